# SPDX-License-Identifier: Apache-2.0
"""What befell the weight of a linear layer of which only inputs and outputs are known, under rounding to fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.operators import operator_finding

TOKENS, WIDTH, WIDE = 9, 32, 48
"""Fewer tokens than columns: the weight itself cannot be computed from inputs and outputs."""


def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE, bias=False))
        for parameter in made.parameters():
            parameter.data.normal_(std=0.3)
        return made.requires_grad_(requires_grad=False)


def finding(edit: Callable[[Any], Any], path: str = "0", bias: Any = None) -> str:
    """Return the finding for a layer whose weight is another one, and whose output is rounded to fp16."""
    root = model()
    layer = root.get_submodule(path)
    given = torch.from_numpy(np.random.default_rng(1).normal(size=(1, TOKENS, WIDTH)))
    weight = torch.from_numpy(edit(layer.weight.double().numpy().copy()))
    own = 0 if layer.bias is None else layer.bias.double()
    output = (given @ weight.T + (own if bias is None else bias)).half().double().numpy()
    call = (given,), {}
    return operator_finding(root, (path, "out", 0, 0), path, call, output, relative_error, 1.5e-3)


def rows(edit: Callable[[Any], None]) -> Callable[[Any], Any]:
    def change(weight: Any) -> Any:
        edit(weight)
        return weight

    return change


def negated(weight: Any) -> None:
    weight[5] *= -1


def zero(weight: Any) -> None:
    weight[5] = 0


def larger(weight: Any) -> None:
    weight[[1, 7]] *= 1.5


def swapped(weight: Any) -> None:
    weight[[2, 9]] = weight[[9, 2]]


def copied(weight: Any) -> None:
    weight[2] = weight[9]


def column(weight: Any) -> None:
    weight[:, 3] = 0


def element(weight: Any) -> None:
    weight[4, 6] += 2


def int8(weight: Any) -> Any:
    scale = np.abs(weight).max(-1, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def int4(weight: Any) -> Any:
    scale = np.abs(weight).max() / 7
    return np.rint(weight / scale) * scale


def another(_: Any) -> Any:
    other: Any = model()[1].weight.double().numpy()
    return other


FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (rows(negated), "weight row 5 is negated"),
    (rows(zero), "weight row 5 is zero"),
    (rows(larger), "weight 2 rows (1, 7) are scaled by 1.5"),
    (rows(swapped), "weight 2 rows (2, 9) are swapped"),
    (rows(copied), "weight row 2 is that of row 9"),
    (rows(column), "weight column 3 is zero"),
    (rows(element), "weight element [4, 6] is off by +2"),
    (np.zeros_like, "weight is zero"),
    (int8, "weight rounded to int8 by row"),
    (int4, "weight rounded to int4"),
    (another, "weight is that of 1"),
    (lambda weight: 1.05 * weight, "weight scaled by 1.05"),
    (lambda weight: -weight, "weight negated"),
    (lambda weight: weight.T.reshape(weight.shape), "weight read in the other memory order"),
    (lambda weight: weight[::-1].copy(), "weight 48 rows (0, 1, 2, 3, …) are permuted"),
]


@pytest.mark.parametrize(("fault", "text"), FAULTS, ids=[text for _, text in FAULTS])
def test_what_befell_a_weight_is_told_from_inputs_and_outputs(fault: Callable[[Any], Any], text: str) -> None:
    assert finding(fault) == text


BIASES: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda own, _: -own, "bias negated"),
    (lambda own, _: 0.5 * own, "bias scaled by 0.5"),
    (lambda own, _: np.where(np.arange(WIDE) == 7, own + 3, own), "bias has other elements: [7] "),
    (lambda _, other: other, "bias is that of 1"),
]


@pytest.mark.parametrize(("fault", "text"), BIASES, ids=[text for _, text in BIASES])
def test_what_befell_a_bias_is_told_from_inputs_and_outputs(fault: Callable[[Any, Any], Any], text: str) -> None:
    own, other = (layer.bias.double().numpy() for layer in model()[:2])
    assert finding(lambda weight: weight, bias=torch.from_numpy(fault(own, other))).startswith(text)


def test_weight_and_bias_of_another_layer_are_told() -> None:
    other = model()[1].bias.double()
    assert finding(another, bias=other) == "weight and bias are those of 1"


def test_without_a_bias_rows_are_told_too_and_a_healthy_or_random_weight_has_no_name() -> None:
    assert finding(rows(negated), path="2") == "weight row 5 is negated"
    noise = np.random.default_rng(2).normal(size=(WIDE, WIDTH))
    assert finding(lambda weight: weight + noise) == ""


def test_two_unlike_changes_of_rows_have_no_factor() -> None:
    def change(weight: Any) -> None:
        weight[2] *= -1
        weight[30] *= 0.2

    assert finding(rows(change)) == ""
