# SPDX-License-Identifier: Apache-2.0
"""Lets transformers convert a large checkpoint of half precision to float32 without a copy in memory.

A float32 checkpoint is mapped by transformers, and its weights are pages of the file. Of another dtype, each tensor is
converted when it is loaded; here the result goes to a mapped file (`scratch`), one tensor at a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qeff_validate.models.framework_calls import replaced
from qeff_validate.models.sources.checkpoint import StoredTensor

LARGE = 1 << 28
"""Bytes of float32 weights above which tensors are converted to files; a file for each costs time."""


@contextmanager
def converted_in_files(stored: Mapping[str, StoredTensor]) -> Iterator[None]:
    """Within this context transformers converts the tensors of a large checkpoint to mapped files.

    A version of transformers that reads tensors in another way than this knows converts them in memory.
    """
    from transformers import core_model_loading

    previous = getattr(core_model_loading, "_materialize_copy", None)
    large = sum(4 * math.prod(tensor.shape) for tensor in stored.values()) > LARGE
    if not large or previous is None or [*inspect.signature(previous).parameters] != ["tensor", "device", "dtype"]:
        yield
        return

    def materialize(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        from qeff_validate.models.scratch import filled

        values = tensor[...]
        if dtype in (None, values.dtype) or str(device or "cpu") != "cpu":
            return previous(values, device, dtype)
        return filled(values, dtype, lambda part: part)

    with replaced(core_model_loading, "_materialize_copy", materialize):
        yield
