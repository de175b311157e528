# SPDX-License-Identifier: Apache-2.0
"""Runs the original Hugging Face body, row by row, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from qeff_validate.errors import ConfigError
from qeff_validate.metrics import Floats
from qeff_validate.models.pooling import pooled, resolve_pooling
from qeff_validate.models.sources import foreign
from qeff_validate.tensors import Array


def hidden_states(body: nn.Module, ids: Sequence[Array], dtype: str) -> Iterator[Floats | None]:
    """Yield the hidden states of each row ``[n, hidden]`` in float64; None for a row without a token.

    Each row runs by itself at its natural length, so no padding and no neighbour can touch it.
    """
    with torch.inference_mode(), computing_in(body, dtype):
        for row in ids:
            if row.size == 0:
                yield None
                continue
            tokens = torch.from_numpy(np.ascontiguousarray(row))[None]
            with foreign("run the Hugging Face model"):
                out: Any = body(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            hidden = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
            if hidden is None:
                raise ConfigError(
                    f"{type(body).__name__} returns no last_hidden_state but {', '.join(out.keys())}:"
                    " give the body (AutoModel), not a model with a task head"
                )
            yield hidden[0].to(torch.float64).numpy()


def pooled_alone(pooling: Any, tokens: Floats, dtype: str) -> Floats:
    """Run a custom torch pooling on one unpadded row ``[n, hidden]`` and return its vector in float64."""
    hidden = torch.from_numpy(tokens).to(getattr(torch, dtype))[None]
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    with torch.inference_mode():
        vector = pooled(resolve_pooling(pooling), pooling, hidden, mask)[0]
    array: Floats = vector.to(torch.float64).numpy()
    return array


@contextmanager
def computing_in(body: nn.Module, dtype: str) -> Iterator[None]:
    """Let a float32 body compute in ``dtype``; afterwards it is float32 again, bit for bit."""
    if dtype == "float32":
        yield
        return

    body.double()
    try:
        yield
    finally:
        body.float()
