# SPDX-License-Identifier: Apache-2.0
"""A table of word vectors: the WordEmbeddings module of sentence-transformers, with the tokenizer that it names."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from qeff_validate.errors import ConfigError
from qeff_validate.files import MOST_CONFIG
from qeff_validate.models.framework_calls import translated_errors, versions
from qeff_validate.models.sources.checkpoint import (
    MOST_VOCABULARY,
    checked,
    digests,
    read_object,
    tokenizer_files,
)
from qeff_validate.models.sources.static_embedding import StaticFolder
from qeff_validate.models.sources.tokenizers import Tokenize

CONFIG, WHITESPACE = "wordembedding_config.json", "whitespacetokenizer_config.json"


@dataclass(frozen=True)
class WordFolder(StaticFolder):
    """A directory with a table of word vectors."""

    kind: ClassVar[str] = "WordEmbeddings"
    table_names: ClassVar[tuple[str, ...]] = ("emb_layer.weight",)

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return digests of the tokenizer and of the settings."""
        files = checked({*tokenizer_files(self.path), *self._settings_files()})
        return {"files": digests(files, self.root), **versions("transformers", "tokenizers")}

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_object(self.path / CONFIG, most_bytes=MOST_CONFIG)

    def computes_in(self) -> str:
        """Return float32: sentence-transformers copies the table into one of that."""
        return "float32"

    def text_limit(self) -> int | None:
        """Return the number of tokens that texts are cut at."""
        limit = self._config.get("max_seq_length", 1000000)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"{self.path / CONFIG}: max_seq_length is {limit!r}, wanted a number from 1")
        return limit

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the tokenizer, and 0 for padding.

        Raises:
            ConfigError: the tokenizer's class is not supported, or its file is broken.
        """
        name = str(self._config.get("tokenizer_class", "")).rpartition(".")[2]
        readers = {"WhitespaceTokenizer": self._whitespace, "TransformersTokenizerWrapper": self._pretrained}
        if name not in readers:
            why = ": it needs the package nltk and its data" if name == "PhraseTokenizer" else ""
            raise ConfigError(
                f"{self.path / CONFIG} names the tokenizer {name or 'none'}, which is not supported{why}; supported are"
                f" {' and '.join(readers)}"
            )
        return readers[name](), 0

    def _pretrained(self) -> Tokenize:
        from transformers import AutoTokenizer

        with translated_errors(f"load the tokenizer in {self.path}"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)

        def tokenize(text: str, most: int | None = None, /) -> list[int]:
            with translated_errors(f"tokenize {text[:40]!r}"):
                return list(tokenizer(text, verbose=False)["input_ids"])[:most]

        return tokenize

    def _whitespace(self) -> Tokenize:
        path = self.path / WHITESPACE
        config = read_object(path, most_bytes=MOST_VOCABULARY)
        words, stop_words = config.get("vocab"), config.get("stop_words", [])
        if not isinstance(words, list) or not isinstance(stop_words, list):
            raise ConfigError(f"{path} holds no lists vocab and stop_words")
        return whitespace_tokenizer(words, stop_words, lower_case=bool(config.get("do_lower_case")))


def whitespace_tokenizer(words: Sequence[str], stop_words: Iterable[str] = (), *, lower_case: bool = False) -> Tokenize:
    """Return a tokenizer that splits at white space and leaves out stop words and words that it does not know.

    Args:
        words: in the order of their ids.
        stop_words: words that have no id in a text.
        lower_case: texts are read in small letters.
    """
    ids, ignored = {word: number for number, word in enumerate(words)}, frozenset(stop_words)

    def tokenize(text: str, most: int | None = None, /) -> list[int]:
        pieces = (text.lower() if lower_case else text).split()
        return [number for piece in pieces for number in _found(piece, ids, ignored)][:most]

    return tokenize


def _found(piece: str, ids: Mapping[str, int], ignored: frozenset[str]) -> Iterator[int]:
    """Yield the id of a word as it stands, else without punctuation, else in small letters; nothing for a stop word."""
    stripped = piece.strip(string.punctuation)
    for form in filter(None, (piece, stripped, stripped.lower())):
        if form in ignored:
            return
        if form in ids:
            yield ids[form]
            return
