# SPDX-License-Identifier: Apache-2.0
"""Values inside an ONNX graph: any of them as outputs, and any of them replaced by given content.

A replaced value is cut: its node still computes it, as an output, while the nodes behind it read the given content.
With all values of the original model cut at once, one run shows the error that each block makes by itself.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from qeff_validate.artifact import Artifact
from qeff_validate.builders.external_data import files_of
from qeff_validate.builders.onnx_patterns import producers
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array, Tensors

FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}

REAL = ("float32", "float16", "float64")
"""Dtypes of real numbers as sessions name them."""

CUT = "/explain.reference"
"""Ends the name of the input that stands for a cut value."""

LAYOUTS = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
"""Operators that give a weight in another layout or dtype."""

Open = Callable[[Artifact], AbstractContextManager[Session]]


class GraphValues:
    """An ONNX file whose inner values can be read and replaced.

    Args:
        path: the file.
        folder: an empty directory for changed copies; weights are written there once.
        open_graph: opens such a copy.
        untrusted: whether the file is somebody else's, which is opened in a process of its own.
        buckets: values of symbols that the shapes of the feeds may not determine, such as ``ctx_len``.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        open_graph: Open,
        *,
        untrusted: bool = False,
        buckets: Sequence[Mapping[str, int]] = (),
    ) -> None:
        model = onnx.load(str(path), load_external_data=False)
        for file in files_of(model, path):  # copied, not read: the weights of a large model are never in memory
            target = folder / file.relative_to(path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        if model.functions:
            model = inliner.inline_local_functions(model)
        _constants_as_initializers(model.graph)
        self._folder, self._open = folder, open_graph
        self._untrusted, self._buckets = untrusted, tuple(buckets)
        self._numbers = itertools.count()
        self.repairs: dict[str, Array] = {}
        """The right content of initializers that differ; runs with ``repaired`` use it."""
        skeleton = folder / "graph.onnx"
        location = next(name for name in map("weights{}".format, itertools.count()) if not (folder / name).exists())
        onnx.save(model, str(skeleton), save_as_external_data=True, location=location, size_threshold=1024)
        del model
        self.model = onnx.load(str(skeleton), load_external_data=False)
        self.weights: dict[str, Array] = {
            tensor.name: _mapped(tensor, folder) for tensor in self.model.graph.initializer
        }
        """Content of the initializers; the large ones stay in their file."""
        self.nodes: list[Any] = list(self.model.graph.node)
        self.producer: Mapping[str, Any] = producers(self.model.graph)
        self.index: Mapping[str, int] = {
            name: place for place, node in enumerate(self.nodes) for name in node.output if name
        }
        self.inputs = [value.name for value in self.model.graph.input if value.name not in self.weights]
        self.outputs = [value.name for value in self.model.graph.output]

    def sizes(self) -> dict[str, int]:
        """Return the dims of ``input_ids`` that are fixed, as ``batch_size`` and ``seq_len``."""
        fixed: dict[str, int] = {}
        for value in self.model.graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name == "batch_index":  # [batch_size, 1], of continuous batching
                continue
            if len(dims) == 2 and value.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32):
                for name, dim in zip(("batch_size", "seq_len"), dims, strict=True):
                    if dim.dim_value:
                        fixed[name] = dim.dim_value
        return fixed

    def run(
        self,
        feeds: Tensors,
        wanted: Sequence[str] | None = None,
        cuts: Tensors | None = None,
        *,
        repaired: bool = False,
    ) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: its inputs, by its own names.
            wanted: values to return; None: every value but weights in another layout.
            cuts: content of values that the nodes behind them read instead.
            repaired: run with the right weights in place of those that differ.

        Returns:
            The values that are real numbers, as they are computed.
        """
        cuts = dict(cuts or {})
        names = self.computed() if wanted is None else list(dict.fromkeys([*wanted, *cuts]))
        with self.opened(names, cuts, repaired=repaired) as session:
            dtypes = {spec.name: spec.dtype for spec in session.inputs}
            given = {**feeds, **{name + CUT: array for name, array in cuts.items()}}
            fed = {name: given[name].astype(dtype, copy=False) for name, dtype in dtypes.items()}
            floats = {spec.name for spec in session.outputs if spec.dtype in REAL}
            return dict(session.run(fed, fetch=[name for name in names if name in floats]))

    def computed(self) -> list[str]:
        """Return the values of nodes but those that are a weight in another layout or dtype, and as large."""
        weights, names = set(self.weights), list[str]()
        for node in self.nodes:
            if node.op_type in LAYOUTS and node.input[0] in weights:
                weights.update(node.output)
            else:
                names += [name for name in node.output if name]
        return names

    @contextmanager
    def opened(self, names: Sequence[str], cuts: Tensors | None = None, *, repaired: bool = False) -> Iterator[Session]:
        """Open the graph with some values as further outputs.

        Args:
            names: of the values.
            cuts: content of values that become inputs; only dtypes and shapes matter here.
            repaired: with the content of ``repairs`` in place of the initializers of these names.
        """
        path = self.saved(
            [onnx.ValueInfoProto(name=name) for name in names], _cut_inputs(cuts or {}), repaired=repaired
        )
        artifact = Artifact("onnx", path, str(path), untrusted=self._untrusted, buckets=self._buckets)
        with self._open(artifact) as session:
            yield session

    def saved(self, outputs: Sequence[Any], cuts: Sequence[Any] = (), *, repaired: bool = False) -> Path:
        """Write the graph with some values as further outputs, and others cut; return the path.

        Args:
            outputs: ValueInfoProto of values; those that are outputs already are left out.
            cuts: ValueInfoProto of the inputs that stand for cut values, whose names end with `CUT`.
            repaired: see `opened`.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        names = {value.name.removesuffix(CUT) for value in cuts}
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name in names:
                    node.input[place] = name + CUT
        model.graph.input.extend(cuts)
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(value for value in outputs if value.name not in known)
        for tensor in model.graph.initializer if repaired else ():
            if tensor.name in self.repairs:
                tensor.CopyFrom(numpy_helper.from_array(self.repairs[tensor.name], tensor.name))
        path = self._folder / f"run{next(self._numbers)}.onnx"
        onnx.save(model, str(path))
        return path

    def operator(self, name: str) -> tuple[str, str]:
        """Return the name and the operator of the node that computes a value."""
        node = self.producer.get(name)
        return ("", "") if node is None else (node.name or node.output[0], node.op_type)

    def block(self, name: str, stops: Mapping[str, Any] | set[str]) -> list[Any]:
        """Return the nodes between other values and a value, in the order of the graph."""
        places: set[int] = set()
        pending = [name]
        while pending:
            at = self.index.get(pending.pop())
            if at is None or at in places:
                continue
            places.add(at)
            pending += [source for source in reads(self.nodes[at]) if source not in stops]
        return [self.nodes[place] for place in sorted(places)]

    def run_model(self, model: Any, feeds: Tensors, wanted: Sequence[str]) -> dict[str, Array]:
        """Run another model, such as a part of the graph, with the runtime that the graph is run with.

        Args:
            model: ModelProto with its weights inside.
            feeds: its inputs.
            wanted: names of its outputs.
        """
        path = self._folder / f"run{next(self._numbers)}.onnx"
        onnx.save(model, str(path))
        with self._open(Artifact("onnx", path, str(path), untrusted=self._untrusted)) as session:
            return dict(session.run(feeds, fetch=list(wanted)))


