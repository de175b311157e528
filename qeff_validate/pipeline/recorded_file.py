# SPDX-License-Identifier: Apache-2.0
"""Recorded files (``run --record``): inputs, reference outputs, floors and ceiling of a case in one safetensors file.

Inputs are ``ids``, ``lengths``, ``texts`` and what begins with ``inputs.``; floors and ceiling begin with ``floor.``;
``about`` says what was recorded, ``digest`` covers everything else, and all other tensors are outputs. A file that this
library did not write may hold outputs, or inputs and outputs, alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from qeff_validate.comparison.noise_floor import digest_of
from qeff_validate.errors import IncomparableError, Unavailable, ValidateError
from qeff_validate.files import regular_file
from qeff_validate.json_tensor import parse_json_tensor, text_of
from qeff_validate.prechecks.checks import ABOUT
from qeff_validate.tensors import Tensors, load_tensors

INPUTS = ("ids", "lengths", "texts")
"""Names of inputs, beside those that start with ``inputs.``."""

FLOOR = "floor."
"""Begins the names of tensors of floors and ceiling; the precision or ``ceiling`` comes next."""

DIGEST = "digest"
"""Name of the tensor with the hex SHA-256 of all others: whoever changes a bound's floor changes it."""


class _Tokens(BaseModel):
    asked: dict[str, Any]
    tokenizer: dict[str, Any]


class About(BaseModel):
    """What the tensor ``about`` says of inputs and reference."""

    model_config = ConfigDict(extra="ignore")

    model: dict[str, Any]
    tokens: _Tokens | None = None


def is_input(name: str) -> bool:
    """Say whether a tensor is an input."""
    return name in INPUTS or name.startswith("inputs.")


def outputs_of(tensors: Tensors) -> Tensors:
    """Return the outputs of the reference."""
    beside = (ABOUT, DIGEST)
    return {n: array for n, array in tensors.items() if n not in beside and not is_input(n) and not n.startswith(FLOOR)}


def sealed(tensors: Tensors) -> Tensors:
    """Return tensors with their digest."""
    return {**tensors, DIGEST: np.frombuffer(digest_of(tensors).encode(), dtype=np.uint8)}


def read_recorded(path: Path) -> Tensors:
    """Read a recorded file.

    Raises:
        Unavailable: it is missing, or no safetensors file.
        IncomparableError: it was changed since, holds floors without a digest, or no output.
    """
    try:
        regular_file(path)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"cannot read {path}: {exc}") from exc
    tensors = load_tensors(path)
    with naming(path):
        floors = sorted(name for name in tensors if name.startswith(FLOOR))
        if DIGEST in tensors:
            rest = {name: array for name, array in tensors.items() if name != DIGEST}
            if text_of(tensors, DIGEST) != digest_of(rest):
                raise IncomparableError(
                    "it was changed since it was recorded: its digest does not fit. Record it anew (run --record)"
                )
        elif floors:
            raise IncomparableError(
                f"tensor {floors[0]!r} widens bounds, and no digest says that it was measured with these outputs:"
                f" record it anew (run --record), or leave out what begins with {FLOOR!r}"
            )
        inputs = sorted(name for name in tensors if is_input(name))
        if inputs and not set(INPUTS) <= set(inputs):
            raise IncomparableError(f"it holds {inputs[0]!r}, and inputs need all of {', '.join(map(repr, INPUTS))}")
        if ABOUT in tensors:
            parse_json_tensor(tensors, ABOUT, About)
        outputs = outputs_of(tensors)
        if not outputs:
            raise IncomparableError("it holds no output of a reference")
        wrong = [f"{name} ({array.dtype})" for name, array in outputs.items() if array.dtype.kind not in "fi"]
        if wrong:
            raise IncomparableError(f"outputs of a reference are real numbers, these are not: {', '.join(wrong[:4])}")
    return tensors


@contextmanager
def naming(path: Path | str | None) -> Iterator[None]:
    """Let errors about what a recorded file holds begin with its path; None: there is no such file."""
    try:
        yield
    except ValidateError as exc:
        if path is None:
            raise
        raise IncomparableError(f"recorded file {path}: {exc}") from exc


def part(tensors: Tensors, name: str) -> dict[str, Any]:
    """Return the tensors of a floor or of the ceiling, by their names in it."""
    start = f"{FLOOR}{name}/"
    return {n.removeprefix(start): array for n, array in tensors.items() if n.startswith(start)}


def parts(stored: Mapping[str, Tensors]) -> dict[str, Any]:
    """Return the tensors of floors and ceiling, by their names in a recorded file."""
    return {f"{FLOOR}{name}/{key}": array for name, tensors in stored.items() for key, array in tensors.items()}
