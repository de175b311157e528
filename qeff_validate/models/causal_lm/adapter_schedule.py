# SPDX-License-Identifier: Apache-2.0
"""Order in which adapters are run: sequentially on one session, or together in a batch. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors


def stack_adapters(adapters: Mapping[str, Tensors]) -> Tensors:
    """Stack each tensor over all adapters, ``[adapters, …]``; the base is first."""
    return {name: np.stack([tensors[name] for tensors in adapters.values()]) for name in adapters[BASE]}


def run_sequentially(session: Session, inputs: Any, plan: Plan, forced: Sequence[Array]) -> Tensors:
    """Run every prompt with every adapter, swapping adapters on the open session, then the first two adapters again.

    Args:
        session: open.
        inputs: prompts and adapters.
        plan: sizes and stop rule.
        forced: the tokens of each continuation, in the order adapter, prompt.

    Returns:
        ``logits [n, vocab]`` in the order adapter, prompt, step; ``again``: the logits of the second visits.
    """
    first: dict[str, list[Array]] = {}
    again: list[Array] = []
    names = list(inputs.adapters)
    for name in [*names, *names[:2]]:
        at = names.index(name) * len(inputs.ids)
        texts = forced[at : at + len(inputs.ids)]
        continuations = generate(session, inputs.fed(name), plan, state=inputs.adapters[name], forced=texts)
        if name in first:
            again += continuations
        else:
            first[name] = continuations
    logits = [array for name in names for array in first[name]]
    return {"logits": np.concatenate(logits), "again": np.concatenate(again)}


def run_batched(session: Session, inputs: Any, plan: Plan, forced: Sequence[Array]) -> Tensors:
    """Run every prompt with every adapter, the adapters of a prompt adjacent in a batch, then all again.

    Arguments and result are those of `run_sequentially`.
    """
    prompts, fed = len(inputs.ids), [inputs.fed(name) for name in inputs.adapters]
    visits = [(adapter, prompt) for prompt in range(prompts) for adapter in range(len(inputs.adapters))]

    def run(state: Tensors) -> list[Array]:
        continuations = generate(
            session,
            [fed[adapter][prompt] for adapter, prompt in visits],
            plan,
            state=state,
            forced=[forced[adapter * prompts + prompt] for adapter, prompt in visits],
            adapter_ids=[adapter for adapter, _ in visits],
        )
        ordered = dict(zip(visits, continuations, strict=True))
        return [ordered[visit] for visit in sorted(visits)]

    logits, again = run(stack_adapters(inputs.adapters)), run({})
    return {"logits": np.concatenate(logits), "again": np.concatenate(again[: 2 * prompts])}
