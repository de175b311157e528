# SPDX-License-Identifier: Apache-2.0
"""From an ONNX graph to another: adapter weights in a user's graph become inputs with ``_RetainedState`` twins.

Exporters transpose, rename and merge weights, so an adapter tensor is identified by its content and by the nodes that
read it: node names and metadata contain the module that a node was exported from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from qeff_validate.errors import BuildError
from qeff_validate.tensors import RETAINED, Array

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node's module names; the TorchScript exporter puts them into the node's name instead."""

PREFIX = "base_model.model."
"""Prefix of PEFT's saved names; a graph that was exported from the inner model lacks these modules."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An adapter tensor that an initializer may hold.

    Attributes:
        name: PEFT's saved name.
        transposed: the initializer holds the transposed tensor.
        by_name: the initializer's own name contains the tensor's.
    """

    name: str
    transposed: bool
    by_name: bool = False


@dataclass(frozen=True, slots=True)
class _Use:
    """An input of a node that reads an initializer, directly or through Identity nodes."""

    node: onnx.NodeProto
    index: int

    @property
    def scope(self) -> str:
        """The modules that the node was exported from, separated by dots; empty if the exporter did not record them."""
        scopes = [entry.value for entry in self.node.metadata_props if entry.key == SCOPES]
        return " ".join([*scopes, self.node.name.replace("/", ".") if "/" in self.node.name else ""]).strip()

    @property
    def transposed(self) -> bool:
        """True if a linear layer's weight has shape ``[in, out]`` here."""
        trans_b = any(entry.name == "transB" and entry.i for entry in self.node.attribute)
        return self.node.op_type in ("MatMul", "Gemm") and self.index == 1 and not trans_b


_Match = tuple[str, _Candidate, _Use]
"""Name of an initializer, the adapter tensor that it holds, and a node input that reads it."""


def lift_adapters(model: onnx.ModelProto | Path | str, adapter: Mapping[str, Array] | Iterable[str]) -> onnx.ModelProto:
    """Return a graph in which the tensors of an adapter are inputs with ``_RetainedState`` twins.

    Args:
        model: a graph with the adapter's weights as initializers, or its file. External data stays where it is, and
            only tensors with the shape of an adapter tensor are read: save the result in the same directory, or load
            the external data first.
        adapter: the exported arrays by PEFT's saved names; they are matched by content, transposed or not. Names
            alone suffice for initializers that still have the names of the module's parameters.

    Raises:
        BuildError: an adapter tensor is not in the graph, or cannot be distinguished from an equal one; the message
            lists them.
    """
    lifted, folder = _opened(model)
    graph = lifted.graph
    arrays = dict(adapter) if isinstance(adapter, Mapping) else None
    names = list(adapter)
    _free_names(graph, names)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    if arrays is None:
        candidates = _candidates_by_name(initializers, names)
    else:
        candidates = _candidates_by_content(initializers, arrays, folder)
    matches = _matches(candidates, _uses(graph, candidates), names)
    missing = sorted(set(names) - {candidate.name for _, candidate, _ in matches})
    if missing:
        hint = "Give the arrays too: exporters rename weights" if arrays is None else "Are these the exported weights?"
        raise BuildError(f"the graph does not use {len(missing)} of {len(names)} adapter tensors: {missing}. {hint}")
    tensors = {candidate.name: initializers[name] for name, candidate, _ in matches}
    _rewire(graph, matches)
    for name in names:
        shape = list(tensors[name].dims if arrays is None else arrays[name].shape)
        for port, ports in ((name, graph.input), (f"{name}{RETAINED}", graph.output)):
            ports.append(helper.make_tensor_value_info(port, tensors[name].data_type, shape))
        graph.node.append(helper.make_node("Identity", [name], [f"{name}{RETAINED}"], f"{name}{RETAINED}"))
    _remove_unused(graph, set(candidates))
    return lifted


