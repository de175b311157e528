# SPDX-License-Identifier: Apache-2.0
"""How texts become tokens in directories of sentence-transformers: chat templates, lengths, the tokenizer's options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_oracle import TEXTS, WIDTH, assert_near, encoded, reference

import qeff_validate as qv
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import ComparisonContext

TEMPLATES = {
    "flat": "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}one"
    "{% endif %}",
    "structured": "{% for m in messages %}{{ m.role }}{% for p in m.content %}{% if p.type == 'text' %} : {{ p.text }}"
    "{% endif %}{% endfor %} {% endfor %}",
}


def save(folder: Path, body: Path, template: str | None = None, pooling: str = "mean", **options: Any) -> Path:
    """Write a directory, by default without a chat template."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoTokenizer

    of_model = {name: options.pop(name) for name in ("prompts", "default_prompt_name") if name in options}
    source = body
    if template:
        source = folder.parent / "with template"
        source.mkdir()
        for path in body.iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(body)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(source)
    modules = [Transformer(str(source), **options), Pooling(WIDTH, pooling)]
    SentenceTransformer(modules=modules, device="cpu", **of_model).save(str(folder))
    return folder


def written(folder: Path, **config: Any) -> Path:
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.numeric
@pytest.mark.parametrize("form", TEMPLATES)
def test_texts_become_messages_where_the_files_say_so(form: str, body: Path, tmp_path: Path) -> None:
    """The default of sentence-transformers from 5.4 on for a tokenizer with a chat template."""
    prompts = {"prompts": {"query": "blue one"}, "default_prompt_name": "query"}
    folder = save(tmp_path / "saved", body, TEMPLATES[form], "lasttoken", **prompts)
    assert (
        json.loads((folder / "sentence_bert_config.json").read_text())["modality_config"]["message"]["format"] == form
    )
    assert_near(reference(folder, tmp_path, seq_len=[8, 64]), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_options_of_the_template_are_passed_on(body: Path, tmp_path: Path) -> None:
    options = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    folder = save(tmp_path / "saved", body, TEMPLATES["flat"], "lasttoken", **options)
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


def test_texts_that_would_be_cut_within_a_template_are_refused(body: Path, tmp_path: Path) -> None:
    folder = written(save(tmp_path / "saved", body, TEMPLATES["flat"]), max_seq_length=10)
    with pytest.raises(ConfigError, match="has 16 tokens in the chat template, and at most 10 are taken"):
        qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS})).rows()


def test_kinds_with_a_head_refuse_a_chat_template(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body, TEMPLATES["flat"])
    entries = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(entries[:1]))
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_type": "MultiVectorEncoder"}))
    case = qv.Case(name="x", model="multi-vector", source=f"path:{folder}")
    with pytest.raises(ConfigError, match="put texts into the tokenizer's chat template"):
        qv.model(case).rows()


LENGTHS: Mapping[str, Mapping[str, Any]] = {
    "of the call": {"max_seq_length": 12, "processing_kwargs": {"text": {"max_length": 6, "truncation": True}}},
    "of the tokenizer's options": {"max_seq_length": 5, "tokenizer_args": {"model_max_length": 9}},
    "none": {"max_seq_length": 5, "processing_kwargs": {"text": {"truncation": False}}},
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", LENGTHS)
def test_greatest_length_is_the_one_that_encode_heeds(name: str, body: Path, tmp_path: Path) -> None:
    folder = written(save(tmp_path / "saved", body), **LENGTHS[name])
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"processing_kwargs": {"text": {"stride": 2}}}, "processing_kwargs that are not supported: text: stride"),
        ({"processing_kwargs": {"common": {"padding": True}}}, "not supported: common: padding"),
        ({"modality_config": {"message": {"method_output_name": "last_hidden_state"}}}, "texts become messages"),
    ],
)
def test_what_is_not_supported_is_named(config: Mapping[str, Any], words: str, body: Path, tmp_path: Path) -> None:
    folder = written(save(tmp_path / "saved", body), **config)
    with pytest.raises(ConfigError, match=words):
        qv.model(qv.Case(name="x", source=f"path:{folder}")).rows()


def test_computation_of_encode_in_half_precision_is_told(body: Path, tmp_path: Path) -> None:
    def notes() -> str:
        return " ".join(qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS})).rows().notes)

    folder = save(tmp_path / "saved", body)
    assert "computes in it" not in notes()
    written(folder, model_args={"torch_dtype": "float16"})
    assert "loads this directory in float16 and computes in it" in notes()
    written(folder, model_args={})
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    assert "loads this directory in bfloat16 and computes in it" in notes()


@pytest.mark.parametrize("similarity", ["dot", "manhattan", None])
def test_neighbours_are_ordered_by_the_similarity_of_the_files(
    similarity: str | None, body: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "saved", body)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "similarity_fn_name": similarity}))
    model = qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS}))
    inputs = model.inputs(model.tokenize())
    vectors = np.random.default_rng(0).uniform(size=(len(inputs.ids), WIDTH)).astype(np.float32)
    vectors[-1] = 0  # the row without a token
    grown = vectors * np.float32([[1], [3], [1], [1], [1], [1]])
    verdict = model.judge({"output": vectors}, {"output": grown}, inputs, ComparisonContext("fp32", {}, seed=0))
    (order,) = (item.metric for item in verdict.metrics if item.metric.name == "output.neighbour_order")
    assert (order.value > 0) == (similarity is not None)
    assert order.worst.get("similarity") == similarity


def test_unknown_similarity_is_an_error(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "similarity_fn_name": "cosin"}))
    with pytest.raises(ConfigError, match="similarity_fn_name is 'cosin'; there are cosine, dot"):
        qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS})).rows()
