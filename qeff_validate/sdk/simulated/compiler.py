# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaic-compile`: ONNX in, a QPC for the simulated card out (qaic-contract §6, §8).

Run as `python -m qeff_validate.sdk.simulated.compiler <flags>`. Exit code 0 and `<dir>/programqpc.bin`,
or 255, the reason on stderr, and no file. An existing binary directory is accepted unless it holds a
programqpc.bin: a program is never overwritten, and clients that clean up or reuse one themselves (QEfficient,
SDK samples) never ask for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import yaml
from google.protobuf.message import DecodeError
from onnx import inliner, shape_inference

from . import boundary, numerics, qpc
from .device import NSP_TOTAL
from .errors import CompileError
from .options import USAGE, Options, parse
from .release import base_version
from .shapes import Symbols, concrete_shapes, read_specializations, symbols_of
from .weights import Weight, detach

MAX_OPSET, MAX_IR = 21, 10
_STANDARD = ("", "ai.onnx")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the compiler and returns its exit code: 0, or 255 for every failure."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.show:
            print(base_version() if options.show == "version" else USAGE)
        else:
            _compile(options)
    except (CompileError, OSError) as error:
        print(error, file=sys.stderr)
        return 255
    return 0


def _compile(options: Options) -> None:
    path, directory = _checked(options)
    print(f"Reading ONNX Model from {path}")
    model, weights = _load(path)
    assignments = _assignments(options, model.graph)
    ports = boundary.ports(model.graph, _custom_io(options.custom_io))
    shapes = concrete_shapes(model, assignments, options.batch)
    retained = boundary.retained_pairs(ports, shapes) if options.retained_state else {}
    if options.retained_state and not retained:
        print("warning: -retained-state: no output X_RetainedState has an input X", file=sys.stderr)
    partial = {*retained, *retained.values()}
    desc = boundary.io_desc(ports, shapes, specialized=options.specializations is not None, partial=partial)
    print("Compile started ...............")
    if options.fp16:
        print("Compiling model with FP16 precision.")
        numerics.round_graph(model.graph, numerics.value_types(model.graph))
        weights = [numerics.round_weight(weight) for weight in weights]
    boundary.apply(model.graph, ports, fp16=options.fp16)
    # ONNX Runtime infers these itself.
    del model.graph.value_info[:]
    facts = {
        "num_cores": options.num_cores,
        "num_devices": 1,
        "hw_version": options.hw_version,
        "precision": "fp16" if options.fp16 else "fp32",
        "sdk_version": base_version(),
        "retained": retained,
    }

    def verify(program: qpc.Program) -> None:
        try:
            qpc.open_session(program, check_only=True)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise _rejected(model, str(error)) from error

    qpc.write(directory, model=model, weights=weights, io_desc=desc, facts=facts, verify=verify)
    print(f"Generated binary is present at {directory}")


def _checked(options: Options) -> tuple[Path, Path]:
    if options.model is None or options.binary_dir is None:
        raise CompileError("Options -m=<model.onnx> and -aic-binary-dir=<dir> are needed. Use -h for the flags.")
    if not options.hw:
        raise CompileError("Option -aic-hw is needed: compiling for the host interpreter is not simulated")
    if options.hw_version != "ai100":
        raise CompileError(f"Option -aic-hw-version={options.hw_version} is not simulated; use ai100")
    if options.num_cores > NSP_TOTAL:
        raise CompileError(f"Option -aic-num-cores={options.num_cores}: a card has {NSP_TOTAL} NSPs")
    if (options.binary_dir / qpc.FILE_NAME).exists():
        raise CompileError(
            f"{options.binary_dir} already holds a {qpc.FILE_NAME}; delete it, or choose another directory"
        )
    return options.model, options.binary_dir


def _assignments(options: Options, graph: Any) -> list[Symbols]:
    given = read_specializations(options.specializations) if options.specializations else [{}]
    known = symbols_of(graph)
    if unused := sorted({symbol for entry in [*given, options.symbols] for symbol in entry} - known):
        print(f"warning: no input has the symbolic dim {', '.join(unused)}", file=sys.stderr)
    return [{**options.symbols, **entry} for entry in given]


def _custom_io(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
        return {str(entry["IOName"]): str(entry["Precision"]) for entry in entries}
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: custom IO list is missing") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CompileError(f"{path} is not a list of IOName and Precision: {error!r}") from error


def _load(path: Path) -> tuple[Any, list[Weight]]:
    """Returns the checked model, functions inlined and types inferred, and its detached weights."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: the model is missing") from error
    except (DecodeError, ValueError) as error:
        raise CompileError(
            f"QAIC_ERROR: Error message: protobuf parse failure of {path} ({error}); the file is damaged, "
            "not ONNX, or larger than 2 GB without external data"
        ) from error
    if not model.graph.node:
        raise CompileError(f"QAIC_ERROR: Error message: protobuf parse failure of {path}: it has no graph with nodes")
    weights = detach(model, path.parent)
    _check(model)
    if model.functions:
        model = inliner.inline_local_functions(model, convert_version=True)
    model.ir_version = max(4, min(model.ir_version, MAX_IR))
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for info in model.graph.value_info:
        if info.type.WhichOneof("value") != "tensor_type":
            continue
        # Types help inference; shapes recorded for the exporter's example would pass for those of every run.
        info.type.tensor_type.ClearField("shape")
    try:
        return shape_inference.infer_shapes(model), weights
    except Exception as error:  # the same as in shapes.py
        raise _rejected(model, str(error)) from error


def _check(model: Any) -> None:
    opset = _opset(model)
    if opset > MAX_OPSET:
        raise _rejected(model, f"opset {opset} is not supported; export with {MAX_OPSET} or lower")
    local = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model.graph):
        standard = node.domain in _STANDARD and (node.domain, node.op_type) not in local
        if standard and not onnx.defs.has(node.op_type, opset, ""):
            raise _rejected(model, "unsupported operator", node.op_type)
    if model.graph.sparse_initializer:
        raise _rejected(model, "sparse initializers are not supported")
    # The checker wants external data to exist; for the structure, a stub may as well be an input.
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    inputs = {info.name for info in bare.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in inputs:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(bare)
    except onnx.checker.ValidationError as error:
        raise _rejected(model, str(error)) from error


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(subgraph)


def _opset(model: Any) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in _STANDARD), default=1)


def _rejected(model: Any, why: str, operator: str = "") -> CompileError:
    where = f"Operator-'{operator}'" if operator else "Model"
    return CompileError(
        f"QAIC_ERROR: Error message: [{where}, opset_version-{_opset(model)}, ir_version-{model.ir_version}]"
        f" : {why}\n"
        "QAICException:Unable to AddNodesToGraphFromModel"
    )


if __name__ == "__main__":
    sys.exit(main())
