# SPDX-License-Identifier: Apache-2.0
"""What crosses every border: named numpy arrays, their specifications, and their files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qeff_validate.errors import RunError, Unavailable, suggest

Array = NDArray[np.generic]
Tensors = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]
"""One allowed combination: the dims of every input and output, by name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, numpy dtype name and dims of a tensor; a dim is an int or a symbol such as ``batch_size``.

    Examples:
        >>> print(TensorSpec("input_ids", "int64", ("batch_size", 32)))
        input_ids: int64[batch_size, 32]
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


RETAINED = "_RetainedState"
"""Suffix of the output that becomes the next content of the input before it (card-contract §4.5)."""


def retained(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Return the retained state of an interface: each input that has a twin among the outputs, with its twin."""
    names = {spec.name for spec in outputs}
    return {spec.name: f"{spec.name}{RETAINED}" for spec in inputs if f"{spec.name}{RETAINED}" in names}


def undefined(shape: Sequence[int], dtype: str) -> Array:
    """Return an array that shows if it is taken for a value: NaN, or the lowest integer."""
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return np.zeros(shape, dtype=kind)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).min, dtype=kind)


def fits(shape: Sequence[int], spec: Sequence[int | str], symbols: dict[str, int]) -> bool:
    """Say whether a shape fits dims with symbols; each symbol takes its value from where it is met first."""
    if len(shape) != len(spec):
        return False
    return all(
        size == (symbols.setdefault(dim, size) if isinstance(dim, str) else dim)
        for size, dim in zip(shape, spec, strict=True)
    )


def check_names(what: str, given: Sequence[str], specs: Sequence[TensorSpec], optional: Sequence[str] = ()) -> None:
    """Raise RunError unless the names are exactly those of the specs; both sides are listed.

    Args:
        what: the noun of the message, "input" or "output".
        given: the names at hand.
        specs: what is wanted.
        optional: names that may be left out (retained state).
    """
    known = [spec.name for spec in specs]
    unknown = [name for name in given if name not in known]
    missing = [name for name in known if name not in given and name not in optional]
    if unknown or missing:
        text = f"{what} names do not match: given {sorted(given)}, wanted {sorted(known)}"
        if missing:
            text += f"; missing {missing}"
        if unknown:
            text += f"; unknown {unknown}.{suggest(unknown[0], known)}"
        raise RunError(text)


def check_feeds(feeds: Tensors, specs: Sequence[TensorSpec], *, optional: Sequence[str] = ()) -> dict[str, int]:
    """Raise RunError unless the feeds have exactly the wanted names, dtypes and shapes; return the symbols' values.

    The dtype is checked here because a card cannot see it: only item size and dims travel (card-contract §4.2).
    """
    check_names("input", list(feeds), specs, optional)
    symbols: dict[str, int] = {}
    for spec in specs:
        if spec.name not in feeds:
            continue
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise RunError(f"input {spec.name!r} is a {type(array).__name__}, wanted a numpy array")
        if array.dtype.name != spec.dtype:
            raise RunError(
                f"input {spec.name!r} has dtype {array.dtype.name}, wanted {spec.dtype}: convert it with .astype()"
            )
        if not fits(array.shape, spec.shape, symbols):
            raise RunError(f"input {spec.name!r} has shape {list(array.shape)}, wanted {list(spec.shape)}")
    return symbols


def wanted_outputs(outputs: Sequence[TensorSpec], fetch: Sequence[str] | None) -> list[str]:
    """Return the names of the outputs that were asked for, all if ``fetch`` is None.

    Raises:
        RunError: there is no output of such a name.
    """
    known = [spec.name for spec in outputs]
    for name in fetch or ():
        if name not in known:
            raise RunError(f"there is no output {name!r}.{suggest(name, known)}")
    return known if fetch is None else list(fetch)


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write named arrays to a safetensors file.

    Raises:
        OSError: it cannot be written: no room, or no permission.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, os.fspath(path))
    except SafetensorError as exc:  # it tells the system's error number in its text alone
        number = re.search(r"os error (\d+)", str(exc))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from exc


def load_tensors(path: Path) -> dict[str, Array]:
    """Read a safetensors file.

    Raises:
        Unavailable: the file is missing, cut short, no safetensors file, or holds a dtype that numpy does not know.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(os.fspath(path)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError, MemoryError) as exc:
        raise Unavailable(f"cannot read {path} as safetensors: {exc}") from exc
