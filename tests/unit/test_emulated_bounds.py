# SPDX-License-Identifier: Apache-2.0
"""From an emulated run to bounds: what is measured, what comes on top, and when there is no bound."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from qeff_validate.compare import FALLBACK, ROW_GATES, Rows, bounds_for, compare, errors_of
from qeff_validate.logits import FALLBACK as LOGIT_FALLBACK
from qeff_validate.logits import logit_bounds, logit_errors
from qeff_validate.models.continuations import judge_continuations
from qeff_validate.protocols import Terms

RNG = np.random.default_rng(4)
REFERENCE = RNG.normal(size=(8, 64)).astype(np.float32)
ROWS = Rows([f"text {i}" for i in range(8)], frozenset({3}))
REFERENCE[3] = 0


def near(size: float, seed: int = 0) -> np.ndarray:
    """The reference with noise of this relative size in every row."""
    noise = np.random.default_rng(seed).normal(size=REFERENCE.shape)
    norms = np.linalg.norm(REFERENCE, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    return (REFERENCE + size * noise * norms).astype(np.float32)


def test_the_worst_row_is_measured_and_rows_without_a_token_are_not() -> None:
    emulated = near(0.1)
    emulated[5] = REFERENCE[5] * 1.2
    found = errors_of({"output": REFERENCE}, {"output": emulated}, ROWS)
    assert set(found) == set(ROW_GATES)
    assert found["rel_l2"] == pytest.approx(0.2, rel=1e-5)
    assert found["norm_ratio"] == pytest.approx(0.2, rel=1e-5)
    assert found["cosine"] == pytest.approx(0.005, rel=0.1)


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
def test_bounds_are_twice_what_was_measured_and_what_the_arithmetic_may_cost(compute: str) -> None:
    measured = {"rel_l2": 0.1, "cosine": 0.005, "norm_ratio": 0.02, "max_abs_rms": 0.4}
    bounds = bounds_for(f"{compute}+mxfp6", floor=1e-6, override={}, measured=measured)
    for name, value in measured.items():
        assert bounds[name].value == pytest.approx(2 * value + FALLBACK[compute][name])
        assert bounds[name].source == "emulated"
        assert "2 x emulated mxfp6" in bounds[name].why
    assert bounds["neighbour_order"].value == 0


@pytest.mark.parametrize("value", [0.5, math.inf, math.nan])
def test_noise_that_would_let_anything_pass_gives_no_bound(value: float) -> None:
    measured = {"rel_l2": value, "cosine": 0.005, "norm_ratio": 0.02, "max_abs_rms": 0.4}
    bounds = bounds_for("fp16+mxfp6", floor=None, override={}, measured=measured)
    assert "rel_l2" not in bounds
    verdict = compare({"output": REFERENCE}, {"output": REFERENCE}, bounds, rows=ROWS)
    assert verdict.status == "inconclusive"
    assert "no sound bound for rel_l2" in verdict.reason


def test_without_an_emulated_run_there_is_no_bound_but_the_case_s() -> None:
    assert bounds_for("fp16+mxfp6", floor=None, override={}) == {}
    assert logit_bounds("fp16+mxint8", noise=None, override={}) == {}
    given = bounds_for("fp16+mxfp6", floor=None, override={"rel_l2": 0.3, "why": "measured"})
    assert {name: bound.source for name, bound in given.items()} == {"rel_l2": "case"}


def test_a_profile_with_bounds_of_its_own_is_not_widened() -> None:
    measured = dict.fromkeys(ROW_GATES, 0.1)
    assert bounds_for("fp16", floor=None, override={}, measured=measured) == bounds_for("fp16", floor=None, override={})


@pytest.mark.parametrize(("size", "status"), [(0.1, "pass"), (0.19, "pass"), (0.24, "fail"), (0.4, "fail")])
def test_verdicts_on_other_noise_of_this_size(size: float, status: str) -> None:
    measured = errors_of({"output": REFERENCE}, {"output": near(0.1)}, ROWS)
    bounds = bounds_for("fp16+mxfp6", floor=None, override={}, measured=measured)
    # rel_l2 alone: the other metrics of this noise are not of the same size in each draw
    bounds |= bounds_for("", floor=None, override={"cosine": 0.9, "norm_ratio": 0.9, "max_abs_rms": 9, "why": "rel_l2"})
    verdict = compare({"output": REFERENCE}, {"output": near(size, seed=1)}, bounds, rows=ROWS)
    assert verdict.status == status, verdict.reason


def test_logits() -> None:
    wanted = RNG.normal(size=(6, 50)) * 3
    emulated = wanted + RNG.normal(size=(6, 50)) * 0.1
    measured = logit_errors(wanted, emulated)
    shifted = logit_errors(wanted, emulated + 7)
    assert measured == pytest.approx(shifted), "a constant shift of logits is none of probabilities"
    exact = wanted - np.log(np.exp(wanted).sum(1, keepdims=True))
    moved = emulated - np.log(np.exp(emulated).sum(1, keepdims=True))
    assert measured["all_error"] == pytest.approx(np.abs(exact - moved).max())
    assert measured["kl_max"] == pytest.approx((np.exp(exact) * (exact - moved)).sum(1).max())
    bounds = logit_bounds("fp16+mxfp6+mxint8", noise=None, override={}, measured=measured)
    assert bounds["kl_max"].value == pytest.approx(2 * measured["kl_max"] + LOGIT_FALLBACK["fp16"]["kl_max"])
    assert bounds["all_error"].value == pytest.approx(2 * measured["all_error"] + LOGIT_FALLBACK["fp16"]["all_error"])
    assert bounds["flips"].value == 0
    assert "2 x emulated mxfp6+mxint8" in bounds["kl_max"].why


VOCAB, PROMPTS = 40, 12
SHARED = np.random.default_rng(7).normal(size=(1, PROMPTS, VOCAB)) * 0.15
"""Noise of compressed weights: the same with and without an adapter."""


def judged(effect: float, own: float, *, got: str = "right") -> tuple[str, str]:
    """Verdict on a base and two adapters of this effect, where ``own`` is the noise that differs between them."""
    rng = np.random.default_rng(8)
    base = rng.normal(size=(1, PROMPTS, VOCAB)) * 2
    changes = np.concatenate([np.zeros_like(base), rng.normal(size=(2, PROMPTS, VOCAB)) * effect])
    wanted = base + changes

    def noisy(seed: int) -> np.ndarray:
        return wanted + SHARED + np.random.default_rng(seed).normal(size=wanted.shape) * own

    actual = noisy(1)
    if got == "base for a":
        actual[1] = actual[0]
    elif got == "a too strong":
        actual[1] += 0.3 * changes[1]
    flat = {"logits": actual.reshape(-1, VOCAB).astype(np.float32)}
    flat["again"] = flat["logits"][: 2 * PROMPTS]
    reference = wanted.reshape(-1, VOCAB).astype(np.float32)
    steps = np.ones(3 * PROMPTS, np.int64)
    emulated = {"logits": noisy(2).reshape(-1, VOCAB).astype(np.float32)}
    terms = Terms("fp16+mxfp6", None, {}, 0, emulated)
    inputs = SimpleNamespace(labels=[f"x{i}" for i in range(PROMPTS)], ids=[np.arange(3)] * PROMPTS, eos=frozenset())
    given = {"logits": reference, "tokens": steps, "steps": steps}
    verdict = judge_continuations(given, flat, terms, adapters=["base", "a", "b"], inputs=inputs)
    return verdict.status, verdict.reason


def test_adapters_are_told_by_the_noise_that_is_not_shared() -> None:
    assert judged(1.5, 0.1) == ("pass", "")
    status, reason = judged(0.8, 0.15)
    assert status == "inconclusive"
    assert "times the noise of fp16+mxfp6, and 5 are needed" in reason
    assert judged(0.05, 0.001)[0] == "inconclusive", "the arithmetic has noise as well"


@pytest.mark.parametrize("got", ["base for a", "a too strong"])
def test_an_adapter_that_is_off_or_too_strong_fails(got: str) -> None:
    status, reason = judged(1.5, 0.1, got=got)
    assert status == "fail"
    assert "adapter" in reason
