# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from qeff_validate import memory


class Cycle:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self, held: Any = None) -> None:
        self.itself, self.held = self, held


@pytest.mark.parametrize("freed", [0, 4], ids=["", "after memory was freed"])
def test_garbage_is_collected_once_it_is_worth_it(freed: int) -> None:
    with memory.without_collection():
        other = np.ones(freed * memory.WORTH_COLLECTING, np.uint8)
        memory.release_memory()
        del other
        memory.release_memory()
        small = weakref.ref(Cycle())
        memory.release_memory()
        assert small() is not None
        large = weakref.ref(Cycle(np.ones(2 * memory.WORTH_COLLECTING, np.uint8)))
        memory.release_memory()
        assert small() is None
        assert large() is None


def test_garbage_is_always_collected_where_the_system_does_not_tell_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_resident_bytes", lambda: None)
    with memory.without_collection():
        for _ in range(2):
            small = weakref.ref(Cycle())
            memory.release_memory()
            assert small() is None
