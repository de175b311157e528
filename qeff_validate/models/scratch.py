# SPDX-License-Identifier: Apache-2.0
"""Tensors in the page cache: their memory is a mapped file without a name, which the system can write to disk.

What is computed once of all weights of a large model (rounded, or converted to float32) would be a second copy of the
model in memory. The mapping is shared, so no page is the process's own, and the file is gone with the tensor.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

DISK = Path("/var/tmp")  # noqa: S108
"""Where temporary files are kept on disk; ``/tmp`` is a part of the memory on many systems."""

LEAST = 1 << 20
"""Bytes of the smallest tensor that gets a file; smaller ones are in memory."""

PIECE = 1 << 22
"""Elements that `filled` computes at a time."""


def scratch_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor in a mapped file; in memory if it is small, or if there is no room for a file."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST or not hasattr(os, "posix_fallocate"):
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=_folder()) as file:  # never has a name, so nothing is left of a killed process
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk would end the process at the first write
            name = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(tuple(shape))
    except (OSError, RuntimeError):
        return torch.empty(tuple(shape), dtype=dtype)


def filled(source: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return an elementwise function of a tensor as a scratch tensor, computed in pieces.

    Args:
        source: of any shape.
        dtype: of the result.
        function: maps a part of the source, in one dim, to its result, which may have another dtype.
    """
    target = scratch_tensor(source.shape, dtype)
    if not source.is_contiguous():
        return target.copy_(function(source))
    values, result = source.view(-1), target.view(-1)
    for start in range(0, values.numel(), PIECE):
        result[start : start + PIECE] = function(values[start : start + PIECE])
    return target


def _folder() -> str:
    """Return ``$TMPDIR``, else a directory for temporary files on disk."""
    if os.environ.get("TMPDIR") or not os.access(DISK, os.W_OK | os.X_OK):
        return tempfile.gettempdir()
    return str(DISK)
