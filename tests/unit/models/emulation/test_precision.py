# SPDX-License-Identifier: Apache-2.0
"""Emulated precisions against numpy with explicit rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bounds import within
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from qeff_validate.models.emulation.precision import (
    PRODUCTS,
    ComputationVariant,
    PrecisionMode,
    emulate_precision,
    in_parts,
)

PLAIN = ComputationVariant("to nearest")
RANDOM = ComputationVariant("random rounding", seed=3)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 90}
DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def rounded(values: Any, compute: str = "fp16") -> np.ndarray:
    """Return values rounded to half precision, float32."""
    return np.asarray(values, np.float32).astype(DTYPES[compute]).astype(np.float32)


def run(compute: Any, variant: ComputationVariant, call: Callable[[], Tensor]) -> np.ndarray:
    with torch.no_grad(), PrecisionMode(compute, variant):
        result = call()
    return result.numpy()


def learned(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.as_tensor(np.asarray(values, np.float32)))


def small(kind: str, **more: Any) -> Any:
    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(kind, **{**SMALL, **more})).eval()


# --- to nearest ---------------------------------------------------------------------------------------


def normalized(x: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + eps)


@pytest.mark.numeric
@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_each_operation_reads_rounded_numbers(compute: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 8)).eval()
    nn.init.normal_(model[1].weight, 1, 0.2)
    nn.init.normal_(model[1].bias, 0, 0.2)
    inputs = torch.randn(5, 24)
    got = run(compute, PLAIN, lambda: model(inputs))
    w = {
        name: rounded(tensor.detach().numpy(), compute).astype(np.float64) for name, tensor in model.named_parameters()
    }
    x = rounded(inputs.numpy(), compute) @ w["0.weight"].T + w["0.bias"]
    x = normalized(rounded(x, compute), model[1].eps) * w["1.weight"] + w["1.bias"]
    x = np.tanh(rounded(x, compute).astype(np.float64))
    wanted = rounded(x, compute) @ w["3.weight"].T + w["3.bias"]
    exact = model.double()(inputs.double()).detach().numpy()
    noise = np.abs(wanted - exact).max()
    # a float32 sum may fall on the other side of a middle, once in thousands of roundings
    within(np.median(np.abs(got - wanted)), 1e-3 * noise)
    within(np.abs(got - wanted), 0.1 * noise)


def test_float32_to_nearest_is_plain_torch_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 8)).eval()
    inputs = torch.randn(5, 24)
    assert np.array_equal(run("fp32", PLAIN, lambda: model(inputs)), model(inputs).detach().numpy())


def test_an_operation_in_place_writes_into_the_tensor_itself() -> None:
    weight = learned([1.0, 2.0])
    with torch.no_grad(), PrecisionMode("fp16", PLAIN):
        scaled = weight * 1.0
        alias = scaled
        scaled.add_(0.1)
        scaled.mul_(3.0)
        total = torch.zeros(2)
        total.add_(scaled)
    assert alias.tolist() == pytest.approx(rounded([1.1, 2.1]) * 3, rel=1e-6)
    assert alias.tolist() != pytest.approx([3.3, 6.3], rel=1e-6)
    assert np.array_equal(total.numpy(), rounded(scaled.numpy()))


def test_a_write_into_a_view_reaches_its_base() -> None:
    weight = learned([[1.0, 2.0, 3.0]] * 2)
    with torch.no_grad(), PrecisionMode("fp16", PLAIN):
        scaled = weight * 1.1
        scaled[:, :1] = scaled[:, 1:2] * 2.0
        scaled.mT[2].add_(1.0)
        double = scaled * 2.0
    row = rounded([1.1, 2.2, 3.3])
    wanted = [float(row[1] * 2), float(np.float32(2) * np.float32(1.1)), float(row[2] + 1)]
    assert scaled.tolist() == [pytest.approx(wanted, rel=1e-6)] * 2
    assert double.tolist() == [pytest.approx(2 * rounded(wanted), rel=1e-6)] * 2


def test_mask_values_are_clipped_and_overflow_still_gives_infinity() -> None:
    weight = learned([60000.0, 1.0])
    with torch.no_grad(), PrecisionMode("fp16", PLAIN):
        masked = (weight * 1.0).masked_fill(torch.tensor([False, True]), torch.finfo(torch.float32).min)
        added = (weight * 0.0) + torch.full((2,), torch.finfo(torch.float32).min)
        doubled = weight * 2.0
        through = doubled * 1.0
    assert masked.tolist() == [60000.0, -65504.0]
    assert added.tolist() == [-65504.0, -65504.0]
    assert doubled.tolist() == [120000.0, 2.0], "a sum is float32; it is stored when it is read"
    assert through.tolist() == [float("inf"), 2.0]
    assert run("fp16", PLAIN, lambda: learned([1e6, -1e6]) * 1.0).tolist() == [65504.0, -65504.0], "weights are clipped"


def test_positions_are_exact_until_they_are_combined_with_weights() -> None:
    positions = torch.tensor([[5001.0]])
    frequency = torch.tensor([0.123456])
    with torch.no_grad(), PrecisionMode("fp16", PLAIN):
        cosine = (positions * frequency).cos()
        product = cosine * learned([1.0])
    assert cosine.item() == (positions * frequency).cos().item()
    assert product.item() == rounded(cosine.item()).item()
    assert rounded(5001.0).item() == 5000.0, "rounding would have moved the position"


def test_rms_norm_stays_in_float32_unless_its_factor_is_rounded() -> None:
    model = small("llama", num_key_value_heads=1)
    norm, states = model.layers[0].input_layernorm, torch.full((1, 64), 300.0)  # 300² is beyond fp16
    nn.init.constant_(norm.weight, 1.1)
    factors = {}
    for fused in (True, False):
        with emulate_precision(model, "fp16", ComputationVariant("", fused=fused)):
            normalized_states = norm(states * learned([1.0]))
        factors[fused] = normalized_states[0, 0].item() / 300
    assert factors[True] == pytest.approx(1.1 / 300, rel=1e-6)
    assert factors[False] == pytest.approx(1.1 * float(rounded(1 / 300)), rel=1e-6)
    assert factors[False] != pytest.approx(factors[True], rel=1e-5)


# --- random rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("value", [1.0003, -0.7771, 1234.567, 3.1e-4])
def test_random_rounding_is_unbiased_and_gives_one_of_both_neighbours(compute: str, value: float) -> None:
    exact = np.float32(value)
    results = run(compute, RANDOM, lambda: torch.full((40_000,), float(exact)) * learned(1.0)).astype(np.float64)
    near = rounded(exact, compute).astype(DTYPES[compute])
    others = [np.nextafter(near, near.dtype.type(sign * np.inf)).astype(np.float64) for sign in (-1, 1)]
    pair = sorted([float(near), next(x for x in others if (x - exact) * (float(near) - exact) <= 0)])
    assert set(np.unique(results)) == set(pair)
    share, gap = (float(exact) - pair[0]) / (pair[1] - pair[0]), pair[1] - pair[0]
    assert abs(results.mean() - exact) < 5 * gap * np.sqrt(share * (1 - share) / results.size)


def test_random_rounding_leaves_representable_values_unchanged() -> None:
    values = [0.0, -0.0, 1.5, -65504.0, 2.0**-24]
    got = run("fp16", RANDOM, lambda: torch.tensor(values) * learned(1.0) * 1.0)
    assert got.tolist() == values
    assert run("fp16", RANDOM, lambda: learned([6e4, -6e4]) * 2.0 * 1.0).tolist() == [np.inf, -np.inf]
    assert np.isnan(run("fp16", RANDOM, lambda: torch.tensor([float("nan")]) * learned(1.0) * 1.0)).all()


def test_weights_are_rounded_to_nearest_in_every_variant() -> None:
    values = np.random.default_rng(0).standard_normal(500)
    assert np.array_equal(run("fp16", RANDOM, lambda: learned(values) * 1.0), rounded(values))


def test_a_seed_is_reproducible_and_seeds_differ() -> None:
    weight = learned(np.random.default_rng(0).standard_normal((30, 30)))

    def once(seed: int) -> np.ndarray:
        return run("fp16", ComputationVariant("", seed=seed), lambda: (weight @ weight) @ weight)

    assert np.array_equal(once(1), once(1))
    assert not np.array_equal(once(1), once(2))


# --- sums in parts --------------------------------------------------------------------------------------

A, B, BIAS = (torch.from_numpy(np.random.default_rng(s).standard_normal(shape).astype(np.float32))
              for s, shape in enumerate([(2, 6, 50), (2, 50, 7), (7,)]))  # fmt: skip
CALLS: dict[str, tuple[Any, ...]] = {
    "linear": (A, B[0].mT, BIAS),
    "matmul": (A, B),
    "bmm": (A, B),
    "mm": (A[0], B[0]),
    "addmm": (BIAS, A[0], B[0]),
}


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_sums_in_parts_are_the_product_in_another_order(name: str, parts: int) -> None:
    args = CALLS[name]
    wide = tuple(tensor.double() for tensor in args)
    exact = getattr(torch.nn.functional if name == "linear" else torch, name)(*wide)
    got = in_parts(name, parts, *args)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 50 * 2**-24 * exact.abs().max()
    whole = getattr(torch.nn.functional if name == "linear" else torch, name)(*args)
    assert not torch.equal(got, whole), "partial sums are rounded elsewhere"


def test_parts_are_added_in_order_and_short_sums_are_not_split() -> None:
    line, ones = torch.tensor([[1e8, 1.0, -1e8, 1.0]]), torch.ones(4, 1)
    assert in_parts("mm", 4, line, ones).item() == 1.0, "((1e8 + 1) - 1e8) + 1 in float32"
    assert in_parts("mm", 4, torch.tensor([[1.0, 1e8, 1.0, -1e8]]), ones).item() == 0.0
    short = torch.randn(3, 2)
    assert torch.equal(in_parts("mm", 3, short, short.mT), short @ short.mT)
