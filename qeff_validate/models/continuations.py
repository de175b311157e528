# SPDX-License-Identifier: Apache-2.0
"""The verdict on continuations: logits, choices, what an adapter does, second visits (validation-methods §12.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.compare import (
    EMULATED_FACTOR,
    Bound,
    Judged,
    Rows,
    Status,
    Verdict,
    non_finite,
    sentence,
    structure_problem,
)
from qeff_validate.logits import FALLBACK, LOGIT_GATES, Text, judge_logits, logit_bounds, logit_errors, rows_beyond
from qeff_validate.metrics import Metric
from qeff_validate.models.symptoms import FirstTokens, pattern
from qeff_validate.protocols import Terms
from qeff_validate.tensors import Array, Tensors

EFFECT = 20.0
"""An adapter must change log-probabilities by so many times the noise, or nothing can be said of it."""

EFFECT_MEASURED = 5.0
"""The same where the noise in an adapter's change was measured by emulation, and so was what its direction suffers."""

DELTA_COSINE, DELTA_NORM = 0.01, 0.05
"""The change that an adapter makes has the reference's direction (cosine ≥ 0.99) and size (within 5 %), §14.2."""

SAID = 3
"""So many gates that failed are put into words; of the others the names are enough, the report has the numbers."""


def judge_continuations(
    reference: Tensors, actual: Tensors, terms: Terms, *, adapters: Sequence[str], inputs: Any
) -> Verdict:
    """Compare the continuations of all prompts with all adapters.

    Args:
        reference: ``logits [n, vocab]``, ``tokens [n]``, ``steps``, in the order adapter, prompt, step.
        actual: ``logits`` of the same rows, and ``again``: those of the first two visits once more.
        terms: precision, floor, the case's bounds.
        adapters: ``base`` and the adapters' names.
        inputs: labels and token ids of the prompts, and end tokens.
    """
    texts = _texts(reference["steps"], adapters, inputs.labels)
    labels = [f"{text.label} +{step}" for text in texts for step in range(len(text.rows))]
    again = sum(len(text.rows) for text in texts[: 2 * len(inputs.labels)]) if len(adapters) > 1 else len(labels)
    planned = len(labels) + again
    problem = _structure(reference, actual, len(labels), again)
    if problem:
        return Verdict("fail", problem, planned=planned)
    lengths = [tokens.size for tokens in inputs.ids]
    bad = non_finite({"logits": actual["logits"]}, Rows(labels))
    if bad:
        where = pattern(np.asarray(~np.isfinite(actual["logits"]).all(axis=1)), texts, adapters, lengths)
        return Verdict("fail", f"{bad[0]}; {where}", (bad[1],), planned=planned)
    if not np.isfinite(reference["logits"]).all():
        return Verdict("inconclusive", "the reference itself holds NaN or infinity", planned=planned)
    noise = (
        None if terms.floor is None else terms.floor * float(np.sqrt(np.mean(reference["logits"].astype(float) ** 2)))
    )
    emulated = None if terms.emulated is None else terms.emulated["logits"]
    measured = None if emulated is None else logit_errors(reference["logits"], emulated)
    bounds = logit_bounds(terms.precision, noise=noise, override=terms.override, measured=measured)
    missing = [name for name in LOGIT_GATES if name not in (*bounds, "tie_flips")]
    if missing:
        reason = f"no sound bound for {', '.join(missing)}: give one with its reason in the case's tolerance"
        return Verdict("inconclusive", reason, planned=planned)
    judged = judge_logits(reference["logits"], actual["logits"], bounds, labels=labels, texts=texts, eos=inputs.eos)
    first = FirstTokens.of(reference["logits"], actual, texts, adapters)
    like = None
    if emulated is not None:
        like = FirstTokens.of(reference["logits"], {"logits": emulated, "again": emulated[:again]}, texts, adapters)
    effects, weak = _effects(first, terms.precision, noise, like)
    judged += [*effects, _revisits(actual, labels, again)]
    verdict = _conclude(judged, weak, planned)
    if verdict.status != "fail":
        return verdict
    beyond = rows_beyond(reference["logits"], actual["logits"], bounds)
    told = [*first.told(beyond), pattern(beyond, texts, adapters, lengths), _divergence(judged), verdict.reason]
    return replace(verdict, reason="; ".join(filter(None, told)))


def _texts(steps: Array, adapters: Sequence[str], prompts: Sequence[str]) -> list[Text]:
    ends = np.cumsum(steps)
    names = [f"{adapter}: {prompt!r}" for adapter in adapters for prompt in prompts]
    return [Text(name, range(int(end - count), int(end))) for name, end, count in zip(names, ends, steps, strict=True)]


