# SPDX-License-Identifier: Apache-2.0
"""What sentence-transformers' ``encode`` returns for a directory, and the reference that the library records for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bounds import within

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.protocols import runtime

WIDTH = 32
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "query",
    ":",
    "red",
    "Red",
    "green",
    "Green",
    "blue",
    "one",
    "two",
    "three",
]
TEXTS = ["red", "Green green BLUE one", "one two three red green blue one two three red green blue one two", "", "Red"]
LIMIT = 5e-6
"""Relative L2 between two float32 implementations of one model."""


def save_bert(folder: Path) -> None:
    """Save a small BERT over `WORDS`, the same each time."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def encoded(folder: Path, texts: list[str], **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=1, **options)


def reference(
    folder: Path, tmp_path: Path, texts: list[str] = TEXTS, runtimes: Sequence[str] = ("torch",), **options: Any
) -> Any:
    """Return the recorded reference, with which the runtimes agree."""
    case = qv.Case(
        name="saved", source=f"path:{folder}", inputs={"texts": texts}, tolerance="table", exporter="torchscript",
        options={"seq_len": [8, 32], **options},
    )  # fmt: skip
    pipeline = Runner(store=tmp_path / "store").pipeline(case)
    for name in runtimes:
        result = pipeline.result(runtime(name))
        assert result.status == "pass", f"{name}: {result.reason}"
    return pipeline.reference()["output"][: len(texts)]


def assert_near(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    errors = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    within(errors, LIMIT)
