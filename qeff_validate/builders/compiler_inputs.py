# SPDX-License-Identifier: Apache-2.0
"""What the compiler reads: its command line, and the files that the command line names (card-contract §6)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.builders.provenance import graph_fingerprint
from qeff_validate.config.case import Compile, Precision
from qeff_validate.errors import BuildError, ConfigError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.tensors import RETAINED

RESERVED_FLAGS = frozenset({
    "m", "model", "aic-hw", "aic-hw-version", "aic-num-cores", "convert-to-fp16", "compile-only", "aic-binary-dir",
    "mos", "mxfp6-matmul", "network-specialization-config", "retained-state", "custom-IO-list-file",
})  # fmt: skip
"""Flags that are set from other keys of a case, and so are refused in ``compile.flags``."""

PARTITIONS = "mdp-load-partition-config"

NODE_PRECISION = "node-precision-info"
"""Names the file that lists the nodes in float32."""


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What the compiler's inputs depend on in an ONNX file.

    Attributes:
        states: retained state, that is, each input with a ``_RetainedState`` twin, and whether it is float32.
        float32_nodes: first outputs of the nodes that must compute in float32: those of rotary angles, those inside
            root mean squares, and those that scale the sums of integer products.
        inputs: names of the symbolic dims of each input, empty where a dim has none.
        fingerprint: of the model that the graph was exported from, as its metadata say; None if they do not.
    """

    states: Mapping[str, bool]
    float32_nodes: Sequence[str]
    inputs: Mapping[str, Sequence[str]]
    fingerprint: Any = None


def read_graph(onnx: Path) -> GraphFacts:
    """Read retained state and the nodes that need float32 from an ONNX file, without its weights.

    Raises:
        BuildError: the file cannot be read as ONNX.
    """
    from onnx import TensorProto, load

    from qeff_validate.builders.onnx_patterns import integer_products, root_mean_squares, rotary_angles

    try:
        model = load(str(onnx), load_external_data=False)
        graph, fingerprint = model.graph, graph_fingerprint(model)
    except Exception as exc:  # protobuf's errors depend on its implementation
        raise BuildError(f"cannot read {onnx} as ONNX: {first_line(exc)}") from exc
    outputs = {value.name for value in graph.output}
    states = {
        value.name: value.type.tensor_type.elem_type == TensorProto.FLOAT
        for value in graph.input
        if f"{value.name}{RETAINED}" in outputs
    }
    norms = [name for norm in root_mean_squares(graph) for name in norm.outputs]
    dims = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    float32_nodes = dict.fromkeys([*rotary_angles(graph), *norms, *integer_products(graph)])
    return GraphFacts(states, tuple(float32_nodes), dims, fingerprint)


def renamed_dims(
    buckets: Sequence[Mapping[str, int]],
    file_inputs: Mapping[str, Sequence[str]],
    inputs: Mapping[str, Sequence[int | str]],
) -> list[dict[str, int]]:
    """Return the buckets under the file's names of its symbolic dims, which are found by their places in the inputs.

    Args:
        buckets: values by the interface's names.
        file_inputs: the file's names of the dims of each input, empty where it has none.
        inputs: the interface's names of the dims of the same inputs; of others the names of dims are the interface's.
    """
    ours = {
        theirs: str(dim)
        for name, dims in inputs.items()
        for theirs, dim in zip(file_inputs.get(name, ()), dims, strict=False)
        if theirs
    }
    if not ours:
        return [dict(bucket) for bucket in buckets]
    return [{theirs: bucket[dim] for theirs, dim in ours.items() if dim in bucket} for bucket in buckets]


def write_specializations(buckets: Sequence[Mapping[str, int]], folder: Path) -> Path:
    """Write the values of the symbolic dims, one entry per specialization, and return the path.

    The flat form is read by every SDK, the named one by the newest only (card-contract §6.2).
    """
    path = folder / "specializations.json"
    entries = [{name: str(value) for name, value in bucket.items()} for bucket in buckets]
    path.write_text(json.dumps({"specializations": entries}, indent=1), encoding="utf-8")
    return path


