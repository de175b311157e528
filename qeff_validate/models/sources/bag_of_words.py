# SPDX-License-Identifier: Apache-2.0
"""Counts of a text's words, weighted: the BoW module of sentence-transformers, which has no weights file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from qeff_validate.errors import ConfigError
from qeff_validate.models.sources.checkpoint import CONFIG, MOST_VOCABULARY, checked, digests, read_object
from qeff_validate.models.sources.static_embedding import StaticFolder
from qeff_validate.models.sources.tokenizers import Tokenize
from qeff_validate.models.sources.word_embeddings import whitespace_tokenizer


@dataclass(frozen=True)
class BagOfWordsFolder(StaticFolder):
    """A directory with a vocabulary and a weight for each of its words.

    sentence-transformers counts words as it reads a text. Here ids of words are the graph's inputs, and it counts them:
    the vectors of tokens are such that their mean is the vector of the text.
    """

    kind: ClassVar[str] = "BoW"

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return a digest of the vocabulary and of the settings."""
        return {"files": digests(checked([self._config_file, *self._settings_files()]), self.root)}

    def tables(self) -> Mapping[str, int]:
        """Return the number of words."""
        return {"tokens": len(self._words)}

    def computes_in(self) -> str:
        """Return float32: sentence-transformers counts in that."""
        return "float32"

    def body(self) -> Any:
        """Return a torch module ``input_ids, attention_mask → (hidden_states,)`` whose mean counts the words."""
        import torch

        weight = torch.tensor(self._weights())
        each = self._config.get("cumulative_term_frequency", True) is not False

        class WordCounts(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(weight)

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                words = torch.arange(self.weight.shape[0], device=input_ids.device)
                hidden = torch.where(input_ids[..., None] == words, self.weight, 0.0)
                if not each:  # a word counts where it stands first
                    places = torch.arange(input_ids.shape[1], device=input_ids.device)
                    earlier = (places[:, None] > places) & (attention_mask[:, None] > 0)
                    repeated = ((input_ids[:, :, None] == input_ids[:, None]) & earlier).any(dim=-1)
                    hidden = torch.where(repeated[..., None], 0.0, hidden)
                return (hidden * attention_mask.sum(dim=1).to(hidden.dtype)[:, None, None],)

        return WordCounts().eval()

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the tokenizer, which leaves out words that the vocabulary has not, and 0 for padding."""
        return whitespace_tokenizer(self._words), 0

    @property
    def _config_file(self) -> Path:
        return self.path / CONFIG

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_object(self._config_file, most_bytes=MOST_VOCABULARY)

    @cached_property
    def _words(self) -> list[str]:
        words = self._config.get("vocab")
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{self._config_file}: vocab is no list of words")
        return list(dict.fromkeys(words))

    def _weights(self) -> list[float]:
        """Return the weight of each word: its own, that of its small letters, or that of words without one."""
        own, unknown = self._config.get("word_weights", {}), self._config.get("unknown_word_weight", 1)
        given = [*own.values(), unknown] if isinstance(own, dict) else [None]
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in given):
            raise ConfigError(f"{self._config_file}: word_weights and unknown_word_weight hold no number for each word")
        return [float(own.get(word, own.get(word.lower(), unknown))) for word in self._words]
