# SPDX-License-Identifier: Apache-2.0
"""In which layout and order the products of a graph read their weights.

A square weight that is transposed has the content of a right one in the other layout, and so has a weight of another
layer. How a product reads a weight tells the first; the order in which the original model calls its layers, the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qeff_validate.explain.linear import is_linear, weight_of
from qeff_validate.tensors import Array

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
"""Operators whose second input is a weight ``[in, out]``, or ``[out, in]`` with ``transB``."""


def read_transposed(
    module: Any, nodes: Sequence[Any], initializers: Mapping[str, Array], parameters: Mapping[str, str]
) -> list[str]:
    """Return the square initializers that products read the other way than the linear layers of a model do.

    Args:
        module: the original model.
        nodes: of the graph.
        initializers: their content by name.
        parameters: name of the parameter that an initializer is equal to, as it is or transposed.
    """
    owners, found = dict(module.named_modules()), list[str]()
    for name, turned in second_inputs(nodes, initializers):
        owner, _, own = parameters.get(name, "").rpartition(".")
        array = np.squeeze(initializers[name])
        if own != "weight" or not is_linear(owners.get(owner)) or array.ndim != 2 or array.shape != array.shape[::-1]:
            continue
        expected = weight_of(owners[owner])
        right, other = (row.float().numpy() for row in (expected[0], expected[:, 0]))
        read = np.asarray(array[:, 0] if turned else array[0], np.float32)
        if np.array_equal(read, other) and not np.array_equal(read, right) and name not in found:
            found.append(name)
    return found


def exchanged(
    module: Any,
    names: Iterable[str],
    called: Iterable[str],
    nodes: Sequence[Any],
    initializers: Mapping[str, Array],
    parameters: Mapping[str, str],
) -> dict[str, str]:
    """Return the parameters that initializers should stand for, if products read those of a shape in another order.

    Exporters write nodes in the order in which they run, but optimizers may not: this is a hypothesis.

    Args:
        module: the original model.
        names: of its parameters that a graph may have.
        called: paths of its modules, in the order of their first calls.
        nodes: of the graph.
        initializers: their content by name.
        parameters: name of the parameter that an initializer is equal to.
    """
    owners, names = dict(module.named_modules()), set(names)
    expected: dict[Any, list[str]] = {}
    for path in called:
        if is_linear(owners.get(path)) and f"{path}.weight" in names:
            expected.setdefault(tuple(owners[path].weight.shape), []).append(f"{path}.weight")
    actual: dict[Any, list[str]] = {}
    for name, _ in second_inputs(nodes, initializers):
        owner, _, own = parameters.get(name, "").rpartition(".")
        if own == "weight" and is_linear(owners.get(owner)):
            actual.setdefault(tuple(owners[owner].weight.shape), []).append(name)
    found: dict[str, str] = {}
    for shape, read in actual.items():
        if len(set(read)) == len(read) == len(expected.get(shape, ())):
            pairs = zip(read, expected[shape], strict=True)
            found |= {name: parameter for name, parameter in pairs if parameters[name] != parameter}
    return found


def second_inputs(nodes: Sequence[Any], initializers: Mapping[str, Array]) -> Iterator[tuple[str, bool]]:
    """Yield the initializers that products read as their second input, and whether they are transposed on the way."""
    sources = {name: (name, False) for name in initializers}
    for node in nodes:
        if node.op_type in ("Transpose", "Identity", "Cast") and node.input[0] in sources:
            name, turned = sources[node.input[0]]
            sources[node.output[0]] = name, turned != (node.op_type == "Transpose")
        elif node.op_type in PRODUCTS and node.input[1] in sources:
            name, turned = sources[node.input[1]]
            yield name, turned != any(entry.name == "transB" and entry.i for entry in node.attribute)
