# SPDX-License-Identifier: Apache-2.0
"""What is timed of a language model: time to first token, inter-token latency, swap of adapters. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_validate.models.causal_lm.decode_loop import Plan, in_dtypes, padding, sizes, takes_ids, takes_start
from qeff_validate.protocols import Session, Workload
from qeff_validate.tensors import Array, Tensors


def decoder_workloads(
    session: Session, plan: Plan, tokens: Array, states: Sequence[Tensors], ctx_len: int
) -> list[Workload]:
    """Return the workloads of a decoder.

    Args:
        session: open, with inputs ``input_ids``, ``position_ids`` and retained state.
        plan: sizes of the decode loop.
        tokens: token ids to fill prompts with, int64 ``[n]``; repeated as often as needed.
        states: adapter tensors of the base and of each adapter; a mixed batch has the same stack for all.
        ctx_len: slots of the context.
    """
    batch, chunk = sizes(session, plan)
    fixed: Tensors = {"adapter_ids": np.zeros(batch, dtype=np.int64)} if takes_ids(session) else {}
    if takes_start(session):
        fixed = {**fixed, "adapter_start": np.zeros(batch, dtype=np.int64)}
    idle = padding(session, plan)

    def step(start: int, length: int) -> Tensors:
        """Return the feeds of ``length`` tokens of each row from position ``start``."""
        ids = np.resize(tokens, start + length)[start:]
        places = np.arange(start, start + length)
        feeds = {"input_ids": np.tile(ids, (batch, 1)), "position_ids": np.tile(places, (batch, 1)), **fixed}
        return in_dtypes(session, feeds)

    def swap(state: Tensors) -> Tensors:
        return {**idle, **in_dtypes(session, state)}

    longest = (ctx_len - 1) // chunk * chunk  # a decode step needs a slot behind it
    lengths = dict.fromkeys((min(chunk, longest), longest)) if longest else {}
    fetch, made = ("logits",), []
    for length in lengths:
        prefill = tuple(step(start, chunk) for start in range(0, length, chunk))
        where = f"prefill {length}, batch {batch}"
        before = (swap(states[0]),)
        made.append(Workload(where, "time_to_first_token", prefill, before, fetch, rows=batch))
        decode, filled = (step(length, 1),), (*before, *prefill)
        where = f"context {length}, batch {batch}"
        made.append(Workload(where, "inter_token", decode, filled, fetch, rows=0, tokens=batch))
    if len(states) > 1 and states[0] and not takes_ids(session):
        feeds = tuple(swap(state) for state in states[-2:])
        made.append(Workload(f"swap, batch {batch}", "adapter_swap", feeds, (), fetch, count=len(feeds), rows=0))
    return made
