# SPDX-License-Identifier: Apache-2.0
"""Metrics of logits against scipy and plain loops, and what a changed token is excused by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from bounds import close
from floors import made_floor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax as scipy_log_softmax
from scipy.special import rel_entr, softmax
from scipy.stats import norm

from qeff_validate.comparison import logit_metrics
from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.logit_metrics import (
    ERRORS,
    FALLBACK,
    LEAST,
    LOGIT_GATES,
    MOST,
    TIERS,
    Text,
    judge_logits,
    log_softmax,
    logit_bounds,
    logit_errors,
    rows_beyond,
    systematic_logit_metrics,
)
from qeff_validate.comparison.verdict import GateResult

N, VOCAB = 12, 1500
EOS = frozenset({3})


def logits(seed: int = 0, n: int = N, vocab: int = VOCAB) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((n, vocab))).astype(np.float32)


def judge(
    reference: np.ndarray, actual: np.ndarray, bounds: Mapping[str, Bound] | None = None
) -> dict[str, GateResult]:
    """Judge rows that are texts of three tokens."""
    n = len(reference)
    texts = [Text(f"text {at}", range(start, min(start + 3, n))) for at, start in enumerate(range(0, n, 3))]
    bounds = logit_bounds("fp16", override={}) if bounds is None else bounds
    labels = [f"row {row}" for row in range(n)]
    found = judge_logits(reference, actual, bounds, labels=labels, texts=texts, eos=EOS)
    return {item.metric.name.removeprefix("logits."): item for item in found}


def value(found: Mapping[str, GateResult], name: str) -> float:
    return found[name].metric.value


def by_definition(reference: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """The formulas of validation-methods §14.2, with scipy and a loop over tokens."""
    wide = reference.astype(np.float64), actual.astype(np.float64)
    p, q = softmax(wide[0], axis=1), softmax(wide[1], axis=1)
    kl = sorted(rel_entr(p, q).sum(axis=1).tolist())
    place = 0.99 * (len(kl) - 1)
    low = math.floor(place)
    high = min(low + 1, len(kl) - 1)
    errors = dict.fromkeys(ERRORS, 0.0)
    for a, b in zip(np.log(p), np.log(q), strict=True):
        likeliest = sorted(range(len(a)), key=lambda token: -a[token])
        for k, name in zip((*TIERS, len(a)), ERRORS, strict=True):
            errors[name] = max(errors[name], *(abs(a[token] - b[token]) for token in likeliest[:k]))
    return {
        "kl_p99": kl[low] + (place - low) * (kl[high] - kl[low]),
        "kl_max": kl[-1],
        "kl_p50": statistics.median(kl),
        **errors,
        "same_top1": float(np.mean(p.argmax(axis=1) == q.argmax(axis=1))),
    }


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("n", "vocab"), [(12, 1500), (1, 7), (5, 60)])
def test_metrics_are_those_of_the_formulas(noise: float, n: int, vocab: int) -> None:
    a = logits(0, n, vocab)
    b = (a + noise * logits(1, n, vocab)).astype(np.float32)
    found = judge(a, b)
    for name, wanted in by_definition(a, b).items():
        assert value(found, name) == pytest.approx(wanted, rel=1e-6, abs=1e-14), name


@pytest.mark.numeric
def test_log_probabilities_are_scipys_for_large_and_for_half_precision_logits() -> None:
    for rows in (logits(), logits() * 1000 + 5e4, logits().astype(np.float16)):
        close(log_softmax(rows), scipy_log_softmax(rows.astype(np.float64), axis=1), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-64, 64), min_size=4, max_size=4), st.integers(0, 5))
def test_a_constant_shift_of_a_row_changes_nothing(shifts: list[int], seed: int) -> None:
    a, b = logits(seed, 4, 50).astype(np.float64), logits(seed + 1, 4, 50).astype(np.float64)
    shifted = b + np.array(shifts, dtype=np.float64)[:, None]
    before, after = judge(a, b), judge(a, shifted)
    for name in before:
        assert value(after, name) == pytest.approx(value(before, name), rel=1e-9, abs=1e-12), name


def test_equal_logits_pass_every_gate_at_every_precision() -> None:
    for precision in FALLBACK:
        found = judge(logits(), logits(), logit_bounds(precision, override={}))
        assert all(item.passed for item in found.values())
        assert {name for name, item in found.items() if item.bound} == set(LOGIT_GATES)


@pytest.mark.parametrize(("row", "rank", "gate"), [(7, 1, "top1_error"), (3, 4, "top5_error"), (11, 40, "top50_error"),
                                                   (0, 900, "top1000_error"), (5, 1400, "all_error")])  # fmt: skip
def test_a_tier_sees_one_token_and_names_the_row(row: int, rank: int, gate: str) -> None:
    b = logits()
    token = np.argsort(-b[row])[rank - 1]
    b[row, token] -= 1.001 * FALLBACK["fp16"][gate] / (1 - softmax(b[row].astype(float))[token])
    found = judge(logits(), b)
    tiers = [name for name in ERRORS if not found[name].passed]
    assert tiers == [gate], {name: value(found, name) for name in ERRORS}
    assert (found[gate].metric.worst["row"], found[gate].metric.worst["text"]) == (row, f"row {row}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_beyond_every_bound(bad: float) -> None:
    b = logits()
    b[4, 9] = bad
    bounds = logit_bounds("fp16", override={})
    assert np.flatnonzero(rows_beyond(logits(), b, bounds)).tolist() == [4]


@pytest.mark.parametrize("size", [1e-3, 2e-2, 0.3])
def test_rows_beyond_are_those_whose_own_verdict_fails(size: float) -> None:
    a = logits()
    b = (a + size * np.linspace(0, 1, N)[:, None] * logits(5)).astype(np.float32)
    bounds = logit_bounds("fp16", override={})
    alone = [judge(a[row : row + 1], b[row : row + 1]) for row in range(N)]
    wanted = [not all(found[name].passed for name in ("kl_max", *ERRORS)) for found in alone]
    assert rows_beyond(a, b, bounds).tolist() == wanted


@pytest.mark.parametrize("tight", ["kl_max", *ERRORS])
def test_row_is_beyond_if_a_single_bound_is_exceeded(tight: str) -> None:
    a = logits()
    b = a.copy()
    b[2] += 0.1 * logits(5)[2]
    loose = {name: Bound(math.inf, "case", "") for name in ("kl_max", *ERRORS)}
    assert not rows_beyond(a, b, loose).any()
    assert np.flatnonzero(rows_beyond(a, b, {**loose, tight: Bound(1e-9, "case", "")})).tolist() == [2]


# --- changed choices --------------------------------------------------------------------------------


def pair(margin: float, n: int = 1) -> np.ndarray:
    """Return rows in which token 10 leads token 20 by a margin, and all others by 5."""
    rows = np.zeros((n, 50))
    rows[:, 10], rows[:, 20] = 5 + margin, 5
    return rows


FP32 = logit_bounds("fp32", override={})


def test_a_change_within_the_noise_of_the_row_is_a_tie_and_one_beyond_it_is_not() -> None:
    for margin, tie in ((1e-6, True), (1e-3, False)):
        b = pair(margin)
        b[0, [10, 20]] += [-margin, margin]
        found = judge(pair(margin), b, FP32)
        assert (value(found, "flips"), value(found, "tie_flips")) == (float(not tie), float(tie)), margin
        assert found["flips"].passed == tie


def test_only_the_margin_of_the_reference_excuses_never_a_flat_target_or_a_large_error() -> None:
    flat = np.zeros((1, 50))
    flat[0, 20] = 1e-7  # all level here: by its own margin it would be a tie
    assert value(judge(pair(0.5), flat, FP32), "flips") == 1
    wild = pair(0.5)
    wild[0, 20] += 4  # by its own KL the row would have noise enough
    assert value(judge(pair(0.5), wild, FP32), "flips") == 1


def test_ties_may_change_as_often_as_the_noise_makes_likely_and_not_once_more() -> None:
    a = pair(1e-6, N)
    for changed, passed in ((0, True), (1, True), (2, False)):
        b = a.copy()
        b[:changed, 10] -= 2e-6  # the other rows are equal: the median says that there is no noise
        found = judge(a, b, FP32)
        assert value(found, "tie_flips") == changed
        assert found["tie_flips"].bound is not None
        assert (found["tie_flips"].bound.value, found["tie_flips"].passed) == (1, passed)


def test_the_budget_is_three_times_what_the_normal_distribution_expects() -> None:
    a = pair(2e-7, N)
    a[::2, 10] += 1
    b = a + 1e-6 * np.random.default_rng(3).standard_normal(a.shape)
    p, q = softmax(a, axis=1), softmax(b, axis=1)
    sigma = np.sqrt(2 * np.median(rel_entr(p, q).sum(axis=1)))
    expected = sum(norm.cdf(-(row[10] - row[20]) / (math.sqrt(2) * sigma)) for row in a)
    bound = judge(a, b, FP32)["tie_flips"].bound
    assert expected > 0.1
    assert bound is not None
    assert bound.value == math.ceil(1 + 3 * expected)


def changed(**tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a reference that chooses token 10, and a target that chooses others in rows r0, r1, …."""
    a, b = pair(0.5, 9), pair(0.5, 9)
    for name, token in tokens.items():
        b[int(name[1:]), token] = 8
    return a, b


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ({}, {}),
        ({"r4": 20}, {"prompt": "text 1", "step": 1, "kind": "non-tie", "tokens": [10, 20], "texts": {"non-tie": 1}}),
        ({"r8": 3}, {"prompt": "text 2", "step": 2, "kind": "stop", "tokens": [10, 3], "texts": {"stop": 1}}),
        (
            {"r3": 3, "r4": 20, "r6": 30},  # the first of each text counts
            {"prompt": "text 1", "step": 0, "kind": "stop", "tokens": [10, 3], "texts": {"stop": 1, "non-tie": 1}},
        ),
    ],
    ids=["none", "another token", "an end", "several"],
)
def test_the_first_divergent_token_is_told_with_its_kind(tokens: dict[str, int], wanted: dict[str, Any]) -> None:
    worst = judge(*changed(**tokens), FP32)["flips"].metric.worst
    assert {name: worst[name] for name in ("prompt", "step", "kind", "tokens", "texts") if name in worst} == wanted
    if wanted:
        assert worst["row"] == min(int(name[1:]) for name in tokens)


