# SPDX-License-Identifier: Apache-2.0
"""The verdict on continuations: logits, tokens, effects of adapters, second visits (validation-methods §12.7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import Bound, measured_bound, missing_bounds_reason, systematic_bounds
from qeff_validate.comparison.logit_metrics import (
    LOGIT_GATES,
    Text,
    judge_logits,
    logit_bounds,
    logit_errors,
    noise_level,
    rows_beyond,
    systematic_logit_metrics,
)
from qeff_validate.comparison.metric import ADAPTER_METRICS, Metric, least_bounds, most_bounds
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.verdict import (
    GateResult,
    Rows,
    Status,
    Verdict,
    finite_rows,
    non_finite,
    row_texts,
    sentence,
    structure_problem,
    with_unusable_rows,
)
from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.failure_hints import SERVED_ALONE, FirstTokens, Serving, describe_rows
from qeff_validate.models.causal_lm.next_tokens import next_token_gate
from qeff_validate.protocols import ComparisonContext
from qeff_validate.tensors import Array, Tensors

MIN_EFFECT = 20.0
"""Minimum ratio of an adapter's change of log-probabilities to the noise; below it the adapter cannot be validated."""

MIN_EFFECT_MEASURED = 5.0
"""The same where the noise, and its effect on the direction of the change, were measured with this adapter."""

DELTAS = {"delta_cosine": 0.01, "delta_norm": 0.05}
"""The change that an adapter makes has the reference's direction (cosine ≥ 0.99) and size (within 5 %), §14.2."""

SIZE_SHARE = 0.25
"""Part of the error across an adapter's change that is allowed along it, which is one direction of many.

All runs of an ensemble may err little there by chance: VeRA on Qwen2 by up to 1.5e-4, and a device by 7.1e-4, which is
0.30 of its own error across the change; docs/decisions/language-models.md has the others.
"""

LEAST_DELTAS, MOST_DELTAS = least_bounds(ADAPTER_METRICS), most_bounds(ADAPTER_METRICS)
"""Limits of their measured bounds."""

MOST_DESCRIBED = 3
"""Maximum number of failed gates that are described; the others are named, and the report has their numbers."""


def judge_continuations(
    reference: Tensors,
    actual: Tensors,
    context: ComparisonContext,
    *,
    adapters: Sequence[str],
    inputs: Any,
    serving: Serving = SERVED_ALONE,
) -> Verdict:
    """Compare the continuations of all prompts with all adapters.

    Args:
        reference: ``logits [n, vocab]``, ``tokens [n]``, ``steps``, in the order adapter, prompt, step.
        actual: ``logits`` of the same rows, and ``again``: the logits of second visits to the first two adapters.
        context: precision, floor, the case's bounds.
        adapters: ``base`` and the adapters' names.
        inputs: labels and token ids of the prompts, and end tokens.
        serving: how they are served.
    """
    texts = _texts(reference["steps"], adapters, inputs.labels)
    labels = [f"{text.label} +{step}" for text in texts for step in range(len(text.rows))]
    again = sum(len(text.rows) for text in texts[: 2 * len(inputs.labels)]) if len(adapters) > 1 else len(labels)
    planned = len(labels) + again
    problem = _structure(reference, actual, len(labels), again)
    if problem:
        return Verdict("fail", problem, planned=planned)
    lengths = [tokens.size for tokens in inputs.ids]
    floor, bounds = context.floor, logit_bounds(context.precision, override=context.override, floor=context.floor)
    usable, finite = finite_rows(reference["logits"]), finite_rows(actual["logits"])
    both_finite = np.flatnonzero(usable & finite)
    results = non_finite("logits", actual["logits"], np.flatnonzero(usable & ~finite).tolist(), Rows(labels))
    results += judge_logits(
        reference["logits"],
        actual["logits"],
        bounds,
        labels=labels,
        texts=texts,
        eos=inputs.eos,
        finite=both_finite.tolist(),
    )
    measured = np.arange(len(labels)) if floor is None or floor.rows is None else floor.rows
    places = np.flatnonzero(np.isin(measured, both_finite))
    if context.device and floor is not None and places.size:
        limits = systematic_bounds(floor)
        errors = systematic_logit_metrics(floor.center["logits"][places], actual["logits"][measured[places]])
        results += [GateResult(replace(item, name=f"logits.{item.name}"), limits.get(item.name)) for item in errors]
    first = FirstTokens.of(reference["logits"], actual, texts, adapters)
    effects, weaknesses = _effects(first, context.precision, floor) if first.at.size else ([], [])
    results += [*effects, _revisits(actual, labels, again)]
    if "next_token_gaps" in actual:
        results.append(next_token_gate(actual["next_token_gaps"]))
    missing = [name for name in LOGIT_GATES if name not in (*bounds, "tie_flips")]
    if missing:
        weaknesses = [missing_bounds_reason(missing, floor, context.precision)]
    verdict = _conclude(results, weaknesses, planned)
    unusable = np.flatnonzero(~usable)
    if verdict.status == "fail" and not missing:
        beyond = rows_beyond(reference["logits"], actual["logits"], bounds) & usable
        parts = [
            *first.explanations(beyond, serving),
            describe_rows(beyond, texts, adapters, lengths, serving),
            _divergence(results),
            verdict.reason,
        ]
        verdict = replace(verdict, reason="; ".join(filter(None, parts)))
    elif verdict.status == "fail" and not finite[usable].all():
        verdict = replace(
            verdict, reason=f"{verdict.reason}; {describe_rows(usable & ~finite, texts, adapters, lengths, serving)}"
        )
    shown = row_texts([(text.label, len(text.rows)) for text in texts])
    verdict = replace(verdict, compared=planned - unusable.size - int((unusable < again).sum()), texts=shown)
    return with_unusable_rows(verdict, {"logits": unusable.tolist()}, labels)


