# SPDX-License-Identifier: Apache-2.0
"""A part of a graph alone shows the error that the graph makes there, and a healthy one shows none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bounds import within
from onnx import helper, numpy_helper
from tiny_graph import IDS, MASK, body, graph, original
from torch import nn

from qeff_validate.explain.block import Block, block_model, sources, with_used_rows
from qeff_validate.explain.graph_values import GraphValues, reads
from qeff_validate.explain.layers import Layers, find_layers
from qeff_validate.explain.reference_values import record
from qeff_validate.explain.smallest_block import graph_error, graph_targets, smallest_block
from qeff_validate.protocols import Settings
from qeff_validate.runtimes.ort import OrtRuntime


def opened(proto: Any, folder: Path) -> tuple[GraphValues, Layers]:
    """Return a graph that can be run, and its layers beside those of the model."""
    onnx.save(proto, str(folder / "model.onnx"))
    (folder / "copies").mkdir()
    ort = OrtRuntime(Settings(ort_optimization="disabled"))
    values = GraphValues(folder / "model.onnx", folder / "copies", ort.open)
    run = original(body())
    return values, find_layers(run, record(run), values, run.feeds)


def block_of(values: GraphValues, layers: Layers, index: int) -> Block:
    """Return the block of a value on the reference's own inputs."""
    name, value = layers.matches.names[index], layers.values[index]
    cuts = {other: layers.values[at].array for at, other in layers.matches.names.items() if at != index}
    content = {name: array.astype(np.float32) for name, array in cuts.items()} | {"ids": IDS, "mask": MASK}
    inputs = {other: content[other] for other in sources(values, name, cuts)}
    tokens = MASK > 0 if value.array.shape[:2] == MASK.shape else None
    return Block(
        block_model(values, name, inputs, layers.matches.inherited[name]),
        inputs,
        name,
        value.array,
        tokens,
        *MASK.shape,
    )


class Wrapped(nn.Module):
    """A model whose modules have other paths, as with an adapter of PEFT."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


@pytest.mark.parametrize(("fault", "failing", "wrapped", "tried"), [("up", 3, {0, 1}, [2]), ("output", 1, {0}, [0, 1])])
def test_bundle_of_one_adapter_is_not_the_whole_graph_because_another_has_other_paths(
    fault: str, failing: int, wrapped: set[int], tried: list[int], tmp_path: Path
) -> None:
    """Rows 0 and 1 are of the texts with one adapter, 2 and 3 with another; the shorter text is tried first."""
    proto = graph(body())
    if fault == "output":
        proto.graph.node[-1].op_type = "Mul"
    else:
        weight = next(t for t in proto.graph.initializer if list(t.dims) == [8, 12])
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    values, layers = opened(proto, tmp_path)
    runs = list[int]()

    def original_run(alone: Any, sizes: Any, place: int) -> Any:
        run = original(body())
        runs.append(int(alone.rows[place]))
        return replace(run, module=Wrapped(run.module)) if runs[-1] in wrapped else run

    context: Any = SimpleNamespace(
        pipeline=SimpleNamespace(
            inputs=lambda: SimpleNamespace(ids=[np.arange(3), np.arange(5)]),
            actual={"output": np.zeros((4, 8))},
            graph=lambda: SimpleNamespace(outputs=[SimpleNamespace(name="output")]),
            reference=dict,
            case=SimpleNamespace(artifacts=SimpleNamespace(inputs={})),
        ),
        model=SimpleNamespace(text_of_row=lambda inputs, reference, row: row % 2),
        subset=lambda texts: SimpleNamespace(rows=np.array([texts[0], texts[0] + 2])),
        original_run=original_run,
        clock=SimpleNamespace(check=lambda: None),
    )
    inside: Any = SimpleNamespace(graph=values, layers=layers, original=original(body()), feeds={})
    shown = smallest_block(
        context, inside, context.subset([1]), failing, graph_targets(inside), partial(graph_error, values)
    )
    assert shown is not None
    assert shown.block.nodes < 8
    assert runs == tried


@pytest.mark.numeric
def test_each_block_of_a_healthy_graph_is_right_by_itself_and_a_checked_model(tmp_path: Path) -> None:
    values, layers = opened(graph(body()), tmp_path)
    for index in layers.matches.names:
        block = block_of(values, layers, index)
        onnx.checker.check_model(block.model, full_check=True)
        within(graph_error(values, block), 1e-5)


def test_block_of_a_fault_shows_it_and_holds_nothing_but_its_own_weights(tmp_path: Path) -> None:
    proto = graph(body())
    weight = next(t for t in proto.graph.initializer if list(t.dims) == [8, 12])
    values = numpy_helper.to_array(weight).copy()
    values[:, 3] = 0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    opened_graph, layers = opened(proto, tmp_path)
    assert layers.guilty is not None
    block = block_of(opened_graph, layers, layers.guilty)
    assert graph_error(opened_graph, block) > 1e-2
    assert [node.op_type for node in block.model.graph.node] == ["MatMul", "Add"]
    assert {tensor.name for tensor in block.model.graph.initializer} >= {weight.name}
    assert len(block.model.graph.initializer) == 2


def test_table_keeps_only_the_rows_that_are_read_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qeff_validate.explain.block.LARGE_TABLE", 0)
    proto = graph(body())
    gather = next(node for node in proto.graph.node if node.op_type == "Gather")
    # ids from the end of the table, through a node: neither an input nor in order
    proto.graph.initializer.append(numpy_helper.from_array(np.int64(16), "sixteen"))
    proto.graph.node.insert(0, helper.make_node("Sub", ["ids", "sixteen"], ["from the end"]))
    gather.input[1] = "from the end"
    values, layers = opened(proto, tmp_path)
    index = next(at for at, name in layers.matches.names.items() if name == gather.output[0])
    block = block_of(values, layers, index)
    small = with_used_rows(values, block)
    table = next(tensor for tensor in small.model.graph.initializer if tensor.name == gather.input[0])
    assert table.dims[0] == np.unique(IDS).size < 16
    assert [node.op_type for node in small.model.graph.node] == ["Gather"]  # the subtraction is not needed any more
    outputs = [values.run_model(it.model, it.inputs, [it.output])[it.output] for it in (block, small)]
    assert np.array_equal(*outputs)


def test_branches_are_read_from_outside() -> None:
    inner = helper.make_graph([helper.make_node("Add", ["outer", "own"], ["sum"])], "then", [], [])
    inner.initializer.append(numpy_helper.from_array(np.float32(1), "own"))
    inner.output.append(onnx.ValueInfoProto(name="passed on"))
    node = helper.make_node("If", ["condition"], ["out"], then_branch=inner)
    assert reads(node) == ["condition", "outer", "passed on"]
