# SPDX-License-Identifier: Apache-2.0
"""From an ensemble of runs to a floor, and to verdicts on one more run of the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bounds import close

from qeff_validate.comparison.bounds import bounds_for
from qeff_validate.comparison.decisive_rows import DecisiveRows
from qeff_validate.comparison.noise_floor import Floor, digest_of
from qeff_validate.comparison.verdict import Rows, Verdict, compare, systematic_errors, worst_errors
from qeff_validate.config.case import Precision
from qeff_validate.models.causal_lm.verdict import judge_continuations, measure_continuations
from qeff_validate.pipeline.measure_floor import Sample, by_metric, measure_floor
from qeff_validate.protocols import ComparisonContext
from qeff_validate.tensors import Tensors

RUNS = 8
ROWS = Rows([f"text {i}" for i in range(8)], frozenset({3}))
EXACT = np.random.default_rng(1004).normal(size=(8, 64))
EXACT[3] = 0


ALL = Sample(None, {}, None, DecisiveRows(()))


def near(size: float, seed: int) -> np.ndarray:
    """The reference with noise of this relative size in every row."""
    noise = np.random.default_rng(seed).normal(size=EXACT.shape)
    norms = np.linalg.norm(EXACT, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    return (EXACT + size * noise * norms).astype(np.float32)


OF = digest_of({"output": near(0, 0)})


class Ensemble:
    """A model whose legitimate runs are off by noise of one size, and by a shift that they have in common."""

    def __init__(self, size: float, shift: float = 0.0) -> None:
        self.runs = [near(size, seed) + np.float32(shift) * (EXACT != 0) for seed in range(1, RUNS + 1)]

    def ensemble(self, inputs: Any, reference: Tensors, precision: Precision) -> Iterator[Tensors]:
        for run in self.runs:
            yield {"output": run.astype(np.float32)}

    def measure(self, exact: Tensors, outputs: Tensors, inputs: Any) -> Mapping[str, float]:
        return worst_errors(exact, outputs, ROWS)

    def systematic_errors(self, center: Tensors, outputs: Tensors, inputs: Any) -> Mapping[str, float]:
        return systematic_errors(center, outputs, ROWS)


def test_the_worst_row_of_each_run_is_kept_and_rows_without_a_token_take_no_part() -> None:
    made = Ensemble(0.1)
    made.runs[2][5] = EXACT[5] * 1.2
    made.runs[4][3] = 9.0
    floor = measure_floor(made, {"output": EXACT}, ALL, Precision(compute="fp16", weights="mxfp6"), OF)
    assert (floor.profile, floor.of) == ("fp16+mxfp6", OF)
    wanted = [0.1] * RUNS
    wanted[2] = 0.2
    assert floor.errors["rel_l2"] == pytest.approx(wanted, rel=1e-5)
    assert floor.errors["norm_ratio"][2] == pytest.approx(0.2, rel=1e-5)
    assert floor.level("rel_l2") == pytest.approx(0.1 * 2 ** (1 / RUNS), rel=1e-5)


@pytest.mark.numeric
def test_the_center_is_the_mean_and_each_run_strays_from_the_mean_of_the_others() -> None:
    made = Ensemble(0.01, shift=0.05)
    floor = measure_floor(made, {"output": EXACT}, ALL, Precision(compute="fp16"), OF)
    runs = np.stack(made.runs).astype(np.float64)
    close(floor.center["output"], runs.mean(0), rtol=1e-6, atol=1e-7)
    kept = [row for row in range(8) if row != 3]
    for at in range(RUNS):
        others = np.delete(runs, at, axis=0).mean(0)[kept]
        sizes = np.sqrt((others**2).mean(1, keepdims=True))
        signed = np.abs(((runs[at][kept] - others) / sizes).mean(0)).max()
        assert floor.systematic_errors["mean_signed"][at] == pytest.approx(signed, rel=1e-4)
        ratios = np.linalg.norm(runs[at][kept], axis=1) / np.linalg.norm(others, axis=1)
        least = ratios.std() / np.sqrt(len(kept))  # a mean that is nearer to 1 than that was lucky
        assert floor.systematic_errors["mean_norm"][at] == pytest.approx(
            max(abs(ratios.mean() - 1), least), rel=1e-3, abs=1e-9
        )


@pytest.mark.parametrize(("size", "status"), [(0.1, "pass"), (0.19, "pass"), (0.25, "fail"), (0.4, "fail")])
def test_verdicts_on_other_noise_of_this_size(size: float, status: str) -> None:
    floor = measure_floor(Ensemble(0.1), {"output": EXACT}, ALL, Precision(compute="fp16"), OF)
    # rel_l2 alone: the other metrics of this noise are not of the same size in each draw
    override = {"cosine": 0.9, "norm_ratio": 0.9, "max_abs_rms": 9, "why": "rel_l2"}
    bounds = bounds_for("fp16", floor=floor, override=override)
    verdict = compare({"output": near(0, 0)}, {"output": near(size, 99)}, bounds, rows=ROWS, floor=floor)
    assert verdict.status == status, verdict.reason


def test_one_run_more_of_the_same_noise_passes_every_gate() -> None:
    floor = measure_floor(Ensemble(0.1), {"output": EXACT}, ALL, Precision(compute="fp16"), OF)
    bounds = bounds_for("fp16", floor=floor, override={})
    for seed in range(100, 120):
        verdict = compare({"output": near(0, 0)}, {"output": near(0.1, seed)}, bounds, rows=ROWS, floor=floor)
        assert verdict.status == "pass", verdict.reason


# --- adapters ----------------------------------------------------------------------------------------

VOCAB, PROMPTS, NAMES = 40, 48, ["base", "a", "b"]
SHARED = np.random.default_rng(7).normal(size=(1, PROMPTS, VOCAB)) * 0.06
"""Noise of compressed weights: the same with and without an adapter."""


def judged(effect: float, own: float, *, got: str = "right") -> Verdict:
    """Verdict on a base and two adapters of this effect, where ``own`` is the noise that differs between them.

    Adapters act 4 % more strongly than in float64, in all runs.
    """
    rng = np.random.default_rng(8)
    base = rng.normal(size=(1, PROMPTS, VOCAB)) * 2
    changes = np.concatenate([np.zeros_like(base), rng.normal(size=(2, PROMPTS, VOCAB)) * effect])
    wanted = base + changes

    def noisy(seed: int) -> np.ndarray:
        return wanted + 0.04 * changes + SHARED + np.random.default_rng(seed).normal(size=wanted.shape) * own

    actual = noisy(1)
    if got == "base for a":
        actual[1] = actual[0]
    elif got == "a too strong":
        actual[1] += 0.7 * changes[1]
    flat = {"logits": actual.reshape(-1, VOCAB).astype(np.float32)}
    flat["again"] = flat["logits"][: 2 * PROMPTS]
    rows = 3 * PROMPTS
    reference = {"logits": wanted.reshape(-1, VOCAB), "tokens": np.zeros(rows), "steps": np.ones(rows, np.int64)}
    labels = [f"x{i}" for i in range(PROMPTS)]
    errors = [
        measure_continuations(reference, noisy(seed).reshape(-1, VOCAB), reference["steps"], NAMES, labels)
        for seed in range(2, 2 + RUNS)
    ]
    floor = Floor("fp16+mxfp6", "", by_metric(errors), {}, {})
    context = ComparisonContext("fp16+mxfp6", {}, 0, floor)
    inputs = SimpleNamespace(labels=labels, ids=[np.arange(3)] * PROMPTS, eos=frozenset())
    given = reference | {"logits": reference["logits"].astype(np.float32)}
    return judge_continuations(given, flat, context, adapters=NAMES, inputs=inputs)


def test_adapters_are_told_by_the_noise_that_is_not_shared() -> None:
    passed = judged(0.2, 0.01)
    assert (passed.status, passed.reason) == ("pass", "")
    weak = judged(0.05, 0.01)
    assert weak.status == "inconclusive"
    assert "times the noise of fp16+mxfp6, and 5 are needed" in weak.reason


@pytest.mark.parametrize("got", ["base for a", "a too strong"])
def test_an_adapter_that_is_off_or_too_strong_fails(got: str) -> None:
    verdict = judged(0.2, 0.01, got=got)
    assert verdict.status == "fail"
    assert "adapter" in verdict.reason
