# SPDX-License-Identifier: Apache-2.0
"""In which layout the products of a graph read their weights: a square one that is transposed looks the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    for name, turned in _second_inputs(nodes, initializers):
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


def _second_inputs(nodes: Sequence[Any], initializers: Mapping[str, Array]) -> Iterator[tuple[str, bool]]:
    """Yield the initializers that products read as their second input, and whether they are transposed on the way."""
    sources = {name: (name, False) for name in initializers}
    for node in nodes:
        if node.op_type in ("Transpose", "Identity", "Cast") and node.input[0] in sources:
            name, turned = sources[node.input[0]]
            sources[node.output[0]] = name, turned != (node.op_type == "Transpose")
        elif node.op_type in PRODUCTS and node.input[1] in sources:
            name, turned = sources[node.input[1]]
            yield name, turned != any(entry.name == "transB" and entry.i for entry in node.attribute)
