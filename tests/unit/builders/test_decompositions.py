# SPDX-License-Identifier: Apache-2.0
"""An export traces a graph again only where an operator needs it, and the values are those of the module either way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from bounds import close
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

from qeff_validate.builders.export_onnx import export_onnx
from qeff_validate.protocols import Graph
from qeff_validate.tensors import TensorSpec

OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool-and": lambda x: torch.where((x > 0) & (x < 1) | (x > 2) ^ (x > 3), x, -x),
    "dtype": lambda x: x.to(torch.float64).to("cpu", torch.float32) + x.to(x.dtype) * (x > 0),
    "same-dtype-as-output": lambda x: x.to(torch.float32),
    "transpose": lambda x: (torch.arange(6.0).reshape(2, 3).T @ x.reshape(-1, 2, 4)).mT,
    "views": lambda x: torch.cat(x.narrow(1, 2, 5).flatten(0).reshape(-1, 5).chunk(2, dim=1), 1).contiguous(),
    "detach": lambda x: (x * 2).detach_() + x.detach(),
    "smaller": lambda x: torch.min(x, x * x) + torch.max(x, -x),
    "no-gradients": lambda x: _without_gradients(x) + 1,
    "in-place": lambda x: (x * 2).add_(x).mul_(3) + _read_before_and_after(x),
    "in-place-then-view": lambda x: (x * 2).sub_(x).T.reshape(8, -1).T,
    "in-place-integers": lambda x: ((x > 0).long() * 2).add_((x > 1).long()) * x,
    "in-place-at-places": lambda x: (
        torch.zeros_like(x).scatter_(1, (x > 0).long(), 2.0).masked_fill_(x > 1, 0.5)
        + torch.ones_like(x).scatter_(1, (x > 0).long(), x)
    ),
    "copied-over": lambda x: _copied_over(x * 2, x + 1) + _copied_over((x * 2).to(torch.float64), x),
    "part": lambda x: _changed_through_a_view(x) + 1,
    "parts": lambda x: torch.cat(_written_in_parts(x), 1),
    "parts-of-the-output": lambda x: _written_in_parts(x)[1],
    "gradients": lambda x: _with_gradients(x) + 1,
    "part-when-permuted": lambda x: _changed_when_permuted(x) + 0,
    "deviation": lambda x: (
        x.std(1, keepdim=True, unbiased=False) + x.std(-1, keepdim=True) * x.std((0, 1)) - x.std(None)
    ),
    "eye": lambda x: x @ torch.eye(8) + torch.linalg.norm(x, dim=1, keepdim=True),
    "decomposed-output": lambda x: torch.square(x @ torch.kron(torch.eye(4), torch.ones(2, 2))),
}
"""Operators of transformers, in graphs that need no trace to be translated."""

DECOMPOSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in-place-of-another-view": lambda x: _changed_when_flat(x) + 1,
    "in-place-in-wider-numbers": lambda x: (x * 2).add_(x.to(torch.float64)),
    "in-place-view": lambda x: (x * 2).unsqueeze_(1),
    "copied-over-a-part": lambda x: _copied_over(x * 2, x[:, :1]),
    "rows-by-themselves": lambda x: (x * 2).add_(torch.vmap(lambda row: row * 3 + row.sum())(x)),
    "in-place-in-rows-by-themselves": torch.vmap(lambda row: row.abs().add_(row)),
}


@torch.no_grad()
def _without_gradients(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@torch.enable_grad()
def _with_gradients(x: torch.Tensor) -> torch.Tensor:
    return x * 3


def _read_before_and_after(x: torch.Tensor) -> torch.Tensor:
    doubled = x * 2
    before = doubled * 5
    doubled.add_(x)
    return before - doubled


def _copied_over(state: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """As recurrent layers write their state: what was read before stays, and the source may change afterwards."""
    before = state * 5
    state.to(state.dtype).copy_(new)
    read = state + 3
    state.add_(1)
    return (before - read * state + new).to(torch.float32)


def _changed_through_a_view(x: torch.Tensor) -> torch.Tensor:
    doubled = x * 2
    doubled[:, :4].add_(x[:, 4:])
    return doubled


def _changed_when_permuted(x: torch.Tensor) -> torch.Tensor:
    """As Gemma-3n adds to predictions whose dims are in another order, and then to some of them."""
    boxes = x.view(-1, 2, 2, 2) * 2
    turned = boxes.permute(1, 2, -1, 0)
    before = turned.sum(0)
    turned += x.view(-1, 2, 2, 2).permute(1, 3, 2, 0)
    turned.type_as(x)[1:] += 1
    boxes.transpose(1, -1)[:, :1].mul_(3)
    return torch.cat([boxes.flatten(1), turned.permute(3, 0, 1, 2).flatten(1), before.permute(2, 0, 1).flatten(1)], 1)


def _changed_when_flat(x: torch.Tensor) -> torch.Tensor:
    doubled = x * 2
    doubled.view(-1)[:4].add_(1)
    return doubled


def _written_in_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As attention joins rotated and plain halves of a key; views are read before and after a write, and written."""
    key = x.new_empty(x.shape[0], 8)
    left, column = key[:, :4], key[:, 5]
    key[:, :4] = x[:, 4:]
    key[:, 4:] = x[:, :4] * 2
    before = left * column[:, None]
    left[:, 1:3] += 1
    column.mul_(3)
    key[1:, 0] -= x[1:, 0].detach()
    return torch.cat([before, left, column[:, None], key], 1), key


