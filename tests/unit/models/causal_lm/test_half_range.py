# SPDX-License-Identifier: Apache-2.0
"""What leaves the range of fp16 in the original model is named; what stays within is not."""

from __future__ import annotations

import numpy as np
import torch

from qeff_validate.models.causal_lm.half_range import beyond_half
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}


def test_first_operation_beyond_the_range_is_named() -> None:
    model = Random("llama", SMALL, 0).causal_lm()
    text = [np.arange(5, 11)]
    assert beyond_half(model, None, {}, text, "base") == ""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    said = beyond_half(model, None, {}, text, "base")
    assert "range of fp16: mm in model.layers.1.mlp.down_proj reaches " in said
    assert " with base, and the greatest number is 65504" in said


def test_a_square_inside_of_a_norm_is_found_though_its_output_is_small() -> None:
    model = Random("llama", SMALL, 0).causal_lm()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e4)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    said = beyond_half(model, None, {}, [np.arange(5, 11)], "base")
    assert "range of fp16: pow in model.layers.0.input_layernorm reaches " in said
