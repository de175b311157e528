# SPDX-License-Identifier: Apache-2.0
"""Runs the original Hugging Face body, row by row, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import ConfigError, UnstableReferenceError
from qeff_validate.models.embedding.pooling import pooled, resolve_pooling
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.models.original_rows import batched_outputs, unpadded_outputs
from qeff_validate.models.token_rows import together
from qeff_validate.tensors import Array

PADDING = 5
"""Number of padding tokens that a body is tried with."""

MAX_PADDING_SHIFT = 1e-3
"""Accepted relative L2 of a float32 body with padding that the mask hides: rounding gives 1e-6, large negative numbers
for infinity up to 1e-4."""


def hidden_states(
    body: nn.Module, ids: Sequence[Array], dtype: str, labels: Sequence[str] = ()
) -> Iterator[tuple[int, Floats]]:
    """Yield the index and hidden states, float64 ``[n, hidden]``, of each row with a token; the shortest rows first.

    Rows are batched with rows of equal length only, so there is no padding. With ``labels`` some rows are run again at
    the end.

    Raises:
        UnstableReferenceError: at the end, if those rows give other values than before.
    """
    return unpadded_outputs(body, _run, ids, dtype, labels=labels)


def unpadded_states(body: nn.Module, ids: Sequence[Array]) -> Iterator[tuple[int, Floats]]:
    """Yield like `hidden_states`, from a body whose precision and thread count are already set."""
    with torch.no_grad():
        yield from batched_outputs(body, _run, ids, together(ids))


def batched_states(body: nn.Module, ids: Sequence[Array], pad: int, batch: int | None) -> dict[int, Floats]:
    """Return the hidden states of `hidden_states` by row, computed in batches with padding.

    Args:
        body: computes in float32, or in an emulated precision.
        ids: token ids of each row, int64 ``[n]``.
        pad: id of the padding token.
        batch: rows of similar length per batch, padded on the right; None: batches of rows of equal length.
    """
    return dict(batched_outputs(body, _run, ids, together(ids, batch), pad=pad))


def padding_shift(body: nn.Module, rows: Sequence[Array], pad: int, side: str) -> float:
    """Return the relative L2 difference of hidden states with `PADDING` tokens of padding and without, the worst row.

    Args:
        body: the body, in eval mode.
        rows: token ids of some rows with a token.
        pad: id of the padding token.
        side: of the padding: ``left`` or ``right``.
    """
    shifts = [0.0]
    with torch.inference_mode():
        for row in rows:
            padded = np.full(row.size + PADDING, pad)
            tokens = slice(PADDING, None) if side == "left" else slice(0, row.size)
            padded[tokens] = row
            mask = np.zeros(padded.size)
            mask[tokens] = 1
            shifted = _run(body, *_tensors(padded, mask))[0, tokens]
            alone = _run(body, *_tensors(row, np.ones(row.size)))[0]
            shifts.append(float((shifted - alone).norm() / alone.norm()))
    return float(np.max(shifts))  # NaN if one is NaN


def refuse_padding(body: nn.Module, ids: Sequence[Array], pad: int) -> None:
    """Refuse a body whose hidden states depend on the padding behind a text, under a mask that hides it.

    The shortest row and the longest that has room are tried: behind the longest there may be no position left.

    Raises:
        UnstableReferenceError: they do.
    """
    by_length = sorted((row for row in ids if row.size), key=len)
    fitting = [row for row in by_length if row.size + PADDING <= by_length[-1].size]
    shift = padding_shift(body, [*fitting[:1], *fitting[1:][-1:]], pad, "right")
    if shift > MAX_PADDING_SHIFT:
        raise UnstableReferenceError(
            f"what {type(body).__name__} returns depends on the padding behind a text (relative L2 {shift:.1e}), which"
            " the mask should hide: a compiled program pads every text, so there is no one answer that it could give"
        )


def _tensors(ids: Array, mask: Array) -> tuple[Tensor, Tensor]:
    """Return a row's ids and mask ``[n]`` as int64 ``[1, n]``."""
    return torch.from_numpy(ids[None].astype(np.int64)), torch.from_numpy(mask[None].astype(np.int64))


def _run(body: Any, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Any:  # noqa: ARG001
    """Return the hidden states ``[rows, n, hidden]`` of rows ``[rows, n]``."""
    with translated_errors("run the Hugging Face model"):
        output: Any = body(input_ids=ids, attention_mask=mask)
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ConfigError(
            f"{type(body).__name__} returns no last_hidden_state but {', '.join(output.keys())}:"
            " give the body (AutoModel), not a model with a task head"
        )
    if hidden.shape[:2] != ids.shape:
        raise ConfigError(
            f"{type(body).__name__} returns {hidden.shape[1]} vectors for {ids.shape[1]} tokens, so a mask does not say"
            " which of them to pool: such a body is not supported"
        )
    return hidden


def pooled_alone(pooling: Any, tokens: Floats, dtype: str) -> Floats:
    """Run a custom torch pooling on one unpadded row ``[n, hidden]`` and return its vector in float64."""
    hidden = torch.from_numpy(tokens).to(getattr(torch, dtype))[None]
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    with torch.inference_mode():
        vector = pooled(resolve_pooling(pooling), pooling, hidden, mask)[0]
    array: Floats = vector.to(torch.float64).numpy()
    return array
