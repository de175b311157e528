# SPDX-License-Identifier: Apache-2.0
"""From an ONNX graph to another: the adapter in somebody else's graph becomes inputs with retained twins.

An exporter transposes, renames and merges weights, so a tensor is known by its content and by the place that uses it:
node names and metadata tell the module that a node comes from.
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
"""Where the dynamo exporter keeps the modules round a node; the TorchScript exporter has them in the node's name."""

PREFIX = "base_model.model."
"""What PEFT's saved names begin with; a graph made of the model inside has no such modules."""


@dataclass(frozen=True, slots=True)
class _Form:
    """An adapter tensor as an initializer may hold it."""

    name: str
    transposed: bool
    own: bool = False  # the initializer's own name says so


@dataclass(frozen=True, slots=True)
class _Place:
    """An input of a node that reads an initializer, itself or through Identity nodes."""

    node: onnx.NodeProto
    index: int

    @property
    def scope(self) -> str:
        """The modules that the node comes from, with dots; empty if the exporter did not say."""
        scopes = [entry.value for entry in self.node.metadata_props if entry.key == SCOPES]
        return " ".join([*scopes, self.node.name.replace("/", ".") if "/" in self.node.name else ""]).strip()

    @property
    def transposes(self) -> bool:
        """Whether a linear layer's weight stands here turned round, ``[in, out]``."""
        turned = any(entry.name == "transB" and entry.i for entry in self.node.attribute)
        return self.node.op_type in ("MatMul", "Gemm") and self.index == 1 and not turned


def lift_adapters(model: onnx.ModelProto | Path | str, adapter: Mapping[str, Array] | Iterable[str]) -> onnx.ModelProto:
    """Return a graph in which the tensors of an adapter are inputs with ``_RetainedState`` twins.

    Args:
        model: a graph with the adapter's weights inside, or its file. Weights in a file of their own stay there, and
            only those of an adapter's shape are read: save the result in the same directory, or load them first.
        adapter: the arrays that were exported, by PEFT's saved names; they are found by content, transposed or not.
            Names alone do for initializers that still have the names of the module's parameters.

    Raises:
        BuildError: a tensor is not in the graph, or cannot be told from an equal one; the message lists them.
    """
    proto, folder = _opened(model)
    arrays = dict(adapter) if isinstance(adapter, Mapping) else None
    names = list(adapter)
    _free_names(proto, names)
    kept = {tensor.name: tensor for tensor in proto.graph.initializer}
    forms = _by_name(kept, names) if arrays is None else _by_content(kept, arrays, folder)
    found = _assigned(forms, _places(proto.graph, forms), names)
    missing = sorted(set(names) - {form.name for _, form, _ in found})
    if missing:
        hint = "Give the arrays too: exporters rename weights" if arrays is None else "Are these the exported weights?"
        raise BuildError(f"the graph does not use {len(missing)} of {len(names)} adapter tensors: {missing}. {hint}")
    holders = {form.name: kept[tensor] for tensor, form, _ in found}
    _rewire(proto.graph, found)
    for name in names:
        shape = list(holders[name].dims if arrays is None else arrays[name].shape)
        for value, values in ((name, proto.graph.input), (f"{name}{RETAINED}", proto.graph.output)):
            values.append(helper.make_tensor_value_info(value, holders[name].data_type, shape))
        proto.graph.node.append(helper.make_node("Identity", [name], [f"{name}{RETAINED}"], f"{name}{RETAINED}"))
    _drop_unused(proto.graph, set(forms))
    return proto


def _opened(model: onnx.ModelProto | Path | str) -> tuple[onnx.ModelProto, Path | None]:
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy, None
    try:
        return onnx.load(str(model), load_external_data=False), Path(model).parent
    except Exception as exc:  # protobuf's own error, or the file system's
        raise BuildError(f"cannot read {model} as an ONNX graph: {exc}") from exc


def _free_names(proto: onnx.ModelProto, names: list[str]) -> None:
    """Give initializers that have an adapter tensor's very name another one."""
    graph = proto.graph
    if not names:
        raise BuildError("no adapter tensor is named")
    renamed = {tensor.name: f"{tensor.name}.initializer" for tensor in graph.initializer if tensor.name in names}
    there = {value.name for value in (*graph.input, *graph.output)} - renamed.keys()
    taken = sorted(name for name in names if name in there or f"{name}{RETAINED}" in there)
    if taken:
        raise BuildError(f"the graph has inputs or outputs of these names already: {taken}")
    for value in graph.input:
        value.name = renamed.get(value.name, value.name)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in _nodes(graph):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _by_name(kept: Mapping[str, onnx.TensorProto], names: list[str]) -> dict[str, list[_Form]]:
    """Return what each initializer may hold by its own name: that tensor, or one that was merged with it."""
    found: dict[str, list[_Form]] = {}
    for name in names:
        owner, leaf = _owner(name)
        pattern = re.compile(rf"(?<!\w){re.escape(owner)}\.(\w+\.)?{re.escape(leaf)}(\.\w+)?")
        for own in kept:
            if any(match.end() == len(own) for match in pattern.finditer(own)):
                found.setdefault(own, []).append(_Form(name, False, own=True))
    named = {form.name for forms in found.values() for form in forms}
    merged = [_Form(name, False) for name in names if name not in named]
    return {own: [*forms, *merged] for own, forms in found.items()}


