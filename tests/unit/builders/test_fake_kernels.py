# SPDX-License-Identifier: Apache-2.0
"""The shapes that an export is traced with are those that torch finds itself, and torch is as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._C import DispatchKey
from torch.nn import functional

from qeff_validate.builders.fake_kernels import fake_kernels

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: functional.linear(x, torch.ones(5, 4), torch.ones(5)),
    "linear of a vector": lambda x: functional.linear(x, torch.ones(4)),
    "matrices": lambda x: x @ x.mT,
    "matrices of heads": lambda x: _heads(x).transpose(1, 2) @ torch.ones(2, 7),
    "batch of one": lambda x: x[:1] @ x.mT,
    "vector": lambda x: x @ torch.ones(4),
    "norm": lambda x: functional.layer_norm(x, (4,), torch.ones(4)),
    "norm over two dims": lambda x: functional.layer_norm(_heads(x), (2, 2), None, torch.ones(2, 2)),
}


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, 2, 2)


def shapes(function: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[str, str, str]]:
    """Target, shape and dtype of each node of a captured function of ``[batch, length, 4]``."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=3)},)
    program = torch.export.export(Module(), (torch.ones(3, 5, 4),), dynamic_shapes=dims)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return [
        (str(node.target), str(tuple(value.shape)), str(value.dtype))
        for node in nodes
        if isinstance(value := node.meta["val"], torch.Tensor)
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_are_those_that_torch_finds(name: str) -> None:
    expected = shapes(FUNCTIONS[name])
    with fake_kernels():
        assert shapes(FUNCTIONS[name]) == expected


def test_shapes_that_do_not_fit_stay_errors_and_torch_is_as_before() -> None:
    operators = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default, torch.ops.aten.layer_norm.default)
    before = [operator.py_kernels.get(DispatchKey.CompositeImplicitAutograd) for operator in operators]
    with fake_kernels(), contextlib.suppress(ZeroDivisionError):
        for function in (lambda x: functional.linear(x, torch.ones(5, 3)), lambda x: x @ torch.ones(5, 2)):
            with pytest.raises(RuntimeError):
                shapes(function)
        raise ZeroDivisionError
    assert [operator.py_kernels.get(DispatchKey.CompositeImplicitAutograd) for operator in operators] == before
