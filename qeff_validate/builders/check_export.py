# SPDX-License-Identifier: Apache-2.0
"""Checks of an exported ONNX file: validity, interface, and that its symbolic dims are free."""

from __future__ import annotations

from pathlib import Path

from qeff_validate.builders.export_contexts import reason
from qeff_validate.errors import BuildError
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Tensors


def dynamic_axes(graph: Graph) -> dict[str, dict[int, str]]:
    """Return, for each input, the symbol of each of its dynamic axes."""
    return {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in graph.inputs
    }


def symbols(graph: Graph) -> set[int | str]:
    """Return the symbols in the shapes of the inputs."""
    return {dim for spec in graph.inputs for dim in spec.shape if isinstance(dim, str)}


def check_interface(path: Path, graph: Graph) -> None:
    """Check an ONNX file and its interface.

    Args:
        path: the ONNX file.
        graph: the expected inputs and outputs, with symbolic dims.

    Raises:
        BuildError: `onnx.checker` refuses the file, or names or dims differ from the interface.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=False)
    except (onnx.checker.ValidationError, ValueError, OSError) as exc:
        raise BuildError(f"the ONNX checker refuses {path.name}: {reason(exc)}") from exc
    exported = onnx.load(str(path), load_external_data=False).graph
    ports = (("inputs", graph.inputs, exported.input), ("outputs", graph.outputs, exported.output))
    for side, specs, values in ports:
        expected, names = [spec.name for spec in specs], [value.name for value in values]
        if expected != names:
            raise BuildError(f"the exported graph has {side} {names}, wanted {expected}")
        for spec, value in zip(specs, values, strict=True):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            pairs = zip(spec.shape, dims, strict=True)
            fixed = [symbol for symbol, dim in pairs if symbol in symbols(graph) and dim != symbol]
            if fixed:
                raise BuildError(f"the exported graph fixed {fixed} of {value.name!r}: its dims are {dims}")


def check_other_sizes(path: Path, examples: Tensors, graph: Graph) -> None:
    """Run a traced graph at sizes other than the example's: tracing labels dims as dynamic without a proof.

    Args:
        path: the ONNX file.
        examples: the arrays that it was traced with.
        graph: its interface.

    Raises:
        BuildError: the graph runs at the example's sizes only.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        sizes: dict[str, int] = {}
        for name, axes in dynamic_axes(graph).items():
            sizes.update({dim: examples[name].shape[axis] + 2 for axis, dim in axes.items()})
        feeds = {
            spec.name: np.resize(
                examples[spec.name], [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            )
            for spec in graph.inputs
        }
        session.run(None, feeds)
    except Exception as exc:  # ONNX Runtime's exceptions share no base class
        raise BuildError(
            f"torch.onnx.export (torchscript) fixed sizes of the example: the graph fails at {sizes}:"
            f" {reason(exc)}; try exporter: dynamo"
        ) from exc
