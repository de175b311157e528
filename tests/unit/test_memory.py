# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
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


ENDS = {
    "command line": "from qeff_validate.cli import main; main(['--version'])",
    "worker of a run": """
import os, socket
from qeff_validate.pipeline.executors import worker
ours, its = socket.socketpair()
ours.close()
assert worker.main([str(its.detach()), str(os.getppid())]) == 0
""",
    "process that times": """
import os
from pathlib import Path
from qeff_validate.pipeline import timing_worker
timing_worker.launch = lambda job: job
Path("job").write_text("{}")
assert timing_worker.main(["job", "result", str(os.getppid())]) == 0
""",
}
"""Ways of this library's own processes to their end."""


@pytest.mark.parametrize("code", ENDS.values(), ids=list(ENDS))
def test_own_processes_end_without_a_look_at_every_object(code: str, tmp_path: Path) -> None:
    first = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 10_000))\n"  # so it runs last
    done = subprocess.run(
        [sys.executable, "-c", first + code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "True", done