def _texts(steps: Array, adapters: Sequence[str], prompts: Sequence[str]) -> list[Text]:
    ends = np.cumsum(steps)
    names = [f"{adapter}: {prompt!r}" for adapter in adapters for prompt in prompts]
    return [Text(name, range(int(end - count), int(end))) for name, end, count in zip(names, ends, steps, strict=True)]


def _structure(reference: Tensors, actual: Tensors, rows: int, again: int) -> str | None:
    for what, wanted in (("logits", rows), ("again", again)):
        rows_got = len(actual[what])
        if rows_got != wanted:
            ended = "a continuation ended early" if rows_got < wanted else "a continuation went on behind its end"
            return f"{'second visits' if what == 'again' else what} have {rows_got} rows, wanted {wanted}: {ended}"
    return structure_problem({"logits": reference["logits"]}, {"logits": actual["logits"]}, rows)


def check_continuations(reference: Tensors, texts: int, steps: int, vocabulary: int | str) -> None:
    """Check that the outputs of a reference are consistent.

    Args:
        reference: ``logits`` float ``[n, vocab]``, ``tokens`` int64 ``[n]``, and ``steps`` int64 with sum n.
        texts: number of continuations.
        steps: maximum number of tokens of a continuation.
        vocabulary: number of columns of ``logits``.

    Raises:
        IncomparableError: an output is missing, of another dtype or shape, or out of range.
    """
    if set(reference) != {"logits", "tokens", "steps"}:
        raise IncomparableError(f"outputs are {sorted(reference)}, wanted are logits, steps and tokens")
    logits, tokens, counts = (reference[name] for name in ("logits", "tokens", "steps"))
    for name in ("tokens", "steps"):
        if reference[name].dtype != np.int64 or reference[name].ndim != 1:
            actual = f"{reference[name].dtype} {list(reference[name].shape)}"
            raise IncomparableError(f"tensor {name!r} is {actual}, wanted int64 [n]")
    if logits.dtype.kind != "f" or logits.ndim != 2 or logits.shape[1] != vocabulary:
        actual = f"{logits.dtype} {list(logits.shape)}"
        raise IncomparableError(f"tensor 'logits' is {actual}, wanted real numbers [n, {vocabulary}]")
    if len(counts) != texts or not all(1 <= count <= steps for count in counts.tolist()):
        raise IncomparableError(f"tensor 'steps' is no list of {texts} numbers of tokens from 1 to {steps}")
    if not int(counts.sum()) == len(tokens) == len(logits):
        raise IncomparableError(
            f"tensors 'steps', 'tokens' and 'logits' do not fit: {counts.sum()}, {len(tokens)} and {len(logits)} rows"
        )
    if tokens.min() < 0 or tokens.max() >= logits.shape[1]:
        raise IncomparableError(f"tensor 'tokens' holds ids from {tokens.min()} to {tokens.max()} of {vocabulary}")


def measure_continuations(
    exact: Tensors, logits: Array, steps: Array, adapters: Sequence[str], prompts: Sequence[str]
) -> dict[str, float]:
    """Return the errors of a run's logits, and of the change that each adapter makes.

    Args:
        exact: ``logits`` of the float64 reference.
        logits: logits of the same rows, ``[n, vocab]``.
        steps: number of rows of each continuation.
        adapters: ``base`` and the adapters' names.
        prompts: labels.
    """
    texts = _texts(steps, adapters, prompts)
    again = sum(len(text.rows) for text in texts[: 2 * len(prompts)])
    first = FirstTokens.of(exact["logits"], {"logits": logits, "again": logits[:again]}, texts, adapters)
    errors = logit_errors(exact["logits"], logits)
    for at, name in enumerate(adapters[1:], start=1):
        changes = zip(DELTAS, first.change(at), strict=True)
        errors |= {f"{name}.{metric}": value for metric, value in changes} | {f"{name}.strayed": first.change_error(at)}
    return errors


