# SPDX-License-Identifier: Apache-2.0
"""Settings of a directory of sentence-transformers: prompts, lengths, lower case, ``truncate_dim``.

Loads no framework.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.models.sources.checkpoint import read_object
from qeff_validate.models.sources.sentence_directory import first_module, transformer_config

SETTINGS = "config_sentence_transformers.json"

TASKS: Mapping[str, str] = {
    "feature-extraction": "embedding or multi-vector",
    "fill-mask": "sparse-embedding",
    "sequence-classification": "reranker or sequence-classification",
}
"""Model kinds that validate a directory, by the task of its Transformer module."""

HARMLESS = frozenset({"attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "torch_dtype",
                      "trust_remote_code", "use_safetensors"})  # fmt: skip
"""Options of loading a model that change no float32 result beyond rounding."""


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How texts become tokens, and how long the vectors are.

    Attributes:
        prompts: texts that are put before a text, by name.
        default_prompt: the prompt that is used where none is asked for.
        truncate_dim: number of elements that are kept in the end; None: all.
        max_seq_length: greatest number of tokens, special ones included; None: the tokenizer's limit.
        lower_case: texts are lowercased.
        tokenizer: options of loading the tokenizer.
        config: overrides of the model's config.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    truncate_dim: int | None = None
    max_seq_length: int | None = None
    lower_case: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def encode_settings(folder: Path, route: str | None = None, *, task: str = "feature-extraction") -> EncodeSettings:
    """Return the settings of a directory; defaults where there are no files.

    Args:
        folder: with ``modules.json``, or without.
        route: of a Router; None: its default.
        task: what the Transformer module must be loaded for, as its files name it.

    Raises:
        ConfigError: a file is broken, or asks for something that is not supported.
    """
    settings = read_object(folder / SETTINGS) if os.path.lexists(folder / SETTINGS) else {}
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"{folder / SETTINGS}: prompts must map names to texts, got {prompts!r}")
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise ConfigError(
            f"{folder / SETTINGS}: default_prompt_name {default!r} is none of the prompts {sorted(prompts)}"
        )
    path, config = transformer_config(first_module(folder, route)[1])
    saved = config.get("transformer_task", task)
    if saved != task:
        remedy = f"say model: {TASKS[saved]}" if saved in TASKS else "no model kind validates it"
        raise ConfigError(f"{path}: transformer_task is {saved!r}, and this kind of model needs {task!r}: {remedy}")
    options = {**(config.get("model_args") or {}), **(config.get("model_kwargs") or {})}
    if not options.keys() <= HARMLESS:
        unknown = ", ".join(sorted(options.keys() - HARMLESS))
        raise ConfigError(f"{path}: options of loading the model that are not supported: {unknown}")
    return EncodeSettings(
        prompts=prompts,
        default_prompt="" if default is None else prompts[default],
        truncate_dim=_count(settings, "truncate_dim", folder / SETTINGS),
        max_seq_length=_count(config, "max_seq_length", path),
        lower_case=bool(config.get("do_lower_case")),
        tokenizer=_options(config, "tokenizer_args", "processor_kwargs"),
        config=_options(config, "config_args", "config_kwargs"),
    )


def resolve_prompt(prompt: str | None, settings: EncodeSettings) -> str:
    """Return the text of a prompt: the default, one by its name, or the text itself.

    Raises:
        ConfigError: the directory names prompts, and a single word is none of them.
    """
    if prompt is None:
        return settings.default_prompt
    if prompt in settings.prompts:
        return settings.prompts[prompt]
    if settings.prompts and prompt.isidentifier():
        raise ConfigError(
            f"no prompt is called {prompt!r}.{suggest(prompt, settings.prompts)} The directory has"
            f" {', '.join(sorted(settings.prompts))}; a text of your own ends with a space or a colon"
        )
    return prompt


def _options(config: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    options = {**(config.get(old) or {}), **(config.get(new) or {})}
    return {name: value for name, value in options.items() if name != "trust_remote_code"}


def _count(config: Mapping[str, Any], name: str, where: Path | None) -> int | None:
    value = config.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ConfigError(f"{where}: {name} is {value!r}, wanted a number from 1")