def _structure(reference: Tensors, actual: Tensors, rows: int, again: int) -> str | None:
    for what, wanted in (("logits", rows), ("again", again)):
        found = len(actual[what])
        if found != wanted:
            ended = "a continuation ended early" if found < wanted else "a continuation went on behind its end"
            return f"{'second visits' if what == 'again' else what} have {found} rows, wanted {wanted}: {ended}"
    return structure_problem({"logits": reference["logits"]}, {"logits": actual["logits"]}, rows)


def _effects(
    first: FirstTokens, precision: str, noise: float | None, like: FirstTokens | None
) -> tuple[list[Judged], list[str]]:
    """Judge what each adapter changes, and whether that, and the difference between two, can be told from noise."""
    level, needed = _level(precision, noise, like)
    judged: list[Judged] = []
    weak: list[str] = []
    for at, name in enumerate(first.adapters[1:], start=1):
        place = {"row": first.rows[at], "text": first.labels[at]}
        size = first.apart(0, at)
        ratio = size / level if level > 0 else np.inf
        judged.append(Judged(Metric(f"adapter.{name}.effect_over_noise", ratio, place), None))
        if not ratio >= needed:
            weak.append(
                f"adapter {name!r} changes log-probabilities by {size:.1e}, {ratio:.1f} times the noise of {precision},"
                f" and {needed:g} are needed to tell it from the base: is it trained?"
            )
            continue
        weak += [
            f"adapters {first.adapters[other]!r} and {name!r} say the same, so a swap would not be seen"
            for other in range(1, at)
            if not first.apart(other, at) >= needed * level
        ]
        bounds = _change_bounds(None if like is None else like.change(at))
        for metric, value in zip(bounds, first.change(at), strict=True):
            judged.append(Judged(Metric(f"adapter.{name}.{metric}", value, place), bounds[metric]))
    return judged, weak


def _level(precision: str, noise: float | None, like: FirstTokens | None) -> tuple[float, float]:
    """Return the noise in an adapter's change of a log-probability, and how many times as great the change must be.

    Of what compressed weights cost, most is the same with and without an adapter; an emulated run says what is not.
    """
    compute, _, kept = precision.partition("+")
    if compute not in FALLBACK or (kept and like is None):
        return np.inf, EFFECT
    level = noise if compute == "fp32" and noise is not None else float(np.sqrt(2 * FALLBACK[compute]["kl_p99"])) / 5
    return (level, EFFECT) if like is None else (level + like.strayed(), EFFECT_MEASURED)


def _change_bounds(emulated: tuple[float, float] | None) -> dict[str, Bound]:
    """Return what an adapter's change may be off by, in direction and size."""
    least, why = (
        {"delta_cosine": DELTA_COSINE, "delta_norm": DELTA_NORM},
        "the adapter's change against the reference's",
    )
    if emulated is None:
        return {name: Bound(value, "fallback", why) for name, value in least.items()}
    bounds = {}
    for (name, value), more in zip(least.items(), emulated, strict=True):
        said = f"{why}: {value:g} + {EMULATED_FACTOR:g} x {more:.2g}"
        bounds[name] = Bound(value + EMULATED_FACTOR * more, "emulated", said)
    return bounds


def _revisits(actual: Tensors, labels: Sequence[str], again: int) -> Judged:
    """Judge second visits: equal to the first bit for bit, on the same session."""
    differing = (actual["logits"][:again] != actual["again"]).any(axis=1)
    row = int(np.argmax(differing))
    metric = Metric("revisit", float(differing.sum()), {"row": row, "text": labels[row]})
    return Judged(metric, Bound(0.0, "exact", "a second visit gives the same bits: no state is left over"))


def _divergence(judged: Sequence[Judged]) -> str:
    """Say where a choice changed beyond a tie first."""
    flips = next(item for item in judged if item.metric.name == "logits.flips")
    place = flips.metric.worst
    if flips.passed:
        return ""
    wanted, got = place["tokens"]
    kind = {"stop": "one of them ends the text", "non-tie": "no tie"}.get(place["kind"], place["kind"])
    return f"first divergent token: {place['prompt']} at step {place['step']}, {got} instead of {wanted}, {kind}"


def _conclude(judged: list[Judged], weak: Sequence[str], planned: int) -> Verdict:
    failed = [item for item in judged if not item.passed]
    status: Status = "fail" if failed else "inconclusive" if weak else "pass"
    said = [sentence(item) for item in failed[:SAID]]
    if failed[SAID:]:
        said.append(f"and {', '.join(item.metric.name for item in failed[SAID:])}")
    reason = "; ".join([*said, *weak])
    return Verdict(status, reason, tuple(judged), planned, planned)