def _mapped(tensor: Any, folder: Path) -> Array:
    """Return the content of an initializer, mapped from the file where it has numpy's own layout."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    size = dtype.itemsize * int(np.prod(tensor.dims))
    if not place or not size or dtype.kind not in "fiub" or size != int(place.get("length", size)):
        return numpy_helper.to_array(tensor, str(folder))
    offset = int(place.get("offset", 0))
    return np.memmap(folder / place["location"], dtype, "r", offset, shape=tuple(tensor.dims))


def reads(node: Any) -> list[str]:
    """Return the names of the values that a node reads, those inside its branches that come from outside included."""
    names = [name for name in node.input if name]
    for entry in node.attribute:
        for branch in [entry.g] if entry.HasField("g") else []:
            inner = {value.name for value in (*branch.input, *branch.initializer)}
            inner |= {name for other in branch.node for name in other.output}
            within = [name for other in branch.node for name in reads(other)]
            names += [name for name in (*within, *(value.name for value in branch.output)) if name not in inner]
    return list(dict.fromkeys(names))


def _cut_inputs(cuts: Tensors) -> list[Any]:
    """Return the inputs that stand for cut values, of the shapes of their content."""
    infos = []
    for name, array in cuts.items():
        kind = next(key for key, dtype in FLOATS.items() if dtype == array.dtype)
        infos.append(helper.make_tensor_value_info(name + CUT, kind, array.shape))
    return infos


def _constants_as_initializers(graph: Any) -> None:
    """Turn Constant nodes that hold a tensor into initializers."""
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
    if len(kept) != len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
