# SPDX-License-Identifier: Apache-2.0
"""Grouped attention against the authors' own eager attention, which repeats keys and values."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bounds import close

from qeff_validate.models.causal_lm.grouped_query_attention import NAME, grouped_attention
from qeff_validate.models.causal_lm.wrapper import Decoder
from qeff_validate.models.sources.synthetic import Random

BATCH, HEADS, LENGTH, SLOTS, SIZE = 2, 6, 3, 7, 4


def attention_of(model_type: str, groups: int) -> Any:
    """An object of the file of an architecture, with what its eager attention reads."""
    path = f"transformers.models.{model_type}.modeling_{model_type}"
    importlib.import_module(path)
    made = type("Attention", (SimpleNamespace,), {"__module__": path})
    return made(num_key_value_groups=HEADS // groups, training=False, head_dim=SIZE)


def given(groups: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(groups)
    query = torch.randn(BATCH, LENGTH, HEADS, SIZE).transpose(1, 2)
    key, value = torch.randn(BATCH, groups, SLOTS, SIZE), torch.randn(BATCH, groups, SLOTS, SIZE)
    mask = torch.where(torch.rand(BATCH, 1, LENGTH, SLOTS) < 0.4, -1e30, 0.0)
    mask[..., 0] = 0.0
    return query, key, value, mask


@pytest.mark.numeric
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("model_type", "more"), [("llama", {}), ("gemma2", {"softcap": 0.7}), ("qwen3", {"sliding_window": 4})]
)
def test_grouped_attention_is_the_authors_own(groups: int, model_type: str, more: dict[str, Any]) -> None:
    module, feeds = attention_of(model_type, groups), given(groups)
    eager = importlib.import_module(type(module).__module__).eager_attention_forward
    expected, _ = eager(module, *feeds, scaling=0.3, **more)
    found, _ = grouped_attention(module, *feeds, scaling=0.3, **more)
    assert found.shape == (BATCH, LENGTH, HEADS, SIZE)
    close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_belongs_to_heads_is_left_to_the_authors() -> None:
    module, feeds = attention_of("gpt_oss", 2), given(2)
    module.sinks = torch.randn(HEADS)
    eager = importlib.import_module(type(module).__module__).eager_attention_forward
    expected, _ = eager(module, *feeds, scaling=0.3, s_aux=module.sinks)
    found, _ = grouped_attention(module, *feeds, scaling=0.3, s_aux=module.sinks)
    assert torch.equal(found, expected)


def test_no_key_is_copied_for_a_head() -> None:
    """The exported graph's operations on keys are as large as the keys, whatever number of heads reads them."""
    module, (query, key, value, mask) = attention_of("llama", 2), given(2)
    program = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *feeds: grouped_attention(module, *feeds, scaling=0.3)[0]
    )(query, key, value, mask)
    sizes = [node.meta["tensor_meta"].shape for node in program.graph.nodes if "tensor_meta" in node.meta]
    assert sizes
    assert not [shape for shape in sizes if shape[-2:] == (SLOTS, SIZE) and shape.numel() > key.numel()]


def test_decoder_uses_it() -> None:
    model = Random("llama", {}, 0).causal_lm()
    Decoder(model, 2)
    assert model.config._attn_implementation == NAME
