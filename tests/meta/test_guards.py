# SPDX-License-Identifier: Apache-2.0
"""The suites must be able to fail: a damage for each metric and for each guard, and no false alarm beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from floors import EVEN, made_floor

import qeff_validate as qv
from qeff_validate.comparison.bounds import FALLBACK, NOISE_SHARE, Bound, bounds_for, check_tolerance, systematic_bounds
from qeff_validate.comparison.vector_metrics import GATES
from qeff_validate.comparison.verdict import Rows, Verdict, compare
from qeff_validate.errors import ConfigError

N, D = 16, 64
LABELS = Rows([f"text {row}" for row in range(N)])


def clean(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)


def judge(actual: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None = None, **options) -> Verdict:
    precision = options.pop("precision", "fp16")
    bounds = options.pop("bounds", None) or bounds_for(precision, override={})
    return compare(reference or {"output": clean()}, actual, bounds, rows=options.pop("rows", LABELS), **options)


def failed(verdict: Verdict) -> set[str]:
    return {item.metric.name.rpartition(".")[2] for item in verdict.metrics if not item.passed}


def test_equal_outputs_pass_and_are_counted() -> None:
    verdict = judge({"output": clean()})
    assert verdict.status == "pass", verdict.reason
    assert (verdict.planned, verdict.compared) == (N, N)
    assert {item.metric.name.rpartition(".")[2] for item in verdict.metrics if item.bound} == set(GATES)


# --- a damage that only one metric sees, or sees first (fp16 bounds) -------------------------------


def in_direction(reference: np.ndarray, rel_l2: float) -> np.ndarray:
    """Turn every row by an angle, in a spread-out direction, keeping its length."""
    a = reference.astype(np.float64)
    signs = np.sign(np.random.default_rng(7).standard_normal(a.shape))
    signs -= (signs * a).sum(1, keepdims=True) / (a * a).sum(1, keepdims=True) * a
    signs /= np.linalg.norm(signs, axis=1, keepdims=True)
    norm = np.linalg.norm(a, axis=1, keepdims=True)
    turned = a + rel_l2 * norm * signs
    return (turned / np.linalg.norm(turned, axis=1, keepdims=True) * norm).astype(np.float32)


def test_relative_l2_alone_sees_a_spread_error_that_is_within_every_other_bound() -> None:
    a = clean().astype(np.float64)
    sideways = in_direction(clean(), 9.9e-3).astype(np.float64)
    b = ((a + (sideways - a)) * (1 + 1.9e-3)).astype(np.float32)
    assert failed(judge({"output": b})) == {"rel_l2"}


def test_cosine_alone_sees_a_turn_when_the_bound_of_relative_l2_is_wider() -> None:
    bounds = {**bounds_for("fp16", override={}), "rel_l2": Bound(2e-2, "case", "wider here")}
    assert failed(judge({"output": in_direction(clean(), 1.5e-2)}, bounds=bounds)) == {"cosine"}


@pytest.mark.parametrize("factor", [1.003, 0.997])
def test_norm_ratio_alone_sees_a_scale(factor: float) -> None:
    assert failed(judge({"output": clean() * np.float32(factor)})) == {"norm_ratio"}


def test_max_abs_alone_sees_one_bad_element() -> None:
    b = clean()
    b[9, 33] += 0.05 * np.sqrt((b[9] ** 2).mean())
    verdict = judge({"output": b})
    assert failed(verdict) == {"max_abs_rms"}
    worst = next(item.metric.worst for item in verdict.metrics if not item.passed)
    assert (worst["row"], worst["column"], worst["text"]) == (9, 33, "text 9")


def test_the_order_of_neighbours_alone_sees_errors_that_conspire() -> None:
    """Three rows, each off by less than its own bound, so placed that a neighbour is overtaken."""
    hadamard = np.array([[1.0]])
    while len(hadamard) < D:  # orthogonal rows of ±1: spread out, so that no element stands out
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    base, left, right = hadamard[1:4] / np.sqrt(D)
    a = clean().astype(np.float64)
    noise = FALLBACK["fp16"]["rel_l2"] / NOISE_SHARE
    gap = 2 * (2 * noise + noise**2)
    a[0], a[1], a[2] = base, left + 0.1 * base, right + (0.1 - 1.25 * gap) * base
    b = a.copy()
    b[1] -= 7e-3 * base
    b[2] += 7e-3 * base
    b[1] *= np.linalg.norm(a[1]) / np.linalg.norm(b[1])
    b[2] *= np.linalg.norm(a[2]) / np.linalg.norm(b[2])
    reference = {"output": a.astype(np.float32)}
    verdict = judge({"output": b.astype(np.float32)}, reference)
    assert failed(verdict) == {"neighbour_order"}, verdict.reason


# --- guards -----------------------------------------------------------------------------------------


def damaged(change: Callable[[np.ndarray], None]) -> np.ndarray:
    b = clean()
    change(b)
    return b


def swap(b: np.ndarray) -> None:
    b[[3, 4]] = b[[4, 3]]


def zero(b: np.ndarray) -> None:
    b[N - 1] = 0


def stale(b: np.ndarray) -> None:
    b[8:] = b[:8]


@pytest.mark.parametrize("change", [swap, zero, stale], ids=["swapped rows", "zero row", "first batch again"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_damaged_rows_fail(change: Callable[[np.ndarray], None], precision: str) -> None:
    verdict = judge({"output": damaged(change)}, precision=precision)
    assert verdict.status == "fail"
    assert "worst row" in verdict.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("row", [0, N - 1])
def test_a_non_finite_value_in_either_of_two_outputs_fails(bad: float, which: str, row: int) -> None:
    reference = {"first": clean(), "second": clean(1)}
    actual = {name: array.copy() for name, array in reference.items()}
    actual[which][row, 5] = bad
    for order in (list(actual), list(actual)[::-1]):
        verdict = judge({name: actual[name] for name in order}, reference)
        assert verdict.status == "fail"
        assert f"row {row}" in verdict.reason
        assert "NaN or infinite" in verdict.reason


def test_all_nan_beside_a_good_output_fails_in_both_orders() -> None:
    good, bad = clean(), np.full((N, D), np.nan, np.float32)
    reference = {"a": good, "b": good}
    assert judge({"a": good, "b": bad}, reference).status == "fail"
    assert judge({"a": bad, "b": good}, reference).status == "fail"


@pytest.mark.parametrize("actual", [{}, {"outputs": clean()}, {"output": clean(), "extra": clean()}])
def test_missing_and_extra_outputs_fail_and_both_sides_are_listed(actual: dict[str, np.ndarray]) -> None:
    verdict = judge(actual)
    assert verdict.status == "fail"
    assert "missing" in verdict.reason
    assert "extra" in verdict.reason
    assert verdict.compared == 0


@pytest.mark.parametrize(
    "array",
    [
        clean().view(np.int32),
        clean().astype(np.float64),
        clean().astype(np.float16),
        clean()[:-1],
        clean()[:, :-1],
        clean()[:, None, :],
        clean().T.copy(),
    ],
    ids=["int32 of the same size", "float64", "float16", "a row less", "narrower", "an axis more", "transposed"],
)
def test_another_dtype_or_shape_fails_before_any_number(array: np.ndarray) -> None:
    verdict = judge({"output": array})
    assert verdict.status == "fail"
    assert verdict.metrics == ()
    assert "dtype" in verdict.reason or "shape" in verdict.reason


def test_an_empty_comparison_is_never_a_pass() -> None:
    assert compare({}, {}, bounds_for("fp32", override={}), rows=Rows([])).status == "inconclusive"
    everything = Rows(LABELS.labels, frozenset(range(N)))
    assert judge({"output": clean()}, rows=everything).status != "pass"


def test_too_few_rows_for_the_order_of_neighbours_is_inconclusive() -> None:
    two = {"output": clean()[:2]}
    verdict = judge(two, two, rows=Rows(["a", "b"]))
    assert verdict.status == "inconclusive"
    assert "neighbour_order" in verdict.reason


def test_a_reference_with_nan_is_inconclusive() -> None:
    reference = clean()
    reference[0, 0] = np.nan
    assert judge({"output": clean()}, {"output": reference}).status == "inconclusive"


def test_a_precision_without_a_sound_bound_is_inconclusive() -> None:
    verdict = judge({"output": clean()}, bounds={}, precision="mxfp6")
    assert verdict.status == "inconclusive"
    assert "no sound bound" in verdict.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_floor_that_is_no_number_gives_no_bound_and_no_verdict(value: float) -> None:
    floor = made_floor({**EVEN, "rel_l2": [*[1e-3] * 7, value]})
    bounds = bounds_for("fp16", floor=floor, override={})
    assert "rel_l2" not in bounds
    verdict = judge({"output": clean()}, bounds=bounds, floor=floor)
    assert verdict.status == "inconclusive"
    assert verdict.reason.startswith("the original model itself gives NaN or infinity in fp16; no sound bound for rel")


def test_noise_that_hides_everything_gives_no_bound_and_no_verdict() -> None:
    floor = made_floor({**EVEN, "rel_l2": 0.5})  # twice that accepts zeros
    verdict = judge({"output": clean()}, bounds=bounds_for("fp16", floor=floor, override={}), floor=floor)
    assert verdict.status == "inconclusive"
    assert "anything would pass; no sound bound for rel_l2:" in verdict.reason


def test_noise_in_float32_that_no_rounding_explains_gives_no_bound_and_no_verdict() -> None:
    even = {"rel_l2": 1e-2, "cosine": 1e-10, "norm_ratio": 1e-6, "max_abs_rms": 1e-5}
    floor = made_floor(even, profile="fp32")
    bounds = bounds_for("fp32", floor=floor, override={})
    verdict = judge({"output": clean()}, bounds=bounds, floor=floor, precision="fp32")
    assert verdict.status == "inconclusive"
    assert "off by more than rounding explains, as those of a model that draws random numbers" in verdict.reason


def test_a_nan_bound_fails_even_if_it_got_past_the_config() -> None:
    bounds = {**bounds_for("fp32", override={}), "rel_l2": Bound(math.nan, "case", "a slip")}
    assert judge({"output": clean()}, bounds=bounds).status == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, 1.0, 2.0, "1e-3", True, None])
def test_an_unusable_bound_is_a_config_error(value: object) -> None:
    with pytest.raises(ConfigError, match="no usable bound"):
        check_tolerance("ort", {"rel_l2": value, "why": "because"})


def test_a_bound_without_a_reason_or_for_an_unknown_metric_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="why"):
        check_tolerance("ort", {"rel_l2": 1e-4})
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        check_tolerance("ort", {"cosin": 1e-4, "why": "x"})


# --- rows without a token ---------------------------------------------------------------------------


def test_rows_without_a_token_must_be_zeros_and_take_no_part_in_the_metrics() -> None:
    rows = Rows(LABELS.labels, frozenset({N - 1}))
    a, b = clean(), clean()
    a[-1] = b[-1] = 0
    assert judge({"output": b}, {"output": a}, rows=rows).status == "pass"
    b[-1, 3] = 1e-6
    verdict = judge({"output": b}, {"output": a}, rows=rows)
    assert verdict.status == "fail"
    assert failed(verdict) == {"tokenless_rows"}
    b[-1, 3] = np.nan
    assert judge({"output": b}, {"output": a}, rows=rows).status == "fail"


# --- bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "size", "wanted"),
    [("fp32", 1e-6, 3e-6), ("fp16", 1e-3, 2e-3), ("fp16+mxfp6", 1e-2, 2e-2), ("fp32", 1e-9, 1e-6)],
)
def test_a_measured_bound_is_a_multiple_of_the_limit_and_not_below_float32(
    profile: str, size: float, wanted: float
) -> None:
    bounds = bounds_for(profile, floor=made_floor({**EVEN, "rel_l2": size}, profile=profile), override={})
    assert bounds["rel_l2"].value == pytest.approx(wanted)
    assert (bounds["rel_l2"].source, bounds["rel_l2"].floor) == ("floor", pytest.approx(size))
    assert bounds["neighbour_order"].value == 0


def test_runs_that_differ_more_give_a_wider_bound_than_their_worst() -> None:
    spread = [1e-6 * 1.2**step for step in range(8)]
    bound = bounds_for("fp32", floor=made_floor({**EVEN, "rel_l2": spread}, profile="fp32"), override={})["rel_l2"]
    assert bound.value > 3 * max(spread)


def test_a_measured_bound_gates_on_both_sides_of_it() -> None:
    floor = made_floor({"rel_l2": 4e-3, "cosine": 1e-3, "norm_ratio": 0.1, "max_abs_rms": 1.0})
    bounds = bounds_for("fp16", floor=floor, override={})
    for size, wanted in ((7.9e-3, set()), (8.1e-3, {"rel_l2"})):
        assert failed(judge({"output": in_direction(clean(), size)}, bounds=bounds)) == wanted


def test_a_case_overrides_with_its_reason() -> None:
    override = {"rel_l2": 0.02, "why": "measured"}
    for floor in (None, made_floor()):
        bounds = bounds_for("fp16", floor=floor, override=override)
        assert bounds["rel_l2"] == Bound(0.02, "case", "measured", None if floor is None else floor.level("rel_l2"))
        assert bounds["cosine"].source == ("fallback" if floor is None else "floor")


# --- what rows have in common (a device's systematic errors) ----------------------------------------

STRAYING = ("mean_signed", "mean_norm")


def against_the_mean(actual: np.ndarray) -> Verdict:
    """Judge a device whose precision has noise of 4e-3 in each row, and much less in their mean."""
    floor = made_floor(
        {"rel_l2": 4e-3, "cosine": 1e-3, "norm_ratio": 2e-3, "max_abs_rms": 2e-2},
        systematic_errors={"mean_signed": 1e-3, "mean_norm": 1e-4},
        center={"output": clean()},
    )
    bounds = bounds_for("fp16", floor=floor, override={}) | systematic_bounds(floor)
    return judge({"output": actual}, bounds=bounds, floor=floor)


def test_a_factor_that_all_rows_have_is_seen_by_the_mean_norm_alone() -> None:
    assert failed(against_the_mean(clean() * np.float32(1.0012))) == {"mean_norm"}
    alternating = 1 + 0.0012 * np.resize([1, -1], (N, 1)).astype(np.float32)  # the same size, and none in the mean
    assert against_the_mean(clean() * alternating).status == "pass"


def test_a_shift_of_one_column_is_seen_by_the_mean_signed_error_alone() -> None:
    size = np.sqrt((clean() ** 2).mean(1))
    b = clean()
    b[:, 11] += np.float32(0.01) * size
    verdict = against_the_mean(b)
    assert failed(verdict) == {"mean_signed"}
    assert "allowed 0.003 (floor), over all 16 rows" in verdict.reason
    assert next(item for item in verdict.metrics if not item.passed).metric.worst["column"] == 11
    b = clean()
    b[:, 11] += np.float32(0.01) * size * np.resize([1, -1], N)
    assert against_the_mean(b).status == "pass"


def test_equal_outputs_pass_with_systematic_gates_as_well() -> None:
    verdict = against_the_mean(clean())
    assert verdict.status == "pass"
    gates = {item.metric.name.rpartition(".")[2] for item in verdict.metrics if item.bound}
    assert gates == {*GATES, *STRAYING}


def test_one_row_among_seven_hundred_is_not_lost_in_an_average() -> None:
    a = np.random.default_rng(0).standard_normal((700, 384)).astype(np.float32)
    b = a.copy()
    b[412] *= -1
    verdict = judge({"output": b}, {"output": a}, rows=Rows([str(row) for row in range(700)]))
    assert verdict.status == "fail"
    assert "worst row 412" in verdict.reason


def test_bounds_of_a_case_that_accept_a_gross_fault_need_a_reason(tmp_path: Path) -> None:
    wide = {"rel_l2": 0.9, "cosine": 0.9, "norm_ratio": 0.9, "max_abs_rms": 9.0, "neighbour_order": 0.9, "why": "new"}
    case = qv.Case(name="wide", source="random:bert", exporter="torchscript", tolerance={"ort": wide})
    (result,) = qv.validate(case, runtimes=["ort"], store=tmp_path).results
    assert (result.status, "which nobody may ship" in result.reason) == ("inconclusive", True), result.reason
    accepted = case.model_copy(update={"tolerance": {"ort": {**wide, "accept_low_power": "ranking alone counts"}}})
    report = qv.validate(accepted, runtimes=["ort"], store=tmp_path)
    assert report.results[0].status == "pass"
    assert any("which the case accepts: ranking alone counts" in finding for finding in report.results[0].findings)
    assert "Not proved: wide-ort passes within the case's own bound rel_l2 <= 0.9" in report.closing()[0]
    assert re.search(r"\(why: new\); \d+ of \d+ faults would pass", report.closing()[0])


def test_neighbours_may_move_as_far_as_a_bound_of_the_cases_own_implies() -> None:
    """A case that widens its bound is judged by that bound, not by the noise that was measured."""
    rng = np.random.default_rng(0)
    reference = clean()
    noisy = reference * (1 + 4e-3 * rng.standard_normal(reference.shape)).astype(np.float32)
    wide = {"rel_l2": 0.05, "cosine": 1e-3, "norm_ratio": 1e-2, "max_abs_rms": 0.1, "why": "int8"}
    floor = made_floor({name: 1e-3 * value for name, value in EVEN.items()})
    bounds = bounds_for("fp16", floor=floor, override=wide)
    verdict = judge({"output": noisy}, bounds=bounds)
    assert verdict.status == "pass", verdict.reason