def _opened(model: onnx.ModelProto | Path | str) -> tuple[onnx.ModelProto, Path | None]:
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, None
    try:
        return onnx.load(str(model), load_external_data=False), Path(model).parent
    except Exception as exc:  # protobuf's own error, or the file system's
        raise BuildError(f"cannot read {model} as an ONNX graph: {exc}") from exc


def _free_names(graph: onnx.GraphProto, names: list[str]) -> None:
    """Rename initializers whose name is that of an adapter tensor; the name is needed for the new input."""
    if not names:
        raise BuildError("no adapter tensor is named")
    renamed = {tensor.name: f"{tensor.name}.initializer" for tensor in graph.initializer if tensor.name in names}
    ports = {value.name for value in (*graph.input, *graph.output)} - renamed.keys()
    taken = sorted(name for name in names if name in ports or f"{name}{RETAINED}" in ports)
    if taken:
        raise BuildError(f"the graph has inputs or outputs of these names already: {taken}")
    for value in graph.input:
        value.name = renamed.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in _nodes(graph):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _candidates_by_name(initializers: Mapping[str, onnx.TensorProto], names: list[str]) -> dict[str, list[_Candidate]]:
    """Return the adapter tensors that each initializer may hold: the one in its name, or one merged with it."""
    candidates: dict[str, list[_Candidate]] = {}
    for name in names:
        module, parameter = _module_and_parameter(name)
        pattern = re.compile(rf"(?<!\w){re.escape(module)}\.(\w+\.)?{re.escape(parameter)}(\.\w+)?")
        for initializer in initializers:
            if any(match.end() == len(initializer) for match in pattern.finditer(initializer)):
                candidates.setdefault(initializer, []).append(_Candidate(name, False, by_name=True))
    named = {candidate.name for entries in candidates.values() for candidate in entries}
    merged = [_Candidate(name, False) for name in names if name not in named]
    return {initializer: [*entries, *merged] for initializer, entries in candidates.items()}


def _candidates_by_content(
    initializers: Mapping[str, onnx.TensorProto], arrays: Mapping[str, Array], folder: Path | None
) -> dict[str, list[_Candidate]]:
    """Return the adapter tensors that each initializer equals, bit for bit."""
    by_digest: dict[tuple[object, ...], list[_Candidate]] = {}
    for name, array in arrays.items():
        by_digest.setdefault(_digest(array), []).append(_Candidate(name, False))
        if array.ndim == 2:
            by_digest.setdefault(_digest(array.T), []).append(_Candidate(name, True))
    shapes = {digest[:2] for digest in by_digest}
    candidates = {}
    for name, tensor in initializers.items():
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if (str(dtype), tuple(tensor.dims)) in shapes:
            entries = by_digest.get(_digest(_content(tensor, folder)))
            if entries:
                candidates[name] = entries
    return candidates


def _digest(array: Array) -> tuple[object, ...]:
    """Return dtype, shape and SHA-256 of an array."""
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return str(array.dtype), array.shape, content


