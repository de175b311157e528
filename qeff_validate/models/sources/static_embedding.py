# SPDX-License-Identifier: Apache-2.0
"""A table of token vectors without a transformer: the StaticEmbedding module of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import translated_errors, versions
from qeff_validate.models.sources.checkpoint import (
    SENTENCE_TRANSFORMERS,
    SINGLE,
    checked,
    digests,
    half_precision,
    tensors,
)
from qeff_validate.models.sources.encode_settings import EncodeSettings, encode_settings
from qeff_validate.models.sources.tokenizers import Tokenize

TOKENIZER = "tokenizer.json"

MODEL2VEC = "embeddings"
"""Name of the table in files of model2vec, which may hold the row of each token (``mapping``) and its ``weights``."""

TABLES = ("embedding.weight", MODEL2VEC)
"""Names of the table; the first is sentence-transformers' own."""


@dataclass(frozen=True)
class StaticFolder:
    """A directory with a table of token vectors.

    Attributes:
        path: the directory of the StaticEmbedding module.
        root: the directory with ``modules.json``.
        route: of a Router that the module is part of; None: its default.
    """

    kind: ClassVar[str] = "StaticEmbedding"
    """The module."""
    table_names: ClassVar[tuple[str, ...]] = TABLES
    """Names of the table in the file; the first that is there is taken."""

    path: Path
    root: Path
    route: str | None = None

    @cached_property
    def settings(self) -> EncodeSettings:
        """What the files say of texts and vectors."""
        return encode_settings(self.root, self.route)

    def body_key(self) -> Mapping[str, Any]:
        """Return digests of the table and of the files of sentence-transformers."""
        files = [path for path in self.root.rglob("*") if path.suffix in (".json", ".safetensors") and path.is_file()]
        return {"files": digests(checked(files), self.root), "route": self.route, **versions("torch")}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return digests of the tokenizer and of the settings."""
        files = checked([self.path / TOKENIZER, *self._settings_files()])
        return {"files": digests(files, self.root), **versions("tokenizers")}

    def _settings_files(self) -> list[Path]:
        return [self.root / name for name in SENTENCE_TRANSFORMERS if (self.root / name).is_file()]

    def tables(self) -> Mapping[str, int]:
        """Return the number of tokens in the table."""
        return {"tokens": self._table()[1]}

    def body(self) -> Any:
        """Return a torch module ``input_ids, attention_mask → (hidden_states,)`` that looks tokens up."""
        import torch
        from safetensors.torch import load_file

        name = self._table()[0]
        with translated_errors(f"load the table in {self.path}"):
            stored = load_file(self.path / SINGLE)
            weight = stored[name].float()
            if name == MODEL2VEC and "mapping" in stored:
                weight = weight[stored["mapping"].long()]
            if name == MODEL2VEC and "weights" in stored:
                weight = weight * stored["weights"].float()[:, None]

        class TokenTable(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = torch.nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:  # noqa: ARG002
                return (self.embedding(input_ids),)

        return TokenTable().eval()

    def computes_in(self) -> str:
        """Return the dtype that sentence-transformers looks vectors up in."""
        return half_precision([tensors(checked([self.path / SINGLE]))[self._table()[0]].dtype])

    def causal_lm(self) -> Any:
        """Refuse: a table generates no text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.root} holds a {self.kind}, and that generates no text: say model: embedding")

    def with_head(self, auto: str) -> Any:  # noqa: ARG002
        """Refuse: a table has no head.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.root} holds a {self.kind}, which has no head: say model: embedding")

    def model_config(self) -> Any:
        """Refuse: there is no transformers config; raises like `with_head`."""
        return self.with_head("")

    def pretrained_tokenizer(self) -> None:
        """Return None: the tokenizer is none of transformers."""

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the tokenizer, without special tokens, and 0 for padding."""
        from tokenizers import Tokenizer

        with translated_errors(f"load the tokenizer in {self.path}"):
            tokenizer = Tokenizer.from_file(str(self.path / TOKENIZER))
        tokenizer.no_padding()

        def tokenize(text: str, most: int | None = None, /) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return ids[:most]

        return tokenize, 0

    def text_limit(self) -> int | None:
        """Return the number of tokens that texts are cut at; None: texts of any length are averaged."""
        return None

    def _table(self) -> tuple[str, int]:
        """Return the table's name in the file and its number of rows."""
        stored = tensors(checked([self.path / SINGLE]))
        name = next((name for name in self.table_names if name in stored), None)
        if name is None or len(stored[name].shape) != 2:
            raise ConfigError(f"{self.path / SINGLE} holds no table of token vectors ({' or '.join(self.table_names)})")
        rows = stored["mapping"].shape if name == MODEL2VEC and "mapping" in stored else stored[name].shape
        return name, rows[0]