def test_a_change_beyond_a_tie_is_told_before_an_earlier_tie() -> None:
    a, b = changed(r7=20)
    a[0, 20] = b[0, 20] = a[0, 10] - 1e-6
    b[0, 20] += 2e-6
    worst = judge(a, b, FP32)["flips"].metric.worst
    assert (worst["row"], worst["prompt"], worst["kind"]) == (7, "text 2", "non-tie")
    assert worst["texts"] == {"tie": 1, "non-tie": 1}


# --- bounds ------------------------------------------------------------------------------------------


def test_bounds_are_a_multiple_of_what_legitimate_runs_are_off_by_squared_for_divergences() -> None:
    errors = {"kl_p99": 1e-10, "kl_max": 1e-9, **dict.fromkeys(ERRORS, 1e-5)}
    for profile, times in (("fp32", 3), ("fp16", 2), ("fp16+mxfp6", 2)):
        squared = times if "+" in profile else times**2
        bounds = logit_bounds(profile, override={}, floor=made_floor(errors, profile=profile))
        assert set(bounds) == {*errors, "flips"}
        for name, size in errors.items():
            assert bounds[name].value == pytest.approx(size * (squared if name.startswith("kl") else times)), name
            assert (bounds[name].source, bounds[name].floor) == ("floor", pytest.approx(size))
        assert bounds["flips"] == FP32["flips"]


