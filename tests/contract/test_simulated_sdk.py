# SPDX-License-Identifier: Apache-2.0
"""The simulated SDK obeys the contract of the real one, rule by rule, as a client sees it.

Each test is named after its rule, and its docstring has the section of the contract's fact sheet. Graphs are made by
hand and compiled by the simulated compiler; expected values are numpy's. Where the contract is silent, the choice is
listed in docs/simulated-sdk.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulated_graphs import PHASES, cached, compile_to, counter

from qeff_validate.sdk.simulated import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated import device
from qeff_validate.sdk.simulated import qaicrt as rt

OK = rt.QStatus.QS_SUCCESS


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test cards that nobody has used, and no environment of ours."""
    monkeypatch.setattr(device, "_cards", {})
    for name in ("QAIC_SIM_DEVICES", "QAIC_SIM_FAULT", "QAIC_SIM_FAULT_FILE", "QAIC_SIM_STATE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., str]:
    """Compile a model; a refusal raises, with the compiler's text on stderr."""
    return lambda *args, name="p", **options: compile_to(tmp_path / name, *args, **options)


def iodesc(directory: str) -> Any:
    status, data = rt.Qpc(directory).getIoDescriptor()
    assert status == OK
    return aicapi.IoDesc.FromString(bytes(data))


class TestRetainedPairs:
    @pytest.mark.parametrize("twin", ["past_key.0_RetainedState", "past_key.0_InternalRetainedState"])
    def test_pairing_is_by_name_and_both_bindings_may_be_partial(self, twin, build):
        """§4.5, §3.3: input X with output X_RetainedState, or the name that sub-functions leave."""
        bindings = iodesc(build(cached(twin), "-retained-state", specs=PHASES)).selected_set.bindings
        assert [b.name for b in bindings if b.is_partial_buf_allowed] == ["past_key.0", twin]

    def test_nothing_is_paired_without_the_flag(self, build):
        """§4.5: the flag is -retained-state."""
        bindings = iodesc(build(cached(), specs=PHASES)).selected_set.bindings
        assert not any(b.is_partial_buf_allowed for b in bindings)

    def test_a_flag_without_a_pair_is_a_warning(self, build, capsys):
        """§4.5: unknown of the real compiler, so a choice."""
        build(counter(twin="total_new"), "-retained-state")
        assert "warning: -retained-state: no output X_RetainedState" in capsys.readouterr().err

    def test_a_pair_has_one_type(self, build, capsys):
        """§6.3: a custom precision is given for input and output alike."""
        half = " - IOName: total\n   Precision: float16\n"
        both = half + " - IOName: total_RetainedState\n   Precision: float16\n"
        assert [b.type for b in iodesc(build(counter(), "-retained-state", custom_io=both)).selected_set.bindings] == [
            aicapi.FLOAT_TYPE, aicapi.FLOAT_16_TYPE, aicapi.FLOAT_TYPE, aicapi.FLOAT_16_TYPE
        ]  # fmt: skip
        with pytest.raises(ValueError, match="refuses"):
            build(counter(), "-retained-state", custom_io=half, name="half")
        assert "'total' and 'total_RetainedState' are one retained state" in capsys.readouterr().err

    def test_a_pair_has_one_shape(self, build, capsys):
        """§4.5: they share device memory."""
        with pytest.raises(ValueError, match="refuses"):
            build(counter(kept=[1, 3]), "-retained-state")
        assert "'total' [1, 3] is retained as 'total_RetainedState' [2, 3]" in capsys.readouterr().err
