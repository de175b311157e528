# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as functions from a text to token ids. Loads no framework."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.models.sources.checkpoint import read_object

Tokenize = Callable[[str], list[int]]
"""Turns a text into token ids, special tokens included, nothing cut."""

MOST_LENGTH = 10**9
"""transformers writes 1e30 for a tokenizer without a limit."""


def tokenize_with(tokenizer: Any) -> tuple[Tokenize, int]:
    """Wrap a transformers tokenizer; a padding id of 0 is a padding id."""
    pad = tokenizer.pad_token_id
    encode = tokenizer

    def tokenize(text: str) -> list[int]:
        with translated_errors(f"tokenize {text[:40]!r}"):
            return list(encode(text, truncation=False, verbose=False)["input_ids"])

    return tokenize, 0 if pad is None else int(pad)


def hashed_words(vocabulary: int, pad: int) -> tuple[Tokenize, int]:
    """Return a tokenizer for bodies without one: words and signs, hashed, between a first and a last token.

    Raises:
        ConfigError: the vocabulary is too small to be of use.
    """
    ids = [token for token in range(vocabulary) if token != pad]
    if len(ids) < 8:
        raise ConfigError(f"vocab_size {vocabulary} is too small: at least 9 are needed")
    first, last, words = ids[0], ids[1], ids[3:]

    def tokenize(text: str) -> list[int]:
        found: Sequence[str] = re.findall(r"\w+|[^\w\s]", text)
        return [first, *(words[zlib.crc32(word.encode()) % len(words)] for word in found), last]

    return tokenize, pad


def tokenizer_length(folder: Path | None) -> dict[str, Any]:
    """Return ``model_max_length`` of a directory's tokenizer; nothing if it has none, which is written as 1e30."""
    with suppress(ConfigError, AttributeError):
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            length = read_object(folder / "tokenizer_config.json").get("model_max_length")
            return {"model_max_length": length} if isinstance(length, int) and 0 < length < MOST_LENGTH else {}
    return {}
