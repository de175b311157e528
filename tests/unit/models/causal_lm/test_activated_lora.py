# SPDX-License-Identifier: Apache-2.0
"""Activated LoRA, whose adapter acts from the last invocation in a prompt on. The oracle is PEFT's ``generate``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft import LoraConfig, PeftModel, get_peft_model

import qeff_validate as qv
from qeff_validate.builders.store import Store
from qeff_validate.engine import check
from qeff_validate.models.causal_lm.decoder_feeds import NEVER, invocation_start
from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.mutation.causal_lm_mutants import CAUSAL_LM_MUTANTS, serving
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.selftest.faulty_runtime import FaultyRuntime

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
PROMPTS = ["one two three four five six seven eight nine ten", "two three", "five one two three", "four"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters as PEFT saves them, invoked by the words "two three"; the third has another rank and other modules."""
    folder, source = tmp_path_factory.mktemp("activated"), Random("llama", SMALL, 0)
    invocation = source.tokenizer()[0]("two three")[1:-1]
    with torch.random.fork_rng(), torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for name, rank, modules in (
            ("a", 4, ["q_proj", "v_proj"]),
            ("b", 4, ["q_proj", "v_proj"]),
            ("c", 2, ["k_proj"]),
        ):
            config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=modules)
            config.alora_invocation_tokens = invocation
            model = get_peft_model(source.causal_lm(), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
            model.save_pretrained(folder / name, save_embedding_layers=False)
    return folder


def case(saved: Path, names: str = "ab", **options: Any) -> qv.Case:
    adapters = {name: str(saved / name) for name in names}
    sizes = {"prompts": PROMPTS, "max_new_tokens": 4, "prefill_seq_len": 4, "ctx_len": 32, "batch_size": 3}
    return qv.Case(
        name="activated", model="peft-causal-lm", source="random:llama", config=SMALL, tolerance="table",
        options={"adapters": adapters, **sizes, **options},
    )  # fmt: skip


@pytest.mark.numeric
def test_reference_is_what_peft_generates(saved: Path) -> None:
    model = qv.model(case(saved))
    inputs = model.inputs(model.tokenize())
    reference = model.reference(inputs, dtype="float32")
    assert "1 of 4 prompts do not hold the invocation tokens" in " ".join(inputs.notes)
    ends = np.cumsum(reference["steps"])
    with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        oracle = PeftModel.from_pretrained(Random("llama", SMALL, 0).causal_lm(), saved / "a").eval()
        for row, ids in enumerate(inputs.ids, start=len(inputs.ids)):
            generated = oracle.generate(
                input_ids=torch.from_numpy(ids)[None], max_new_tokens=4, do_sample=False, pad_token_id=inputs.pad,
                eos_token_id=sorted(inputs.eos), return_dict_in_generate=True, output_logits=True,
                use_cache=True,
            )  # fmt: skip
            rows = slice(ends[row - 1], ends[row])
            assert reference["tokens"][rows].tolist() == generated.sequences[0, ids.size :].tolist()
            close(reference["logits"][rows], torch.cat(generated.logits), rtol=1e-4, atol=1e-5)
    without = slice(ends[3 + 4] - reference["steps"][3 + 4], ends[3 + 4])
    base = slice(ends[3] - reference["steps"][3], ends[3])
    np.testing.assert_array_equal(reference["logits"][without], reference["logits"][base])


@pytest.mark.parametrize("names", ["ab", "ac"])
@pytest.mark.parametrize("mixed", [False, True])
def test_each_row_is_activated_at_its_own_position(names: str, mixed: bool, saved: Path, tmp_path: Path) -> None:
    report = qv.validate(case(saved, names, mixed_batch=mixed), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


@pytest.mark.slow
def test_activated_lora_is_exported(saved: Path, tmp_path: Path) -> None:
    report = qv.validate(case(saved), runtimes=["ort", "sim"], store=tmp_path)
    assert report.passed, [result.reason for result in report.results]


def test_activation_one_token_late_fails(saved: Path) -> None:
    damaged = case(saved)
    made = Pipeline(damaged, check(damaged), Store(), Silent())
    (late,) = [mutant for mutant in CAUSAL_LM_MUTANTS if mutant.name == "invocation one token late"]
    result = made.result(FaultyRuntime(serving(late, made.inputs().adapters), "torch"))
    assert result.status == "fail"
    assert "from another token on than its invocation's first" in result.reason


def test_built_in_prompts_hold_the_invocation(saved: Path) -> None:
    model = qv.model(case(saved, prompts=None))
    inputs = model.inputs(model.tokenize())
    starts = [invocation_start(tokens, inputs.invocation) for tokens in inputs.ids if tokens.size > 3]
    assert starts
    assert NEVER not in starts
    assert len(set(starts)) > 1


@pytest.mark.parametrize(
    ("tokens", "start"), [([5, 6, 1, 5, 6], 3), ([5, 6], 0), ([1, 5], NEVER), ([5], NEVER), ([5, 5, 6, 7], 1)]
)
def test_last_invocation_counts(tokens: list[int], start: int) -> None:
    assert invocation_start(np.array(tokens), (5, 6)) == start


def test_adapters_share_a_graph_only_if_the_same_tokens_invoke_them() -> None:
    from peft import LoraConfig

    from qeff_validate.errors import ConfigError
    from qeff_validate.models.causal_lm.attach_adapters import _check_shareable

    def configs(*invocations: list[int] | None) -> dict[str, LoraConfig]:
        return {
            str(at): LoraConfig(r=at + 1, alora_invocation_tokens=each, task_type="CAUSAL_LM")
            for at, each in enumerate(invocations)
        }

    _check_shareable(configs([5, 6], [5, 6]), "ranks differ")
    for others in ([7], None):
        with pytest.raises(ConfigError, match="alora_invocation_tokens"):
            _check_shareable(configs([5, 6], others), "ranks differ")
