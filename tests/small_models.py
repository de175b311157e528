# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints with heads, and their tokenizer, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qeff_validate.models.corpus import PAIRS, TEXTS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CORPUS = sorted({word for pair in PAIRS for text in pair for word in text.split()} | set(TEXTS[4].split()))
WORDS = [*SPECIAL, *["red", "green", "blue", "one", "two", "three", ".", ",", ":"], *CORPUS]
"""The vocabulary: whole words."""


def save_tokenizer(folder: Path, *, types: bool = True, length: int = 96) -> None:
    """Save a tokenizer of whole words that tells the texts of a pair apart by token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=length, model_input_names=names,
    ).save_pretrained(folder)  # fmt: skip


def save_model(folder: Path, auto: str, *, model_type: str = "bert", **config: Any) -> Path:
    """Save a small model of an Auto class of transformers with weights that tell texts apart; return its folder."""
    import torch
    import transformers

    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    settings = {"vocab_size": len(WORDS), "max_position_embeddings": 96, "initializer_range": 0.2, "pad_token_id": 0}
    made = transformers.AutoConfig.for_model(model_type, **{**settings, **sizes, **config})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(made)
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.data.normal_(std=0.1)
        model.save_pretrained(folder)
    return folder