def compiler_flags(
    onnx: Path,
    folder: Path,
    facts: GraphFacts,
    *,
    old: bool,
    options: Compile,
    precision: Precision,
    specializations: Path,
) -> list[str]:
    """Return the flags of the compiler, and write the precision files that they name into a folder.

    Args:
        onnx: the model.
        folder: receives ``node_precision.yaml``, ``custom_io.yaml`` and ``partitions.json``; the compiler adds ``qpc``.
        facts: of the model.
        old: True for ``qaic-exec``, the compiler before SDK 1.21.
        options: cores, hardware version, further flags.
        precision: of the device.
        specializations: path of the specializations file.

    Raises:
        ConfigError: a flag of the case is reserved, or the case compresses keys and values that the graph lacks.
    """
    return [
        "-aic-hw",
        f"-aic-hw-version={'2.0' if old else options.aic_hw_version}",
        *(["-compile-only"] if old else []),
        f"-m={onnx}",
        f"-aic-num-cores={options.num_cores}",
        *(["-convert-to-fp16"] if precision.compute == "fp16" else []),
        *(["-mxfp6-matmul"] if precision.weights == "mxfp6" else []),
        *([f"-mos={options.mos}"] if options.mos is not None else []),
        f"-network-specialization-config={specializations}",
        *(["-retained-state"] if facts.states else []),
        *_custom_io(facts.states, precision, folder),
        *_node_precision(facts.float32_nodes, options, precision, folder),
        *_partitions(options, folder),
        f"-aic-binary-dir={folder / 'qpc'}",
        *_case_flags(options.flags),
    ]


def _node_precision(names: Sequence[str], options: Compile, precision: Precision, folder: Path) -> list[str]:
    """List the nodes that compute in float32 (card-contract §6.4), unless the case brings its own list.

    fp16 cannot represent position 2049, and the sine of a rounded angle is wrong. The squares of activations above 256
    overflow fp16, and trained models have such activations (SmolLM2 fails for it); QEfficient exports norms as one
    operator instead. So do sums of integer products before they are scaled (76,777 in MiniLM). Listed nodes are also
    exempt from MXFP6, and the frequencies of rotary angles are no weights, even where a MatMul reads them.
    """
    listed = NODE_PRECISION in map(flag_name, options.flags)
    if listed or not names or (precision.compute != "fp16" and precision.weights is None):
        return []
    path = folder / "node_precision.yaml"
    path.write_text(node_precision_text(names), encoding="utf-8")
    return [f"-{NODE_PRECISION}={path}"]


def node_precision_text(names: Sequence[str]) -> str:
    """Return the content of a node precision file (card-contract §6.4).

    Args:
        names: first outputs of the nodes that compute in float32; at least one.
    """
    entries = "".join(f"\n  - {json.dumps(name)}" for name in names)
    return f"FP32NodeInstanceNames:{entries}\n"


def _custom_io(states: Mapping[str, bool], precision: Precision, folder: Path) -> list[str]:
    """Store float32 state in the precision that the card computes in, as QEfficient does (card-contract §6.3).

    Raises:
        ConfigError: ``precision.kv`` is set, and the graph retains no keys and values in float32.
    """
    floats = [name for name, is_float in states.items() if is_float]
    precisions = dict.fromkeys(floats, "float16") if precision.compute == "fp16" else {}
    if precision.kv is not None:
        cache = [name for name in floats if name.startswith(("past_key.", "past_value."))]
        if not cache:
            raise ConfigError(f"precision.kv: {precision.kv}: the graph retains no keys and values in float32")
        precisions |= dict.fromkeys(cache, precision.kv)
    if not precisions:
        return []
    path = folder / "custom_io.yaml"
    entries = [(port, kind) for name, kind in precisions.items() for port in (name, f"{name}{RETAINED}")]
    text = "\n".join(f" - IOName: {name}\n   Precision: {kind}" for name, kind in entries)
    path.write_text(f"{text}\n", encoding="utf-8")
    return [f"-custom-IO-list-file={path}"]


def _partitions(options: Compile, folder: Path) -> list[str]:
    """Slice tensors over several cards: one partition with all of them (card-contract §6.5).

    Raises:
        ConfigError: the case also brings a partition config of its own.
    """
    if options.num_devices == 1:
        return []
    if PARTITIONS in map(flag_name, options.flags):
        raise ConfigError(
            f"compile.num_devices: {options.num_devices} and compile.flags.{PARTITIONS}: the partition config sets the"
            " number of cards; leave out one of them"
        )
    devices = [{"deviceId": device, "numCores": options.num_cores} for device in range(options.num_devices)]
    config = {
        "connections": [{"devices": [device["deviceId"] for device in devices], "type": "p2p"}],
        "partitions": [{"name": "Partition0", "devices": devices}],
    }
    path = folder / "partitions.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return [f"-{PARTITIONS}={path}"]


def _case_flags(flags: Mapping[str, str | int | bool]) -> list[str]:
    arguments = []
    for key, value in flags.items():
        name = flag_name(key)
        if name in RESERVED_FLAGS:
            raise ConfigError(f"compile.flags.{key}: this flag is set from the case's own keys; leave it out")
        if value is True:
            arguments.append(f"-{name}")
        elif value is not False:
            arguments.append(f"-{name}={value}")
    return arguments


def flag_name(key: str) -> str:
    """Return a flag as the compiler spells it, without the leading dash."""
    return key.lstrip("-").replace("_", "-")
