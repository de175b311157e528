# SPDX-License-Identifier: Apache-2.0
"""Relations between runs of one session with a language model, whatever the right answer is. No reference is needed.

The session first continues every prompt in the usual way, greedily. Each relation then runs the same continuations in
another way, along the same tokens, and the logits must agree. Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import relation_precision
from qeff_validate.comparison.logit_metrics import Text, judge_logits, logit_bounds
from qeff_validate.comparison.verdict import Rows, Verdict, finite_rows, non_finite, verdict_of_gates
from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.adapter_schedule import stack_adapters
from qeff_validate.models.causal_lm.decode_loop import Plan, generate, in_dtypes, padding, takes_ids
from qeff_validate.models.causal_lm.relation_kv_cache import Kept, compare_kv_cache
from qeff_validate.models.causal_lm.relation_linearity import compare_scaled_adapter
from qeff_validate.protocols import ComparisonContext, Session
from qeff_validate.tensors import Array, Tensors, retained

POISON = 1e4
"""What is put into keys and values before a run: finite in fp16, and far from anything that a model computes."""

Relation = Callable[[Session, Any, Plan, Tensors, list[Array]], list[Array]]
"""Runs all prompts along given tokens in some way, and returns their logits in the order of the prompts."""


def other_chunks(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Take prompts one token a run, so that prefill is done by what decodes."""
    return generate(session, inputs.ids, plan, state=state, forced=forced, chunk=1)


def row_alone(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Run each prompt without neighbours: the other places of the batch hold padding."""
    return [
        generate(session, [ids], plan, state=state, forced=[text])[0]
        for ids, text in zip(inputs.ids, forced, strict=True)
    ]


def other_slots(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Run prompts in the opposite order: other slots, other neighbours, other padding."""
    found = generate(session, inputs.ids[::-1], plan, state=state, forced=forced[::-1])
    return found[::-1]


def other_padding(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Put the padding of short prompts on the other side."""
    side = "left" if plan.padding_side == "right" else "right"
    return generate(session, inputs.ids, replace(plan, padding_side=side), state=state, forced=forced)


def poisoned_state(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Fill keys and values with large numbers first: slots that are not written must not be read.

    Raises:
        IncomparableError: the graph keeps none.
    """
    twins = retained(session.inputs, session.outputs)
    cache = [name for name in twins if name.startswith("past_")]
    if not cache:
        raise IncomparableError("the graph retains no keys and values")
    held = session.run({**padding(session, plan), **in_dtypes(session, state)}, fetch=[twins[name] for name in cache])
    given = {name: np.full_like(held[twins[name]], POISON) for name in cache}
    session.run({**padding(session, plan), **given}, fetch=[])
    return generate(session, inputs.ids, plan, state=state, forced=forced)


def mixed_rows(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Put a row with another adapter, the base among them, beside each row.

    Raises:
        IncomparableError: the graph takes one adapter at a time.
    """
    if not takes_ids(session):
        raise IncomparableError("the graph takes one adapter at a time (mixed_batch)")
    count = len(inputs.adapters)
    prompts, texts, ids = [], [], []
    for at, (tokens, text) in enumerate(zip(inputs.ids, forced, strict=True)):
        prompts += [tokens, tokens]
        texts += [text, text]
        ids += [plan.adapter, (plan.adapter + 1 + at % (count - 1)) % count]
    return generate(session, prompts, plan, state=state, forced=texts, adapter_ids=ids)[::2]


RERUN_RELATIONS: Mapping[str, Relation] = {
    "mixed_rows": mixed_rows,
    "other_chunks": other_chunks,
    "other_padding": other_padding,
    "other_slots": other_slots,
    "poisoned_state": poisoned_state,
    "row_alone": row_alone,
}

RELATIONS = ("kv_cache", "merged", "scaled", *RERUN_RELATIONS)
"""The ways, and three more. ``merged``: the adapter as inputs against the same one merged into the weights by PEFT.
``kv_cache``: what is retained of prompts against transformers' cache. ``scaled``: a share of the adapter has that share
of its effect."""

AGAINST_FLOAT32 = ("kv_cache", "merged", "scaled")
"""Relations that have no bound where weights or state are compressed."""


@dataclass(frozen=True, slots=True)
class Original:
    """The model of Hugging Face with an adapter that PEFT has put on it.

    Attributes:
        merged: from the adapter's name and given continuations to their logits, the adapter merged into the weights.
        kept: from the adapter's name to keys and values of each prompt (`kv_check.Kept`).
    """

    merged: Callable[[str, list[Array]], list[Array]]
    kept: Callable[[str], Kept]


def relate(
    name: str, session: Session, inputs: Any, plan: Plan, context: ComparisonContext, original: Original
) -> Verdict:
    """Judge a relation with the first adapter, or with the base if there is none.

    Args:
        name: one of `RELATIONS`.
        session: open.
        inputs: prompts, end tokens and adapters.
        plan: the usual way.
        context: precision and the case's bounds.
        original: for the relations ``merged`` and ``kv_cache``.

    Raises:
        IncomparableError: the relation does not apply here.
    """
    at = min(1, len(inputs.adapters) - 1)
    adapter = list(inputs.adapters)[at]
    plan = replace(plan, adapter=at)
    state = stack_adapters(inputs.adapters) if takes_ids(session) else inputs.adapters[adapter]
    if name in ("merged", "scaled") and not state:
        raise IncomparableError("there is no adapter")
    _, _, kept = context.precision.partition("+")
    if name in AGAINST_FLOAT32 and kept:
        raise IncomparableError(f"the other side computes in float32, and this session keeps {kept}")
    if name == "kv_cache":
        return compare_kv_cache(session, inputs, plan, state, original.kept(adapter), context)
    usual = generate(session, inputs.ids, plan, state=state)
    forced = [logits.argmax(axis=-1) for logits in usual]
    if name == "scaled":
        return compare_scaled_adapter(session, inputs, plan, state, forced, context)
    if name == "merged":
        found = original.merged(adapter, forced)
    else:
        found = RERUN_RELATIONS[name](session, inputs, plan, state, forced)
    expected, actual = np.concatenate(usual), np.concatenate(found)
    texts = _texts(inputs.labels, usual)
    labels = [f"{text.label!r} +{step}" for text in texts for step in range(len(text.rows))]
    finite = [finite_rows(array) for array in (expected, actual)]
    kept = np.flatnonzero(finite[0] & finite[1]).tolist()
    judged = [
        item
        for array, good in zip((expected, actual), finite, strict=True)
        for item in non_finite("logits", array, np.flatnonzero(~good).tolist(), Rows(labels))
    ]
    bounds = logit_bounds(relation_precision(context.precision), override=context.override)
    judged += judge_logits(expected, actual, bounds, labels=labels, texts=texts, eos=inputs.eos, finite=kept)
    verdict = verdict_of_gates(judged, len(labels))
    if not bounds and verdict.status != "fail":
        reason = f"no sound bound for precision {context.precision}: give bounds with their reason in the tolerance"
        return replace(verdict, status="inconclusive", reason=reason)
    return verdict


def _texts(labels: Sequence[str], logits: Sequence[Array]) -> list[Text]:
    ends = np.cumsum([len(rows) for rows in logits])
    return [
        Text(label, range(int(end) - len(rows), int(end)))
        for label, end, rows in zip(labels, ends, logits, strict=True)
    ]
