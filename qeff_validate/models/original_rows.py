# SPDX-License-Identifier: Apache-2.0
"""Runs an original Hugging Face model on rows of token ids: unpadded in float32 or float64, or in padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small
from qeff_validate.models.row_order import probes, refuse_change
from qeff_validate.models.token_rows import padded, together
from qeff_validate.tensors import Array


class RunRows(Protocol):
    """Runs a model on token ids, a mask and token types, int64 ``[rows, n]`` each; returns ``[rows, …]``."""

    def __call__(self, model: Any, ids: Tensor, mask: Tensor, types: Tensor | None, /) -> Tensor:
        """Return the output."""


def unpadded_outputs(
    model: nn.Module,
    run: RunRows,
    ids: Sequence[Array],
    dtype: str,
    *,
    labels: Sequence[str] = (),
    types: Sequence[Array] = (),
    attended: Sequence[Array] = (),
    per_token: bool = True,
) -> Iterator[tuple[int, Floats]]:
    """Yield the index and the output, float64, of each row with a token; the shortest rows first.

    Rows are batched with rows of equal length only, so there is no padding. With ``labels`` some rows are run again at
    the end.

    Raises:
        UnstableReferenceError: at the end, if those rows give other values than before.
    """
    longest = max(range(len(ids)), key=lambda row: ids[row].size)
    repeated = probes([row.size for row in ids]) if labels else []
    first: dict[int, Floats] = {}
    outputs = partial(batched_outputs, model, run, ids, types=types, attended=attended, per_token=per_token)

    def run_alone(row: int) -> Floats:
        ((_, output),) = outputs([[row]])
        return output

    probe = partial(run_alone, longest)
    with torch.inference_mode(), one_thread_if_small(model), compute_in_dtype(model, dtype, probe=probe):
        for row, output in outputs(together(ids)):
            if row in repeated:
                first[row] = output
            yield row, output
        refuse_change(first, run_alone, labels)


def batched_outputs(
    model: nn.Module,
    run: RunRows,
    ids: Sequence[Array],
    batches: Iterable[Sequence[int]],
    *,
    pad: int = 0,
    types: Sequence[Array] = (),
    attended: Sequence[Array] = (),
    per_token: bool = True,
) -> Iterator[tuple[int, Floats]]:
    """Yield the index and the output, float64, of each row of some batches, padded on the right.

    Args:
        model: computes in float32, or in an emulated precision.
        run: runs it.
        ids: token ids of each row, int64 ``[n]``.
        batches: indices of rows.
        pad: id of the padding token.
        types: token types of each row; empty: none are fed.
        attended: 1 for each token under the mask; empty: all are.
        per_token: an output has one vector per token, so padding is cut off.
    """
    for rows in batches:
        length = max(ids[row].size for row in rows)
        batch, token_types, seen = (
            [values[row] for row in rows] if values else [] for values in (ids, types, attended)
        )
        fed = padded(batch, len(rows), length, pad=pad, side="right", types=token_types, attended=seen)
        input_ids, mask, token_type_ids = (torch.from_numpy(array) for array in fed.values())
        outputs = run(model, input_ids, mask, token_type_ids if types else None)
        for row, output in zip(rows, outputs, strict=True):
            yield row, (output[: ids[row].size] if per_token else output).to(torch.float64).numpy()
