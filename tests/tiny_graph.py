# SPDX-License-Identifier: Apache-2.0
"""A model of a few layers in torch, and the same written by hand as an ONNX graph whose names say nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qeff_validate.explain.graph_values import GraphValues
from qeff_validate.explain.inside_graph import with_exchanged
from qeff_validate.explain.layers import Layers, find_layers
from qeff_validate.explain.locate import Location, locate
from qeff_validate.explain.reference_values import record
from qeff_validate.explain.weights import WeightComparison, compare_weights
from qeff_validate.protocols import OriginalRun, Settings
from qeff_validate.runtimes.ort import OrtRuntime

WIDTH, WIDE = 8, 12
IDS = np.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]], dtype=np.int64)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=np.int64)


class Attention(nn.Module):
    """One head, with a scale as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scaling = WIDTH**-0.5

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the context."""
        scores = self.query(states) @ self.key(states).mT * self.scaling + mask
        return scores.softmax(-1) @ self.value(states)


class Layer(nn.Module):
    """Attention, a square product, a norm, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = Attention(), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDE), nn.GELU(), nn.Linear(WIDE, WIDTH)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the states behind the layer."""
        states = self.norm(states + self.output(self.attention(states, mask)))
        return states + self.down(self.act(self.up(states)))


class Body(nn.Module):
    """Two layers on word embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states of the last layer."""
        states = self.words(ids)
        hidden = ((1 - mask[:, None]) * -1e4).to(states.dtype)
        for layer in self.layers:
            states = layer(states, hidden)
        return states


def body() -> Body:
    """Return the model with weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Body().eval()
        for parameter in made.parameters():
            parameter.data.normal_(std=0.5)
    return made


def original(model: Any) -> OriginalRun:
    """Return its run on two rows, one of them padded, with the mean of the tokens as the output."""

    def run() -> dict[str, Any]:
        states = model(torch.from_numpy(IDS), torch.from_numpy(MASK)).detach().double().numpy()
        return {"output": (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)}

    def others() -> dict[str, dict[str, Any]]:
        states = model(torch.from_numpy(IDS), torch.from_numpy(MASK)).detach().double().numpy()
        return {"pooled by cls": {"output": states[:, 0]}}

    return OriginalRun(model, {"ids": IDS, "mask": MASK}, MASK > 0, run, {"output": "pooling"}, others)


@dataclass
class Writer:
    """Writes an ONNX graph node by node, with numbers for names."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def weight(self, array: Any) -> str:
        """Add an initializer, and return its name."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), f"w{len(self.weights)}"))
        return f"w{len(self.weights) - 1}"

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node, and return its output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def linear(self, module: Any, value: str) -> str:
        """Add a product and its bias."""
        product = self.node("MatMul", value, self.weight(module.weight.detach().numpy().T))
        return self.node("Add", product, self.weight(module.bias.detach().numpy()))


def graph(model: Body) -> Any:
    """Return the model as an ONNX graph, opset 20."""
    to = Writer()
    one, minus = to.weight(np.float32(1)), to.weight(np.float32(-1e4))
    mask = to.node("Cast", "mask", to=TensorProto.FLOAT)
    hidden = to.node("Mul", to.node("Sub", one, to.node("Unsqueeze", mask, to.weight(np.array([1])))), minus)
    states = to.node("Gather", to.weight(model.words.weight.detach().numpy()), "ids")
    for layer in model.layers:
        attention = layer.attention
        query, key, value = (to.linear(part, states) for part in (attention.query, attention.key, attention.value))
        scores = to.node("MatMul", query, to.node("Transpose", key, perm=[0, 2, 1]))
        scores = to.node("Add", to.node("Mul", scores, to.weight(np.float32(attention.scaling))), hidden)
        context = to.node("MatMul", to.node("Softmax", scores, axis=-1), value)
        added = to.node("Add", states, to.linear(layer.output, context))
        norm = [to.weight(tensor.detach().numpy()) for tensor in (layer.norm.weight, layer.norm.bias)]
        states = to.node("LayerNormalization", added, *norm, epsilon=layer.norm.eps)
        states = to.node("Add", states, to.linear(layer.down, to.node("Gelu", to.linear(layer.up, states))))
    tokens = to.node("Unsqueeze", mask, to.weight(np.array([2])))
    axes = to.weight(np.array([1]))
    total = to.node("ReduceSum", to.node("Mul", states, tokens), axes, keepdims=0)
    output = to.node("Div", total, to.node("ReduceSum", mask, axes, keepdims=1))
    to.nodes[-1].output[0] = "output"
    assert output != "output"
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in ("ids", "mask")]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", WIDTH])]
    made = helper.make_graph(to.nodes, "tiny", inputs, outputs, to.weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@dataclass(frozen=True)
class Examined:
    """What is found in a graph."""

    layers: Layers
    location: Location
    weights: WeightComparison


def examine(model: Body, proto: Any, folder: Path) -> Examined:
    """Look for the first divergent layer of a graph."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, str(folder / "model.onnx"))
    (folder / "copies").mkdir()
    opened = OrtRuntime(Settings(ort_optimization="disabled")).open
    run = original(model)
    values = GraphValues(folder / "model.onnx", folder / "copies", opened)
    weights, recorded = compare_weights(model, values.weights, nodes=values.nodes), record(run)
    weights = with_exchanged(weights, run, recorded, values, run.feeds)
    layers = find_layers(run, recorded, values, run.feeds)
    return Examined(layers, locate(run, recorded, values, layers, weights), weights)
