# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_graphs import compile_to

from qeff_validate.sdk.simulated import device


@pytest.fixture
def fresh_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test cards that nobody has used, and no simulator environment."""
    monkeypatch.setattr(device, "_cards", {})
    for name in ("QAIC_SIM_DEVICES", "QAIC_SIM_FAULT", "QAIC_SIM_FAULT_FILE", "QAIC_SIM_STATE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., str]:
    """Compile a model into a directory of the given name; a refusal raises, with the compiler's text on stderr."""
    return lambda *args, name="p", **options: compile_to(tmp_path / name, *args, **options)
