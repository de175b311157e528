# SPDX-License-Identifier: Apache-2.0
"""Pooling and the modules around it; ``pooling: auto`` reads the files of sentence-transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_file
from qeff_validate.errors import ConfigError
from qeff_validate.models.embedding.options import POOLINGS, EmbeddingOptions
from qeff_validate.models.module_search import find_module
from qeff_validate.models.sources.encode_settings import encode_settings
from qeff_validate.models.sources.sentence_directory import Layer, is_sentence_directory, read_modules, weighted_kinds
from qeff_validate.models.sources.tokenizers import tokenizer_length


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """The pooling of an embedding model and what stands around it, in the order of its computation.

    Attributes:
        pooling: a name in `POOLINGS`, a tuple of names whose vectors are concatenated, ``package.module:function``, or
            a callable.
        normalize: scale each vector to length 1, in the end.
        truncate_dim: length of the vectors after truncation, before ``normalize``; None: not truncated.
        token_layers: modules on token vectors, before the pooling.
        layers: modules on vectors, after the pooling.
        prompt_tokens: number of first tokens of each row that are not pooled.
    """

    pooling: Any
    normalize: bool = False
    truncate_dim: int | None = None
    token_layers: tuple[Layer, ...] = ()
    layers: tuple[Layer, ...] = ()
    prompt_tokens: int = 0

    @property
    def poolings(self) -> tuple[Any, ...]:
        """The pooling, or those whose vectors are concatenated."""
        return self.pooling if isinstance(self.pooling, tuple) else (self.pooling,)

    @property
    def custom(self) -> bool:
        """True if the pooling is a user's function."""
        return not isinstance(self.pooling, tuple) and (
            not isinstance(self.pooling, str) or self.pooling not in POOLINGS
        )

    def key(self) -> Mapping[str, Any]:
        """Return plain data that identifies the computation, for fingerprints."""
        name = "+".join(self.pooling) if isinstance(self.pooling, tuple) else self.pooling
        name = name if isinstance(name, str) else f"{name.__module__}:{_name(name)}"
        code = _source_digest(self.pooling) if self.custom else None
        layers = [layer.key() for layer in (*self.token_layers, *self.layers)]
        around = {"layers": layers, "prompt_tokens": self.prompt_tokens} if layers or self.prompt_tokens else {}
        return {"pooling": name, "code": code, "normalize": self.normalize, "truncate_dim": self.truncate_dim, **around}


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _source_digest(pooling: Any) -> str:
    """Return what identifies a custom pooling: a digest of its file, or its source and closure variables."""
    if isinstance(pooling, str):
        spec = find_module(pooling.partition(":")[0])
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise ConfigError(f"pooling {pooling!r}: there is no such module")
        return digest_file(Path(spec.origin))
    function = pooling if inspect.isfunction(pooling) else type(pooling).__call__
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError) as exc:
        raise ConfigError(f"pooling {pooling!r} has no source to identify it by: define it in a file") from exc
    closure = inspect.getclosurevars(pooling).nonlocals if inspect.isfunction(pooling) else vars(pooling)
    return f"{text}{closure!r}"


def resolve_pooling_config(
    options: EmbeddingOptions, folder: Path | None, prompt_tokens: Callable[[], int] = lambda: 0
) -> PoolingConfig:
    """Return the pooling config of the options; ``pooling: auto`` reads ``modules.json`` beside the weights.

    Args:
        options: the case's options.
        folder: the model's directory; None if it has none.
        prompt_tokens: returns the number of tokens of the prompt, for poolings that leave it out.

    Raises:
        ConfigError: ``auto``, and the files are missing, broken or name a module that is not supported.
    """
    if not from_files(options, folder):
        return PoolingConfig(options.pooling or "mean", bool(options.normalize), options.truncate_dim)
    if folder is None or not is_sentence_directory(folder):
        raise ConfigError(f"pooling: auto needs a modules.json of sentence-transformers in {folder or 'a directory'}")
    settings, modules = encode_settings(folder, options.route), read_modules(folder, options.leave_out, options.route)
    layers, normalize = modules.layers, bool(options.normalize)
    truncate_dim = options.truncate_dim or settings.truncate_dim
    last_normalizes = bool(layers) and layers[-1].kind == "Normalize"
    if last_normalizes and (options.normalize is False or truncate_dim is None):
        # without a truncation behind it, the last module and the option are the same
        layers, normalize = layers[:-1], options.normalize is not False
    poolings = modules.poolings
    return PoolingConfig(
        poolings[0] if len(poolings) == 1 else poolings,
        normalize,
        truncate_dim,
        modules.token_layers,
        layers,
        0 if modules.include_prompt else prompt_tokens(),
    )


def from_files(options: EmbeddingOptions, folder: Path | None) -> bool:
    """Return True if the directory's files decide the pooling."""
    return options.pooling == "auto" or (options.pooling is None and is_sentence_directory(folder))


def published(folder: Path | None, options: EmbeddingOptions) -> dict[str, Any]:
    """Return the settings in a model's directory that a case may override, without missing and invalid ones.

    Returns:
        ``pooling``, ``normalize`` and ``max_seq_length`` of sentence-transformers, ``left_out``: kinds of modules that
        the case's pooling leaves out without saying so, and ``model_max_length`` of the tokenizer.
    """
    settings = tokenizer_length(folder)
    if folder is None or not is_sentence_directory(folder):
        return settings
    with suppress(ConfigError):
        if not from_files(options, folder):
            kinds = weighted_kinds(folder, options.route)
            settings["left_out"] = [kind for kind in kinds if kind not in options.leave_out]
        length = encode_settings(folder, options.route).max_seq_length
        settings |= {} if length is None else {"max_seq_length": length}
        auto = options.model_copy(update={"pooling": "auto", "normalize": None, "truncate_dim": None})
        config = resolve_pooling_config(auto, folder)
        normalizes = config.normalize or any(layer.kind == "Normalize" for layer in config.layers)
        settings |= {"pooling": config.key()["pooling"], "normalize": normalizes}
    return settings
