# SPDX-License-Identifier: Apache-2.0
"""``random:TYPE`` for the model types of transformers: each builds a body of its family, or says why not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import qeff_validate as qv
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.sources.resolve import resolve
from qeff_validate.models.sources.synthetic import Random, empty_body

REASONS = (
    "is built",
    "it is no model of texts",
    "is made of parts",
    "it is a part of other models",
    "its default config, shrunk, is none of a whole model",
    "the config's values do not go together",
    "cannot make a config for",
    "which the family has",
    "shrunk it still has",
)
"""Why a type is refused; each is followed by what to do, or by transformers' own reason."""


def classes(model_type: str, **config: Any) -> set[str]:
    body = empty_body(Random(model_type, config, 0)._config(), model_type)
    return {type(module).__name__ for module in body.modules()}


def built_or_refused(model_type: str) -> str:
    try:
        empty_body(Random(model_type, {}, 0)._config(), model_type)
    except (ConfigError, Unavailable) as exc:
        return str(exc)
    return f"{model_type} is built"


@pytest.mark.slow
def test_each_type_builds_a_small_body_or_says_why_not() -> None:
    outcomes: Counter[str] = Counter()
    unknown = []
    for model_type in sorted(set(CONFIG_MAPPING)):
        message = built_or_refused(model_type)
        reason = next((reason for reason in REASONS if reason in message), None)
        outcomes[reason or "unknown"] += 1
        unknown += [f"{model_type}: {message}"] if reason is None or model_type not in message else []
    assert not unknown
    assert outcomes["is built"] > 200, outcomes
    assert outcomes["which the family has"] <= 3, outcomes


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("jamba", {"JambaAttention", "JambaMambaMixer", "JambaSparseMoeBlock"}),
        ("recurrent_gemma", {"RecurrentGemmaAttention", "RecurrentGemmaRecurrentBlock"}),
        ("lfm2_moe", {"Lfm2MoeAttention", "Lfm2MoeShortConv"}),
    ],
)
def test_kinds_of_layers_that_come_late_are_kept(model_type: str, wanted: set[str]) -> None:
    assert wanted <= classes(model_type)


def test_body_that_loses_what_makes_its_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shrunk to 1 layers it loses JambaAttention, .*such as num_hidden_layers"):
        classes("jamba", num_hidden_layers=1)


def test_what_a_case_replaces_is_not_lost() -> None:
    assert "NewGELUActivation" in classes("bert", hidden_act="gelu_new")


def test_published_config_keeps_its_family_too(tmp_path: Path) -> None:
    from transformers import RecurrentGemmaConfig

    RecurrentGemmaConfig().save_pretrained(tmp_path)
    config = resolve(qv.Case(name="x", source=f"tiny:{tmp_path}")).model_config()
    assert "RecurrentGemmaAttention" in {type(module).__name__ for module in empty_body(config, "x").modules()}
    with pytest.raises(ConfigError, match="it loses RecurrentGemmaAttention"):
        resolve(qv.Case(name="x", source=f"tiny:{tmp_path}", config={"num_hidden_layers": 2})).model_config()


def test_what_is_set_for_single_layers_stays_with_its_kind_of_layer() -> None:
    config = Random("embedding_gemma2_text", {}, 0)._config()
    assert config.layer_types == ["sliding_attention", "full_attention"]
    body = empty_body(config, "x")
    sizes = [layer.self_attn.head_dim for layer in body.layers]
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen2_5_omni_thinker", "made of parts; what reads texts is its text_config"),
        ("gemma3", "take random:gemma3_text"),
        ("align", "of the type 'align_text_model', of which transformers builds no body by itself"),
        ("convnext", "no vocab_size and hidden_size in its config: it is no model of texts"),
        ("owlvit_text_model", "transformers builds no body of this type by itself; it is a part of other models"),
        ("mistral_large4_text", "the config's values do not go together"),
        ("reformer", "its default config, shrunk, is none of a whole model; set what is missing in config"),
    ],
)
def test_why_a_type_is_refused(model_type: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        classes(model_type)
