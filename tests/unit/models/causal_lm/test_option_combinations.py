# SPDX-License-Identifier: Apache-2.0
"""Options in any combination: a case is made and tokenized, or an error says why not; nothing else is ever raised."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import qeff_validate as qv
from qeff_validate.errors import ValidateError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 8, 16, 1 << 20, 1 << 40, 1.5, True, None, "2"])
TEXTS = st.sampled_from([[], [""], ["a b"], ["a", "b", "c"], ["a", "a", "a"], "text", [1], None, ["\0", "x", "y"]])
PEFT = st.fixed_dictionaries({}, optional={
    "r": NUMBERS,
    "lora_alpha": NUMBERS,
    "init": st.sampled_from(["random", "peft", 0.1, 0, -1, float("nan"), float("inf"), "x", None]),
    "seed": NUMBERS,
    "target_modules": st.sampled_from([["q_proj"], [], "all-linear", r".*q_proj", "[", [1], ["embed_tokens"], None]),
    "modules_to_save": st.sampled_from([["lm_head"], ["norm"], [], "lm_head", [""]]),
    "layers_to_transform": st.sampled_from([0, [0], [7], -1, "0", []]),
    "rank_pattern": st.sampled_from([{"q_proj": 2}, {"[": 2}, {"": 2}, {"q_proj": "2"}, []]),
    "trainable_token_indices": st.sampled_from([[1], [99999], [-1], {"embed_tokens": [1]}, {"x": [1]}, [], "1"]),
    "use_dora": st.booleans(),
    "ensure_weight_tying": st.booleans(),
})  # fmt: skip
METHODS = st.sampled_from([None, "lora", "dora", "rslora", "ia3", "vera", "prompt_tuning", "x", "", 1])
ADAPTERS = st.sampled_from([
    {}, {"a": "no/such/folder"}, {"base": {"peft_method": "lora"}}, {"a": {}}, {"a": {"peft_method": "lora"}},
    {"a": {"peft_type": "LORA", "r": 4}}, {"": {"peft_method": "lora"}}, {"a/b": {"peft_method": "ia3"}}, {"a": 1}, [],
    {"a": {"peft_method": "lora", "r": 2}, "b": {"peft_method": "lora", "r": 4}},
])  # fmt: skip
SIZES = dict.fromkeys(("max_new_tokens", "prefill_seq_len", "ctx_len", "batch_size"), NUMBERS)
CAUSAL = st.fixed_dictionaries({}, optional={
    **SIZES, "peft_method": METHODS, "peft": PEFT, "adapters": ADAPTERS, "prompts": TEXTS,
    "full_batch_size": NUMBERS, "kv_cache_batch_size": NUMBERS,
    "mixed_batch": st.booleans(), "padding_side": st.sampled_from(["left", "right", "both", None]),
})  # fmt: skip
ADAPTED = st.fixed_dictionaries(
    {"peft_method": st.sampled_from(["lora", "dora", "rslora", "ia3"])},
    optional={"peft": PEFT, "mixed_batch": st.booleans()},
)
EMBEDDING = st.fixed_dictionaries({}, optional={
    "pooling": st.sampled_from(["mean", "cls", "none", "auto", "x", "a:b", "os:getcwd", ":", "math:pi", 1, None, []]),
    "normalize": st.sampled_from([True, False, None, "yes"]),
    "truncate_dim": NUMBERS,
    "prompt": st.sampled_from(["", "query: ", 1, None, "\0"]),
    "padding_side": st.sampled_from(["left", "right", "both"]),
    "token_type_ids": st.booleans(),
    "seq_len": st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3)),
    "batch_size": NUMBERS,
    "truncate": st.booleans(),
})  # fmt: skip
SEVERAL = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def tokenized(**case: Any) -> None:
    reason = refusal(**case)
    assert reason is None or (reason.strip() and "unexpected" not in reason)


def refusal(**case: Any) -> str | None:
    """Return why a case is refused; pydantic's own error is that of a case that is made in Python."""
    try:
        model = qv.model(qv.Case(name="x", **{"config": SMALL, **case}))
        model.inputs(model.tokenize())
    except (ValidateError, ValidationError) as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' notes on odd options
@SEVERAL
@given(options=st.one_of(CAUSAL, ADAPTED), tied=st.booleans())
def test_causal_options(options: dict[str, Any], *, tied: bool) -> None:
    config = {**SMALL, "tie_word_embeddings": tied}
    tokenized(model="peft-causal-lm", source="random:llama", config=config, options=options)


@pytest.mark.filterwarnings("ignore")
@SEVERAL
@given(options=EMBEDDING, texts=TEXTS)
def test_embedding_options(options: dict[str, Any], texts: Any) -> None:
    tokenized(model="embedding", source="random:bert", options=options, inputs={"texts": texts})
