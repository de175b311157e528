# SPDX-License-Identifier: Apache-2.0
"""Metamorphic relations between runs of one session with a language model. No reference is needed.

The session first continues every prompt greedily. Each relation then runs the same continuations differently, along the
same tokens, and the logits must agree. Numpy only.
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
from qeff_validate.models.causal_lm.decode_loop import batches, generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan, in_dtypes, padding, run_sizes, takes_ids
from qeff_validate.models.causal_lm.decoder_interface import RECURRENT
from qeff_validate.models.causal_lm.relation_kv_cache import KeysAndValues, compare_kv_cache
from qeff_validate.models.causal_lm.relation_linearity import compare_scaled_adapter
from qeff_validate.protocols import ComparisonContext, Session
from qeff_validate.tensors import Array, Tensors, retained

POISON = 1e4
"""Value written into keys and values before a run: finite in fp16, and far from all values of a model."""

Relation = Callable[[Session, Any, Plan, Tensors, list[Array]], list[Array]]
"""Runs all prompts along given tokens, and returns their logits in the order of the prompts."""


def other_chunks(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Prefill prompts one token at a time, with the decode specialization."""
    return generate(session, inputs.ids, plan, state=state, forced=forced, chunk=1)


def row_alone(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Run each prompt alone in its batch: the other rows hold padding."""
    return [
        generate(session, [ids], plan, state=state, forced=[text])[0]
        for ids, text in zip(inputs.ids, forced, strict=True)
    ]


def other_slots(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Run prompts in reverse order: other rows of the batch or slots, other neighbours, other padding."""
    slots = range(run_sizes(session, plan).slots)[::-1]
    logits = generate(session, inputs.ids[::-1], plan, state=state, forced=forced[::-1], slots=slots)
    return logits[::-1]


def other_padding(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Put the padding of short prompts on the other side."""
    side = "left" if plan.padding_side == "right" else "right"
    return generate(session, inputs.ids, replace(plan, padding_side=side), state=state, forced=forced)


def poisoned_state(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Fill keys and values with large numbers first: slots that are not written must not be read.

    Raises:
        IncomparableError: the graph retains no keys and values.
    """
    twins = retained(session.inputs, session.outputs)
    cache = [name for name in twins if name.startswith("past_")]
    if not cache:
        raise IncomparableError("the graph retains no keys and values")
    state_outputs = session.run(
        {**padding(session, plan), **in_dtypes(session, state)}, fetch=[twins[name] for name in cache]
    )
    poisoned = {name: np.full_like(state_outputs[twins[name]], POISON) for name in cache}
    session.run({**padding(session, plan), **poisoned}, fetch=[])
    return generate(session, inputs.ids, plan, state=state, forced=forced)


def mixed_rows(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Batch each row with a row of another adapter or of the base.

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


def kept_prefix(session: Session, inputs: Any, plan: Plan, state: Tensors, forced: list[Array]) -> list[Array]:
    """Prefill each prompt from its middle, behind a first half that another text has left in its row or slot.

    Raises:
        IncomparableError: a recurrent state holds a whole text, not its first half.
    """
    if any(spec.name.startswith(RECURRENT) for spec in session.inputs):
        raise IncomparableError("a recurrent state holds a whole text: none can go on from its first half")
    logits: list[Array] = []
    for start, prompts in batches(session, inputs.ids, plan):
        texts, kept = forced[start : start + len(prompts)], [tokens.size // 2 for tokens in prompts]
        others = [
            np.concatenate([tokens[:half], tokens[half:][::-1]]) for tokens, half in zip(prompts, kept, strict=True)
        ]
        generate(session, others, replace(plan, max_new_tokens=1), state=state, forced=texts)
        logits += generate(session, prompts, plan, forced=texts, kept=kept)
    return logits


RERUN_RELATIONS: Mapping[str, Relation] = {
    "kept_prefix": kept_prefix,
    "mixed_rows": mixed_rows,
    "other_chunks": other_chunks,
    "other_padding": other_padding,
    "other_slots": other_slots,
    "poisoned_state": poisoned_state,
    "row_alone": row_alone,
}

RELATIONS = ("kv_cache", "merged", "scaled", *RERUN_RELATIONS)
"""All relations. ``merged``: the adapter as inputs against the adapter merged into the weights by PEFT. ``kv_cache``:
the retained keys and values of prompts against the cache of transformers. ``scaled``: a fraction of the adapter has
that fraction of its effect."""

AGAINST_FLOAT32 = ("kv_cache", "merged", "scaled")
"""Relations that have no bound where weights or state are compressed."""


@dataclass(frozen=True, slots=True)
class Original:
    """Runs of the original Hugging Face model with a PEFT adapter.

    Attributes:
        merged_logits: maps an adapter's name and continuations to logits, with the adapter merged into the weights.
        keys_and_values: maps an adapter's name to the keys and values of each prompt.
    """

    merged_logits: Callable[[str, list[Array]], list[Array]]
    keys_and_values: Callable[[str], KeysAndValues]


def relate(
    name: str, session: Session, inputs: Any, plan: Plan, context: ComparisonContext, original: Original
) -> Verdict:
    """Check a relation with the first adapter, or with the base if there is none.

    Args:
        name: one of `RELATIONS`.
        session: open.
        inputs: prompts, end tokens and adapters.
        plan: batch size, chunk length and padding of the greedy run.
        context: precision and the case's bounds.
        original: for the relations ``merged`` and ``kv_cache``.

    Raises:
        IncomparableError: the relation does not apply here.
    """
    at = min(1, len(inputs.adapters) - 1)
    adapter = list(inputs.adapters)[at]
    plan, inputs = replace(plan, adapter=at), replace(inputs, ids=inputs.fed(adapter), virtual=None)
    state = stack_adapters(inputs.adapters) if takes_ids(session) else inputs.adapters[adapter]
    if name in ("merged", "scaled") and not state:
        raise IncomparableError("there is no adapter")
    _, _, formats = context.precision.partition("+")
    if name in AGAINST_FLOAT32 and formats:
        raise IncomparableError(f"the other side computes in float32, and this session keeps {formats}")
    if name == "kv_cache":
        return compare_kv_cache(session, inputs, plan, state, original.keys_and_values(adapter), context)
    greedy = generate(session, inputs.ids, plan, state=state)
    forced = [logits.argmax(axis=-1) for logits in greedy]
    if name == "scaled":
        return compare_scaled_adapter(session, inputs, plan, state, forced, context)
    if name == "merged":
        rerun = original.merged_logits(adapter, forced)
    else:
        rerun = RERUN_RELATIONS[name](session, inputs, plan, state, forced)
    expected, actual = np.concatenate(greedy), np.concatenate(rerun)
    texts = _texts(inputs.labels, greedy)
    labels = [f"{text.label!r} +{step}" for text in texts for step in range(len(text.rows))]
    finite = [finite_rows(array) for array in (expected, actual)]
    both_finite = np.flatnonzero(finite[0] & finite[1]).tolist()
    results = [
        item
        for array, good in zip((expected, actual), finite, strict=True)
        for item in non_finite("logits", array, np.flatnonzero(~good).tolist(), Rows(labels))
    ]
    bounds = logit_bounds(relation_precision(context.precision), override=context.override)
    results += judge_logits(expected, actual, bounds, labels=labels, texts=texts, eos=inputs.eos, finite=both_finite)
    verdict = verdict_of_gates(results, len(labels))
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
