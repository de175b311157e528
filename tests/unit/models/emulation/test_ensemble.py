# SPDX-License-Identifier: Apache-2.0
"""The ensemble of variants of the original model: how far they differ, and that the model is left unchanged."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from bounds import within
from transformers import AutoConfig, AutoModel

from qeff_validate.models import scratch
from qeff_validate.models.embedding.reference import batched_states, hidden_states
from qeff_validate.models.emulation import ensemble
from qeff_validate.models.emulation.ensemble import (
    ENSEMBLE,
    attention_implementation,
    copy_sharing_weights,
    run_ensemble,
)
from qeff_validate.models.emulation.microscaling import CompressedWeights
from qeff_validate.models.emulation.precision import (
    ComputationVariant,
    InPlaceRoundedWeights,
    RoundedWeights,
    emulate_precision,
)

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 90}
IDS = [np.random.default_rng(5).integers(3, 90, size) for size in (9, 3, 17, 1, 12, 6, 30)]


def small(kind: str, **more: Any) -> Any:
    torch.manual_seed(1)
    return AutoModel.from_config(AutoConfig.for_model(kind, **{**SMALL, **more})).eval()


# --- the model is left unchanged ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "aborted"])
def test_weights_attention_and_hooks_are_restored(kind: str, stop: bool) -> None:
    model = small(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    plain = by_row(model, IDS[:2], "float32")
    variant = ComputationVariant("", attention="eager" if attention == "sdpa" else "sdpa", parts=2, seed=1, batch=4)
    try:
        with attention_implementation(model, variant.attention), emulate_precision(model, "fp16", variant):
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
def test_variants_differ_from_each_other_and_all_are_near_the_exact_result(kind: str) -> None:
    model = small(kind)
    with (
        torch.no_grad()
    ):  # a randomly initialized layer adds so little to its input that its rounding is lost in the sum
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    exact = by_row(model, IDS, "float64")
    for compute, most in (("fp32", 1e-5), ("fp16", 2e-2), ("bf16", 0.16)):
        results = run_ensemble(model, compute, states_of_ids, weights=RoundedWeights(compute))
        runs = dict(zip(ENSEMBLE, results, strict=True))
        errors = {variant.name: worst(run, exact) for variant, run in runs.items()}
        within(max(errors.values()), most, str(errors))
        assert min(errors.values()) > most / 2e3, "the run does not round"
        for one, other in combinations(runs, 2):
            # in bf16 hardly any sum is near enough to a tie for its order to matter
            if compute != "bf16" or one.seed != other.seed:
                assert worst(runs[one], runs[other]) > 0, (compute, one, other)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_parallel_variants_equal_sequential_ones_and_leave_the_model_unchanged(kind: str, compute: Any) -> None:
    model = small(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, threads = model.config._attn_implementation, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_ensemble(model, compute, states_of_ids, weights=RoundedWeights(compute))
        torch.set_num_threads(3)
        together = run_ensemble(model, compute, states_of_ids, weights=RoundedWeights(compute))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(equal(one, other) for one, other in zip(alone, together, strict=True))
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("threads", [1, 2])
def test_modules_are_copied_once_for_each_attention_and_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        ensemble, "copy_sharing_weights", lambda model: made.append(copy_sharing_weights(model)) or made[-1]
    )
    used: set[int] = set()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run_ensemble(small("bert"), "fp32", lambda model, _: used.add(id(model)), weights=RoundedWeights("fp32"))
    finally:
        torch.set_num_threads(before)
    assert len(made) == 2 * threads
    assert used <= {id(model) for model in made}


def test_an_error_in_a_variant_is_raised_and_the_thread_count_restored() -> None:
    def stop(model: Any, variant: ComputationVariant) -> None:
        raise Stop

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Stop):
            run_ensemble(small("bert"), "fp16", stop, weights=RoundedWeights("fp16"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rounded_weights_are_equal_in_memory_in_files_or_in_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LEAST", 0)
    plain = run_ensemble(small(kind), "fp16", states_of_ids, weights=RoundedWeights("fp16"))
    large = run_ensemble(small(kind), "fp16", states_of_ids, weights=RoundedWeights("fp16", large=True))
    others = [large]
    for in_files in (False, True):
        model = small(kind)
        weights = InPlaceRoundedWeights("fp16", model, large=in_files)
        others.append(run_ensemble(model, "fp16", states_of_ids, weights=weights))
    for runs in others:
        assert all(equal(one, other) for one, other in zip(plain, runs, strict=True))


def test_a_copy_has_its_own_modules_and_shares_the_weights() -> None:
    model = small("bert")
    twin = copy_sharing_weights(model)
    assert twin is not model
    assert not set(twin.modules()) & set(model.modules())
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert twin.config is not model.config


def test_rounded_and_compressed_weights_follow_what_an_adapter_writes_into_the_base() -> None:
    layer = torch.nn.Linear(32, 32, bias=False)
    rounded, compressed = RoundedWeights("fp16"), CompressedWeights(layer)
    x = torch.randn(2, 32)
    with torch.no_grad():
        before = rounded.read(layer.weight).clone()
        with compressed:
            product = layer(x)
        layer.weight.copy_(layer.weight + 1)
        assert (rounded.read(layer.weight) - before).min() > 0.5
        with compressed:
            assert not torch.equal(layer(x), product)


# --- values beyond the range ---


@pytest.mark.numeric
def test_what_is_beyond_the_range_for_one_input_stays_in_float32_for_all() -> None:
    """The second product reads an activation of 1e7, whose weight is too small for fp16; with a small input as well."""
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second).eval()
    torch.manual_seed(0)
    for layer in (first, second):
        layer.weight.data.uniform_(0.1, 1)
    first.weight.data[3] *= 1e6
    second.weight.data[:, 3] /= 1e6
    inputs = torch.tensor([[1.0] * 8, [1e-3] * 8])
    exact = copy.deepcopy(model).double()(inputs.double()).detach().numpy()

    def run(replica: Any, _: ComputationVariant) -> Any:
        return np.stack([replica(row[None]).detach().numpy()[0] for row in inputs])

    def errors(**options: bool) -> Any:
        weights = RoundedWeights("fp16", **options)
        (outputs,) = run_ensemble(model, "fp16", run, weights=weights, variants=ENSEMBLE[:1])
        with np.errstate(invalid="ignore"):
            return np.linalg.norm(outputs - exact, axis=-1) / np.linalg.norm(exact, axis=-1)

    plain, kept = errors(), errors(beyond_range=True)
    assert not np.isfinite(plain[0])  # it overflows
    assert plain[1] > 1e-2  # a weight of 1e-6 and less has few bits
    within(kept, 2e-3)
    assert kept[1] > 1e-6  # an activation that fits is rounded where other operations read it
