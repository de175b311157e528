# SPDX-License-Identifier: Apache-2.0
"""From a torch module to a checked ONNX file, with `torch.onnx.export` and symbolic dims."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qeff_validate.errors import BuildError
from qeff_validate.models.sources import versions
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Tensors

OPSET = 18
EXTERNAL_BYTES = 64 << 20
"""Weights beyond this size go to a file of their own; a protobuf must stay below 2 GiB."""


def export_key() -> Mapping[str, Any]:
    """Return what the exporter's output depends on besides the model."""
    return {"exporter": "dynamo", "opset": OPSET, **versions("torch", "transformers", "onnx", "onnxscript", "onnx-ir")}


def export_onnx(module: Any, examples: Tensors, graph: Graph, folder: Path) -> None:
    """Write ``model.onnx`` (and ``model.onnx.data`` if the weights are large) into a folder.

    Args:
        module: torch module in eval mode.
        examples: one example array for each input.
        graph: names and symbolic dims; every symbol becomes a dynamic dim.
        folder: an existing, empty directory.

    Raises:
        BuildError: the exporter or the checker refuses; the message names the reason, with the op if it is known.
    """
    import torch

    inputs = {spec.name: torch.from_numpy(examples[spec.name]) for spec in graph.inputs}
    symbols: dict[str, Any] = {}
    shapes = {
        spec.name: {
            axis: symbols.setdefault(dim, torch.export.Dim(dim))
            for axis, dim in enumerate(spec.shape)
            if isinstance(dim, str)
        }
        for spec in graph.inputs
    }
    path = folder / "model.onnx"
    with _silent():
        try:
            program = torch.onnx.export(
                module,
                kwargs=inputs,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=[spec.name for spec in graph.outputs],
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except Exception as exc:  # the exporter raises whatever its tracer met
            raise BuildError(f"torch.onnx.export failed: {_reason(exc)}") from exc
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine, half of the file
        weights = sum(
            v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None
        )
        program.save(path, external_data=weights > EXTERNAL_BYTES)
    del program
    check(path, graph)


def check(path: Path, graph: Graph) -> None:
    """Check an ONNX file and its interface.

    Raises:
        BuildError: `onnx.checker` refuses the file, or names or dims differ from the interface.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except (onnx.checker.ValidationError, ValueError, OSError) as exc:
        raise BuildError(f"the ONNX checker refuses {path.name}: {_reason(exc)}") from exc
    proto = onnx.load(str(path), load_external_data=False).graph
    for what, specs, values in (("inputs", graph.inputs, proto.input), ("outputs", graph.outputs, proto.output)):
        wanted, got = [spec.name for spec in specs], [value.name for value in values]
        if wanted != got:
            raise BuildError(f"the exported graph has {what} {got}, wanted {wanted}")
        for spec, value in zip(specs, values, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            fixed = [
                name for name, dim in zip(spec.shape, dims, strict=True) if name in _symbols(graph) and dim != name
            ]
            if fixed:
                raise BuildError(f"the exported graph fixed {fixed} of {value.name!r}: its dims are {dims}")


def _symbols(graph: Graph) -> set[int | str]:
    return {dim for spec in graph.inputs for dim in spec.shape if isinstance(dim, str)}


def _reason(exc: BaseException) -> str:
    """Return the innermost cause in a line or two: the exporter wraps it in pages."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {' '.join(lines[:3])[:500]}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter's own chatter off the terminal; what matters of it comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