def _effects(first: FirstTokens, precision: str, floor: Floor | None) -> tuple[list[GateResult], list[str]]:
    """Return the gates on the change of each adapter, and which changes are too small beside the noise."""
    needed = MIN_EFFECT if floor is None else MIN_EFFECT_MEASURED
    results: list[GateResult] = []
    weaknesses: list[str] = []
    for at, name in enumerate(first.adapters[1:], start=1):
        place = {"row": first.rows[at], "text": first.labels[at]}
        level = noise_level(precision) if floor is None else floor.level(f"{name}.strayed")
        size = first.apart(0, at)
        ratio = np.inf if level == 0 else size / level
        results.append(GateResult(Metric(f"adapter.{name}.effect_over_noise", ratio, place), None))
        if not ratio >= needed:
            weaknesses.append(
                f"adapter {name!r} changes log-probabilities by {size:.1e}, {ratio:.1f} times the noise of {precision},"
                f" and {needed:g} are needed to tell it from the base: is it trained?"
            )
            continue
        weaknesses += [
            f"adapters {first.adapters[other]!r} and {name!r} say the same, so a swap would not be seen"
            for other in range(1, at)
            if not first.apart(other, at) >= needed * level
        ]
        for metric, value in zip(DELTAS, first.change(at), strict=True):
            bound = _change_bound(name, metric, floor)
            if bound is None:
                weaknesses.append(
                    f"adapter {name!r}: noise in {precision} hides {metric.replace('_', ' of ')} of its change"
                )
            else:
                results.append(GateResult(Metric(f"adapter.{name}.{metric}", value, place), bound))
    return results, weaknesses


def _change_bound(adapter: str, metric: str, floor: Floor | None) -> Bound | None:
    """Return the bound on the direction or size of an adapter's change; None if the noise is too great."""
    if floor is None:
        return Bound(DELTAS[metric], "fallback", "the adapter's change against the reference's")
    bound = measured_bound(f"{adapter}.{metric}", floor, LEAST_DELTAS[metric], MOST_DELTAS[metric])
    turned = _change_bound(adapter, "delta_cosine", floor) if metric == "delta_norm" else None
    least = 0.0 if turned is None else SIZE_SHARE * math.sqrt(2 * turned.value)
    if bound is None or turned is None or not bound.value < least < MOST_DELTAS[metric]:
        return bound
    why = f"{SIZE_SHARE:g} x {least / SIZE_SHARE:.2g}, the error across the change that is allowed"
    return replace(bound, value=least, why=why)


def _revisits(actual: Tensors, labels: Sequence[str], again: int) -> GateResult:
    """Return the gate on second visits: bitwise equal to the first on the same session."""
    first, second = actual["logits"][:again], actual["again"]
    differing = ~((first == second) | (np.isnan(first) & np.isnan(second))).all(axis=1)
    row = int(np.argmax(differing))
    metric = Metric("revisit", float(differing.sum()), {"row": row, "text": labels[row]})
    return GateResult(metric, Bound(0.0, "exact", "a second visit gives the same bits: no state is left over"))


def _divergence(results: Sequence[GateResult]) -> str:
    """Describe the first token that differs beyond a tie; empty if there is none."""
    flips = next((item for item in results if item.metric.name == "logits.flips"), None)
    if flips is None or flips.passed:
        return ""
    place = flips.metric.worst
    wanted, got = place["tokens"]
    kind = {"stop": "one of them ends the text", "non-tie": "no tie"}.get(place["kind"], place["kind"])
    return f"first divergent token: {place['prompt']} at step {place['step']}, {got} instead of {wanted}, {kind}"


def _conclude(results: list[GateResult], weaknesses: Sequence[str], planned: int) -> Verdict:
    failed = [item for item in results if not item.passed]
    status: Status = "fail" if failed else "inconclusive" if weaknesses else "pass"
    sentences = [sentence(item) for item in failed[:MOST_DESCRIBED]]
    if failed[MOST_DESCRIBED:]:
        sentences.append(f"and {', '.join(item.metric.name for item in failed[MOST_DESCRIBED:])}")
    reason = "; ".join([*sentences, *weaknesses])
    return Verdict(status, reason, tuple(results), planned, planned)
