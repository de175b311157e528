# SPDX-License-Identifier: Apache-2.0
"""The greedy part of on-device sampling: the graph's output ``next_tokens`` against its own logits. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.verdict import GateResult
from qeff_validate.errors import RunError
from qeff_validate.protocols import Session
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Array, Tensors

NEXT_TOKENS = "next_tokens"
"""Upstream's name of the token that the graph chooses for each row, int64 ``[batch_size, 1, 1]``."""


class NextTokenMonitor(SessionWrapper):
    """A session that measures how far the logits of the tokens that the graph chooses are from the greatest.

    Args:
        session: open, with the outputs ``logits`` and ``next_tokens``.

    Raises:
        RunError: in a run, the tokens have another shape.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._gaps: list[Array] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run, and compare where logits are fetched."""
        if fetch is None or "logits" not in fetch:
            return self.session.run(feeds, fetch=fetch)
        outputs = self.session.run(feeds, fetch=[*fetch, NEXT_TOKENS])
        logits, tokens = outputs["logits"], outputs[NEXT_TOKENS]
        if tokens.shape != (len(logits), 1, 1):
            raise RunError(f"{NEXT_TOKENS} have shape {list(tokens.shape)}, wanted [{len(logits)}, 1, 1]")
        used = feeds["position_ids"].max(axis=1) >= 0
        self._gaps.append(token_gaps(logits[used, -1], tokens[used, 0, 0]))
        return {name: outputs[name] for name in fetch}

    def gaps(self) -> Array:
        """Return the gap of each row of each run, float64 ``[n]``."""
        return np.concatenate([np.zeros(0), *self._gaps])


def token_gaps(logits: NDArray[Any], tokens: NDArray[Any]) -> Array:
    """Return for each row the greatest logit minus the token's, float64 ``[n]``; infinite for no token.

    Args:
        logits: ``[n, vocab]``.
        tokens: ids, ``[n]``.
    """
    valid = (tokens >= 0) & (tokens < logits.shape[1])
    chosen = logits[np.arange(len(logits)), np.where(valid, tokens, 0)].astype(np.float64)
    with np.errstate(invalid="ignore"):  # logits may be infinite
        gaps: Array = np.where(valid, logits.max(axis=1).astype(np.float64) - chosen, np.inf)
    return gaps


def next_token_gate(gaps: Array) -> GateResult:
    """Return the gate on the tokens that the graph chooses: each has the greatest logit of its row."""
    wrong = ~(gaps == 0)
    metric = Metric("sampler.wrong", float(wrong.sum()), {"rows": int(wrong.size)})
    return GateResult(metric, Bound(0.0, "exact", "the graph chooses a token with the greatest of its own logits"))
