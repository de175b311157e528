# SPDX-License-Identifier: Apache-2.0
"""Relations between runs of one session with a language model, whatever the right answer is. No reference is needed.

The session first continues every prompt in the usual way, greedily. Each relation then runs the same continuations in
another way, along the same tokens, and the logits must agree. Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.compare import Rows, Status, Verdict, non_finite, sentence
from qeff_validate.errors import IncomparableError
from qeff_validate.logits import Text, judge_logits, logit_bounds
from qeff_validate.models.generate import Plan, generate
from qeff_validate.protocols import Session, Terms
from qeff_validate.tensors import Array, Tensors, retained

POISON = 1e4
"""What is put into keys and values before a run: finite in fp16, and far from anything that a model computes."""

Way = Callable[[Session, Any, Plan, Tensors, list[Array]], list[Array]]
"""Runs all prompts along given tokens in some way, and returns their logits in the order of the prompts."""

Merge = Callable[[str, list[Array]], list[Array]]
"""Returns the logits of given continuations by the model with the named adapter merged into its weights."""


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
    held = session.run(_padding(session, plan, state), fetch=[twins[name] for name in cache])
    given = {name: np.full_like(held[twins[name]], POISON) for name in cache}
    session.run({**_padding(session, plan, state), **given}, fetch=[])
    return generate(session, inputs.ids, plan, state=state, forced=forced)


WAYS: Mapping[str, Way] = {
    "other_chunks": other_chunks,
    "other_padding": other_padding,
    "other_slots": other_slots,
    "poisoned_state": poisoned_state,
    "row_alone": row_alone,
}

RELATIONS = ("merged", *WAYS)
"""The ways, and ``merged``: the adapter as inputs against the same adapter merged into the weights by PEFT."""


def relate(name: str, session: Session, inputs: Any, plan: Plan, terms: Terms, merge: Merge) -> Verdict:
    """Judge a relation with the first adapter, or with the base if there is none.

    Args:
        name: one of `RELATIONS`.
        session: open.
        inputs: prompts, end tokens and adapters.
        plan: the usual way.
        terms: precision and the case's bounds.
        merge: for the relation ``merged``.

    Raises:
        IncomparableError: the relation does not apply here.
    """
    adapter = list(inputs.adapters)[min(1, len(inputs.adapters) - 1)]
    state = inputs.adapters[adapter]
    usual = generate(session, inputs.ids, plan, state=state)
    forced = [logits.argmax(axis=-1) for logits in usual]
    compute, _, kept = terms.precision.partition("+")
    if name == "merged" and kept:
        raise IncomparableError(f"the adapter is merged into weights in float32, and this session keeps {kept}")
    if name != "merged":
        found = WAYS[name](session, inputs, plan, state, forced)
    elif state:
        found = merge(adapter, forced)
    else:
        raise IncomparableError("there is no adapter to merge")
    expected, actual = np.concatenate(usual), np.concatenate(found)
    texts = _texts(inputs.labels, usual)
    labels = [f"{text.label!r} +{step}" for text in texts for step in range(len(text.rows))]
    for array in (expected, actual):
        bad = non_finite({"logits": array}, Rows(labels))
        if bad:
            return Verdict("fail", bad[0], (bad[1],), planned=len(labels))
    bounds = logit_bounds(compute, noise=None, override=terms.override)
    if not bounds:
        reason = f"no sound bound for precision {compute}: give bounds with their reason in the tolerance"
        return Verdict("inconclusive", reason, planned=len(labels))
    judged = judge_logits(expected, actual, bounds, labels=labels, texts=texts, eos=inputs.eos)
    failed = [item for item in judged if not item.passed]
    status: Status = "fail" if failed else "pass"
    return Verdict(status, "; ".join(map(sentence, failed)), tuple(judged), len(labels), len(labels))


def _texts(labels: Sequence[str], logits: Sequence[Array]) -> list[Text]:
    ends = np.cumsum([len(rows) for rows in logits])
    return [
        Text(label, range(int(end) - len(rows), int(end)))
        for label, end, rows in zip(labels, ends, logits, strict=True)
    ]


def _padding(session: Session, plan: Plan, state: Tensors) -> dict[str, Array]:
    """Return feeds of one step of padding alone, with the adapter's tensors."""
    batch = max((shapes["input_ids"][0] for shapes in session.shapes), default=plan.batch_size)
    feeds = {"input_ids": np.full((batch, 1), plan.pad), "position_ids": np.full((batch, 1), -1), **state}
    return {name: array.astype(_dtype(session, name)) for name, array in feeds.items()}


def _dtype(session: Session, name: str) -> str:
    return next(spec.dtype for spec in session.inputs if spec.name == name)
