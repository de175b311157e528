# SPDX-License-Identifier: Apache-2.0
"""What the reference of a language model computes once: the tokens it chooses, and the logits that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close

import qeff_validate as qv
from qeff_validate.models.adapters.apply import apply_peft
from qeff_validate.models.causal_lm import reference
from qeff_validate.models.causal_lm.model import PeftCausalLM
from qeff_validate.models.emulation.precision import ComputationVariant
from qeff_validate.models.sources.synthetic import Random

OPTIONS = {"peft_method": "lora", "peft": {"r": 2, "init": 0.1}, "prompts": ["a b c", "d e"], "max_new_tokens": 3}
SMALL = {"num_hidden_layers": 1}


def made(seed: int = 0) -> PeftCausalLM:
    case = qv.Case(
        name="small", model="peft-causal-lm", source="random:llama", config=SMALL, options=OPTIONS, seed=seed
    )
    model = qv.model(case)
    assert isinstance(model, PeftCausalLM)
    return model


@pytest.mark.numeric
def test_float64_reference_follows_the_tokens_that_were_chosen_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = made(), reference._greedy
    calls: list[int] = []
    monkeypatch.setattr(reference, "_greedy", lambda *args: calls.append(1) or chosen(*args))
    inputs = model.inputs(model.tokenize())
    rounded = model.reference(inputs, dtype="float32")
    texts = len(inputs.ids) * len(inputs.adapters)
    assert len(calls) == texts
    exact = model.reference(inputs, dtype="float64")
    assert len(calls) == texts
    other = made(seed=1)
    np.testing.assert_array_equal(exact["tokens"], rounded["tokens"])
    np.testing.assert_array_equal(exact["steps"], rounded["steps"])
    close(exact["logits"], rounded["logits"], atol=1e-4)
    theirs = other.inputs(other.tokenize())
    model.reference(theirs, dtype="float64")
    assert len(calls) == 2 * texts, "tokens of other inputs are no continuation of these"
    kept = made().reference(inputs, dtype="float64")
    np.testing.assert_array_equal(kept["tokens"], exact["tokens"])


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", {}), ("gpt2", {}), ("mpt", {}), ("llama", {"peft_method": "lora", "r": 2})]
)
def test_logits_of_tokens_that_nobody_compares_are_not_computed(family: str, adapter: Mapping[str, Any]) -> None:
    model = Random(family, {"num_hidden_layers": 1}, 0).causal_lm()
    model = apply_peft(model, adapter) if adapter else model
    texts, starts = [np.arange(1, 12), np.arange(3, 9), np.arange(5, 15)], [8, 5, 9]
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[1]))

    def run(variant: ComputationVariant) -> list[Any]:
        with torch.no_grad():
            return reference.batched_logits(model, variant, texts=texts, starts=starts, pad=0)

    together = run(ComputationVariant("", batch=3))
    assert sizes == [10 - 4], "from the first token that is compared, in any row"
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        with torch.no_grad():
            whole = model(input_ids=torch.from_numpy(text[:-1])[None]).logits[0, start - 1 :].numpy()
        close(together[row], whole, atol=1e-4)
