# SPDX-License-Identifier: Apache-2.0
"""Pooling, truncation and normalization on top of a body; ``pooling: auto`` reads sentence-transformers files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_file
from qeff_validate.errors import ConfigError
from qeff_validate.models.embedding.options import POOLINGS, EmbeddingOptions
from qeff_validate.models.module_search import find_module
from qeff_validate.models.sources.checkpoint import modules, read_object
from qeff_validate.models.sources.tokenizers import tokenizer_length

MODES: Mapping[str, str] = {
    "cls": "cls",
    "lasttoken": "last",
    "max": "max",
    "mean": "mean",
    "weightedmean": "weighted_mean",
}
"""Pooling modes of sentence-transformers, and their names here."""

OLD_KEYS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """The pooling of an embedding model and what follows it.

    Attributes:
        pooling: a name in `POOLINGS`, ``package.module:function``, or a callable.
        normalize: scale each vector to length 1.
        truncate_dim: length of the vectors after truncation, before normalization; None: not truncated.
    """

    pooling: Any
    normalize: bool
    truncate_dim: int | None

    @property
    def custom(self) -> bool:
        """True if the pooling is a user's function."""
        return not isinstance(self.pooling, str) or self.pooling not in POOLINGS

    def key(self) -> Mapping[str, Any]:
        """Return plain data that identifies the computation, for fingerprints."""
        name = self.pooling if isinstance(self.pooling, str) else f"{self.pooling.__module__}:{_name(self.pooling)}"
        code = _source_digest(self.pooling) if self.custom else None
        return {"pooling": name, "code": code, "normalize": self.normalize, "truncate_dim": self.truncate_dim}


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


def resolve_pooling_config(options: EmbeddingOptions, folder: Path | None) -> PoolingConfig:
    """Return the pooling config of the options; ``pooling: auto`` reads ``modules.json`` beside the weights.

    Args:
        options: the case's options.
        folder: the model's directory; None if it has none.

    Raises:
        ConfigError: ``auto``, and the files are missing or name a module that the wrapper does not support.
    """
    if options.pooling != "auto":
        return PoolingConfig(options.pooling, bool(options.normalize), options.truncate_dim)
    if folder is None or not (folder / "modules.json").is_file():
        raise ConfigError(f"pooling: auto needs a modules.json of sentence-transformers in {folder or 'a directory'}")
    pooling, normalize = "", False
    for name, path in modules(folder):
        kind = name.rpartition(".")[2]
        if kind == "Pooling":
            pooling = _mode(read_object(path / "config.json"), folder)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ConfigError(f"pooling: auto: {folder}/modules.json has a {kind} module, which the wrapper lacks")
    if not pooling:
        raise ConfigError(f"pooling: auto: {folder}/modules.json names no Pooling module")
    return PoolingConfig(pooling, normalize if options.normalize is None else options.normalize, options.truncate_dim)


def published(folder: Path | None) -> dict[str, Any]:
    """Return the settings in a model's directory that a case may override, without missing and invalid ones.

    Returns:
        ``pooling``, ``normalize`` and ``max_seq_length`` of sentence-transformers, ``model_max_length`` of the
        tokenizer.
    """
    settings = tokenizer_length(folder)
    with suppress(ConfigError):
        if folder is not None and (folder / "modules.json").is_file():
            config = resolve_pooling_config(EmbeddingOptions(pooling="auto"), folder)
            settings |= {"pooling": config.pooling, "normalize": config.normalize}
            length = read_object(folder / "sentence_bert_config.json").get("max_seq_length")
            settings |= {"max_seq_length": length} if isinstance(length, int) else {}
    return settings


def _mode(config: Mapping[str, Any], folder: Path) -> str:
    modes = config.get("pooling_mode") or [mode for key, mode in OLD_KEYS.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in MODES:
        raise ConfigError(f"pooling: auto: {folder} pools with {modes}, known are {sorted(MODES)}, one at a time")
    if config.get("include_prompt") is False:
        raise ConfigError(f"pooling: auto: {folder} leaves the prompt out of pooling, which the wrapper does not")
    return MODES[modes[0]]
