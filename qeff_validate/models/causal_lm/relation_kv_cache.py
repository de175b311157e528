# SPDX-License-Identifier: Apache-2.0
"""The relation ``kv_cache``: keys and values of each layer after the prompt, against transformers' cache. Numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import FALLBACK, Bound
from qeff_validate.comparison.vector_metrics import worst_row
from qeff_validate.comparison.verdict import GateResult, Verdict, verdict_of_gates
from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.decode_loop import batches, generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan, padding
from qeff_validate.protocols import ComparisonContext, Session
from qeff_validate.tensors import Array, Tensors, retained

KeysAndValues = Sequence[Mapping[str, Array]]
"""For each prompt ``past_key.i`` and ``past_value.i`` ``[heads, tokens, head_dim]``; a window holds the last tokens."""


def compare_kv_cache(
    session: Session, inputs: Any, plan: Plan, state: Tensors, wanted: KeysAndValues, context: ComparisonContext
) -> Verdict:
    """Prefill all prompts, and compare the keys and values that the session retains with those of transformers.

    The error of a token is the L2 norm of the difference over the root mean square of the norms of the prompt's tokens,
    because the first token's keys may be near zero.

    Args:
        session: open.
        inputs: prompts.
        plan: batch size, chunk length and padding.
        state: the adapter's tensors.
        wanted: keys and values of the original model.
        context: precision.

    Raises:
        IncomparableError: the graph does not retain these keys and values.
    """
    if not wanted[0]:
        raise IncomparableError("the model keeps no keys and values")
    bound = FALLBACK.get(context.precision, {}).get("rel_l2")
    retained_states = _retained_states(session, inputs, plan, state, list(wanted[0]))
    planned = len(wanted) * len(wanted[0])
    results = []
    for name in wanted[0]:
        errors = np.array(
            [_error(expected[name], got[name]) for expected, got in zip(wanted, retained_states, strict=True)]
        )
        metric = worst_row(f"kv.{name.removeprefix('past_')}", errors)
        metric = replace(metric, worst={**metric.worst, "text": inputs.labels[metric.worst["row"]]})
        gate_bound = None if bound is None else Bound(bound, "fallback", f"{context.precision} profile")
        results.append(GateResult(metric, gate_bound))
    if bound is None:
        reason = f"no sound bound for keys and values in {context.precision}"
        return Verdict("inconclusive", reason, tuple(results), planned, planned)
    return verdict_of_gates(results, planned)


def _retained_states(session: Session, inputs: Any, plan: Plan, state: Tensors, names: Sequence[str]) -> KeysAndValues:
    """Return the keys and values that the session retains of each prompt, ``[heads, tokens, head_dim]``."""
    twins = retained(session.inputs, session.outputs)
    missing = sorted(set(names) - set(twins))
    if missing:
        raise IncomparableError(f"the graph does not retain {', '.join(missing[:4])}")
    states: list[dict[str, Array]] = []
    for _, prompts in batches(session, inputs.ids, plan):
        generate(session, prompts, replace(plan, max_new_tokens=1), state=state)
        outputs = session.run(padding(session, plan), fetch=[twins[name] for name in names])
        states += [
            {name: outputs[twins[name]][row, :, : tokens.size] for name in names} for row, tokens in enumerate(prompts)
        ]
    return states


def _error(wanted: Array, got: Array) -> float:
    """Return the worst token's error; NaN if anything is not finite."""
    expected = wanted.astype(np.float64)
    actual = got[:, -expected.shape[1] :].astype(np.float64)
    if actual.shape != expected.shape:
        return float("nan")
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(expected, axis=(0, 2))
        apart = np.linalg.norm(actual - expected, axis=(0, 2))
        return float(apart.max() / np.sqrt(np.mean(norms**2)))
