# SPDX-License-Identifier: Apache-2.0
"""Conversations by chat template, begin and end tokens, and sampling settings. The oracle is the tokenizer itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import qeff_validate as qv
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.options import PeftCausalLMOptions

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<bot>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ 'bot' if m['role'] == 'assistant' else 'user' }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
MESSAGES = [
    [{"role": "user", "content": "w1 w2 w3"}],
    [
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
        {"role": "user", "content": "w7 w8 w9"},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokenizer begins each text with ``<bos>`` and has a chat template, set up to sample."""
    path = tmp_path_factory.mktemp("chat")
    words = [*SPECIAL, *(f"w{number}" for number in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=["<user>", "<bot>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=1, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=len(words),
            initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    generation = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": [2, 5]}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def case(folder: Path, **options: Any) -> qv.Case:
    sizes = {"max_new_tokens": 3, "prefill_seq_len": 4, "ctx_len": 32, **options}
    return qv.Case(name="chat", model="peft-causal-lm", source=f"path:{folder}", tolerance="table", options=sizes)


def inputs(folder: Path, **options: Any) -> Any:
    model = qv.model(case(folder, **options))
    return model.inputs(model.tokenize())


@pytest.mark.parametrize("opening", [True, False])
def test_conversations_are_what_the_chat_template_gives(folder: Path, opening: bool) -> None:
    rows = inputs(folder, messages=MESSAGES, add_generation_prompt=opening)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=opening, return_dict=False)
        for messages in MESSAGES
    ]
    assert [tokens.tolist() for tokens in rows.ids] == expected
    assert all(tokens.tolist().count(1) == 1 for tokens in rows.ids), "the template writes the only begin token"
    assert all((tokens[-1] == 5) == opening for tokens in rows.ids)
    assert "w7 w8 w9" in rows.texts[1]


def test_conversations_run(folder: Path, tmp_path: Path) -> None:
    report = qv.validate(case(folder, messages=MESSAGES), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


def test_begin_token_of_a_prompt_is_not_doubled(folder: Path) -> None:
    rows = inputs(folder, prompts=["<bos> w1 w2", "w1 w2", "w1 w1 w2"])
    assert rows.ids[0].tolist() == rows.ids[1].tolist() == [1, 7, 8]
    assert rows.ids[2].tolist() == [1, 7, 7, 8]


def test_end_tokens_are_those_of_the_generation_config_and_sampling_is_told(folder: Path) -> None:
    rows = inputs(folder, prompts=["w1 w2"])
    assert rows.eos == {2, 5}
    (note,) = [note for note in rows.notes if "generation_config" in note]
    assert "do_sample: True, repetition_penalty: 1.1, which is ignored" in note


def test_model_that_continues_greedily_has_no_note() -> None:
    model = qv.model(qv.Case(name="a", model="peft-causal-lm", source="random:llama"))
    assert not model.inputs(model.tokenize()).notes


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        ("random:llama", MESSAGES, "messages: the tokenizer has no chat template: give prompts instead"),
        ("", [[{"role": "tool", "content": "w1"}]], "messages: the chat template refuses them: no tools here"),
    ],
)
def test_conversation_without_a_template_that_takes_it_is_an_error(
    source: str, messages: Any, words: str, folder: Path
) -> None:
    given = case(folder, messages=messages).model_copy(update={"source": source} if source else {})
    with pytest.raises(ConfigError, match=words):
        qv.model(given).tokenize()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": MESSAGES, "prompts": ["a"]}, "give prompts or messages, not both"),
        ({"messages": [[]]}, "at least 1 item"),
        ({"messages": [[{"role": "user"}]]}, "Field required"),
    ],
)
def test_broken_conversations_are_config_errors(options: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PeftCausalLMOptions(**options)
