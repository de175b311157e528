# SPDX-License-Identifier: Apache-2.0
"""Bodies of transformers whose vectors need care: attention that changes, padding that is read, encoders of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from bounds import close, within
from encode_oracle import TEXTS, WIDTH, WORDS, assert_near, encoded

import qeff_validate as qv
from qeff_validate.config.case import Precision
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError, UnstableReferenceError
from qeff_validate.models.embedding.vector_head import VectorHead, emulated_head

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": len(WORDS), "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "init_std": 0.2,
}  # fmt: skip


def saved(folder: Path, body: Path, model: Any) -> Path:
    """Write a directory of sentence-transformers with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model.save_pretrained(folder.parent / "body")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(folder.parent / "body")
    modules = [Transformer(str(folder.parent / "body")), Pooling(WIDTH, "mean")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def case(folder: Path, texts: list[str] = TEXTS, **keys: Any) -> qv.Case:
    return qv.Case(name="x", source=f"path:{folder}", inputs={"texts": texts}, exporter="torchscript", **keys)


def vectors(case: qv.Case, store: Path) -> Any:
    return Runner(store=store).pipeline(case).reference()["output"][: len(case.inputs.texts or ())]


@pytest.mark.numeric
def test_sparse_attention_of_bigbird_is_full_for_short_texts_and_refused_for_long_ones(
    body: Path, tmp_path: Path
) -> None:
    config = transformers.BigBirdConfig(**SIZES, block_size=4, num_random_blocks=1)
    folder = saved(tmp_path / "saved", body, transformers.BigBirdModel(config))
    report = qv.validate(case(folder, tolerance="table"), runtimes=["torch", "ort"], store=tmp_path / "store")
    assert [result.status for result in report.results] == ["pass", "pass"]
    assert_near(vectors(case(folder), tmp_path / "store"), encoded(folder, TEXTS))
    texts = [*TEXTS, "one two three " * 10]
    with pytest.raises(UnstableReferenceError, match="attends to blocks of tokens beyond 28 tokens, and to all"):
        vectors(case(folder, texts), tmp_path / "store")


def test_body_that_reads_padding_is_refused_by_observation(body: Path, tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    transformers.FNetModel(transformers.FNetConfig(**sizes)).save_pretrained(tmp_path / "fnet")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(tmp_path / "fnet")
    (result,) = qv.validate(case(tmp_path / "fnet"), runtimes=["torch"], store=tmp_path / "store").results
    assert (result.status, "depends on the padding behind a text" in result.reason) == ("inconclusive", True)


def test_body_that_splits_texts_into_windows_is_refused(body: Path, tmp_path: Path) -> None:
    config = transformers.LongformerConfig(**SIZES, attention_window=8)
    transformers.LongformerModel(config).save_pretrained(tmp_path / "longformer")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(tmp_path / "longformer")
    (result,) = qv.validate(case(tmp_path / "longformer"), runtimes=["ort"], store=tmp_path / "store").results
    assert (result.status, "LongformerModel splits a text into windows" in result.reason) == ("error", True)


def test_body_with_fewer_vectors_than_tokens_is_refused(body: Path, tmp_path: Path) -> None:
    config = transformers.FunnelConfig(vocab_size=len(WORDS), block_sizes=[1, 1], d_model=WIDTH, n_head=4, d_head=8)
    transformers.FunnelBaseModel(config).save_pretrained(tmp_path / "funnel")
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(tmp_path / "funnel")
    texts = ["one two three red green", "green blue one two three red", "red red one two three"]
    model = qv.model(case(tmp_path / "funnel", texts))
    with pytest.raises(ConfigError, match="FunnelBaseModel returns 4 vectors for 7 tokens"):
        model.reference(model.inputs(model.tokenize()), dtype="float32")


@pytest.mark.numeric
def test_encoder_alone_of_an_encoder_decoder(body: Path, tmp_path: Path) -> None:
    from transformers.models.pegasus.modeling_pegasus import PegasusEncoder

    encoder = PegasusEncoder(transformers.PegasusConfig(**ENCODER_DECODER))
    folder = saved(tmp_path / "saved", body, encoder)
    assert_near(vectors(case(folder), tmp_path / "store"), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_normalization_in_half_precision_moves_whole_vectors() -> None:
    """Rounding of the length is one factor for all elements, which rounding of the result alone would not show."""
    rows = np.random.default_rng(0).normal(size=(40, 32))
    head = VectorHead([], None, normalize=True).eval()
    runs = emulated_head(head, [rows] * 8, Precision(compute="fp16"))
    lengths = np.abs([np.linalg.norm(vectors, axis=1) - 1 for vectors in runs])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rounded = np.linalg.norm(unit.astype(np.float16).astype(np.float64), axis=1)
    assert lengths.max() > 3 * np.abs(rounded - 1).max()
    within(lengths, 8e-3)
    exact = emulated_head(head, [rows] * 8, Precision(compute="fp32"))
    close(exact, [unit] * 8, atol=2e-6)
