# SPDX-License-Identifier: Apache-2.0
"""Writes into a tensor of a captured graph as new tensors: ``x.add_(y)``, ``state.copy_(y)``, ``x[..., :n] = y``.

ONNX has no operator that changes a tensor. `torch.export` replaces such operators by tracing the whole graph again;
here each is replaced at its place: what read the tensor, or a view of it, after a write reads the new one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

COPY = "copy_.default"

WRITES = {
    "add_.Tensor": "add.Tensor",
    "sub_.Tensor": "sub.Tensor",
    "mul_.Tensor": "mul.Tensor",
    "div_.Tensor": "div.Tensor",
    "index_put_.default": "index_put.default",
    "masked_fill_.Scalar": "masked_fill.Scalar",
    "scatter_.src": "scatter.src",
    "scatter_.value": "scatter.value",
    COPY: "clone.default",  # of its second argument alone
}
"""Operators of ATen that change their first argument, each with one that returns the changed tensor."""

PARTS = {"slice.Tensor": "slice_scatter.default", "select.int": "select_scatter.default"}
"""Views of a part of a tensor, each with the operator that returns the tensor with another part."""


def _permuted_back(dims: Sequence[int]) -> tuple[list[int]]:
    """Return the permutation that takes back another one, whose dims may be negative."""
    return (sorted(range(len(dims)), key=[dim % len(dims) for dim in dims].__getitem__),)


REORDERINGS: Mapping[str, Callable[..., tuple[Any, ...]]] = {
    "permute.default": _permuted_back,
    "transpose.int": lambda first, second: (first, second),
}
"""Views of all values in another order of dims, each with the arguments that take it back."""


def replace_writes(graph: Any) -> None:
    """Replace operators that change a tensor which was made in the graph, or a part of one.

    Args:
        graph: a captured `torch.fx.Graph`; a tensor with a write of another kind stays as it is.
    """
    writes = {operator(name) for name in WRITES}
    order = {node: place for place, node in enumerate(graph.nodes)}
    for nodes in _nodes_by_storage(graph).values():
        if any(node.target in writes for node in nodes):
            storage = _Storage(graph, nodes, order)
            if storage.is_known():
                storage.replace_writes()


class _Storage:
    """The nodes whose tensors share their memory.

    Args:
        graph: that they are of.
        nodes: in its order, with a write; the first makes the memory.
        order: the place of each node of the graph.
    """

    def __init__(self, graph: Any, nodes: Sequence[Any], order: Mapping[Any, int]) -> None:
        self._graph, self._order = graph, order
        self._written_by = {operator(name): operator(other) for name, other in WRITES.items()}
        self._scattered_by = {operator(name): operator(other) for name, other in PARTS.items()}
        self._alias = operator("alias.default")
        self._reordered_by = {operator(name): inverse for name, inverse in REORDERINGS.items()}
        count = 1 + max(place for place, node in enumerate(nodes) if node.target in self._written_by)
        self._nodes, self._later = nodes[:count], nodes[count:]
        self._now: dict[Any, Any] = {}
        """The node that has the value of the tensor, or of a view of it, at present."""
        self._whole: dict[Any, Any] = {}
        """Of each view what it is a view of."""

    def is_known(self) -> bool:
        """Return whether the graph makes the memory, and no write is of another kind."""
        first, *others = self._nodes
        mutable = any(_is_mutable(node.target) for node in (first, *self._later))
        return first.op == "call_function" and not mutable and all(map(self._can_replace, others))

    def _can_replace(self, node: Any) -> bool:
        if not node.args or node.args[0] not in self._nodes or (_is_mutable(node.target) and not self._is_write(node)):
            return False
        if not self._is_write(node):
            return True  # a view, which is made anew where it is read after a write
        view = node.args[0]
        while view is not self._nodes[0]:
            known = (self._alias, *self._scattered_by, *self._reordered_by, *self._written_by)
            if view.target not in known:
                return False
            view = view.args[0]
        if node.target is not operator(COPY):
            return _keeps_dtype(node)
        target, source = (each.meta["val"] for each in node.args[:2])
        return same_shape(target.shape, source.shape)

    def _is_write(self, node: Any) -> bool:
        return node.target in self._written_by

    def replace_writes(self) -> None:
        """Replace all writes."""
        first, *others = self._nodes
        self._now[first] = first
        for node in others:
            view = next(view for view, now in self._now.items() if now is node.args[0])
            if self._is_write(node):
                self._replace_write(node, view)
            else:
                self._now[node], self._whole[node] = node, view

    def _replace_write(self, write: Any, view: Any) -> None:
        """Replace a write to a view, and let what comes after it read the new tensor."""
        _make_functional(write, self._written_by[write.target])
        before, self._now, self._last = self._now, {view: write}, write
        while view in self._whole:
            whole = self._whole[view]
            if view.target is self._alias:
                self._now[whole] = self._now[view]
            elif view.target in self._reordered_by:
                inverse = self._reordered_by[view.target](*view.args[1:])
                self._now[whole] = self._insert(view.target, (self._now[view], *inverse), before[whole])
            else:
                arguments = (before[whole], self._now[view], *view.args[1:])
                self._now[whole] = self._insert(self._scattered_by[view.target], arguments, before[whole])
            view = whole
        for view, node in before.items():
            for user in [user for user in node.users if self._order.get(user, -1) > self._order[write]]:
                new = self._value(view)
                user.replace_input_with(node, new)
                if user.op == "output":  # the program's signature names its outputs
                    node.name, new.name = new.name, node.name

    def _value(self, view: Any) -> Any:
        """Return the node of a view's present value."""
        if view not in self._now:
            whole = self._value(self._whole[view])
            is_alias = view.target is self._alias
            arguments = (whole, *view.args[1:])
            self._now[view] = whole if is_alias else self._insert(view.target, arguments, view, view.kwargs)
        return self._now[view]

    def _insert(self, target: Any, arguments: tuple[Any, ...], like: Any, options: Mapping[str, Any] = {}) -> Any:
        """Insert an operator after the write; its value is described like that of a node."""
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, arguments, dict(options))
        self._last.meta = dict(like.meta)
        return self._last