def exported(function: Callable[[torch.Tensor], torch.Tensor], folder: Path, monkeypatch: Any) -> int:
    """Export a function, compare it on ONNX Runtime in two sizes, and return how often the graph was decomposed."""
    calls = []
    decompose = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *args: calls.append(1) or decompose(*args)
    )

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    result = function(torch.from_numpy(rows))
    output = TensorSpec("y", "float32", ("batch", *result.shape[1:]))
    graph = Graph((TensorSpec("x", "float32", ("batch", 8)),), (output,), ({"batch": 3},))
    export_onnx(Module(), {"x": rows}, graph, folder)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for feed in (rows, np.tile(rows, (5, 1)) * 2):
        close(session.run(None, {"x": feed})[0], function(torch.from_numpy(feed)), rtol=1e-5, atol=1e-5)
    return len(calls)


@pytest.mark.numeric
@pytest.mark.parametrize("name", OPERATORS)
def test_known_operators_are_translated_without_a_decomposition(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    assert exported(OPERATORS[name], tmp_path, monkeypatch) == 0


@pytest.mark.numeric
@pytest.mark.parametrize("name", DECOMPOSED)
def test_operators_without_a_form_in_onnx_are_decomposed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    assert exported(DECOMPOSED[name], tmp_path, monkeypatch) == 1


@pytest.mark.numeric
def test_torch_is_as_before_after_an_export_that_fails(tmp_path: Path, monkeypatch: Any) -> None:
    decompose, cache = torch.export.ExportedProgram.run_decompositions, torch._dynamo.config.fake_tensor_cache_enabled
    registry, interpreter = ONNXRegistry.from_torchlib, _TypePromotionInterpreter.run_node
    tables = torch.export.default_decompositions
    with pytest.raises(Exception, match=r"torch\.onnx\.export failed"):
        exported(lambda x: torch.linalg.solve(x.T @ x, torch.ones(8)), tmp_path, monkeypatch)
    monkeypatch.undo()
    assert torch.export.ExportedProgram.run_decompositions is decompose
    assert torch._dynamo.config.fake_tensor_cache_enabled == cache
    assert torch.is_grad_enabled()
    assert ONNXRegistry.from_torchlib == registry
    assert _TypePromotionInterpreter.run_node is interpreter
    assert torch.export.default_decompositions is tables
