# SPDX-License-Identifier: Apache-2.0
"""What a directory of ``MultiVectorEncoder`` says of tokens and their vectors. Loads no framework."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.models.sources.checkpoint import MODULES, modules, read_object
from qeff_validate.models.sources.encode_settings import SETTINGS, positive_count
from qeff_validate.models.sources.sentence_directory import TOKENS, TRANSFORMER_CONFIGS, Layer, first_module

LAYERS = ("Dense", "LayerNorm", "Normalize")
"""Modules on the vectors of tokens that are supported, beside Dropout, which has no effect."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """Queries are filled up with a token whose vectors count too.

    Attributes:
        length: to so many tokens.
        cut: longer queries are cut to that length.
        attend: the model sees these tokens.
        token: the token; None: the tokenizer's mask token, else its end token.
    """

    length: int
    cut: bool
    attend: bool
    token: str | None


@dataclass(frozen=True, slots=True)
class MultiVectorModules:
    """The modules of a directory.

    Attributes:
        layers: modules on the vectors of tokens.
        skiplist: tokens whose vectors do not count.
        skipped_in: ``query``, ``document``: texts in which they do not.
        query_length: greatest number of tokens of a query; None: that of any text.
        document_length: of a document.
        expansion: of queries; None: there is none.
    """

    layers: tuple[Layer, ...] = ()
    skiplist: tuple[str, ...] = ()
    skipped_in: tuple[str, ...] = ("document",)
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None


def read_multi_vector(root: Path) -> MultiVectorModules:
    """Return the modules of a directory.

    Raises:
        ConfigError: a file is broken, or a module or option is not supported; the message names it.
    """
    settings = read_object(root / SETTINGS) if os.path.lexists(root / SETTINGS) else {}
    entries, saved_by = modules(root), settings.get("model_type") or "SentenceTransformer"
    if saved_by == "ColBERT" or any(name.startswith("pylate.") for name, _ in entries):
        saved_by = "PyLate"
    if saved_by != "MultiVectorEncoder":
        raise ConfigError(
            f"{root}: this is a directory of {saved_by}, to which sentence-transformers' MultiVectorEncoder adds"
            " modules: load it with that, and save it again"
        )
    layers: list[Layer] = []
    mask: Mapping[str, Any] = {}
    for name, path in entries[1:]:
        kind = name.rpartition(".")[2]
        config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
        if kind == "MultiVectorMask":
            mask = config
        elif kind in LAYERS and config.get("module_input_name", TOKENS) == TOKENS:
            layers.append(Layer(kind, path, config))
        elif kind != "Dropout":
            raise ConfigError(
                f"{root / MODULES} has a {kind} module ({path.name}) that is not supported; supported are"
                f" MultiVectorMask, and {', '.join(LAYERS)} on the vectors of tokens"
            )
    if mask.get("keep_only_token_ids"):
        raise ConfigError(f"{root / MODULES}: a MultiVectorMask with keep_only_token_ids is not supported")
    folder = first_module(root)[1]
    file = next((folder / name for name in TRANSFORMER_CONFIGS if os.path.lexists(folder / name)), None)
    config = {} if file is None else read_object(file)
    return MultiVectorModules(
        tuple(layers),
        _words(mask, "skiplist_words", root) or (),
        _words(mask, "skiplist_tasks", root) or ("document",),
        positive_count(config, "query_length", file),
        positive_count(config, "document_length", file),
        _expansion(config.get("query_expansion"), file),
    )


def _words(mask: Mapping[str, Any], name: str, root: Path) -> tuple[str, ...]:
    words = mask.get(name) or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{root / MODULES}: {name} of the MultiVectorMask is {words!r}, wanted a list of words")
    return tuple(words)


def _expansion(config: Any, path: Path | None) -> Expansion | None:
    if config is None:
        return None
    length = config.get("length") if isinstance(config, dict) else None
    if not isinstance(length, int) or length < 1 or config.get("strategy") not in ("fixed", "min"):
        raise ConfigError(f"{path}: query_expansion is {config!r}, wanted strategy fixed or min, and a length from 1")
    token = config.get("token")
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"{path}: the token of query_expansion is {token!r}, wanted one of the tokenizer's")
    return Expansion(length, config["strategy"] == "fixed", bool(config.get("attend")), token)