def _make_functional(write: Any, target: Any) -> None:
    """Make an operator that changes its first argument one that returns the changed tensor."""
    if write.target is operator(COPY):
        source, dtype = write.args[1], write.meta["val"].dtype
        same = source.meta["val"].dtype == dtype
        write.target, write.args = target if same else operator("_to_copy.default"), (source,)
        write.kwargs = {} if same else {"dtype": dtype}
    else:
        write.target = target


def _nodes_by_storage(graph: Any) -> dict[int, list[Any]]:
    """Return the nodes whose tensors share their memory, by its address, in the order of the graph."""
    import torch

    nodes: dict[int, list[Any]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            nodes.setdefault(value.untyped_storage()._cdata, []).append(node)
    return nodes


def _keeps_dtype(node: Any) -> bool:
    """Return whether an operator gives its first argument's dtype without being told to: no operand is wider."""
    dtype = node.meta["val"].dtype
    dtypes = {getattr(argument.meta["val"], "dtype", dtype) for argument in node.all_input_nodes} - {dtype}
    return not dtypes or (dtype.is_floating_point and not any(other.is_floating_point for other in dtypes))


def _is_mutable(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Return whether shapes are known to be equal, whatever the symbolic dims are."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return len(a) == len(b) and all(bool(guard_or_false(one == other)) for one, other in zip(a, b, strict=True))


def operator(name: str) -> Any:
    """Return the operator of ATen ``packet.overload``."""
    from torch import ops

    packet, overload = name.split(".")
    return getattr(getattr(ops.aten, packet), overload)
