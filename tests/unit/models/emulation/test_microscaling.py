# SPDX-License-Identifier: Apache-2.0
"""The emulation that bounds come from: numbers against `microscaling`, and which weights and states it touches."""

from __future__ import annotations

import copy
from typing import Any

import microscaling
import numpy as np
import pytest
import torch
from bounds import close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from qeff_validate.models.adapters.apply import apply_peft
from qeff_validate.models.emulation.microscaling import E2M3, INT8, CompressedCache, CompressedWeights, in_blocks
from qeff_validate.models.framework_calls import cache_argument

IDS = torch.tensor([[5, 7, 9, 11, 2]])
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}


def values(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    found = rng.normal(size=shape) * np.exp2(rng.integers(-8, 8, shape))
    found.reshape(-1)[::5] = np.round(found.reshape(-1)[::5] * 16) / 16
    found[0] = 0
    return found.astype(np.float32)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(64, 6), (70, 45)])
def test_blocks_are_those_of_ml_dtypes(shape: tuple[int, int], dim: int) -> None:
    given = values(*shape)
    assert np.array_equal(in_blocks(torch.from_numpy(given), E2M3, dim).numpy(), microscaling.mxfp6(given, dim))
    if dim:
        assert np.array_equal(in_blocks(torch.from_numpy(given), INT8, -1).numpy(), microscaling.mxint8(given))


def built(kind: str, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SMALL, "intermediate_size": 96, **more})
    return auto.from_config(config, attn_implementation="eager").eval()


def compressed_copy(model: Any, *ends: str, axis: int = 1) -> Any:
    """A copy whose parameters of these names are what MXFP6 leaves of them; a tied head is untied first."""
    made = copy.deepcopy(model)
    if "lm_head" in ends:
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    for name, module in made.named_modules():
        if name.endswith(ends):
            left = microscaling.mxfp6(module.weight.detach().numpy(), axis)
            module.weight.data = torch.from_numpy(left)
    return made


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("kind", "more", "ends", "axis"),
    [
        ("llama", {"num_key_value_heads": 1}, LLAMA, 1),
        ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, LLAMA, 1),
        ("gpt2", {"tie_word_embeddings": False}, ("c_attn", "c_proj", "c_fc"), 0),
    ],
    ids=["llama", "tied", "gpt2"],
)
def test_products_read_compressed_weights_and_nobody_else_does(
    kind: str, more: dict[str, Any], ends: tuple[str, ...], axis: int
) -> None:
    """An embedding that is tied to the head stays as it is."""
    model = built(kind, AutoModel if kind == "gpt2" else AutoModelForCausalLM, **more)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = compressed_copy(model, *ends, axis=axis)(IDS)[0]
        plain = model(IDS)[0]
        mode = CompressedWeights(model)
        with mode:
            got = model(IDS)[0]
        again = model(IDS)[0]
    close(got, wanted, rtol=1e-5, atol=5e-6)
    assert (plain - wanted).norm() > 1e-2 * plain.norm()
    assert torch.equal(again, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(mode.used) == sum(name.endswith(ends) for name, _ in model.named_modules())


@pytest.mark.numeric
def test_adapters_are_not_compressed() -> None:
    """They are inputs of the graph. One that was there before is named."""
    model = built("llama", num_key_value_heads=1)
    mode = CompressedWeights(model)
    torch.manual_seed(3)
    adapted = apply_peft(model, {"peft_method": "lora", "r": 4, "target_modules": ["q_proj"], "init": "random"})
    names = frozenset(name for name, _ in adapted.named_parameters() if "lora" in name)
    with torch.no_grad():
        whole = compressed_copy(adapted, *(f"{end}.base_layer" if end == "q_proj" else end for end in LLAMA))
        wanted = whole(IDS).logits
        for one in (mode, CompressedWeights(adapted, names)):
            with one:
                close(adapted(IDS).logits, wanted, rtol=1e-5, atol=5e-6)
        with CompressedWeights(adapted):
            assert (adapted(IDS).logits - wanted).norm() > 1e-4 * wanted.norm()


@pytest.mark.numeric
def test_keys_and_values_are_compressed_along_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama", num_key_value_heads=1, head_dim=48)
    plain, held = DynamicCache(config=model.config), CompressedCache(config=model.config)
    with torch.no_grad():
        model(IDS, use_cache=True, **{cache_argument(model): plain})
        got = model(IDS, use_cache=True, **{cache_argument(model): held}).logits
        for name in ("keys", "values"):  # what the first layer writes depends on no state
            wanted = microscaling.mxint8(getattr(plain.layers[0], name).numpy())
            assert np.array_equal(getattr(held.layers[0], name).numpy(), wanted)
        # attention reads what was kept, in the same run: step by step through the same cache says the same
        stepped = CompressedCache(config=model.config)
        last = [
            model(IDS[:, i : i + 1], use_cache=True, **{cache_argument(model): stepped}).logits[:, -1] for i in range(5)
        ]
        without = model(IDS, use_cache=False).logits
    close(got, torch.stack(last, 1), rtol=1e-3, atol=1e-4)
    assert (got - without).norm() > 1e-4 * without.norm()
