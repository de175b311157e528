# SPDX-License-Identifier: Apache-2.0
"""Sequence classification: the reference is what transformers returns for a padded batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from small_models import save_model, save_tokenizer

import qeff_validate as qv
from qeff_validate.engine import Runner, model
from qeff_validate.errors import ConfigError
from qeff_validate.models.corpus import PAIRS, TEXTS

AUTO = "AutoModelForSequenceClassification"


def classifier(folder: Path, **keys: Any) -> qv.Case:
    options = {"seq_len": [64, 96]}
    case = {"name": "classifier", "model": "sequence-classification", "source": f"path:{folder}", "options": options}
    return qv.Case(**case, exporter="torchscript", **keys)


@pytest.mark.numeric
@pytest.mark.parametrize("inputs", ["texts", "pairs"])
def test_reference_is_what_transformers_returns(inputs: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_model(tmp_path / "model", AUTO, num_labels=4)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given: Any = list(TEXTS) if inputs == "texts" else [[*pair] for pair in PAIRS]
    with torch.inference_mode():
        fed = tokenizer(given, padding=True, return_tensors="pt")
        wanted = AutoModelForSequenceClassification.from_pretrained(folder)(**fed).logits.numpy()
    pipeline = Runner(store=tmp_path / "store").pipeline(classifier(folder, inputs={inputs: given}))
    close(pipeline.reference()["logits"], wanted, rtol=5e-6, atol=5e-6)
    names = [spec.name for spec in pipeline.graph().inputs]
    assert names == ["input_ids", "attention_mask", *(["token_type_ids"] if inputs == "pairs" else [])]


@pytest.mark.parametrize("kind", ["roberta", "llama", "qwen3"])
def test_random_models_pass_on_every_runtime(kind: str, tmp_path: Path) -> None:
    options = {"seq_len": [48, 64]}
    case = qv.Case(
        name="x", model="sequence-classification", source=f"random:{kind}", options=options, exporter="torchscript",
        config={"num_labels": 3}, tolerance="table",
    )  # fmt: skip
    report = qv.validate(case, runtimes=["torch", "ort", "sim"], store=tmp_path)
    assert [(result.status, result.reason) for result in report.results] == [("pass", "")] * 3


def test_model_in_memory_is_judged_and_left_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    given = AutoModelForSequenceClassification.from_pretrained(
        save_model(tmp_path / "model", AUTO, num_labels=2)
    ).half()
    case = classifier(tmp_path, tolerance="table")
    report = qv.validate(case, runtimes=["torch"], model=given, store=tmp_path / "store")
    assert report.results[0].status == "pass", report.results[0].reason
    assert next(given.parameters()).dtype == torch.float16


def test_model_without_logits_is_an_error(tmp_path: Path) -> None:
    from transformers import AutoModel

    body = AutoModel.from_pretrained(save_model(tmp_path / "model", "AutoModel"))
    made = model(classifier(tmp_path), given=body)
    with pytest.raises(ConfigError, match="BertModel returns no logits but last_hidden_state"):
        made.reference(made.rows(), dtype="float32")


def test_unknown_family_of_classifiers_is_an_error() -> None:
    made = model(qv.Case(name="x", model="sequence-classification", source="random:t5_gemma2_text"))
    with pytest.raises(ConfigError):
        made.reference(made.rows(), dtype="float32")


def test_text_longer_than_every_bucket_is_an_error_unless_it_is_to_be_cut(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", AUTO)
    save_tokenizer(folder)
    texts = {"texts": ["red " * 80, "green", "blue"]}
    options = {"seq_len": [16]}
    case = classifier(folder, inputs=texts).model_copy(update={"options": options})
    with pytest.raises(ConfigError, match="1 of 3 texts are longer than the greatest seq_len 16; text 0 has 82 tokens"):
        model(case).rows()
    rows = model(case.model_copy(update={"options": {**options, "truncate": True}})).rows()
    assert [row.size for row in rows.ids] == [16, 3, 3]
    assert rows.ids[0][-1] == 3, "the closing [SEP] stays"
    assert "1 of 3 texts were cut to 16 tokens (truncate: true)" in rows.notes
