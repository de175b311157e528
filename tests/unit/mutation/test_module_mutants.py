# SPDX-License-Identifier: Apache-2.0
"""Mutants of bodies: where they apply, that they do something, what it is, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from bounds import close, within
from torch import Tensor, nn

from qeff_validate.models.sources.synthetic import Random
from qeff_validate.mutation.module_mutants import MODULE_MUTANTS
from qeff_validate.mutation.mutant import Inapplicable, Patch

GELU, ROTARY, WINDOW = "GELU by its other formula", "rotary base x 2", "window one token wider"
SWAPPED, BIAS, LATER = "two projections swapped", "one bias dropped", "positions + 1"
DROPPED, ORDER = "last layer dropped", "first two layers swapped"
TABLES = frozenset({ROTARY, WINDOW})
"""What models with tables of positions do not have."""
ROPE = frozenset({WINDOW, BIAS, GELU})
"""What models after Llama's pattern do not have."""

NOT_IN = {
    "bert": TABLES,
    "roberta": TABLES,
    "xlm-roberta": TABLES,
    "mpnet": TABLES,
    "distilbert": TABLES,
    "albert": TABLES | {DROPPED, ORDER},
    "deberta-v2": TABLES,
    "modernbert": {SWAPPED, BIAS},
    "electra": TABLES,
    "nomic_bert": ROPE,
    "jina_embeddings_v3": {WINDOW},
    "eurobert": ROPE,
    "gpt2": TABLES | {SWAPPED},
    "llama": ROPE,
    "qwen3": ROPE,
}
"""Which mutants bodies of each family have nothing for."""

NOT_IN_LANGUAGE = {
    "gemma2": {BIAS},
    "mixtral": ROPE,
    "gpt_neox": {SWAPPED, WINDOW},
    "mpt": {SWAPPED, BIAS, LATER, *TABLES},
}
NAMED = {mutant.name: mutant for mutant in MODULE_MUTANTS}


def ids() -> Tensor:
    made = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(1))
    made[:, 5] = 39  # a word whose embedding becomes garbage
    return made


def output(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), **more)
    outputs: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return outputs


