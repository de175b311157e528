# SPDX-License-Identifier: Apache-2.0
"""Random mixtures of experts choose the same experts in half precision, use all of them, and others are left alone."""

from __future__ import annotations

import pytest
import torch

from qeff_validate.models.sources.decisive_routers import ROUTER, make_decisive
from qeff_validate.models.sources.synthetic import Random


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "kimi_linear", "granitemoehybrid"])
def test_routers_choose_far_beyond_fp16(kind: str) -> None:
    model = Random(kind, {}, 0).causal_lm()
    scores = []
    for name, module in model.named_modules():
        if ROUTER.search(f"{name}.weight"):
            module.register_forward_pre_hook(lambda layer, given: scores.append(given[0] @ layer.weight.T))
    with torch.no_grad():
        model(input_ids=torch.arange(200).reshape(4, 50))
    assert len(scores) == 2
    for layer in scores:
        first, second, third, _ = layer.reshape(200, 4).sort(dim=-1, descending=True).values.unbind(-1)
        assert (second - third).min() > 2  # an error of fp16 is around 0.01 here
        assert (first - second).median() < 4  # and both that are chosen count
        assert set(layer.reshape(200, 4).argmax(-1).tolist()) == {0, 1, 2, 3}


def test_model_without_routers_stays_as_it_is() -> None:
    model = Random("llama", {}, 0).causal_lm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_decisive(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
