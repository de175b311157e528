# SPDX-License-Identifier: Apache-2.0
"""Loads models from a single GGUF file. Frameworks are imported inside the functions that need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_file
from qeff_validate.errors import ConfigError, Unavailable, missing_package
from qeff_validate.memory import release_memory
from qeff_validate.models.framework_calls import (
    quiet_transformers,
    replaced,
    translated_errors,
    versions,
    without_cache,
)
from qeff_validate.models.sources.checkpoint import MOST_VOCABULARY, checked, digests
from qeff_validate.models.sources.tokenizers import Tokenize, tokenize_with

LARGE = 1 << 25
"""Bytes of a file above which its weights are kept in mapped files; with 4 bits each they take 256 MiB in float32."""

BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""Optional files in the same directory that transformers also reads: of a tokenizer, of generation."""


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within this context transformers parses a GGUF file once, and makes its table of tensor names once.

    For a model it reads the file for the config and again for the weights, and makes the table for each submodule:
    SmolLM2-135M took 11.5 s of processor time, and takes 2.6 s. The parsed file holds an array for each token, so
    nothing keeps it afterwards.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _get(self, *args: Any, **options: Any) -> Any:
            if isinstance(self.data, np.memmap):
                # a slice of a memmap costs four times one of an array
                self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
            return super()._get(*args, **options)

    with (
        replaced(gguf, "GGUFReader", cache(Reader)),
        replaced(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield


@contextmanager
def copied_to_files() -> Iterator[None]:
    """Within this context transformers writes the weights that it makes of a GGUF file to mapped files (`scratch`).

    It holds them all at once. A version that copies them in another way than this knows has them in memory.
    """
    import numpy as np
    import torch
    from transformers import modeling_gguf_pytorch_utils as reader

    from qeff_validate.models.scratch import scratch_tensor

    class Numpy:
        """numpy, with copies in files."""

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        @staticmethod
        def copy(array: Any) -> Any:
            target = scratch_tensor(array.shape, torch.from_numpy(np.empty(0, array.dtype)).dtype).numpy()
            target[...] = array
            return target

    with replaced(reader, "np", Numpy()):
        yield


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file with config, weights and tokenizer; quantized weights are converted to float32."""

    path: Path

    def body_key(self) -> Mapping[str, Any]:
        """Return the digests of the file and of configs beside it, and the versions of the packages that read it."""
        folder = self.path.parent
        beside = {path for pattern in BESIDE for path in folder.glob(pattern)}
        files = digests(checked(beside, most_bytes=MOST_VOCABULARY), folder)
        return {
            "file": digest_file(self.path),
            **({"beside": files} if files else {}),
            **versions("transformers", "gguf"),
        }

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return `body_key` and the version of tokenizers."""
        return {**self.body_key(), **versions("tokenizers")}

    def tables(self) -> Mapping[str, int]:
        """Return an empty mapping: the file has other tensor names."""
        return {}

    def body(self) -> Any:
        """Load the body."""
        from transformers import AutoModel

        return without_cache(self._load(AutoModel))

    def causal_lm(self) -> Any:
        """Load the causal LM."""
        from transformers import AutoModelForCausalLM

        return self._load(AutoModelForCausalLM).eval()

    def with_head(self, auto: str) -> Any:
        """Refuse: a GGUF file holds a body or a causal LM.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.path} is a GGUF file, which holds no head of {auto}: name a directory of safetensors")

    def model_config(self) -> Any:
        """Return the config that transformers makes of the file."""
        return self.body().config

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Load the tokenizer."""
        return tokenize_with(self.pretrained_tokenizer())

    def pretrained_tokenizer(self) -> Any:
        """Load the transformers tokenizer."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    @contextmanager
    def _whole_file(self) -> Iterator[None]:
        """Say of an error that the file cannot be parsed at all; it is parsed again only then.

        Raises:
            Unavailable: it cannot.
        """
        try:
            yield
        except Exception as exc:
            from gguf import GGUFReader

            try:
                GGUFReader(self.path)
            except Exception:
                raise Unavailable(f"cannot load {self.path}: it is cut short, damaged, or no GGUF file") from exc
            raise

    def _load(self, auto: Any) -> Any:
        import torch

        if versions("gguf")["gguf"] is None:
            raise missing_package("gguf")
        options = {} if auto.__name__ == "AutoTokenizer" else {"dtype": torch.float32}
        # transformers has no option to switch its progress bar off
        in_files = copied_to_files() if self.path.stat().st_size > LARGE else nullcontext()
        with (
            translated_errors(f"load {self.path}"),
            self._whole_file(),
            quiet_transformers(),
            redirect_stderr(StringIO()),
            parsed_once(),
            in_files,
        ):
            loaded = auto.from_pretrained(
                self.path.parent,
                gguf_file=self.path.name,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        release_memory()  # the parsed file, which refers to itself
        return loaded
