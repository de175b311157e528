# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning, P-tuning and prefix tuning, as PEFT saves them. The oracle is PEFT's loader."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError, IncomparableError
from qeff_validate.models.causal_lm.virtual_tokens import VirtualTokens, virtual_tokens
from qeff_validate.models.framework_calls import quiet_transformers
from qeff_validate.mutation.adapter_mutants import ADAPTER_MUTANTS
from qeff_validate.protocols import ComparisonContext, runtime

SIZES: Mapping[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 100,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: Mapping[str, Any] = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "encoder": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "short-prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
}
EMBEDDINGS, KEYS = ("prompt", "encoder"), ("prefix", "short-prefix")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, and each adapter as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng(), torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
        for name, config in CONFIGS.items():
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.5)
            model.save_pretrained(folder / name)
    return folder


def base(saved: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved / "base").eval()


def case(saved: Path, names: tuple[str, ...], **options: Any) -> qv.Case:
    adapters = {name: str(saved / name) for name in names}
    sizes = {"prompts": ["a", "b c d e f g h i j k"], "max_new_tokens": 4, "prefill_seq_len": 4, "ctx_len": 32}
    return qv.Case(
        name="virtual", model="peft-causal-lm", source=f"path:{saved / 'base'}", tolerance="table",
        options={"adapters": adapters, **sizes, **options},
    )  # fmt: skip


@pytest.mark.numeric
@pytest.mark.parametrize("name", [*EMBEDDINGS, "prefix"])
def test_reference_is_what_the_loader_of_peft_gives(name: str, saved: Path) -> None:
    model = qv.model(case(saved, (name,)), given=base(saved))
    inputs = model.inputs(model.tokenize())
    reference = model.reference(inputs, dtype="float32")
    ends = np.cumsum(reference["steps"])
    with quiet_transformers(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        oracle = AutoPeftModelForCausalLM.from_pretrained(saved / name).eval()
        for row, ids in enumerate(inputs.ids, start=len(inputs.ids)):
            rows = slice(ends[row - 1], ends[row])
            prompt = torch.from_numpy(ids)[None]
            generated = oracle.generate(
                input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=sorted(inputs.eos)
            )
            assert reference["tokens"][rows].tolist() == generated[0, ids.size :].tolist()
            logits = oracle(input_ids=generated[:, :-1]).logits[0, -(generated.shape[1] - ids.size) :]
            close(reference["logits"][rows], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [EMBEDDINGS, KEYS], ids="-".join)
@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_with_different_numbers_of_tokens_share_a_graph(
    names: tuple[str, ...], mixed: bool, saved: Path, tmp_path: Path
) -> None:
    runner = Runner(store=tmp_path / "store", model=base(saved))
    result = runner.pipeline(case(saved, names, mixed_batch=mixed)).result(runtime("torch"))
    assert result.status == "pass", result.reason


@pytest.mark.slow
@pytest.mark.parametrize("names", [EMBEDDINGS, KEYS], ids="-".join)
def test_virtual_tokens_are_exported(names: tuple[str, ...], saved: Path, tmp_path: Path) -> None:
    report = qv.validate(case(saved, names), runtimes=["ort", "sim"], store=tmp_path, model=base(saved))
    assert report.passed, [result.reason for result in report.results]


@pytest.mark.parametrize("name", ["prompt", "prefix"])
@pytest.mark.parametrize("relation", ["kv_cache", "other_chunks", "other_padding", "poisoned_state"])
def test_relations_hold_with_virtual_tokens(name: str, relation: str, saved: Path) -> None:
    model: Any = qv.model(case(saved, (name,)), given=base(saved))
    inputs = model.inputs(model.tokenize())
    with qv.runtime("torch").open(qv.build(model, "module")) as session:
        verdict = model.relate(relation, session, inputs, ComparisonContext("fp32", {}, 0))
        assert verdict.status == "pass", verdict.reason
        with pytest.raises(IncomparableError, match="PEFT cannot merge"):
            model.relate("merged", session, inputs, ComparisonContext("fp32", {}, 0))


@pytest.mark.parametrize("change", ["one position further", "one token short"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_in_the_wrong_place_fail(
    name: str, change: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VirtualTokens.fed

    def fed(self: VirtualTokens, adapter: str, ids: Any) -> Any:
        rows = whole(self, adapter, ids)
        count = self.counts[adapter]
        if change == "one token short":
            return tuple(tokens[1:] if count else tokens for tokens in rows)
        return tuple(
            np.concatenate([tokens[count : count + 1], tokens[:count], tokens[count + 1 :]]) for tokens in rows
        )

    monkeypatch.setattr(VirtualTokens, "fed", fed)
    runner = Runner(store=tmp_path / "store", model=base(saved))
    result = runner.pipeline(case(saved, (name,))).result(runtime("torch"))
    assert result.status == "fail"
    assert name in result.reason


@pytest.mark.parametrize(
    ("names", "groups"),
    [(("prompt", "lora", "encoder"), "prompt, encoder; lora"), (("prefix", "prompt"), "prefix; prompt")],
)
def test_what_cannot_share_proposes_groups(names: tuple[str, ...], groups: str, saved: Path) -> None:
    with pytest.raises(ConfigError, match=f"Give each of these groups a case: {groups}"):
        qv.model(case(saved, names), given=base(saved)).tokenize()


def test_embeddings_of_another_base_are_refused() -> None:
    tensors = {"a": {"prompt_embeddings": np.zeros((4, 16), np.float32)}}
    sizes = {"vocab": 100, "hidden": 32, "cache": 64}
    with pytest.raises(ConfigError, match=r"wanted the tensor prompt_embeddings \[tokens, 32\].*\[4, 16\]"):
        virtual_tokens({"a": CONFIGS["prompt"]}, tensors, "base", sizes, "llama")


def test_prompt_that_leaves_no_room_for_virtual_tokens_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 7 fit beside max_new_tokens 4 and 5 virtual tokens in ctx_len 16"):
        qv.model(case(saved, ("prompt",), ctx_len=16), given=base(saved)).tokenize()


def test_faults_of_adapters_are_tried_on_virtual_tokens(saved: Path) -> None:
    model: Any = qv.model(case(saved, ("prompt",)), given=base(saved))
    inputs = model.inputs(model.tokenize())
    reference = model.reference(inputs, dtype="float32")
    changes = [mutant for mutant in ADAPTER_MUTANTS if mutant.family == "adapters"] or list(ADAPTER_MUTANTS)
    found = dict(model.faulty_runs(inputs, reference, changes))
    assert found, "no fault applies"
    assert any(not np.array_equal(run["logits"], reference["logits"]) for run in found.values())


def test_model_in_memory_with_virtual_tokens_is_refused(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between transformers and PEFT
        adapted = get_peft_model(base(saved), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="save it with save_pretrained"):
        qv.model(case(saved, ()), given=adapted).tokenize()
