# SPDX-License-Identifier: Apache-2.0
"""What each mutant serves for an adapter, over the saved names of PEFT's methods."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from bounds import close

from qeff_validate.mutation.adapter_mutants import ADAPTER_MUTANTS, to_bfloat16, to_float16
from qeff_validate.mutation.causal_lm_mutants import served
from qeff_validate.mutation.mutant import Inapplicable
from qeff_validate.tensors import Array, Tensors

NAMED = {mutant.name: mutant for mutant in ADAPTER_MUTANTS}
HIDDEN, RANK = 6, 2

METHODS: Mapping[str, Mapping[str, tuple[tuple[int, ...], float | None]]] = {
    "lora": {"lora_A.weight": ((RANK, HIDDEN), None), "lora_B.weight": ((HIDDEN, RANK), 0)},
    "dora": {
        "lora_A.weight": ((RANK, HIDDEN), None),
        "lora_B.weight": ((HIDDEN, RANK), 0),
        "lora_magnitude_vector": ((HIDDEN,), 3),
    },
    "adalora": {
        "lora_A": ((RANK, HIDDEN), None),
        "lora_B": ((HIDDEN, RANK), None),
        "lora_E": ((RANK, 1), 0),
    },
    "ia3": {"ia3_l": ((HIDDEN, 1), 1)},
    "loha": {
        "hada_w1_a": ((HIDDEN, RANK), None),
        "hada_w1_b": ((RANK, HIDDEN), None),
        "hada_w2_a": ((HIDDEN, RANK), None),
        "hada_w2_b": ((RANK, HIDDEN), 0),
    },
    "lokr": {"lokr_w1": ((2, 2), 0), "lokr_w2": ((3, 3), None)},
    "vera": {"vera_lambda_b": ((HIDDEN,), 0), "vera_lambda_d": ((RANK,), 0.1)},
    "oft": {"oft_R.weight": ((2, 3), 0)},
    "randlora": {"randlora_lambda": ((3, 1), 0), "randlora_gamma": ((1, HIDDEN), 0.3)},
}
"""For each method the tensors of a module as PEFT saves them: shape, and what a fresh one holds (None: noise)."""


def adapters(method: str = "lora", *, count: int = 2, layers: int = 2, modules: int = 2) -> dict[str, dict[str, Array]]:
    rng = np.random.default_rng(5)
    places = [(layer, module) for layer in range(layers) for module in ("q_proj", "v_proj")[:modules]]
    by_adapter: dict[str, dict[str, Array]] = {name: {} for name in ("base", "a", "b")[: count + 1]}
    for layer, module in places:
        for tensor, (shape, fresh) in METHODS[method].items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{tensor}"
            for adapter, tensors in by_adapter.items():
                noise = rng.standard_normal(shape)
                values = noise if fresh is None or adapter != "base" else np.full(shape, fresh)
                tensors[name] = values.astype(np.float32)
    return by_adapter


def differing(left: Tensors, right: Tensors) -> set[str]:
    """Return layer, module and tensor of what differs."""
    assert left.keys() == right.keys()
    short = "base_model.model.model.layers."
    return {
        name.removeprefix(short).replace("self_attn.", "").removesuffix(".weight")
        for name in left
        if not np.array_equal(left[name], right[name])
    }


def change(tensors: Tensors, place: str) -> Array:
    """Return what LoRA adds to a weight, but for alpha / r."""
    name = f"base_model.model.model.layers.{place}"
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


NOT_LORA = {"alpha / r where alpha / sqrt(r) is meant"}
NOT_DORA = {"DoRA's magnitudes ignored"}
NOT_PADDED = {"padding beyond an adapter's rank not zero", "a module served from another adapter"}
NO_FACTORS = {"adapters of square weights transposed"}
OTHERS = NOT_LORA | NOT_DORA | NOT_PADDED | NO_FACTORS
INAPPLICABLE = {
    "lora": NOT_DORA | NOT_PADDED,
    "dora": NOT_PADDED,
    "adalora": NOT_DORA | NOT_PADDED | NO_FACTORS,
    **dict.fromkeys(("ia3", "loha", "lokr", "vera", "oft", "randlora"), OTHERS),
}


def test_what_is_padded_is_filled_from_another_adapter() -> None:
    healthy = adapters(modules=2, layers=1)
    name = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    healthy["a"][name.format("q_proj", "A")][1:] = 0
    healthy["a"][name.format("q_proj", "B")][:, 1:] = 0
    for factor in "AB":
        healthy["a"][name.format("v_proj", factor)][:] = 0
    ranks = served(NAMED["padding beyond an adapter's rank not zero"], healthy)
    modules = served(NAMED["a module served from another adapter"], healthy)
    assert differing(healthy["a"], ranks["a"]) == {"0.q_proj.lora_A", "0.q_proj.lora_B"}
    assert differing(healthy["a"], modules["a"]) == {"0.v_proj.lora_A", "0.v_proj.lora_B"}
    q, v = name.format("q_proj", "A"), name.format("v_proj", "A")
    np.testing.assert_array_equal(ranks["a"][q], np.stack([healthy["a"][q][0], healthy["b"][q][1]]))
    np.testing.assert_array_equal(modules["a"][v], healthy["b"][v])
    for faulty in (ranks, modules):
        assert not differing(healthy["b"], faulty["b"])


def test_what_a_square_adapter_adds_is_transposed() -> None:
    healthy = adapters(modules=1, layers=1)
    faulty = served(NAMED["adapters of square weights transposed"], healthy)
    np.testing.assert_array_equal(
        change(faulty["a"], "0.self_attn.q_proj"), change(healthy["a"], "0.self_attn.q_proj").T
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_mutant_changes_values_and_nothing_else(method: str) -> None:
    healthy, copies = adapters(method), adapters(method)
    refused = set()
    for name, mutant in NAMED.items():
        try:
            faulty = served(mutant, healthy)
        except Inapplicable:
            refused.add(name)
            continue
        hit = {adapter for adapter in healthy if differing(healthy[adapter], faulty[adapter])}
        assert hit, f"{name} serves what it should"
        assert ("base" in hit) == (name == "first adapter served for base"), name
        for adapter, tensors in faulty.items():
            for key, array in healthy[adapter].items():
                assert (tensors[key].shape, tensors[key].dtype) == (array.shape, array.dtype), (name, key)
                np.testing.assert_array_equal(array, copies[adapter][key], f"{name} writes into {key}")
    assert refused == INAPPLICABLE[method]


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        ("lora", "lora_B"), ("dora", "lora_B"), ("adalora", "lora_E"), ("loha", "hada_w2_b"), ("lokr", "lokr_w1"),
        ("vera", "vera_lambda_b"), ("oft", "oft_R"), ("randlora", "randlora_lambda"), ("ia3", "ia3_l"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "factor"),
    [("alpha / r dropped, x 0.5", 0.5), ("merged and fed, x 2", 2), ("alpha / r squared, x 4", 4),
     ("sign of adapters flipped", -1), ("adapters x 1.02", 1.02)],
)  # fmt: skip
def test_strength_is_in_what_a_fresh_adapter_holds_without_effect(
    method: str, tensor: str, name: str, factor: float
) -> None:
    healthy = adapters(method)
    faulty = served(NAMED[name], healthy)
    places = {f"{layer}.{module}.{tensor}" for layer in (0, 1) for module in ("q_proj", "v_proj")}
    for adapter in ("a", "b"):
        assert differing(healthy[adapter], faulty[adapter]) == places
        for key, array in faulty[adapter].items():
            if tensor in key:
                fresh = 1 if method == "ia3" else 0
                close(array, fresh + factor * (healthy[adapter][key] - fresh), atol=5e-6)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "factor"), [("alpha / r dropped, x 0.5", 0.5), ("alpha / r where alpha / sqrt(r) is meant", RANK**-0.5)]
)
def test_scale_is_that_of_the_product(name: str, factor: float) -> None:
    healthy = adapters()
    faulty = served(NAMED[name], healthy)
    for place in ("0.self_attn.q_proj", "1.self_attn.v_proj"):
        close(change(faulty["b"], place), factor * change(healthy["b"], place), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("base served for every adapter", ["base", "base", "base"]),
        ("base served for the first adapter", ["base", "base", "b"]),
        ("first two adapters swapped", ["base", "b", "a"]),
        ("first adapter served for base", ["a", "a", "b"]),
        ("first adapter served for all adapters", ["base", "a", "a"]),
    ],
)
def test_whole_adapters_take_each_others_place(name: str, wanted: list[str]) -> None:
    healthy = adapters()
    faulty = served(NAMED[name], healthy)
    for adapter, source in zip(healthy, wanted, strict=True):
        assert not differing(faulty[adapter], healthy[source])


PARTS = {
    "one target module without adapter": {"0.v_proj", "1.v_proj"},
    "one layer without adapter": {"1.q_proj", "1.v_proj"},
    "one module of one layer without adapter": {"1.v_proj"},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_without_adapter_have_the_tensors_of_base(name: str) -> None:
    healthy = adapters()
    faulty = served(NAMED[name], healthy)
    for adapter in ("a", "b"):
        hit = differing(healthy[adapter], faulty[adapter])
        assert hit == {f"{part}.lora_{factor}" for part in PARTS[name] for factor in "AB"}
        same_as_base = differing(healthy["base"], faulty[adapter])
        assert not hit & same_as_base


@pytest.mark.numeric
def test_only_one_target_module_has_another_scale() -> None:
    healthy = adapters()
    faulty = served(NAMED["alpha_pattern of one target module ignored, x 0.5"], healthy)
    assert differing(healthy["a"], faulty["a"]) == {"0.v_proj.lora_B", "1.v_proj.lora_B"}
    close(change(faulty["a"], "0.self_attn.v_proj"), change(healthy["a"], "0.self_attn.v_proj") / 2, rtol=1e-6)


def test_layers_are_exchanged_and_come_from_others() -> None:
    healthy = adapters(layers=3)
    faulty = served(NAMED["two layers' tensors exchanged"], healthy)
    mixed = served(NAMED["one layer from another adapter"], healthy)
    for key in healthy["a"]:
        layer = key.split(".")[4]
        twin = key.replace(f"layers.{layer}", f"layers.{2 - int(layer)}")
        np.testing.assert_array_equal(faulty["b"][key], healthy["b"][twin])
        np.testing.assert_array_equal(mixed["a"][key], healthy["b" if layer == "2" else "a"][key])


def test_what_is_equal_in_the_base_has_one_input() -> None:
    healthy = adapters()
    faulty = served(NAMED["one buffer for tensors that are equal in the base"], healthy)
    first = healthy["a"]["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    for key, array in faulty["a"].items():
        np.testing.assert_array_equal(array, first if "lora_B" in key else healthy["a"][key])


def test_magnitudes_alone_stay_as_in_the_base() -> None:
    healthy = adapters("dora")
    faulty = served(NAMED["DoRA's magnitudes ignored"], healthy)
    assert {part.split(".")[-1] for part in differing(healthy["a"], faulty["a"])} == {"lora_magnitude_vector"}
    assert not any("magnitude" in part for part in differing(healthy["base"], faulty["a"]))


def test_numbers_are_rounded_as_others_round_them() -> None:
    drawn = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0, -0.0, 3e38, 1e-40], np.float32)
    values = np.concatenate([drawn, ties])
    np.testing.assert_array_equal(to_bfloat16(values), values.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(to_float16(np.array([1 + 2.0**-12, 7e4, 1e-9], np.float32)), [1, np.inf, 0])


def test_integers_of_an_adapter_are_left_alone() -> None:
    healthy = adapters()
    for at, tensors in enumerate(healthy.values()):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.indices"] = np.array([at, 7])
    for name in ("adapters x 1.02", "adapters rounded to bf16", "sign of adapters flipped"):
        faulty = served(NAMED[name], healthy)
        assert not any("indices" in part for part in differing(healthy["b"], faulty["b"]))


@pytest.mark.parametrize(
    ("sizes", "said", "names"),
    [
        ({"count": 1}, "fewer than 2 adapters", {
            "first two adapters swapped", "first adapter served for all adapters", "one layer from another adapter",
        }),
        ({"layers": 1}, "fewer than two layers", {
            "one layer without adapter", "two layers' tensors exchanged", "one layer from another adapter",
        }),
        ({"modules": 1}, "one target module only", {
            "one target module without adapter", "alpha_pattern of one target module ignored, x 0.5",
        }),
        ({"layers": 1, "modules": 1}, "one place only", {"one module of one layer without adapter"}),
        ({"layers": 1, "modules": 1}, "no two tensors", {"one buffer for tensors that are equal in the base"}),
    ],
)  # fmt: skip
def test_what_is_not_there_cannot_be_changed(sizes: dict[str, int], said: str, names: set[str]) -> None:
    healthy = adapters(**sizes)
    for name in names:
        with pytest.raises(Inapplicable, match=said):
            served(NAMED[name], healthy)


@pytest.mark.parametrize("name", NAMED)
def test_model_without_adapters_has_none_of_these_faults(name: str) -> None:
    for nothing in ({"base": {}}, {"base": {}, "a": {}}):
        with pytest.raises(Inapplicable):
            served(NAMED[name], nothing)
