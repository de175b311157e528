# SPDX-License-Identifier: Apache-2.0
"""JSON as a tensor of bytes, uint8 ``[n]``: how text lies in a safetensors file beside numbers."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from qeff_validate.errors import IncomparableError
from qeff_validate.tensors import Array, Tensors

T = TypeVar("T", bound=BaseModel)


def json_tensor(value: Any) -> Array:
    """Return plain data as the bytes of its JSON, uint8 ``[n]``."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def text_of(tensors: Tensors, name: str) -> str:
    """Return the UTF-8 text of a tensor.

    Raises:
        IncomparableError: it is missing, of another dtype or rank, or not UTF-8; the message names the tensor.
    """
    try:
        return _bytes_of(tensors, name).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise IncomparableError(f"tensor {name!r} holds no UTF-8 text: {exc}") from exc


def parse_json_tensor(tensors: Tensors, name: str, model: type[T]) -> T:
    """Return the content of a tensor as an instance of a pydantic class.

    Raises:
        IncomparableError: it is missing, no JSON, nested too deep, or of another form; the message names the tensor.
    """
    try:
        return model.model_validate_json(_bytes_of(tensors, name), strict=True)
    except ValidationError as exc:
        error = exc.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, error["loc"]))
        raise IncomparableError(f"tensor {name!r}: {f'{place[:80]}: ' if place else ''}{error['msg'][:200]}") from exc


def _bytes_of(tensors: Tensors, name: str) -> bytes:
    array = tensors.get(name)
    if array is None:
        raise IncomparableError(f"tensor {name!r} is missing")
    if array.dtype != np.uint8 or array.ndim != 1:
        raise IncomparableError(f"tensor {name!r} is {array.dtype} {list(array.shape)}, wanted text as uint8 [n]")
    return array.tobytes()
