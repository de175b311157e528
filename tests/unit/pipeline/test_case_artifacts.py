# SPDX-License-Identifier: Apache-2.0
"""What a case does while another process makes what it needs."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.builders.file_locks import lock
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner
from qeff_validate.pipeline import case_artifacts

CASE = Case(name="tiny", source="random:bert", inputs={"texts": ["one", "two", "three"]}, options={"seq_len": [8]})


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("inputs", lambda pipeline: pipeline.stored_inputs()),
        ("reference", lambda pipeline: pipeline.reference()),
    ],
)
def test_frameworks_are_imported_while_another_process_makes_inputs_or_reference(
    kind: str, make: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Runner(store=tmp_path).pipeline(CASE))
    (entry,) = (tmp_path / kind).iterdir()
    shutil.rmtree(entry)
    held, imported = lock(tmp_path / "locks" / f"{kind}-{entry.name}.lock"), []

    def frameworks() -> None:
        imported.append(kind)
        held.close()  # the other process has made it

    monkeypatch.setattr(case_artifacts, "import_frameworks", frameworks)
    ended = threading.Timer(30, held.close)  # else a failure would be a test without an end
    ended.start()
    make(Runner(store=tmp_path).pipeline(CASE))
    ended.cancel()
    assert imported == [kind]
    assert entry.is_dir()
