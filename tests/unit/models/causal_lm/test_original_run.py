# SPDX-License-Identifier: Apache-2.0
"""One run of the original language model gives keys and values as a graph retains them; the oracle is transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import close
from transformers import DynamicCache

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner
from qeff_validate.models.framework_calls import returned_cache
from qeff_validate.tensors import RETAINED

SLOTS = 24


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_keys_and_values_are_those_of_transformers_cache_and_zero_beyond_the_text(family: str, tmp_path: Path) -> None:
    case = Case(
        name="c",
        model="peft-causal-lm",
        source=f"random:{family}",
        tolerance="table",
        config={"num_hidden_layers": 2},
        inputs={"texts": ["a b c d"]},
        options={"peft_method": "lora", "peft": {"init": 0.1, "r": 2}, "max_new_tokens": 3, "ctx_len": SLOTS},
    )
    pipeline = Runner(store=tmp_path).pipeline(case)
    inputs, reference = pipeline.inputs(), pipeline.reference()
    original = pipeline.model().original_run(inputs, reference, {}, 2)
    outputs = original.run()
    ids = original.feeds["input_ids"]
    assert original.steps == 2  # the continuation up to the row
    assert ids.shape[1] == inputs.ids[0].size + 2
    with torch.no_grad():
        cache = returned_cache(original.module(torch.from_numpy(ids), use_cache=True))
    assert isinstance(cache, DynamicCache)
    for index, layer in enumerate(cache.layers):
        for name, expected in (("key", layer.keys), ("value", layer.values)):
            actual = outputs[f"past_{name}.{index}{RETAINED}"]
            assert actual.shape[2] == SLOTS
            close(actual[:, :, : ids.shape[1]], expected.double().numpy(), atol=1e-5, rtol=1e-5)
            assert not np.any(actual[:, :, ids.shape[1] :])
    # a module can be run again by itself: the cache hands back what it is given
    again = original.run()
    assert all(np.array_equal(outputs[name], again[name]) for name in outputs)
