# SPDX-License-Identifier: Apache-2.0
"""What befell a norm of which only inputs and outputs are known, under rounding to fp16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.operators import operator_finding

TOKENS, WIDTH = 9, 32

Arrays = tuple[Any, Any]


def model(kind: Callable[..., Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(kind(WIDTH), kind(WIDTH))
        for parameter in made.parameters():
            parameter.data.normal_(mean=1, std=0.4)
    return made.requires_grad_(requires_grad=False)


def normal(given: Any, kind: Any) -> Any:
    centred = given - given.mean(-1, keepdims=True) if kind is nn.LayerNorm else given
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def finding(edit: Callable[[Arrays, Arrays], Arrays], kind: Any = nn.LayerNorm) -> str:
    """Return the finding for a norm whose weight and bias are other ones, and whose output is rounded to fp16."""
    root = model(kind)
    given = np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH))
    own, other = (
        (layer.weight.double().numpy(), layer.bias.double().numpy() if kind is nn.LayerNorm else 0) for layer in root
    )
    weight, bias = edit(own, other)
    weight = weight + 1 if kind is GemmaRMSNorm else weight
    output = (normal(given, kind) * weight + bias).astype(np.float16).astype(np.float64)
    call = (torch.from_numpy(given),), {}
    return operator_finding(root, ("0", "out", 0, 0), "0", call, output, relative_error, 1.5e-3)


def element(weight: Any) -> Any:
    changed = weight.copy()
    changed[5] += 2
    return changed


FAULTS: list[tuple[Callable[[Arrays, Arrays], Arrays], str]] = [
    (lambda own, _: (2 * own[0], own[1]), "weight scaled by 2"),
    (lambda own, _: (0 * own[0], own[1]), "weight is zero"),
    (lambda own, _: (0 * own[0] + 1, own[1]), "no weight"),
    (lambda own, _: (own[0] + 1, own[1]), "weight has 1 added"),
    (lambda own, _: (np.roll(own[0], 1), own[1]), "weight is shifted by 1"),
    (lambda own, _: (element(own[0]), own[1]), "weight has other elements: [5] "),
    (lambda own, other: (other[0], own[1]), "weight is that of 1"),
]
OF_BIASES: list[tuple[Callable[[Arrays, Arrays], Arrays], str]] = [
    (lambda own, _: (own[0], -own[1]), "bias negated"),
    (lambda own, _: (own[0], 0 * own[1]), "no bias"),
    (lambda own, other: (own[0], other[1]), "bias is that of 1"),
    (lambda _, other: other, "weight and bias are those of 1"),
    (lambda own, _: own[::-1], "weight and bias are swapped"),
]


@pytest.mark.parametrize("kind", [nn.LayerNorm, LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize(("fault", "text"), FAULTS, ids=[text for _, text in FAULTS])
def test_what_befell_a_weight_is_told(fault: Callable[[Arrays, Arrays], Arrays], text: str, kind: Any) -> None:
    assert finding(fault, kind).startswith(text)


@pytest.mark.parametrize(("fault", "text"), OF_BIASES, ids=[text for _, text in OF_BIASES])
def test_what_befell_a_bias_is_told(fault: Callable[[Arrays, Arrays], Arrays], text: str) -> None:
    assert finding(fault) == text


def test_random_weight_has_no_name() -> None:
    noise = np.random.default_rng(2).normal(size=WIDTH)
    assert finding(lambda own, _: (own[0] + noise, own[1])) == ""
