# SPDX-License-Identifier: Apache-2.0
"""ONNX files with the interface of an embedding model that never come to an end, in one way or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 32
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def _save(path: Path, nodes: Iterable[Any], functions: Iterable[Any] = (), **initializers: Any) -> Path:
    """Nodes from ``ids`` (float, [batch_size, seq_len]) to ``wide`` (the same), between the interface's ends."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", "seq_len"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch_size", HIDDEN])]
    before = [helper.make_node("Mul", ["input_ids", "attention_mask"], ["masked"])]
    before += [helper.make_node("Cast", ["masked"], ["ids"], to=TensorProto.FLOAT)]
    after = [helper.make_node("ReduceMean", ["wide", "last"], ["mean"], keepdims=1)]
    after += [helper.make_node("Add", ["mean", "row"], ["output"])]
    arrays = {"last": np.array([1]), "row": np.zeros(HIDDEN, np.float32), **initializers}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph([*before, *nodes, *after], "g", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=10), str(path))
    return path


def endless_loop(path: Path) -> Path:
    """A Loop with 2^62 trips that does nothing."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["state"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["trips", "true", "ids"], ["wide"], body=body)
    return _save(path, [loop], trips=np.array(2**62), true=np.array(True))


def _functions(calls: dict[str, list[str]]) -> list[Any]:
    """Functions of one value, each of which calls others in a row, or Neg if it names none."""
    made = []
    for name, called in calls.items():
        values = ["x", *(f"v{n}" for n in range(max(1, len(called)) - 1)), "y"]
        nodes = [
            helper.make_node(other, [values[n]], [values[n + 1]], domain="own" if other in calls else "")
            for n, other in enumerate(called or ["Neg"])
        ]
        made.append(helper.make_function("own", name, ["x"], ["y"], nodes, OPSETS))
    return made


def _calling(path: Path, calls: dict[str, list[str]], name: str) -> Path:
    return _save(path, [helper.make_node(name, ["ids"], ["wide"], domain="own")], _functions(calls))


def doubling(path: Path, depth: int = 60) -> Path:
    """Functions that each call another twice: 2^depth nodes in 10 kB."""
    calls = {f"f{n}": [f"f{n - 1}"] * 2 if n else [] for n in range(depth)}
    return _calling(path, calls, f"f{depth - 1}")


def recursive(path: Path) -> Path:
    """A function that calls itself."""
    return _calling(path, {"f": ["f", "Neg"]}, "f")


def circular(path: Path) -> Path:
    """Functions that call each other."""
    return _calling(path, {"f": ["Neg", "g"], "g": ["h"], "h": ["Neg", "f"]}, "f")


def hidden_in_branch(path: Path) -> Path:
    """As `doubling`, called from a branch of an If."""

    def branch(name: str) -> Any:
        made = helper.make_node("f59", ["ids"], [name], domain="own")
        return helper.make_graph([made], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    functions = _functions({f"f{n}": [f"f{n - 1}"] * 2 if n else [] for n in range(60)})
    node = helper.make_node("If", ["true"], ["wide"], then_branch=branch("a"), else_branch=branch("b"))
    return _save(path, [node], functions, true=np.array(True))


def cycle(path: Path) -> Path:
    """Root mean squares whose nodes stand in a circle: no graph."""
    nodes = [
        helper.make_node("Pow", ["ids", "two"], ["square"]),
        helper.make_node("ReduceMean", ["square", "last"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Sqrt", ["a"], ["b"]),
        helper.make_node("Neg", ["b"], ["wide"]),
    ]
    return _save(path, nodes, two=np.float32(2))


def without_ends(path: Path) -> Path:
    """Nodes that read or make nothing, where a walk through the graph expects something."""
    nodes = [helper.make_node(name, [], []) for name in ("Sin", "Cos", "Mul", "ReduceMean", "Pow", "Cast")]
    nodes += [helper.make_node("Mul", ["ids"], ["m"]), helper.make_node("ReduceMean", ["m"], ["wide"])]
    return _save(path, nodes)


BOMBS: tuple[Callable[[Path], Path], ...] = (doubling, recursive, circular, hidden_in_branch)
