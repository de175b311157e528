# SPDX-License-Identifier: Apache-2.0
"""Values of a model or graph as arrays: their errors, what of them belongs to tokens, and forms that take no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qeff_validate.models.scratch import scratch_tensor
from qeff_validate.tensors import Array


def relative_error(expected: Any, actual: Any) -> float:
    """Return the relative L2 difference; infinity if a value is not finite, or the shapes differ."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    if expected.size != actual.size or not np.isfinite(actual).all():
        return float("inf")
    with np.errstate(over="ignore"):  # a hypothesis may give numbers of any size
        norm = float(np.linalg.norm(expected))
        difference = float(np.linalg.norm(expected.ravel() - actual.ravel()))
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def of_tokens(array: Any, tokens: Array) -> Any:
    """Return the parts of a value that belong to tokens, ``[tokens, …]``; all of it if it has no such dims."""
    if array.shape[:2] == tokens.shape:  # without padding a view does
        return array.reshape(-1, *array.shape[2:]) if tokens.all() else array[tokens]
    if array.shape[:1] == (tokens.size,):
        return array if tokens.all() else array[tokens.ravel()]
    return array


def in_files(values: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays whose content is in one mapped file, which the system can write to disk.

    Those without content are returned as they are.
    """
    large = {name: array for name, array in values.items() if any(array.strides)}
    file = scratch_tensor([sum(array.nbytes for array in large.values())], torch.uint8).numpy()
    kept, start = dict(values), 0
    for name, array in large.items():
        part = file[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        part[...] = array
        kept[name], start = part, start + array.nbytes
    return kept


def without_content(array: Array) -> Array:
    """Return zeros of the dtype and shape of an array that take no memory."""
    zeros: Array = np.broadcast_to(array.dtype.type(0), array.shape)
    return zeros
