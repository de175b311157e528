# SPDX-License-Identifier: Apache-2.0
"""What is timed of a language model: time to first token, inter-token latency, swap of adapters. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_validate.models.causal_lm.decoder_feeds import Plan, idle_feeds, in_dtypes, padding, run_sizes, takes_ids
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
    sizes = run_sizes(session, plan)
    batch, chunk, idle = sizes.rows, sizes.lengths[-1], padding(session, plan)

    def step(start: int, length: int, rows: int) -> Tensors:
        """Return the feeds of ``length`` tokens of each row from position ``start``."""
        ids = np.resize(tokens, start + length)[start:]
        places = np.arange(start, start + length)
        feeds = {"input_ids": np.tile(ids, (rows, 1)), "position_ids": np.tile(places, (rows, 1))}
        fixed = idle_feeds(session, rows)
        always: Tensors = {"adapter_start": np.zeros(rows)} if "adapter_start" in fixed else {}
        return {**fixed, **in_dtypes(session, {**feeds, **always})}

    def swap(state: Tensors) -> Tensors:
        return {**idle, **in_dtypes(session, state)}

    longest = (ctx_len - 1) // chunk * chunk  # a decode step needs a slot behind it
    lengths = dict.fromkeys((min(chunk, longest), longest)) if longest else {}
    fetch, made = ("logits",), []
    for length in lengths:
        prefill = tuple(step(start, chunk, sizes.prefill_rows) for start in range(0, length, chunk))
        where = f"prefill {length}, batch {sizes.prefill_rows}"
        before = (swap(states[0]),)
        made.append(Workload(where, "time_to_first_token", prefill, before, fetch, rows=sizes.prefill_rows))
        decode, filled = (step(length, 1, batch),), (*before, *prefill)
        where = f"context {length}, batch {batch}"
        made.append(Workload(where, "inter_token", decode, filled, fetch, rows=0, tokens=batch))
    if len(states) > 1 and states[0] and not takes_ids(session):
        feeds = tuple(swap(state) for state in states[-2:])
        made.append(Workload(f"swap, batch {batch}", "adapter_swap", feeds, (), fetch, count=len(feeds), rows=0))
    return made
