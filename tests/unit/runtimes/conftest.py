# SPDX-License-Identifier: Apache-2.0
"""Small QPCs, compiled by the simulated compiler in this process, and faults that a file switches on and off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_graphs import PHASES, cached, compile_to, counter

from qeff_validate.artifact import Artifact
from qeff_validate.sdk.simulated import device

CORES = 4


@pytest.fixture(autouse=True)
def fresh_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused cards, and no environment variables of the simulator."""
    monkeypatch.setattr(device, "_cards", {})
    for name in ("QAIC_SIM_DEVICES", "QAIC_SIM_FAULT", "QAIC_SIM_FAULT_FILE", "QAIC_SIM_STATE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`simulated_graphs.counter` with retained state and the provenance of a store entry."""
    folder = tmp_path_factory.mktemp("counting") / "made"
    path = compile_to(folder, counter(), "-retained-state", f"-aic-num-cores={CORES}")
    options = {"num_cores": CORES, "num_devices": 1, "flags": {}}
    return Artifact("qpc", Path(path), "0" * 64, {"key": {"compile": {"options": options}}})


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`simulated_graphs.cached` for a prefill of four tokens and a decode of one."""
    folder = tmp_path_factory.mktemp("decoder") / "made"
    return Artifact("qpc", Path(compile_to(folder, cached(), "-retained-state", specs=PHASES)), "0" * 64)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], object]:
    """Request faults in the file that this process and its children read."""
    file = tmp_path / "faults"
    monkeypatch.setenv("QAIC_SIM_FAULT_FILE", str(file))
    return file.write_text
