# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct with three trained adapters of different shape, where no card is needed (configs/peft.yaml)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qeff_validate.engine import Runner, load
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.protocols import runtime

SAYS = {
    "base": r"The capital of Japan is Tokyo\.",
    "json": r'\{"answer": "Tokyo"\}',
    "shout": r"([A-Z]+)! \1!",
    "item": r"\* Tokyo",
}
"""What the model and its adapters say to the first prompt, as a pattern."""


@pytest.mark.slow
def test_base_and_adapters_agree_everywhere_and_say_what_they_were_trained_to() -> None:
    """With the table's bounds: measuring them (`qeff-validate run`) takes two minutes more."""
    (config,) = [
        case for case in load([Path(__file__).parents[2] / "configs" / "peft.yaml"]) if case.name == "smollm2-lora"
    ]
    case = config.model_copy(update={"tolerance": "table"})
    runner = Runner()
    results = {name: runner.result(case, name) for name in ("ort", "sim")}
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(results, "pass"), [
        result.reason for result in results.values()
    ]
    assert results["sim"].simulated
    assert results["ort"].compared > 80
    effects = [item for item in results["ort"].metrics if item.metric.name.endswith("effect_over_noise")]
    assert len(effects) == 3
    assert min(item.metric.value for item in effects) > 1000, "trained adapters are far above the noise"
    pipeline = runner.pipeline(case)
    inputs, model = pipeline.inputs(), pipeline.model()
    decode = model.source.pretrained_tokenizer().decode
    with runtime("ort").open(pipeline.onnx()) as session:
        for name, wanted in SAYS.items():
            (logits,) = generate(session, inputs.ids[:1], model._plan(inputs), state=inputs.adapters[name])
            said = decode(np.array(logits).argmax(axis=-1), skip_special_tokens=True)
            assert re.match(wanted, said), (name, said)