def _content(tensor: onnx.TensorProto, folder: Path | None) -> Array:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    if folder is None:
        raise BuildError(f"the weights of {tensor.name!r} are in another file: give the path of the graph")
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    try:
        load_external_data_for_tensor(loaded, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as exc:
        raise BuildError(f"cannot read the weights of {tensor.name!r} in {folder}: {exc}") from exc
    return numpy_helper.to_array(loaded)


def _uses(graph: onnx.GraphProto, initializers: Iterable[str]) -> dict[str, list[_Use]]:
    """Return the readers of each initializer; the TorchScript exporter merges equal ones through Identity nodes."""
    source = {name: name for name in initializers}
    uses: dict[str, list[_Use]] = {name: [] for name in source}
    for node in _nodes(graph):
        if node.op_type == "Identity" and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
            continue
        for index, name in enumerate(node.input):
            if name in source:
                uses[source[name]].append(_Use(node, index))
    return uses


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _matches(
    candidates: Mapping[str, list[_Candidate]], uses: Mapping[str, list[_Use]], names: list[str]
) -> list[_Match]:
    """Decide which adapter tensor each use reads; uses by other modules are left out.

    Raises:
        BuildError: tensors are equal, and the graph does not tell which of them a use reads.
    """
    order = {name: index for index, name in enumerate(names)}
    matches: list[_Match] = []
    ambiguous: set[str] = set()
    for initializer, entries in candidates.items():
        choices = sorted({entry.name for entry in entries}, key=order.__getitem__)
        by_name = {entry.name for entry in entries if entry.by_name}
        in_scopes = [_in_scope(use.scope, choices) for use in uses[initializer]]
        for use, in_scope in zip(uses[initializer], in_scopes, strict=True):
            likely = in_scope if any(in_scopes) else choices
            likely = [name for name in likely if name in by_name] or likely
            if len(likely) > 1 or (not likely and not use.scope):
                ambiguous |= {*(likely or choices)}
            for name in likely[:1]:
                same_name = [entry for entry in entries if entry.name == name]
                entry = next((entry for entry in same_name if entry.transposed == use.transposed), same_name[0])
                matches.append((initializer, entry, use))
    confirmed = {name for _, entry, use in matches for name in _in_scope(use.scope, [entry.name])}
    for name in {entry.name for _, entry, _ in matches} - confirmed:
        if len({initializer for initializer, entry, _ in matches if entry.name == name}) > 1:
            ambiguous.add(name)
    if ambiguous:
        raise BuildError(
            "equal weights, and the graph does not say which node has which of"
            f" {sorted(ambiguous, key=order.__getitem__)}: export an adapter without equal tensors (init: random),"
            " or with the names of modules"
        )
    return matches


def _module_and_parameter(name: str) -> tuple[str, str]:
    """Split a saved name, without PEFT's prefix, into module and parameter."""
    module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
    return module, parameter


def _in_scope(scope: str, names: list[str]) -> list[str]:
    """Return the names whose module is in a scope; if there are none, those whose module's parent is.

    Tracing omits a ModuleDict such as ``lora_B``.
    """

    def contains(module: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(module)}(?!\w)", scope) is not None

    parts = {name: _module_and_parameter(name) for name in names}
    exact = [name for name in names if contains(parts[name][0])]
    if exact:
        return exact
    nested = [name for name in names if parts[name][1] in ("weight", "bias") and "." in parts[name][0]]
    return [name for name in nested if contains(parts[name][0].rpartition(".")[0])]


def _rewire(graph: onnx.GraphProto, matches: list[_Match]) -> None:
    """Connect each use to its new input, through a Transpose where the initializer was transposed."""
    transposes: dict[str, onnx.NodeProto] = {}
    for _, candidate, use in matches:
        if candidate.transposed:
            name = f"{candidate.name}.transposed"
            transposes[name] = helper.make_node("Transpose", [candidate.name], [name], name, perm=[1, 0])
            use.node.input[use.index] = name
        else:
            use.node.input[use.index] = candidate.name
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*transposes.values(), *nodes])


def _remove_unused(graph: onnx.GraphProto, initializers: set[str]) -> None:
    """Remove initializers without readers, and the Identity nodes between them and their former readers."""
    outputs = {value.name for value in graph.output}
    copies = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in initializers
    }
    read = {name for node in _nodes(graph) for name in node.input if node.output[0] not in copies} | outputs
    unread_copies = {name for name in copies if name not in read}
    read |= {source for name, source in copies.items() if name not in unread_copies}
    for entries in (graph.node, graph.initializer, graph.input):
        for index in reversed(range(len(entries))):
            entry = entries[index]
            name = entry.output[0] if isinstance(entry, onnx.NodeProto) else entry.name
            if name in unread_copies or (name in initializers and name not in read):
                del entries[index]
