# SPDX-License-Identifier: Apache-2.0
"""From a torch module to a checked ONNX file, with `torch.onnx.export` and symbolic dims."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qeff_validate.builders.provenance import KEY
from qeff_validate.builders.store import NO_ROOM
from qeff_validate.errors import BuildError
from qeff_validate.models.framework_calls import versions
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Tensors, retained

Exporter = Literal["dynamo", "torchscript"]

OPSET = 18
EXTERNAL_BYTES = 64 << 20
"""Weights beyond this size go to a file of their own; a protobuf must stay below 2 GiB."""


CHATTY = ("torch.onnx", "torch.fx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


def export_key(exporter: Exporter = "dynamo") -> Mapping[str, Any]:
    """Return what the exporter's output depends on besides the model."""
    used = ("onnxscript", "onnx-ir") if exporter == "dynamo" else ("onnxruntime",)
    return {"exporter": exporter, "opset": OPSET, **versions("torch", "transformers", "onnx", *used)}


def export_onnx(
    module: Any,
    examples: Tensors,
    graph: Graph,
    folder: Path,
    exporter: Exporter = "dynamo",
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.onnx`` (and ``model.onnx.data`` if the weights are large) into a folder.

    Args:
        module: torch module; it is exported in eval mode and is left in the modes that it was in.
        examples: one example array for each input.
        graph: names and symbolic dims; every symbol becomes a dynamic dim.
        folder: an existing, empty directory.
        exporter: ``dynamo`` (torch.export) or ``torchscript`` (tracing; quicker, for what torch.export refuses).
        made_from: the fingerprint of the model wrapper, kept in the file's metadata.

    Raises:
        BuildError: the exporter or the checker refuses; the message names the reason, with the op if it is known.
    """
    import torch

    inputs = {spec.name: torch.from_numpy(examples[spec.name]) for spec in graph.inputs}
    path = folder / "model.onnx"
    metadata = {} if made_from is None else {KEY: json.dumps(made_from, sort_keys=True)}
    with _silent(), _evaluating(module), _without_collections():
        (_torchscript if exporter == "torchscript" else _dynamo)(module, inputs, graph, path, metadata)
    check(path, graph)
    if exporter == "torchscript":
        _try_other_sizes(path, examples, graph)


def _axes(graph: Graph) -> dict[str, dict[int, str]]:
    """Return the symbol of each dynamic axis of each input."""
    return {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in graph.inputs
    }


def _positional(module: Any, names: Sequence[str]) -> Any:
    """Return the module with its inputs by place: tracing knows no others, and ``past_key.0`` is no Python name."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> Any:
            return self.module(**dict(zip(names, tensors, strict=True)))

    return Positional()


def _dynamo(module: Any, inputs: dict[str, Any], graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    import torch

    axes = _axes(graph)
    symbols = {dim: torch.export.Dim(dim) for named in axes.values() for dim in named.values()}
    shapes = {name: {axis: symbols[dim] for axis, dim in named.items()} for name, named in axes.items()}
    if all(name.isidentifier() for name in inputs):
        given: dict[str, Any] = {"kwargs": inputs, "dynamic_shapes": shapes}
    else:
        module = _positional(module, list(inputs))
        given = {"args": tuple(inputs.values()), "dynamic_shapes": (tuple(shapes[name] for name in inputs),)}
    with _translated():
        program = torch.onnx.export(
            module,
            **given,
            input_names=list(inputs),
            output_names=[spec.name for spec in graph.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        weights = list(program.model.graph.initializers.values())
        if retained(graph.inputs, graph.outputs):
            _tidy(program.model)
        else:
            program.optimize()
    weights += program.model.graph.initializers.values()
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine, half of the file
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    program.model.metadata_props.update(metadata)
    with _translated():  # a constant that was traced without its content shows only here
        program.save(path, external_data=size > EXTERNAL_BYTES)
    for value in weights:
        value.const_value = None  # the optimizer's rules remember the last graph, and with it the module's weights


def _tidy(model: Any) -> None:
    """Fold constants and merge what is computed twice, in seconds.

    The exporter's own optimizer tries hundreds of rewrites at each node: 108 s for a decoder of 30 layers, and ONNX
    Runtime is no faster for it.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for make in (
        common.IdentityEliminationPass,
        common.CommonSubexpressionEliminationPass,
        common.RemoveUnusedNodesPass,
    ):
        make()(model)


def _torchscript(module: Any, inputs: dict[str, Any], graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    import onnx
    import torch

    symbols = _symbols(graph)
    outputs = {
        spec.name: {axis: str(dim) for axis, dim in enumerate(spec.shape) if dim in symbols} for spec in graph.outputs
    }
    raw = path.parent / "raw"  # beyond 2 GiB the exporter writes a file for each tensor
    raw.mkdir()
    with _translated(), _unlogged():
        torch.onnx.export(
            _positional(module, list(inputs)).eval(),
            tuple(inputs.values()),
            raw / path.name,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**_axes(graph), **outputs},
            opset_version=OPSET,
            dynamo=False,
            verbose=False,
        )
    model = onnx.load(str(raw / path.name))
    shutil.rmtree(raw)
    with torch.inference_mode():
        made = module(**inputs)
    # tracing leaves the widths of outputs open, and a compiler for fixed shapes wants them
    for value, array in zip(model.graph.output, made if isinstance(made, tuple) else (made,), strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, array.shape, strict=True):
            if dim.dim_param not in symbols:
                dim.dim_value = size
    onnx.helper.set_model_props(model, dict(metadata))
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data", size_threshold=1024)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep C++ from printing the whole graph to stdout, past `sys.stdout`, when an op has no ONNX equivalent.

    The exporter means to print only if asked, but tests the function that tells instead of calling it.
    """
    from torch import _C

    kept = getattr(_C, "_jit_onnx_log", None)
    _C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        if kept is not None:
            _C._jit_onnx_log = kept


def _try_other_sizes(path: Path, examples: Tensors, graph: Graph) -> None:
    """Run a traced graph at sizes other than the example's: tracing labels dims as free without a proof.

    Raises:
        BuildError: the graph runs at the example's sizes alone.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        sizes: dict[str, int] = {}
        for name, axes in _axes(graph).items():
            sizes.update({dim: examples[name].shape[axis] + 2 for axis, dim in axes.items()})
        grown = {
            spec.name: np.resize(
                examples[spec.name], [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            )
            for spec in graph.inputs
        }
        session.run(None, grown)
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise BuildError(
            f"torch.onnx.export (torchscript) fixed sizes of the example: the graph fails at {sizes}:"
            f" {_reason(exc)}; try exporter: dynamo"
        ) from exc


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


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # an exporter raises whatever its tracer met
        if isinstance(exc, OSError) and exc.errno in NO_ROOM:
            raise
        raise BuildError(f"torch.onnx.export failed: {_stopped_by(exc)}{_reason(exc)}") from exc


def _stopped_by(exc: BaseException) -> str:
    """Return "op x: " or "at LINE: " where the exporter tells."""
    text = "\n".join(str(cause) for cause in _causes(exc))
    op = re.search(r"OpOverload\(op='([\w.]+)'|operator '([\w:]+)'", text)
    if op:
        return f"op {(op[1] or op[2]).replace('::', '.')}: "
    lines = re.findall(r'File "[^"]*?([^"/]+)", line (\d+), in \w+\n[ \t]+(\S.*)', text)
    return "at {2} ({0}:{1}): ".format(*lines[-1]) if lines else ""


def _causes(exc: BaseException) -> Iterator[BaseException]:
    yield exc
    while exc.__cause__ is not None:
        exc = exc.__cause__
        yield exc


def _reason(exc: BaseException) -> str:
    """Return the innermost cause in a line or two: the exporter wraps it in pages."""
    *_, last = _causes(exc)
    lines = [line.strip() for line in str(last).splitlines() if line.strip()]
    return f"{type(last).__name__}: {' '.join(lines[:3])[:500]}"


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Put every part into eval mode, and afterwards back into its own.

    The TorchScript exporter restores the mode of the outermost module on all parts: training, if that one alone was.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Disable garbage collection: an export allocates millions of objects that stay alive.

    SmolLM2: 48.8 s of processor time with collections, 41.6 s without, and 6 % more memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter's own chatter off the terminal; what matters of it comes as an exception."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