def _by_content(
    kept: Mapping[str, onnx.TensorProto], arrays: Mapping[str, Array], folder: Path | None
) -> dict[str, list[_Form]]:
    """Return which adapter tensors each initializer equals, bit for bit."""
    known: dict[tuple[object, ...], list[_Form]] = {}
    for name, array in arrays.items():
        known.setdefault(_digest(array), []).append(_Form(name, False))
        if array.ndim == 2:
            known.setdefault(_digest(array.T), []).append(_Form(name, True))
    shapes = {key[:2] for key in known}
    found = {}
    for own, tensor in kept.items():
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if (str(dtype), tuple(tensor.dims)) in shapes:
            forms = known.get(_digest(_content(tensor, folder)))
            if forms:
                found[own] = forms
    return found


def _digest(array: Array) -> tuple[object, ...]:
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


def _places(graph: onnx.GraphProto, wanted: Iterable[str]) -> dict[str, list[_Place]]:
    """Return who reads each initializer; the TorchScript exporter puts an Identity where it merges equal ones."""
    alias = {name: name for name in wanted}
    found: dict[str, list[_Place]] = {name: [] for name in alias}
    for node in _nodes(graph):
        if node.op_type == "Identity" and node.input[0] in alias:
            alias[node.output[0]] = alias[node.input[0]]
            continue
        for index, name in enumerate(node.input):
            if name in alias:
                found[alias[name]].append(_Place(node, index))
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _assigned(
    forms: Mapping[str, list[_Form]], places: Mapping[str, list[_Place]], names: list[str]
) -> list[tuple[str, _Form, _Place]]:
    """Decide which adapter tensor each place reads; a place of another module is left out.

    Raises:
        BuildError: equal tensors, and nothing says which of them a place reads.
    """
    order = {name: at for at, name in enumerate(names)}
    found: list[tuple[str, _Form, _Place]] = []
    unclear: set[str] = set()
    for tensor, candidates in forms.items():
        choices = sorted({form.name for form in candidates}, key=order.__getitem__)
        own = {form.name for form in candidates if form.own}
        told = [_told(place.scope, choices) for place in places[tensor]]
        for place, hits in zip(places[tensor], told, strict=True):
            likely = hits if any(told) else choices
            likely = [name for name in likely if name in own] or likely
            if len(likely) > 1 or (not likely and not place.scope):
                unclear |= {*(likely or choices)}
            for name in likely[:1]:
                both = [form for form in candidates if form.name == name]
                form = next((form for form in both if form.transposed == place.transposes), both[0])
                found.append((tensor, form, place))
    by_scope = {name for tensor, form, place in found for name in _told(place.scope, [form.name])}
    for name in {form.name for _, form, _ in found} - by_scope:
        if len({tensor for tensor, form, _ in found if form.name == name}) > 1:
            unclear.add(name)
    if unclear:
        raise BuildError(
            "equal weights, and the graph does not say which node has which of"
            f" {sorted(unclear, key=order.__getitem__)}: export an adapter without equal tensors (init: random),"
            " or with the names of modules"
        )
    return found


def _owner(name: str) -> tuple[str, str]:
    """Return the module of a saved tensor and the tensor's own name."""
    owner, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    return owner, leaf


def _told(scope: str, names: list[str]) -> list[str]:
    """Return those of the names whose module is in a scope; else those whose module's parent is.

    Tracing leaves out a ModuleDict such as ``lora_B``.
    """

    def inside(module: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(module)}(?!\w)", scope) is not None

    exact = [name for name in names if inside(_owner(name)[0])]
    if exact:
        return exact
    inner = [name for name in names if _owner(name)[1] in ("weight", "bias") and "." in _owner(name)[0]]
    return [name for name in inner if inside(_owner(name)[0].rpartition(".")[0])]


def _rewire(graph: onnx.GraphProto, owners: list[tuple[str, _Form, _Place]]) -> None:
    """Let each place read its input, turned round where the initializer was."""
    turned: dict[str, onnx.NodeProto] = {}
    for _, form, place in owners:
        if form.transposed:
            name = f"{form.name}.transposed"
            turned[name] = helper.make_node("Transpose", [form.name], [name], name, perm=[1, 0])
            place.node.input[place.index] = name
        else:
            place.node.input[place.index] = form.name
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*turned.values(), *rest])


def _drop_unused(graph: onnx.GraphProto, lifted: set[str]) -> None:
    """Remove initializers that nobody reads any more, and the Identity nodes that handed them on."""
    outputs = {value.name for value in graph.output}
    merged = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.input[0] in lifted
    }
    read = {name for node in _nodes(graph) for name in node.input if node.output[0] not in merged} | outputs
    idle = {name for name in merged if name not in read}
    read |= {source for name, source in merged.items() if name not in idle}
    for values in (graph.node, graph.initializer, graph.input):
        for at in reversed(range(len(values))):
            value = values[at]
            name = value.output[0] if isinstance(value, onnx.NodeProto) else value.name
            if name in idle or (name in lifted and name not in read):
                del values[at]
