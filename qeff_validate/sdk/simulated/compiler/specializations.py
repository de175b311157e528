# SPDX-License-Identifier: Apache-2.0
"""From symbolic to concrete dims: specializations, defined symbols, batch size (card-contract §6.1, §6.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import shape_inference

from ..errors import CompileError
from ..graph import Dims, shapes_of
from ..release import at_least
from .constant_folding import fold
from .static_shapes import check_static

Symbols = dict[str, int]


def read_specializations(path: Path) -> list[Symbols]:
    """Read the values of the symbols, one mapping per specialization (card-contract §6.2).

    The entries have the flat form, `{"batch_size": "1", …}`, or the named one, `{"name": "Prefill", "symbols": {…}}`.

    Raises:
        CompileError: the file is missing, or has another form.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["specializations"]
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: network specialization config is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CompileError(f'{path} is not {{"specializations": [...]}}: {error!r}') from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise CompileError(f"{path}: specializations must be a list of objects, with one at least")
    names = [entry["name"] for entry in entries if "symbols" in entry and "name" in entry]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise CompileError(f"{path}: the specialization name {repeated[0]} is not unique")
    # An older compiler takes the object of the named form for the value of a symbol.
    named = at_least(1, 22)
    return [_symbols(entry.get("symbols", entry) if named else entry, path) for entry in entries]


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {repeated[0]} is there twice")
    return dict(pairs)


def _symbols(entry: Any, path: Path) -> Symbols:
    if not isinstance(entry, dict):
        raise CompileError(f"{path}: symbols must be an object, not {entry!r}")
    for name, value in entry.items():
        if isinstance(value, dict | list):
            kind = "object" if isinstance(value, dict) else "array"
            text = f"[json.exception.type_error.302] type must be string, but is {kind}"
            raise CompileError(f"{text} ({path}: {name})")
    return {name: positive(value, f"{path}: {name}") for name, value in entry.items()}


def positive(value: Any, what: str) -> int:
    """Parse a positive integer, a number or a text.

    Raises:
        CompileError: it is neither.
    """
    text = "" if isinstance(value, bool) else str(value).strip()
    if not text.isdecimal() or int(text) < 1:
        raise CompileError(f"{what} must be a positive whole number, not {value!r}")
    return int(text)


def concrete_shapes(model: Any, assignments: Sequence[Symbols], batch: int | None) -> list[list[Dims]]:
    """Return, for each assignment of symbols, the dims of every input and then of every output.

    Args:
        model: ModelProto without functions.
        assignments: the values of the symbols, one mapping per specialization.
        batch: the size of leading dims without another value; None if not set.

    Raises:
        CompileError: a dim has no value or depends on data, or two assignments give the same input shapes.
    """
    shapes = []
    for symbols in assignments:
        inputs = [_input_dims(info, symbols, batch) for info in model.graph.input]
        inferred = _infer(model, inputs)
        check_static(inferred)
        shapes.append(inputs + _output_dims(model, inferred, symbols, inputs))
    count, seen = len(model.graph.input), set()
    for entry in shapes:
        if tuple(entry[:count]) in seen:
            raise CompileError(
                "No input that uniquely identifies specialization: two specializations give the input shapes "
                f"{[list(dims) for dims in entry[:count]]}; drop one, or add an input that differs"
            )
        seen.add(tuple(entry[:count]))
    return shapes


def symbols_of(graph: Any) -> set[str]:
    """Return the names of the symbolic dims of a graph's inputs."""
    return {dim.dim_param for info in graph.input for dim in info.type.tensor_type.shape.dim if dim.dim_param}


def _input_dims(info: Any, symbols: Mapping[str, int], batch: int | None) -> Dims:
    if not info.type.tensor_type.HasField("shape"):
        raise CompileError(f"Input '{info.name}' has no shape; export the model with one")
    dims = []
    for axis, dim in enumerate(info.type.tensor_type.shape.dim):
        value = dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param)
        if value is None and axis == 0:
            value = batch
        if value is None or value < 1:
            raise CompileError(
                f"All dims must be static: symbol {dim.dim_param or '(no name)'}, dim {axis} of input "
                f"'{info.name}', has no value; give it in the network specialization config or with "
                "-onnx-define-symbol"
            )
        dims.append(int(value))
    return tuple(dims)


def _output_dims(model: Any, inferred: Any, symbols: Mapping[str, int], inputs: Sequence[Dims]) -> list[Dims]:
    results = []
    for info, computed in zip(model.graph.output, inferred.graph.output, strict=True):
        declared, inferred_dims = _substituted(info, symbols), _substituted(computed, {})
        if declared is None or inferred_dims is None or len(declared) != len(inferred_dims):
            dims = inferred_dims if declared is None else declared
        else:
            dims = [b if a is None else a for a, b in zip(declared, inferred_dims, strict=True)]
        if dims is None or None in dims:
            unresolved = {d.dim_param for d in info.type.tensor_type.shape.dim if d.dim_param} - set(symbols)
            raise CompileError(
                f"All dims must be static: output '{info.name}' is {dims} for the input shapes "
                f"{[list(d) for d in inputs]}, by shape inference and by its symbols; "
                f"{f'symbol {min(unresolved)} has no value' if unresolved else 'name its dims'}"
            )
        if inferred_dims is not None and any(b not in (None, a) for a, b in zip(dims, inferred_dims, strict=True)):
            raise CompileError(f"Output '{info.name}' is declared as {dims}, but computed as {inferred_dims}")
        results.append(tuple(int(dim) for dim in dims if dim is not None))
    return results


def _substituted(info: Any, symbols: Mapping[str, int]) -> list[int | None] | None:
    shape = info.type.tensor_type.shape
    if not info.type.tensor_type.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param) for dim in shape.dim]


def _infer(model: Any, inputs: Sequence[Dims]) -> Any:
    static = onnx.ModelProto()
    static.CopyFrom(model)
    # These are for symbolic dims; inference for the concrete ones starts without them.
    del static.graph.value_info[:]
    for info, dims in zip(static.graph.input, inputs, strict=True):
        for dim, value in zip(info.type.tensor_type.shape.dim, dims, strict=True):
            dim.dim_value = value
    for info in static.graph.output:
        info.type.tensor_type.ClearField("shape")
    inferred = _inferred(static)
    while any(None in (_substituted(info, {}) or (None,)) for info in inferred.graph.output):
        if not fold(static, shapes_of(inferred.graph)):
            break
        inferred = _inferred(static)
    return inferred


def _inferred(model: Any) -> Any:
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # onnx raises plain RuntimeError and its own types, depending on the version
        raise CompileError(f"QAIC_ERROR: Error message: shape inference failed: {error}") from error
