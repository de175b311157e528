# SPDX-License-Identifier: Apache-2.0
"""Hand-made graphs for tests of the simulated SDK, what they compute in numpy, and the compiler as a function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.compiler import qaic_compile

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Values = Mapping[str, tuple[int, Sequence[Any]]]
CTX, WIDTH = 8, 2
PHASES = [{"b": "1", "s": "4", "ctx": str(CTX)}, {"b": "1", "s": "1", "ctx": str(CTX)}]
TABLE = np.random.default_rng(0).integers(-8, 8, (16, WIDTH)).astype(np.float32)
"""Small whole numbers, whose sums are exact in float32 and float16."""


def graph(nodes: Sequence[Any], inputs: Values, outputs: Values, **weights: Any) -> onnx.ModelProto:
    """Return a model of these nodes."""
    infos = [[helper.make_tensor_value_info(n, *value) for n, value in values.items()] for values in (inputs, outputs)]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = helper.make_graph(list(nodes), "g", *infos, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def scaled(rows: Any = 2, factor: float = 2.0) -> onnx.ModelProto:
    """Return y = factor · x for x of [rows, 3]."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    return graph(nodes, {"x": (FLOAT, [rows, 3])}, {"y": (FLOAT, [rows, 3])}, factor=np.float32(factor))


def counter(*, twin: str = "total_RetainedState", rows: Any = 2, kept: Any = None) -> onnx.ModelProto:
    """Return total' = total + x, and y = total', both of [rows, 3]."""
    nodes = [helper.make_node("Add", ["total", "x"], [twin]), helper.make_node("Identity", [twin], ["y"])]
    shape, state = (FLOAT, [rows, 3]), (FLOAT, kept or [rows, 3])
    return graph(nodes, {"x": shape, "total": state}, {"y": shape, twin: shape})


def cached(twin: str = "past_key.0_RetainedState") -> onnx.ModelProto:
    """Return a decoder in miniature: it writes TABLE[ids] into the cache by position and sums what was written.

    Slots beyond the last position are masked with Where, so undefined content never reaches `logits`.
    """
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("Unsqueeze", ["position_ids", "two"], ["pos3"]),
        node("Equal", ["pos3", "slots"], ["hit"]),
        node("Cast", ["hit"], ["hit_float"], to=FLOAT),
        node("Transpose", ["hit_float"], ["writes"], perm=[0, 2, 1]),
        node("MatMul", ["writes", "x"], ["written"]),
        node("ReduceMax", ["writes", "two"], ["any"]),
        node("Cast", ["any"], ["any_bool"], to=TensorProto.BOOL),
        node("Where", ["any_bool", "written", "past_key.0"], [twin]),
        node("ReduceMax", ["position_ids", "one"], ["last"]),
        node("LessOrEqual", ["slots", "last"], ["valid"]),
        node("Unsqueeze", ["valid", "two"], ["valid3"]),
        node("Where", ["valid3", twin, "zero"], ["seen"]),
        node("ReduceSum", ["seen", "one"], ["sum"]),
        node("Add", ["x", "sum"], ["logits"]),
    ]
    ids, cache = (INT64, ["b", "s"]), (FLOAT, ["b", "ctx", WIDTH])
    return graph(
        nodes, {"input_ids": ids, "position_ids": ids, "past_key.0": cache},
        {"logits": (FLOAT, ["b", "s", WIDTH]), twin: cache},
        table=TABLE, slots=np.arange(CTX), one=np.array([1]), two=np.array([2]), zero=np.float32(0),
    )  # fmt: skip


class Cache:
    """`cached` in numpy."""

    def __init__(self, batch: int = 1, fill: float = np.nan) -> None:
        self.slots = np.full((batch, CTX, WIDTH), fill, np.float32)

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        for row, slot_row in enumerate(positions):
            for token, slot in zip(ids[row], slot_row, strict=True):
                if slot >= 0:
                    self.slots[row, slot] = TABLE[token]
        sums = [self.slots[row, : slot_row.max() + 1].sum(0) for row, slot_row in enumerate(positions)]
        return TABLE[ids] + np.stack(sums)[:, None]


def compile_to(directory: Path, model: onnx.ModelProto, *flags: str, specs: Any = None, custom_io: str = "") -> str:
    """Compile in this process and return the binary directory as real clients pass it; a refusal raises."""
    directory.mkdir(parents=True)
    path = directory / "model.onnx"
    path.write_bytes(model.SerializeToString())
    argv = ["-aic-hw", "-aic-hw-version=ai100", f"-m={path}", f"-aic-binary-dir={directory / 'qpc'}", *flags]
    if specs is not None:
        (directory / "specializations.json").write_text(json.dumps({"specializations": specs}))
        argv.append(f"-network-specialization-config={directory / 'specializations.json'}")
    if custom_io:
        (directory / "custom_io.yaml").write_text(custom_io)
        argv.append(f"-custom-IO-list-file={directory / 'custom_io.yaml'}")
    if qaic_compile.main(argv):
        raise ValueError("the compiler refuses: see stderr")
    return str(directory / "qpc")


def altered(source: str, target: Path, **facts: Any) -> str:
    """Write a copy of a QPC with other header entries, such as another number of devices."""
    program = qpc.read(Path(source))
    kept = {key: value for key, value in program.header.items() if key not in ("segments", "simulated")}
    network = onnx.load_model_from_string(program.network)
    qpc.write(target, model=network, weights=(), io_desc=program.io_desc, facts={**kept, **facts})
    return str(target)
