# SPDX-License-Identifier: Apache-2.0
"""What leaves the range of fp16 in the original model is named; what stays within is not."""

from __future__ import annotations

import numpy as np
import torch

from qeff_validate.models.causal_lm.half_range import beyond_half
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}


def test_first_module_beyond_the_range_is_named() -> None:
    model = Random("llama", SMALL, 0).causal_lm()
    text = [np.arange(5, 11)]
    assert beyond_half(model, None, {}, text, "base") == ""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    said = beyond_half(model, None, {}, text, "base")
    assert "range of fp16: model.layers.1.mlp.down_proj reaches " in said
    assert " with base, and the greatest number is 65504" in said
