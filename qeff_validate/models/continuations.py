# SPDX-License-Identifier: Apache-2.0
"""The verdict on continuations: logits, choices, what an adapter does, second visits (validation-methods §12.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qeff_validate.compare import Bound, Judged, Rows, Status, Verdict, non_finite, sentence, structure_problem
from qeff_validate.logits import FALLBACK, LOGIT_GATES, Text, judge_logits, log_softmax, logit_bounds
from qeff_validate.metrics import Metric
from qeff_validate.protocols import Terms
from qeff_validate.tensors import Array, Tensors

EFFECT = 20.0
"""An adapter must change log-probabilities by so many times the noise, or nothing can be said of it."""

DELTA_COSINE, DELTA_NORM = 0.01, 0.05
"""The change that an adapter makes has the reference's direction (cosine ≥ 0.99) and size (within 5 %), §14.2."""


def judge_continuations(
    reference: Tensors, actual: Tensors, terms: Terms, *, adapters: Sequence[str], inputs: Any
) -> Verdict:
    """Compare the continuations of all prompts with all adapters.

    Args:
        reference: ``logits [n, vocab]``, ``tokens [n]``, ``steps``, in the order adapter, prompt, step.
        actual: ``logits`` of the same rows, and ``again``: those of the first two visits once more.
        terms: precision, floor, the case's bounds.
        adapters: ``base`` and the adapters' names.
        inputs: labels of the prompts and end tokens.
    """
    texts = _texts(reference["steps"], adapters, inputs.labels)
    labels = [f"{text.label} +{step}" for text in texts for step in range(len(text.rows))]
    again = sum(len(text.rows) for text in texts[: 2 * len(inputs.labels)]) if len(adapters) > 1 else len(labels)
    planned = len(labels) + again
    problem = structure_problem({"logits": reference["logits"]}, {"logits": actual["logits"]}, len(labels))
    if problem is None and len(actual["again"]) != again:
        problem = f"second visits gave {len(actual['again'])} rows, wanted {again}"
    if problem:
        return Verdict("fail", problem, planned=planned)
    bad = non_finite({"logits": actual["logits"]}, Rows(labels))
    if bad:
        return Verdict("fail", bad[0], (bad[1],), planned=planned)
    if not np.isfinite(reference["logits"]).all():
        return Verdict("inconclusive", "the reference itself holds NaN or infinity", planned=planned)
    noise = (
        None if terms.floor is None else terms.floor * float(np.sqrt(np.mean(reference["logits"].astype(float) ** 2)))
    )
    bounds = logit_bounds(terms.precision, noise=noise, override=terms.override)
    missing = [name for name in LOGIT_GATES if name not in (*bounds, "tie_flips")]
    if missing:
        reason = f"no sound bound for {', '.join(missing)}: give one with its reason in the case's tolerance"
        return Verdict("inconclusive", reason, planned=planned)
    judged = judge_logits(reference["logits"], actual["logits"], bounds, labels=labels, texts=texts, eos=inputs.eos)
    effects, weak = _effects(reference["logits"], actual["logits"], texts, adapters, terms.precision, noise)
    judged += [*effects, _revisits(actual, labels, again)]
    return _conclude(judged, weak, planned)


def _texts(steps: Array, adapters: Sequence[str], prompts: Sequence[str]) -> list[Text]:
    ends = np.cumsum(steps)
    names = [f"{adapter}: {prompt!r}" for adapter in adapters for prompt in prompts]
    return [Text(name, range(int(end - count), int(end))) for name, end, count in zip(names, ends, steps, strict=True)]


def _effects(
    reference: Array,
    actual: Array,
    texts: Sequence[Text],
    adapters: Sequence[str],
    precision: str,
    noise: float | None,
) -> tuple[list[Judged], list[str]]:
    """Judge what each adapter changes at the first token after each prompt, where all have read the same text."""
    count = len(texts) // len(adapters)
    first = np.array([text.rows.start for text in texts]).reshape(len(adapters), count)
    profile = float(np.sqrt(2 * FALLBACK[precision]["kl_p99"])) / 5 if precision in FALLBACK else np.inf
    level = noise if precision == "fp32" and noise is not None else profile
    judged: list[Judged] = []
    weak: list[str] = []
    base = log_softmax(reference[first[0]]), log_softmax(actual[first[0]])
    for at, name in enumerate(adapters[1:], start=1):
        wanted, got = log_softmax(reference[first[at]]) - base[0], log_softmax(actual[first[at]]) - base[1]
        size = float(np.sqrt(np.mean(wanted**2)))
        place = {"row": int(first[at][0]), "text": texts[at * count].label}
        ratio = size / level if level > 0 else np.inf
        judged.append(Judged(Metric(f"adapter.{name}.effect_over_noise", ratio, place), None))
        if not ratio >= EFFECT:
            weak.append(
                f"adapter {name!r} changes log-probabilities by {size:.1e}, {ratio:.1f} times the noise of {precision},"
                f" and {EFFECT:g} are needed to tell it from the base: is it trained?"
            )
            continue
        norms = float(np.linalg.norm(wanted)), float(np.linalg.norm(got))
        with np.errstate(all="ignore"):
            cosine = float(np.sum(wanted * got)) / (norms[0] * norms[1])
        for metric, value, bound in (
            ("delta_cosine", 1 - cosine, DELTA_COSINE),
            ("delta_norm", abs(norms[1] / norms[0] - 1), DELTA_NORM),
        ):
            why = "the adapter's change against the reference's"
            judged.append(Judged(Metric(f"adapter.{name}.{metric}", value, place), Bound(bound, "fallback", why)))
    return judged, weak


def _revisits(actual: Tensors, labels: Sequence[str], again: int) -> Judged:
    """Judge second visits: equal to the first bit for bit, on the same session."""
    differing = (actual["logits"][:again] != actual["again"]).any(axis=1)
    row = int(np.argmax(differing))
    metric = Metric("revisit", float(differing.sum()), {"row": row, "text": labels[row]})
    return Judged(metric, Bound(0.0, "exact", "a second visit gives the same bits: no state is left over"))


def _conclude(judged: list[Judged], weak: Sequence[str], planned: int) -> Verdict:
    failed = [item for item in judged if not item.passed]
    status: Status = "fail" if failed else "inconclusive" if weak else "pass"
    reason = "; ".join([*map(sentence, failed), *weak])
    return Verdict(status, reason, tuple(judged), planned, planned)
