# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct with trained adapters of different shape and with virtual tokens, where no card is needed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, load
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.protocols import runtime
from qeff_validate.report.result import Result

SAYS = {
    "base": r"The capital of Japan is Tokyo\.",
    "json": r'\{"answer": "Tokyo"\}',
    "shout": r"([A-Z]+)! \1!",
    "item": r"\* Tokyo",
}
"""What the model and its adapters say to the first prompt, as a pattern."""


CONFIG = Path(__file__).parents[2] / "configs" / "peft.yaml"


def case_with_the_tables_bounds(name: str) -> Case:
    """A case of `CONFIG`; measuring its bounds (`qeff-validate run`) takes two minutes more."""
    (found,) = [case for case in load([CONFIG]) if case.name == name]
    return found.model_copy(update={"tolerance": "table"})


def passed(runner: Runner, case: Case, *runtimes: str) -> dict[str, Result]:
    results = {name: runner.result(case, name) for name in runtimes}
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(results, "pass"), [
        result.reason for result in results.values()
    ]
    assert results["sim"].simulated
    return results


@pytest.mark.slow
def test_base_and_adapters_agree_everywhere_and_say_what_they_were_trained_to() -> None:
    case, runner = case_with_the_tables_bounds("smollm2-lora"), Runner()
    results = passed(runner, case, "ort", "sim")
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # transformers gives them to PEFT
def test_virtual_tokens_agree_everywhere_and_continue_as_pefts_generate_does() -> None:
    import torch
    from peft import PeftModel

    case, runner = case_with_the_tables_bounds("smollm2-soft"), Runner()
    assert passed(runner, case, "sim")["sim"].compared > 80
    pipeline = runner.pipeline(case)
    inputs, model = pipeline.inputs(), pipeline.model()
    adapter = CONFIG.parent.parent / "examples" / "adapters" / "soft"
    with quiet_transformers():
        original = PeftModel.from_pretrained(model.source.causal_lm(), adapter).eval()
    asked = {"max_new_tokens": case.options["max_new_tokens"], "do_sample": False}
    changed = 0
    with runtime("ort").open(pipeline.onnx()) as session, quiet_transformers():
        for prompt, fed in zip(inputs.ids, inputs.fed("soft"), strict=True):
            ids = torch.from_numpy(prompt)[None]
            (text,) = original.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
            wanted = text[prompt.size :].tolist()
            (logits,) = generate(session, [fed], model._plan(inputs), state=inputs.adapters["soft"])
            assert np.array(logits).argmax(axis=-1).tolist() == wanted
            (plain,) = generate(session, [prompt], model._plan(inputs), state=inputs.adapters["base"])
            changed += np.array(plain).argmax(axis=-1).tolist() != wanted
    assert changed, "what the base says without the adapter is another text"
