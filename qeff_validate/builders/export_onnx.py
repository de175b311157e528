# SPDX-License-Identifier: Apache-2.0
"""From a torch module to a checked ONNX file, with `torch.onnx.export` and symbolic dims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qeff_validate.builders.check_export import check_interface, check_other_sizes, dynamic_axes, symbols
from qeff_validate.builders.decompositions import needed_decompositions
from qeff_validate.builders.export_contexts import eval_mode, export_errors, no_jit_log, silent
from qeff_validate.builders.exporter_overhead import no_repeated_work
from qeff_validate.builders.fake_kernels import fake_kernels
from qeff_validate.builders.provenance import METADATA_KEY
from qeff_validate.memory import without_collection
from qeff_validate.models.framework_calls import versions
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Tensors, retained

Exporter = Literal["dynamo", "torchscript"]

OPSET = 18
EXTERNAL_BYTES = 64 << 20
"""Weights beyond this size are stored as external data; a protobuf message must stay below 2 GiB."""


def export_key(exporter: Exporter = "dynamo") -> Mapping[str, Any]:
    """Return plain data that changes with everything an export depends on beside the model."""
    packages = ("onnxscript", "onnx-ir") if exporter == "dynamo" else ("onnxruntime",)
    return {"exporter": exporter, "opset": OPSET, **versions("torch", "transformers", "onnx", *packages)}


def export_onnx(
    module: Any,
    examples: Tensors,
    graph: Graph,
    folder: Path,
    exporter: Exporter = "dynamo",
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.onnx`` (and ``model.onnx.data`` if the weights are large) into a folder.

    Args:
        module: torch module; it is exported in eval mode, and every submodule returns to its previous mode.
        examples: one example array for each input.
        graph: names and symbolic dims; every symbol becomes a dynamic dim.
        folder: an existing, empty directory.
        exporter: ``dynamo`` (torch.export) or ``torchscript`` (tracing; faster, and an alternative where torch.export
            refuses a model).
        fingerprint: of the model wrapper, stored in the file's metadata.

    Raises:
        BuildError: the exporter or the checker refuses; the message names the reason, and the op if it is known.
    """
    import torch

    inputs = {spec.name: torch.from_numpy(examples[spec.name]) for spec in graph.inputs}
    path = folder / "model.onnx"
    metadata = {} if fingerprint is None else {METADATA_KEY: json.dumps(fingerprint, sort_keys=True)}
    with silent(), eval_mode(module), without_collection():
        (_torchscript if exporter == "torchscript" else _dynamo)(module, inputs, graph, path, metadata)
    check_interface(path, graph)
    if exporter == "torchscript":
        check_other_sizes(path, examples, graph)


def _positional(module: Any, names: Sequence[str]) -> Any:
    """Return a module that takes its inputs by position.

    Tracing supports no keyword arguments, and ``past_key.0`` is no Python identifier.
    """
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

    axes = dynamic_axes(graph)
    dims = {symbol: torch.export.Dim(symbol) for by_axis in axes.values() for symbol in by_axis.values()}
    shapes = {name: {axis: dims[symbol] for axis, symbol in by_axis.items()} for name, by_axis in axes.items()}
    if all(name.isidentifier() for name in inputs):
        arguments: dict[str, Any] = {"kwargs": inputs, "dynamic_shapes": shapes}
    else:
        module = _positional(module, list(inputs))
        arguments = {"args": tuple(inputs.values()), "dynamic_shapes": (tuple(shapes[name] for name in inputs),)}
    with export_errors(), no_repeated_work(), fake_kernels(), needed_decompositions():
        program = torch.onnx.export(
            module,
            **arguments,
            input_names=list(inputs),
            output_names=[spec.name for spec in graph.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        initializers = list(program.model.graph.initializers.values())
        if retained(graph.inputs, graph.outputs):
            _simplify(program.model)
        else:
            program.optimize()
    initializers += program.model.graph.initializers.values()
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine, half of the file
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    program.model.metadata_props.update(metadata)
    with export_errors():  # a constant that was traced without its content fails only here
        program.save(path, external_data=size > EXTERNAL_BYTES)
    for value in initializers:
        value.const_value = None  # the optimizer's rules keep the last graph alive, and with it the module's weights


def _simplify(model: Any) -> None:
    """Fold constants and merge common subexpressions of a decoder, in seconds.

    The exporter's own optimizer tries hundreds of rewrites at each node: 108 s for a decoder of 30 layers, and ONNX
    Runtime runs the result no faster.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for node in model.graph.all_nodes():
        perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
        # an indexed write comes with one on each side, which ONNX Runtime carries out: two copies of the cache
        if perm is not None and list(perm.as_ints()) == sorted(perm.as_ints()):
            node.op_type = "Identity"
            node.attributes.clear()
    for make_pass in (
        common.IdentityEliminationPass,
        common.CommonSubexpressionEliminationPass,
        common.RemoveUnusedNodesPass,
    ):
        make_pass()(model)


def _torchscript(module: Any, inputs: dict[str, Any], graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    import onnx
    import torch

    dynamic = symbols(graph)
    output_axes = {
        spec.name: {axis: str(dim) for axis, dim in enumerate(spec.shape) if dim in dynamic} for spec in graph.outputs
    }
    raw = path.parent / "raw"  # beyond 2 GiB the exporter writes a file for each tensor
    raw.mkdir()
    with export_errors("; try exporter: dynamo"), no_jit_log():
        torch.onnx.export(
            _positional(module, list(inputs)).eval(),
            tuple(inputs.values()),
            raw / path.name,
            input_names=list(inputs),
            output_names=list(output_axes),
            dynamic_axes={**dynamic_axes(graph), **output_axes},
            opset_version=OPSET,
            dynamo=False,
            verbose=False,
        )
    model = onnx.load(str(raw / path.name))
    shutil.rmtree(raw)
    with torch.inference_mode():
        outputs = module(**inputs)
    # tracing leaves the static dims of outputs open, but a compiler for fixed shapes needs them
    for value, tensor in zip(model.graph.output, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
            if dim.dim_param not in dynamic:
                dim.dim_value = size
    onnx.helper.set_model_props(model, dict(metadata))
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > EXTERNAL_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data", size_threshold=1024)