def test_no_measured_bound_is_below_float32_or_accepts_another_distribution() -> None:
    still = dict.fromkeys(LEAST, 0.0)
    bounds = logit_bounds("fp32", override={}, floor=made_floor(still, profile="fp32"))
    assert {name: bounds[name].value for name in LEAST} == dict(LEAST)
    for name in LEAST:
        for size in (MOST[name], math.inf, math.nan):
            floor = made_floor({**still, name: size}, profile="fp32")
            assert name not in logit_bounds("fp32", override={}, floor=floor)


@pytest.mark.parametrize("vocab", [VOCAB, TIERS[-1], TIERS[-1] + 1, 3000])
def test_errors_that_are_measured_are_those_of_the_formulas_and_a_shift_is_none(vocab: int) -> None:
    a = logits(vocab=vocab)
    b = a + 0.1 * logits(1, vocab=vocab)
    found = logit_errors(a, b)
    wanted = by_definition(a, b)
    assert found == pytest.approx({name: wanted[name] for name in LEAST}, rel=1e-6)
    assert logit_errors(a, b.astype(np.float64) + 7) == pytest.approx(found, rel=1e-6)


def test_a_shift_of_all_logits_is_nothing_systematic_and_one_of_a_token_is() -> None:
    a = logits().astype(np.float64)
    for shifted in (a, a + 7, a + np.arange(N)[:, None]):
        assert [item.value for item in systematic_logit_metrics(a, shifted)] == pytest.approx([0, 0], abs=1e-12)
    b = a.copy()
    b[:, 30] += 0.3
    signed, norm = systematic_logit_metrics(a, b)
    spread = (a - a.mean(1, keepdims=True)).std(1)
    assert signed.value == pytest.approx(np.mean(0.3 * (1 - 1 / VOCAB) / spread))
    assert (signed.name, signed.worst["column"], norm.name) == ("mean_signed", 30, "mean_norm")
    assert systematic_logit_metrics(a, 1.01 * a)[1].value == pytest.approx(0.01)


def test_a_case_overrides_with_its_reason_and_a_profile_without_bounds_has_none() -> None:
    bound = logit_bounds("fp32", override={"kl_max": 0.5, "why": "int8"})["kl_max"]
    assert bound == Bound(0.5, "case", "int8")
    assert logit_bounds("mxfp6", override={}) == {}
    assert set(MOST) == set(LOGIT_GATES)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_errors_are_those_of_all_rows_however_many_are_computed_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    wanted = draw.standard_normal((7, 40)).astype(np.float32)
    got = wanted + draw.standard_normal((7, 40)).astype(np.float32) * np.arange(7, dtype=np.float32)[:, None] / 100
    whole = logit_errors(wanted, got)
    monkeypatch.setattr(logit_metrics, "BLOCK", rows * 40)
    assert logit_errors(wanted, got) == whole
    got[6, 3] = np.nan
    assert all(np.isnan(error) for error in logit_errors(wanted, got).values())
