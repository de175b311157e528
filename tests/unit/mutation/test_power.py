# SPDX-License-Identifier: Apache-2.0
"""Which faults count, and which of them bounds would find, on errors that are written by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from floors import EVEN, made_floor

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult, Power, Verdict
from qeff_validate.mutation.mutant import mutants
from qeff_validate.mutation.power import FaultEffects, ceiling_mutants
from qeff_validate.report.result import Result
from qeff_validate.tensors import Tensors

NAMES = ("noise", "small", "large", "wrong scale", "not a number")
ERRORS = {
    "rel_l2": np.array([1.9e-3, 2.1e-3, 0.5, 0.3, math.nan]),
    "norm_ratio": np.array([0.0, 0.0, 0.0, 0.2, math.nan]),
}
EFFECTS = FaultEffects(NAMES, ("large", "not a number"), ERRORS)
FLOOR = made_floor({**EVEN, "rel_l2": 1e-3})


def judged(**bounds: float) -> list[GateResult]:
    gates = [GateResult(Metric(f"output.{name}", 0.0), Bound(value, "case", "x")) for name, value in bounds.items()]
    return [
        *gates,
        GateResult(Metric("output.mean_abs", 0.0), None),
        GateResult(Metric("x.exact", 0), Bound(0, "exact", "")),
    ]


@pytest.mark.parametrize(
    ("bounds", "missed"),
    [
        ({"rel_l2": 1e-3, "norm_ratio": 1e-3}, ()),
        ({"rel_l2": 5e-3, "norm_ratio": 0.9}, ("small",)),
        ({"rel_l2": 0.4, "norm_ratio": 0.1}, ("small",)),
        ({"rel_l2": 0.4, "norm_ratio": 0.3}, ("small", "wrong scale")),
        ({"rel_l2": 0.9, "norm_ratio": 0.9}, ("small", "large", "wrong scale")),
        ({"rel_l2": 0.5, "norm_ratio": 0.1}, ("small", "large")),
        ({"norm_ratio": 0.9}, ("small", "large", "wrong scale")),
    ],
)
def test_a_fault_is_missed_if_no_bound_finds_it(bounds: dict[str, float], missed: tuple[str, ...]) -> None:
    power = EFFECTS.power(FLOOR, judged(**bounds))
    assert power == Power(4, missed, tuple(name for name in missed if name == "large"))


@pytest.mark.parametrize(("level", "visible"), [(1e-3, 4), (0.96e-3, 4), (0.9e-3, 5), (1.1e-3, 3), (0.2, 2)])
def test_what_is_below_twice_the_floor_does_not_count(level: float, visible: int) -> None:
    floor = made_floor({**EVEN, "rel_l2": level})
    assert EFFECTS.power(floor, judged(rel_l2=0.9)).tried == visible


def test_it_is_stored_and_read_as_it_was() -> None:
    tensors: Tensors = EFFECTS.stored()
    again = FaultEffects.from_stored(tensors)
    assert (again.names, again.gross) == (EFFECTS.names, EFFECTS.gross)
    assert {name: array.tobytes() for name, array in again.errors.items()} == {
        name: array.tobytes() for name, array in ERRORS.items()
    }
    none = FaultEffects.from_stored(FaultEffects((), (), {}).stored())
    assert (none.names, none.gross, dict(none.errors)) == ((), (), {})
    assert none.power(FLOOR, judged(rel_l2=0.9)) == Power(0)


@pytest.mark.parametrize("status", ["pass", "fail", "inconclusive"])
def test_only_a_pass_that_would_let_something_gross_through_becomes_inconclusive(status: str) -> None:
    verdict = Verdict(status, "as it was")  # type: ignore[arg-type]
    fine, blind = Power(9, ("small",)), Power(9, ("small", "large"), ("large",))
    assert verdict.with_power(fine).status == status
    limited = verdict.with_power(blind)
    assert limited.status == ("inconclusive" if status == "pass" else status)
    assert ("'large' pass, which nobody may ship" in limited.reason) == (status == "pass")
    assert limited.power == blind


def test_the_report_has_the_share_and_the_missed_ones_by_name() -> None:
    plain = Result("c", "ort", "pass", power=Power(4, ("small",))).plain()["power"]
    assert plain == {"tried": 4, "caught": 3, "share": 0.75, "missed": ["small"]}
    assert Result("c", "ort", "pass", power=Power(0)).plain()["power"]["share"] is None
    assert Result("c", "ort", "pass").plain()["power"] is None


@pytest.mark.parametrize("kind", ["embedding", "peft-causal-lm"])
def test_each_kind_tries_gross_faults_and_faults_of_several_families_in_each_run(kind: str) -> None:
    faults = ceiling_mutants(kind)
    assert set(faults) < set(mutants(kind))
    assert sum(fault.gross for fault in faults) >= 3
    assert len({fault.family for fault in faults}) >= 3
    assert not [fault.name for fault in faults if fault.level == "graph"]