def effect(wanted: Tensor, outputs: Tensor) -> float:
    return float((outputs - wanted).double().norm() / wanted.double().norm())


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a mutant may touch: tensors, modules, hooks, plain attributes and the config."""
    tensors = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = {}
    for path, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float)}
        modules[path] = (id(module), len(module._forward_hooks), len(module._forward_pre_hooks), plain)
    config: Any = model.config
    return {"tensors": tensors, "modules": modules, "config": config.to_dict()}


def check(model: Any, absent: Any, noise: float) -> None:
    """Try every mutant on a model: those that are absent say so, and all leave it as it was."""
    wanted, before, refused = output(model), state(model), set()
    for mutant in MODULE_MUTANTS:
        try:
            with mutant.applied_to(model):
                size = effect(wanted, output(model))
        except Inapplicable:
            refused.add(mutant.name)
        else:
            least = 1e-4 if mutant.gross else noise
            rotates = mutant.name == LATER and ROTARY not in absent
            if rotates:
                within(size, 5e-6, mutant.name)
            else:
                assert not size <= least, f"{mutant.name}: {size}"
        after = state(model)
        assert torch.equal(output(model), wanted), mutant.name
        assert (after["modules"], after["config"]) == (before["modules"], before["config"]), mutant.name
        assert all(torch.equal(after["tensors"][name], copy) for name, copy in before["tensors"].items()), mutant.name
    assert refused == set(absent)


@pytest.mark.numeric
@pytest.mark.parametrize("family", NOT_IN)
def test_mutants_of_a_body_have_an_effect_and_leave_nothing(family: str) -> None:
    check(Random(family, {}, 0).body().double(), NOT_IN[family], noise=1e-9)


@pytest.mark.numeric
@pytest.mark.parametrize("family", NOT_IN_LANGUAGE)
def test_mutants_of_a_language_model_do_too(family: str) -> None:
    check(Random(family, {}, 0).causal_lm(), NOT_IN_LANGUAGE[family], noise=2e-6)


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by a deprecated name
def test_mutants_of_an_adapted_model_change_the_base_alone() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False, r=4)
    model = peft.get_peft_model(Random("llama", {}, 0).causal_lm(), config).eval()
    check(model, ROPE, noise=2e-6)
    adapter = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters() if "lora_" in name}
    assert adapter
    for mutant in MODULE_MUTANTS:
        if mutant.name not in ROPE:
            with mutant.applied_to(model):
                assert all(torch.equal(*pair) for pair in adapter.values()), mutant.name


def test_each_mutant_applies_somewhere_and_is_named_once() -> None:
    assert not set.intersection(*(set(absent) for absent in NOT_IN.values()))
    assert len(NAMED) == len(MODULE_MUTANTS) >= 20


# --- what a mutant does, against the same model made in another way ---------------------------------


def of(family: str, **config: Any) -> Callable[[], Tensor]:
    return lambda: output(Random(family, config, 0).body())


def later(family: str) -> Tensor:
    return output(Random(family, {}, 0).body(), position_ids=torch.arange(1, ids().shape[1] + 1)[None])


def one_layer_less() -> Tensor:
    body = Random("llama", {}, 0).body()
    body.config.num_hidden_layers -= 1
    return output(body)


def in_half() -> Tensor:
    return output(Random("bert", {}, 0).body().half().float())


def one_neuron_less() -> Tensor:
    body = Random("gpt2", {}, 0).body()
    body.h[-1].mlp.act.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([0]), 0.0))
    return output(body)


def other_heads() -> Tensor:
    body = Random("bert", {}, 0).body()
    body.encoder.layer[-1].attention.self.register_forward_hook(
        lambda module, args, out: (torch.cat([out[0].split(16, -1)[head] for head in (1, 0, 2, 3)], -1), *out[1:])
    )
    return output(body)


def scaled_queries(family: str, query: str, width: int) -> Tensor:
    """Scale what comes out of a projection, as far as it is a query."""
    body = Random(family, {}, 0).body()
    factor = torch.cat([torch.full((width,), 0.9), torch.ones(64 * 3 - width)])

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        return out * factor[: out.shape[-1]]

    for path, module in body.named_modules():
        if path.endswith(query):
            module.register_forward_hook(hook)
    return output(body)


DONE_OTHERWISE: dict[tuple[str, str], Callable[[], Tensor]] = {
    ("norm epsilon x 10, at least 1e-5", "bert"): of("bert", layer_norm_eps=1e-5),
    ("norm epsilon x 10, at least 1e-5", "llama"): of("llama", rms_norm_eps=1e-5),
    (GELU, "bert"): of("bert", hidden_act="gelu_new"),
    (GELU, "gpt2"): of("gpt2", activation_function="gelu"),
    (ROTARY, "llama"): of("llama", rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
    (WINDOW, "mistral"): of("mistral", sliding_window=9),
    (LATER, "bert"): lambda: later("bert"),
    (LATER, "gpt2"): lambda: later("gpt2"),
    (DROPPED, "llama"): one_layer_less,
    ("weights rounded to fp16", "bert"): in_half,
    ("one neuron dead", "gpt2"): one_neuron_less,
    ("two heads swapped", "bert"): other_heads,
    ("attention scale x 0.9", "llama"): lambda: scaled_queries("llama", "q_proj", 64),
    ("attention scale x 0.9", "bert"): lambda: scaled_queries("bert", "self.query", 64),
    ("attention scale x 0.9", "mpnet"): lambda: scaled_queries("mpnet", "attn.q", 64),
    ("attention scale x 0.9", "modernbert"): lambda: scaled_queries("modernbert", "Wqkv", 64),
    ("attention scale x 0.9", "gpt2"): lambda: scaled_queries("gpt2", "c_attn", 64),
}


@pytest.mark.numeric
@pytest.mark.parametrize(("name", "family"), DONE_OTHERWISE)
def test_a_mutant_does_what_it_says(name: str, family: str) -> None:
    body = Random(family, {"sliding_window": 8} if family == "mistral" else {}, 0).body()
    wanted = output(body)
    with NAMED[name].applied_to(body):
        outputs = output(body)
    within(effect(DONE_OTHERWISE[name, family](), outputs), 5e-6)
    assert effect(wanted, outputs) > 1e-5


@pytest.mark.numeric
def test_a_norm_that_adds_one_to_its_weight_is_left_plain_too() -> None:
    body = Random("gemma2", {}, 0).body()
    norm = body.layers[-1].post_feedforward_layernorm
    some = torch.linspace(-2, 3, 64)[None]
    with NAMED["one norm without its weight"].applied_to(body), torch.no_grad():
        close(norm(some), some / some.square().mean().sqrt(), rtol=1e-4, atol=1e-6)


# --- Patch -----------------------------------------------------------------------------------------


class Owner:
    shared = 1

    def __init__(self) -> None:
        self.hidden = 2

    @property
    def doubled(self) -> int:
        return 2 * self.hidden

    @doubled.setter
    def doubled(self, value: int) -> None:
        self.hidden = value // 2


def test_a_patch_undoes_the_last_change_first_and_on_an_error() -> None:
    owner, linear, weight = Owner(), nn.Linear(2, 2), torch.ones(2, 2)
    inner = nn.Sequential(linear)

    def fail() -> None:
        with Patch() as patch:
            for value in (5, 6):
                patch.attribute(owner, "hidden", value)
                patch.tensor(weight, torch.full((2, 2), float(value)))
            patch.attribute(owner, "shared", 3)
            patch.attribute(owner, "doubled", 8)
            patch.attribute(inner, "0", nn.ReLU())
            patch.hook(linear.register_forward_hook(lambda *_: None))
            assert (owner.hidden, owner.shared, weight[0, 0]) == (4, 3, 6.0)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert vars(owner) == {"hidden": 2}
    assert torch.equal(weight, torch.ones(2, 2))
    assert inner[0] is linear
    assert not linear._forward_hooks
