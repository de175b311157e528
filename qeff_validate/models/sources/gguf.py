# SPDX-License-Identifier: Apache-2.0
"""Models that come as one GGUF file. Frameworks are imported inside the functions that need them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_file
from qeff_validate.errors import Unavailable
from qeff_validate.models.framework_calls import quiet_transformers, translated_errors, versions, without_cache
from qeff_validate.models.sources.checkpoint import MOST_VOCABULARY, checked, digests
from qeff_validate.models.sources.tokenizers import Tokenize, tokenize_with

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""Files in the same directory that transformers reads too, where there are some: a tokenizer's, generation's."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file, which holds config, weights and tokenizer; quantized weights are made float32."""

    path: Path

    def body_key(self) -> Mapping[str, Any]:
        """Return the digest of the file and of configs beside it; what is made of it depends on who reads it."""
        folder = self.path.parent
        beside = {path for pattern in BESIDE for path in folder.glob(pattern)}
        files = digests(checked(beside, most_bytes=MOST_VOCABULARY), folder)
        return {
            "file": digest_file(self.path),
            **({"beside": files} if files else {}),
            **versions("transformers", "gguf"),
        }

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return the same with the version of the tokenizers."""
        return {**self.body_key(), **versions("tokenizers")}

    def tables(self) -> Mapping[str, int]:
        """Return none: the file has other names."""
        return {}

    def body(self) -> Any:
        """Load the body."""
        from transformers import AutoModel

        return without_cache(self._load(AutoModel))

    def causal_lm(self) -> Any:
        """Load the causal LM."""
        from transformers import AutoModelForCausalLM

        return self._load(AutoModelForCausalLM).eval()

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Load the tokenizer."""
        return tokenize_with(self.pretrained_tokenizer())

    def pretrained_tokenizer(self) -> Any:
        """Load the transformers tokenizer."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    def _load(self, auto: Any) -> Any:
        import torch

        if versions("gguf")["gguf"] is None:
            raise Unavailable(f"{self.path.name} is read by the Python package gguf: pip install gguf")
        more = {} if auto.__name__ == "AutoTokenizer" else {"dtype": torch.float32}
        # its progress bar is none of those that transformers lets one switch off
        with translated_errors(f"load {self.path}"), quiet_transformers(), redirect_stderr(StringIO()):
            return auto.from_pretrained(
                self.path.parent,
                gguf_file=self.path.name,
                trust_remote_code=False,
                local_files_only=True,
                **more,
            )
