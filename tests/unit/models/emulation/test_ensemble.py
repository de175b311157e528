# SPDX-License-Identifier: Apache-2.0
"""The original model in another arithmetic, against numpy with explicit roundings; and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bounds import within
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from qeff_validate.models.embedding.reference import batched_states, hidden_states
from qeff_validate.models.emulation.ensemble import (
    ENSEMBLE,
    PRODUCTS,
    Arithmetic,
    ComputationVariant,
    Rounded,
    RoundedInPlace,
    attending,
    computing_as,
    in_parts,
    run_ensemble,
    sharing_copy,
)

PLAIN = ComputationVariant("to nearest")
RANDOM = ComputationVariant("random rounding", seed=3)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 90}
IDS = [np.random.default_rng(5).integers(3, 90, size) for size in (9, 3, 17, 1, 12, 6, 30)]
DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def rounded(values: Any, compute: str = "fp16") -> np.ndarray:
    """What a tensor is after it was stored in half precision."""
    return np.asarray(values, np.float32).astype(DTYPES[compute]).astype(np.float32)


def run(compute: Any, variant: ComputationVariant, call: Callable[[], Tensor]) -> np.ndarray:
    with torch.no_grad(), Arithmetic(compute, variant):
        found = call()
    return found.numpy()


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
    given = torch.randn(5, 24)
    got = run(compute, PLAIN, lambda: model(given))
    w = {
        name: rounded(tensor.detach().numpy(), compute).astype(np.float64) for name, tensor in model.named_parameters()
    }
    x = rounded(given.numpy(), compute) @ w["0.weight"].T + w["0.bias"]
    x = normalized(rounded(x, compute), model[1].eps) * w["1.weight"] + w["1.bias"]
    x = np.tanh(rounded(x, compute).astype(np.float64))
    wanted = rounded(x, compute) @ w["3.weight"].T + w["3.bias"]
    exact = model.double()(given.double()).detach().numpy()
    noise = np.abs(wanted - exact).max()
    # a float32 sum may fall on the other side of a middle, once in thousands of roundings
    within(np.median(np.abs(got - wanted)), 1e-3 * noise)
    within(np.abs(got - wanted), 0.1 * noise)


def test_float32_to_nearest_is_plain_torch_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 8)).eval()
    given = torch.randn(5, 24)
    assert np.array_equal(run("fp32", PLAIN, lambda: model(given)), model(given).detach().numpy())


def test_an_operation_in_place_writes_into_the_tensor_itself() -> None:
    weight = learned([1.0, 2.0])
    with torch.no_grad(), Arithmetic("fp16", PLAIN):
        made = weight * 1.0
        same = made
        made.add_(0.1)
        made.mul_(3.0)
        filled = torch.zeros(2)
        filled.add_(made)
    assert same.tolist() == pytest.approx(rounded([1.1, 2.1]) * 3, rel=1e-6)
    assert same.tolist() != pytest.approx([3.3, 6.3], rel=1e-6)
    assert np.array_equal(filled.numpy(), rounded(made.numpy()))


def test_what_is_written_into_a_part_is_in_the_whole() -> None:
    weight = learned([[1.0, 2.0, 3.0]] * 2)
    with torch.no_grad(), Arithmetic("fp16", PLAIN):
        made = weight * 1.1
        made[:, :1] = made[:, 1:2] * 2.0
        made.mT[2].add_(1.0)
        double = made * 2.0
    row = rounded([1.1, 2.2, 3.3])
    wanted = [float(row[1] * 2), float(np.float32(2) * np.float32(1.1)), float(row[2] + 1)]
    assert made.tolist() == [pytest.approx(wanted, rel=1e-6)] * 2
    assert double.tolist() == [pytest.approx(2 * rounded(wanted), rel=1e-6)] * 2


def test_what_a_mask_puts_in_is_clipped_and_an_overflow_is_none_the_less_one() -> None:
    weight = learned([60000.0, 1.0])
    with torch.no_grad(), Arithmetic("fp16", PLAIN):
        masked = (weight * 1.0).masked_fill(torch.tensor([False, True]), torch.finfo(torch.float32).min)
        added = (weight * 0.0) + torch.full((2,), torch.finfo(torch.float32).min)
        doubled = weight * 2.0
        through = doubled * 1.0
    assert masked.tolist() == [60000.0, -65504.0]
    assert added.tolist() == [-65504.0, -65504.0]
    assert doubled.tolist() == [120000.0, 2.0], "a sum is float32; it is stored when it is read"
    assert through.tolist() == [float("inf"), 2.0]
    assert run("fp16", PLAIN, lambda: learned([1e6, -1e6]) * 1.0).tolist() == [65504.0, -65504.0], "weights are clipped"


def test_positions_are_exact_until_something_learned_joins_them() -> None:
    positions = torch.tensor([[5001.0]])
    frequency = torch.tensor([0.123456])
    with torch.no_grad(), Arithmetic("fp16", PLAIN):
        cosine = (positions * frequency).cos()
        product = cosine * learned([1.0])
    assert cosine.item() == (positions * frequency).cos().item()
    assert product.item() == rounded(cosine.item()).item()
    assert rounded(5001.0).item() == 5000.0, "which would have been another position"


def test_a_root_mean_square_stays_in_float32_unless_its_factor_is_stored() -> None:
    model = small("llama", num_key_value_heads=1)
    norm, given = model.layers[0].input_layernorm, torch.full((1, 64), 300.0)  # 300² is beyond fp16
    nn.init.constant_(norm.weight, 1.1)
    factors = {}
    for fused in (True, False):
        with computing_as(model, "fp16", ComputationVariant("", fused=fused)):
            found = norm(given * learned([1.0]))
        factors[fused] = found[0, 0].item() / 300
    assert factors[True] == pytest.approx(1.1 / 300, rel=1e-6)
    assert factors[False] == pytest.approx(1.1 * float(rounded(1 / 300)), rel=1e-6)
    assert factors[False] != pytest.approx(factors[True], rel=1e-5)


# --- random rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
@pytest.mark.parametrize("value", [1.0003, -0.7771, 1234.567, 3.1e-4])
def test_random_rounding_gives_a_neighbour_and_the_value_itself_on_average(compute: str, value: float) -> None:
    exact = np.float32(value)
    found = run(compute, RANDOM, lambda: torch.full((40_000,), float(exact)) * learned(1.0)).astype(np.float64)
    near = rounded(exact, compute).astype(DTYPES[compute])
    others = [np.nextafter(near, near.dtype.type(sign * np.inf)).astype(np.float64) for sign in (-1, 1)]
    pair = sorted([float(near), next(x for x in others if (x - exact) * (float(near) - exact) <= 0)])
    assert set(np.unique(found)) == set(pair)
    share, gap = (float(exact) - pair[0]) / (pair[1] - pair[0]), pair[1] - pair[0]
    assert abs(found.mean() - exact) < 5 * gap * np.sqrt(share * (1 - share) / found.size)


def test_random_rounding_leaves_alone_what_is_stored_as_it_is() -> None:
    kept = [0.0, -0.0, 1.5, -65504.0, 2.0**-24]
    got = run("fp16", RANDOM, lambda: torch.tensor(kept) * learned(1.0) * 1.0)
    assert got.tolist() == kept
    assert run("fp16", RANDOM, lambda: learned([6e4, -6e4]) * 2.0 * 1.0).tolist() == [np.inf, -np.inf]
    assert np.isnan(run("fp16", RANDOM, lambda: torch.tensor([float("nan")]) * learned(1.0) * 1.0)).all()


def test_weights_are_rounded_to_nearest_whatever_the_way() -> None:
    values = np.random.default_rng(0).standard_normal(500)
    assert np.array_equal(run("fp16", RANDOM, lambda: learned(values) * 1.0), rounded(values))


def test_a_seed_gives_the_same_numbers_again_and_another_seed_others() -> None:
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
    assert not torch.equal(got, whole), "in parts it is rounded elsewhere"


def test_parts_are_added_in_their_order_and_short_sums_are_left_whole() -> None:
    line, ones = torch.tensor([[1e8, 1.0, -1e8, 1.0]]), torch.ones(4, 1)
    assert in_parts("mm", 4, line, ones).item() == 1.0, "((1e8 + 1) - 1e8) + 1 in float32"
    assert in_parts("mm", 4, torch.tensor([[1.0, 1e8, 1.0, -1e8]]), ones).item() == 0.0
    short = torch.randn(3, 2)
    assert torch.equal(in_parts("mm", 3, short, short.mT), short @ short.mT)


# --- nothing stays ---------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "broken off"])
def test_weights_attention_and_hooks_are_as_they_were(kind: str, stop: bool) -> None:
    model = small(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    plain = by_row(model, IDS[:2], "float32")
    variant = ComputationVariant("", attention="eager" if attention == "sdpa" else "sdpa", parts=2, seed=1, batch=4)
    try:
        with attending(model, variant), computing_as(model, "fp16", variant):
            assert model.config._attn_implementation == variant.attention
            batched_states(model, IDS[:2], 0, variant.batch)
            if stop:
                raise Stop
    except Stop:
        pass
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    again = by_row(model, IDS[:2], "float32")
    assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))


# --- the ensemble ----------------------------------------------------------------------------------------


def by_row(model: Any, ids: Any, dtype: str) -> list[np.ndarray]:
    return [states for _, states in sorted(hidden_states(model, ids, dtype))]


def states_of_ids(model: Any, variant: ComputationVariant) -> list[np.ndarray]:
    return [states for _, states in sorted(batched_states(model, IDS, 0, variant.batch).items())]


def equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def worst(one: Any, other: Any) -> float:
    pairs = zip(one, other, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_ways_differ_from_each_other_and_none_is_far_off(kind: str) -> None:
    model = small(kind)
    with torch.no_grad():  # as drawn, a layer adds so little to what it gets that its rounding is lost in that
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    exact = by_row(model, IDS, "float64")
    for compute, most in (("fp32", 1e-5), ("fp16", 2e-2), ("bf16", 0.16)):
        found = run_ensemble(model, compute, states_of_ids, weights=Rounded(compute))
        runs = dict(zip(ENSEMBLE, found, strict=True))
        errors = {variant.name: worst(run, exact) for variant, run in runs.items()}
        within(max(errors.values()), most, str(errors))
        assert min(errors.values()) > most / 2e3, "a run without rounding is none in this precision"
        for one, other in combinations(runs, 2):
            # in bf16 hardly any sum is so near to a middle that its order shows
            if compute != "bf16" or one.seed != other.seed:
                assert worst(runs[one], runs[other]) > 0, (compute, one, other)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_side_by_side_ways_give_what_each_gives_alone_and_leave_the_model(kind: str, compute: Any) -> None:
    model = small(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, threads = model.config._attn_implementation, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_ensemble(model, compute, states_of_ids, weights=Rounded(compute))
        torch.set_num_threads(3)
        together = run_ensemble(model, compute, states_of_ids, weights=Rounded(compute))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(equal(one, other) for one, other in zip(alone, together, strict=True))
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_fails_in_a_way_is_raised_and_threads_are_as_they_were() -> None:
    def stop(model: Any, variant: ComputationVariant) -> None:
        raise Stop

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Stop):
            run_ensemble(small("bert"), "fp16", stop, weights=Rounded("fp16"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_weights_rounded_once_in_half_the_bytes_or_in_place_are_the_same_weights(kind: str) -> None:
    plain = run_ensemble(small(kind), "fp16", states_of_ids, weights=Rounded("fp16"))
    large = run_ensemble(small(kind), "fp16", states_of_ids, weights=Rounded("fp16", large=True))
    model = small(kind)
    in_place = run_ensemble(model, "fp16", states_of_ids, weights=RoundedInPlace("fp16", model))
    for runs in (large, in_place):
        assert all(equal(one, other) for one, other in zip(plain, runs, strict=True))


def test_a_copy_has_modules_of_its_own_and_the_same_weights() -> None:
    model = small("bert")
    twin = sharing_copy(model)
    assert twin is not model
    assert not set(twin.modules()) & set(model.modules())
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.config is not model.config
