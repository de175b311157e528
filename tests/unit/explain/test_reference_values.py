# SPDX-License-Identifier: Apache-2.0
"""The recorded values of a model whose modules are called several times, and whose padding sees nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bounds import within
from torch import Tensor, nn
from torch.nn import functional

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.layers import first_divergent
from qeff_validate.explain.outputs import output_finding
from qeff_validate.explain.reference_values import local_errors, record
from qeff_validate.protocols import OriginalRun

TOKENS = np.array([[True, True, False, False]])


class Rotation(nn.Module):
    def forward(self, states: Tensor, step: float) -> Tensor:
        return states * torch.cos(step * torch.arange(states.shape[-1], dtype=states.dtype))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.project(states)
        scores = states @ states.mT + mask
        return functional.softmax(scores, dim=-1, dtype=torch.float32).to(states.dtype) @ states


class Body(nn.Module):
    """One rotation is called for both layers, as transformers does for layers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = Rotation()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, states: Tensor) -> Tensor:
        seen = torch.from_numpy(TOKENS[:, None, :] & TOKENS[:, :, None])
        mask = torch.zeros(seen.shape, dtype=states.dtype).masked_fill(~seen, torch.finfo(states.dtype).min)
        for layer, step in zip(self.layers, (0.3, 0.7), strict=True):
            states = layer(self.rotation(states, step), mask)
        return states


def original() -> OriginalRun:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, states = Body().eval(), torch.randn(1, 4, 8)

    def run() -> dict[str, Any]:
        dtype = next(model.parameters()).dtype
        return {"output": model(states.to(dtype)).detach().double().numpy()[:, 0]}

    return OriginalRun(model, {}, TOKENS, run, {"output": "pooling"})


def test_rows_of_padding_that_see_nothing_are_no_reason_to_lose_what_follows() -> None:
    recorded = record(original())
    assert all(np.isfinite(value.array).all() for value in recorded.values)
    assert {value.module for value in recorded.values} >= {"layers.0.project", "layers.1.project", "pooling"}


@pytest.mark.numeric
def test_each_call_of_a_module_is_measured_against_its_own_content() -> None:
    run = original()
    recorded = record(run)
    calls = [value.place for value in recorded.values if value.module == "rotation"]
    assert [place[-1] for place in calls if place is not None] == [0, 1]
    assert recorded.call("rotation", calls[1])[0][1] == 0.7

    def size(expected: Any, actual: Any) -> float:
        return relative_error(expected[:, :2], np.asarray(actual)[:, :2])

    errors = local_errors(run, recorded.values[:-1], "fp32", size)
    within(max(errors), 5e-6)  # a few roundings of float32; with another call's content the error is about 1


def test_nan_is_beyond_every_floor() -> None:
    assert first_divergent([1.0, float("nan"), 2.0], 8) == 1
    assert first_divergent([1.0, 2.0], 8) is None


@pytest.mark.parametrize(("tolerance", "text"), [(1e-6, "its output is rounded to fp16"), (1e-3, "")])
def test_half_precision_is_told_only_where_it_is_not_expected(tolerance: float, text: str) -> None:
    expected = np.random.default_rng(0).normal(size=(4, 8))
    observed = (expected * 1.00001).astype(np.float16).astype(np.float64)
    assert output_finding(expected, observed, None, relative_error, tolerance) == text
