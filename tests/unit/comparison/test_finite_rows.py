# SPDX-License-Identifier: Apache-2.0
"""A row that is not finite fails by itself: it is counted and named, and all other rows are measured as without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qeff_validate.comparison.bounds import bounds_for
from qeff_validate.comparison.logit_metrics import Text, judge_logits, logit_bounds
from qeff_validate.comparison.verdict import Rows, Verdict, compare

N, D = 12, 32
LABELS = [f"text {row}" for row in range(N)]
BAD = [np.nan, np.inf, -np.inf]


def clean(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)


def near(seed: int = 1, size: float = 1e-3) -> np.ndarray:
    return clean() + np.float32(size) * clean(seed)


def judge(actual: np.ndarray, reference: np.ndarray | None = None, **more: Any) -> Verdict:
    wanted = clean() if reference is None else reference
    rows = more.pop("rows", Rows(LABELS))
    bounds = more.pop("bounds", bounds_for("fp16", override={}))
    return compare({"output": wanted}, {"output": actual}, bounds, rows=rows, **more)


def values(verdict: Verdict) -> dict[str, float]:
    return {item.metric.name.removeprefix("output."): item.metric.value for item in verdict.metrics}


def metric(verdict: Verdict, name: str) -> Any:
    return next(item for item in verdict.metrics if item.metric.name == f"output.{name}")


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, N - 1), min_size=1, max_size=N - 3), st.sampled_from(BAD), st.integers(0, D - 1))
def test_metrics_of_the_other_rows_are_those_without_it(places: set[int], bad: float, column: int) -> None:
    actual = near()
    actual[sorted(places), column] = bad
    verdict = judge(actual)
    others = [row for row in range(N) if row not in places]
    alone = compare(
        {"output": clean()[others]}, {"output": near()[others]}, bounds_for("fp16", override={}),
        rows=Rows([LABELS[row] for row in others]),
    )  # fmt: skip
    found = values(verdict)
    assert found.pop("non_finite") == len(places)
    assert found == values(alone)
    assert (verdict.status, verdict.planned, verdict.compared) == ("fail", N, N)
    for item in verdict.metrics[1:]:
        row = item.metric.worst["row"]
        assert row in others
        assert item.metric.worst["text"] == LABELS[row]


def test_the_worst_row_keeps_its_place_behind_rows_that_are_not_finite() -> None:
    actual = near()
    actual[[0, 3]] = np.nan
    actual[7] *= 1.5
    verdict = judge(actual)
    assert metric(verdict, "rel_l2").metric.worst["row"] == 7
    assert "output.rel_l2 0.5, allowed 0.01 (fallback), worst row 7 ('text 7')" in verdict.reason
    assert verdict.reason.startswith(
        "output: 64 of 384 values are NaN or infinite in 2 of 12 rows; first at row 0, column 0 ('text 0'),"
        " then row 3 ('text 3'); "
    )


def test_many_rows_are_counted_and_the_first_are_named() -> None:
    actual = clean()
    actual[1:11, 4] = np.inf
    reason = judge(actual).reason
    assert "in 10 of 12 rows; first at row 1, column 4 ('text 1'), then row 2 ('text 2')" in reason
    assert "row 5 ('text 5') and 5 more" in reason
    assert "row 6" not in reason
    others = metric(judge(actual), "non_finite").metric.worst["others"]
    assert [other["row"] for other in others] == list(range(2, 11))


@pytest.mark.parametrize("bad", BAD)
def test_nothing_but_rows_that_are_not_finite_fails(bad: float) -> None:
    verdict = judge(np.full((N, D), bad, np.float32))
    assert (verdict.status, set(values(verdict))) == ("fail", {"non_finite"})


@pytest.mark.parametrize("bad", BAD)
def test_a_row_of_the_reference_that_is_not_finite_is_inconclusive_and_hides_no_other(bad: float) -> None:
    reference = clean()
    reference[4, 2] = bad
    for actual in (near(), np.where(np.isfinite(reference), near(), np.float32(np.nan))):
        verdict = judge(actual, reference)
        assert (verdict.status, verdict.compared, verdict.planned) == ("inconclusive", N - 1, N)
        assert "holds NaN or infinity in 1 of 12 rows of output: row 4 ('text 4')" in verdict.reason
        assert np.isfinite(values(verdict)["rel_l2"])
    wrong = near()
    wrong[9] *= 2
    verdict = judge(wrong, reference)
    assert verdict.status == "fail"
    assert "worst row 9" in verdict.reason
    assert "row 4 ('text 4')" in verdict.reason


def test_a_relation_fails_whichever_side_is_not_finite() -> None:
    broken = near()
    broken[5, 5] = np.nan
    for expected, actual in ((broken, near()), (near(), broken), (broken, broken)):
        verdict = judge(actual, expected, relation=True)
        assert (verdict.status, values(verdict)["non_finite"]) == ("fail", 1)
        assert "row 5" in verdict.reason


def test_metrics_are_shown_where_no_bound_is_sound() -> None:
    verdict = judge(near(), bounds={}, precision="fp32+int8")
    assert verdict.status == "inconclusive"
    assert verdict.reason.startswith("no noise was measured for int8, so there is no sound bound for rel_l2, ")
    assert np.isfinite(values(verdict)["rel_l2"])
    broken = near()
    broken[5, 5] = np.nan
    assert judge(broken, bounds={}, precision="fp32+int8").status == "fail"


# --- rows without a token ----------------------------------------------------------------------------

FILLER = frozenset({N - 1})
FILLERS: Mapping[str, np.ndarray] = {
    "NaN": np.full(D, np.nan, np.float32), "infinity": np.full(D, np.inf, np.float32), "a vector": clean(5)[0],
}  # fmt: skip


def with_filler(filler: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reference, actual = clean(), near()
    reference[-1], actual[-1] = 0, filler
    return actual, reference


@pytest.mark.parametrize("name", FILLERS)
def test_a_filler_row_fails_for_our_own_wrapper_and_is_a_finding_for_graphs_of_others(name: str) -> None:
    actual, reference = with_filler(FILLERS[name])
    ours = judge(actual, reference, rows=Rows(LABELS, FILLER))
    assert ours.status == "fail"
    assert "output.tokenless_rows 32, allowed 0" in ours.reason
    assert ours.findings == ()
    others = judge(actual, reference, rows=Rows(LABELS, FILLER, zeros=False))
    assert (others.status, others.reason, others.planned, others.compared) == ("pass", "", N - 1, N - 1)
    (finding,) = others.findings
    what = "are not zeros" if name == "a vector" else "are not finite"
    assert finding.startswith(f"output: 1 of 1 rows without a token {what} (row 11 ('text 11')); such rows only")


def test_a_filler_row_of_zeros_is_no_finding() -> None:
    actual, reference = with_filler(np.zeros(D, np.float32))
    for zeros in (True, False):
        verdict = judge(actual, reference, rows=Rows(LABELS, FILLER, zeros=zeros))
        assert (verdict.status, verdict.findings) == ("pass", ())


def test_a_filler_row_that_reaches_others_fails() -> None:
    actual, reference = with_filler(FILLERS["NaN"])
    verdict = judge(actual, reference, rows=Rows(LABELS, FILLER, zeros=False, reached=[8, 9]))
    assert verdict.status == "fail"
    assert "rows.changed_by_filler 2, allowed 0 (exact), worst row 8 ('text 8')" in verdict.reason
    assert "change with them" in verdict.findings[0]


def test_a_real_row_that_is_not_finite_fails_beside_a_filler_row_that_may_be() -> None:
    actual, reference = with_filler(FILLERS["NaN"])
    actual[2, 0] = np.nan
    verdict = judge(actual, reference, rows=Rows(LABELS, FILLER, zeros=False))
    assert verdict.status == "fail"
    assert "1 of 352 values are NaN or infinite in 1 of 11 rows; first at row 2" in verdict.reason


# --- logits -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, N - 1), min_size=1, max_size=N - 1))
def test_logits_of_some_rows_are_judged_as_if_they_were_all_and_keep_their_places(left_out: set[int]) -> None:
    reference, actual = 3 * clean(2), 3 * clean(2)
    kept = [row for row in range(N) if row not in left_out]
    actual[kept[-1], int(reference[kept[-1]].argmin())] += 40  # another choice
    actual[sorted(left_out)] = np.nan
    texts = [Text(f"text {start}", range(start, start + 3)) for start in range(0, N, 3)]
    bounds, eos = logit_bounds("fp16", override={}), frozenset({0})
    found = judge_logits(reference, actual, bounds, labels=LABELS, texts=texts, eos=eos, finite=kept)
    alone = judge_logits(
        reference[kept], actual[kept], bounds, labels=[LABELS[row] for row in kept],
        texts=[Text("all", range(len(kept)))], eos=eos,
    )  # fmt: skip
    assert [(item.metric.name, item.metric.value, item.passed) for item in found] == [
        (item.metric.name, item.metric.value, item.passed) for item in alone
    ]
    for one, other in zip(found, alone, strict=True):
        assert one.metric.worst["row"] == kept[other.metric.worst["row"]]
        assert one.metric.worst["text"] == LABELS[one.metric.worst["row"]]
    flips = next(item.metric.worst for item in found if item.metric.name == "logits.flips")
    assert (flips["prompt"], flips["step"]) == (f"text {kept[-1] // 3 * 3}", kept[-1] % 3)
