# SPDX-License-Identifier: Apache-2.0
"""Bad input for language models with adapters: an error with the remedy, exit code 2, and nothing is exported."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import cli, said
from pydantic import ValidationError

import qeff_validate as qv
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, check
from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import apply_peft
from qeff_validate.models.sources.synthetic import Random

LORA = {"peft_method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"], "init": "random"}
SAVED: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "good": ("llama", {}, {}),
    "wide": ("llama", {"hidden_size": 96}, {}),
    "deep": ("llama", {"num_hidden_layers": 3}, {}),
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn"]}),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of this base and of others, saved by PEFT; one of them as a pickle would be."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, (base, config, options) in SAVED.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's notes
            adapted = apply_peft(Random(base, config, 0).causal_lm(), {**LORA, **options})
            adapted.save_pretrained(folder / name, save_embedding_layers=False)
    shutil.copytree(folder / "good", folder / "pickle")
    (folder / "pickle" / "adapter_model.safetensors").rename(folder / "pickle" / "adapter_model.bin")
    return folder


def case(**changes: Any) -> qv.Case:
    return qv.Case(**{"name": "bad", "model": "peft-causal-lm", "source": "random:llama", **changes})


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens 0": ({"max_new_tokens": 0}, "options: max_new_tokens: Input should be greater than or equal to 1"),
    "no room": (
        {"max_new_tokens": 64, "ctx_len": 64}, "options: max_new_tokens 64 leaves no room for a prompt in ctx_len 64",
    ),
    "chunks beyond the context": ({"prefill_seq_len": 99}, "options: prefill_seq_len 99 exceeds ctx_len 64"),
    "no prompt": ({"prompts": []}, "options: prompts: List should have at least 1 item"),
    "adapters and a method": (
        {"adapters": {"a": "x"}, "peft_method": "lora"},
        "options: give adapters, or peft_method for two random ones, not both",
    ),
    "options without a method": (
        {"peft": {"r": 4}}, "options: peft holds the options of peft_method, which is missing",
    ),
    "an adapter called base": (
        {"adapters": {"base": "x"}}, "adapters: an adapter cannot be called 'base': that is the model without one",
    ),
    "an adapter that is a number": (
        {"adapters": {"a": 3}}, "adapters: adapter 'a': give the directory of a saved one, or {peft_method: lora, …}",
    ),
    "an adapter without a method": ({"adapters": {"a": {"r": 4}}}, "adapters: adapter 'a': give the directory"),
    "a side that is none": ({"padding_side": "up"}, "padding_side: Input should be 'right' or 'left' (got 'up')"),
    "a misspelt option": ({"max_new_token": 3}, "max_new_token: unknown key. Did you mean 'max_new_tokens'?"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_option_is_a_config_error_before_anything_is_loaded(what: str) -> None:
    options, message = WRONG[what]
    with pytest.raises(ConfigError) as caught:
        check(case(options=options))
    assert message in str(caught.value)
    assert str(caught.value).startswith("case 'bad': options: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tolerance": {"ort": {"rel_l2": 1e-3, "why": "x"}}},
            "tolerance.ort: no metric is called 'rel_l2'. Known: all_error, flips, kl_max",
        ),
        (
            {"tolerance": {"ort": {"kl_p99": 0.2, "why": "x"}}},
            "kl_p99: 0.2 is no usable bound: give a number from 0 to",
        ),
        ({"tolerance": {"ort": {"flips": 1, "why": "x"}}}, "flips: 1 is no usable bound"),
    ],
    ids=["a metric of embeddings", "a bound that accepts anything", "flips that are no ties"],
)
def test_tolerance_that_language_models_cannot_have_is_a_config_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError)) as caught:  # pydantic's where no model kind is needed to tell
        check(case(**changes))
    assert message in str(caught.value)


def test_exporter_that_cannot_have_weights_as_inputs_is_refused_with_the_one_that_can() -> None:
    with pytest.raises(
        ConfigError, match=r"exporter torchscript cannot export the model kind .peft-causal-lm.: .* dynamo"
    ):
        qv.model(case(exporter="torchscript"))


UNFIT: Mapping[str, tuple[dict[str, str], list[str]]] = {
    "missing directory": ({"a": "none"}, ["adapter: directory ", "none does not exist"]),
    "a pickle": ({"a": "pickle"}, ["adapter_model.bin is a pickle, which may run code", "save_pretrained(NEW_DIR)"]),
    "a wider base": (
        {"a": "wide"},
        ["adapter 'a': ", "the adapter has [4, 96], the config on this model gives [4, 64]", "so another base"],
    ),
    "a deeper base": ({"a": "deep"}, ["layers.2.", "the adapter reaches layer 2", "last layer with an adapter is 1"]),
    "another family": ({"a": "gpt2"}, ["LlamaForCausalLM has no module 'c_attn'", "Another base?"]),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_adapter_that_does_not_fit_is_an_error_with_the_remedy_before_anything_is_exported(
    what: str, adapters: Path, tmp_path: Path
) -> None:
    given, messages = UNFIT[what]
    options = {"adapters": {name: str(adapters / folder) for name, folder in given.items()}}
    report = qv.validate(case(options=options), runtimes=["ort"], store=tmp_path)
    (result,) = report.results
    assert (result.status, result.stage, report.exit_code()) == ("error", "config", 2), result.reason
    assert [message for message in messages if message not in result.reason] == [], result.reason
    assert not list(tmp_path.glob("*/*/provenance.json"))


def test_prompt_longer_than_the_context_is_an_error_that_names_it_and_what_fits(tmp_path: Path) -> None:
    options = {"prompts": ["a b", "one two three four five six"], "max_new_tokens": 4, "ctx_len": 11,
               "prefill_seq_len": 4}  # fmt: skip
    report = qv.validate(case(options=options), runtimes=["ort"], store=tmp_path)
    (result,) = report.results
    assert (result.status, result.stage, report.exit_code()) == ("error", "config", 2)
    for words in ("prompt 'one two three four five six' has 8 tokens, and 1 to 7 fit", "or raise ctx_len"):
        assert words in result.reason


def test_prompt_that_just_fits_and_a_name_with_a_slash_are_no_errors(tmp_path: Path) -> None:
    adapter = {name: value for name, value in LORA.items() if name != "init"}
    options = {"prompts": ["a b", "one two three four five six"], "max_new_tokens": 4, "ctx_len": 12,
               "prefill_seq_len": 4, "adapters": {"team/a": adapter}}  # fmt: skip
    (result,) = qv.validate(case(options=options), runtimes=["torch"], store=tmp_path).results
    assert result.status == "pass", result.reason


def test_wrong_option_through_the_command_line_exits_2_and_starts_nothing(tmp_path: Path) -> None:
    lines = "cases:\n  - {name: lm, model: peft-causal-lm, source: 'random:llama', options: {max_new_tokens: 0}}\n"
    (tmp_path / "bad.yaml").write_text(lines, encoding="utf-8")
    done = cli("run", "bad.yaml", "--store", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 2, said(done)
    assert "case 'lm': options: max_new_tokens: Input should be greater than or equal to 1 (got 0)" in said(done)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_adapter_of_another_size_is_refused_before_its_digest_is_taken(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters / "good", tmp_path / "a")
    os.truncate(tmp_path / "a" / "adapter_model.safetensors", 10**12)
    monkeypatch.setattr("qeff_validate.artifact.digest_file", lambda path: pytest.fail(f"{path} was read"))
    made = qv.model(case(options={"adapters": {"a": str(tmp_path / "a")}}))
    with pytest.raises(ConfigError, match="1,000,000,000,000 bytes"):
        made.inputs_key()


def test_adapter_of_indices_is_read_back_from_the_store(tmp_path: Path) -> None:
    """Supertuning says which weights it changes by int32 tensors beside their values."""
    options = {
        "peft_method": "supertuning", "peft": {"init": 0.2, "target_modules": ["q_proj", "v_proj"]},
        "prompts": ["Once"], "prefill_seq_len": 8, "ctx_len": 16, "max_new_tokens": 2,
    }  # fmt: skip
    case = Case(name="indices", model="peft-causal-lm", source="random:llama", options=options)
    adapters = Runner(store=tmp_path).pipeline(case).inputs().adapters
    assert {array.dtype for array in adapters["a"].values()} == {np.dtype(np.int32), np.dtype(np.float32)}
