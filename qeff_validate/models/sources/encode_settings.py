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

from qeff_validate.comparison.similarity import SIMILARITIES
from qeff_validate.errors import ConfigError, suggest
from qeff_validate.models.sources.checkpoint import read_object
from qeff_validate.models.sources.sentence_directory import VECTOR, first_module, module_list, transformer_config

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
class ChatFormat:
    """Texts are messages of a user, in the chat template of the tokenizer; a prompt is the message of the system.

    Attributes:
        structured: the content of a message is a list of parts with types, not a text.
        options: of applying the template.
    """

    structured: bool
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How texts become tokens, and how long the vectors are.

    Attributes:
        prompts: texts that are put before a text, by name.
        default_prompt: the prompt that is used where none is asked for.
        truncate_dim: number of elements that are kept in the end; None: all.
        max_seq_length: greatest number of tokens, special ones included; None: the tokenizer's limit.
        max_length: the same for the call of the tokenizer, which takes its place.
        truncate: texts are cut at that length.
        lower_case: texts are lowercased.
        tokenizer: options of loading the tokenizer.
        config: overrides of the model's config.
        chat: how texts become messages; None: they are texts.
        dtype: that the model is loaded in; None: that of its weights.
        similarity: how vectors are compared (`similarity.SIMILARITIES`); None: as is usual for the kind.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    truncate_dim: int | None = None
    max_seq_length: int | None = None
    max_length: int | None = None
    truncate: bool = True
    lower_case: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    chat: ChatFormat | None = None
    dtype: str | None = None
    similarity: str | None = None


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
        if any(kind == "SparseAutoEncoder" for kind, _ in module_list(folder, route)):
            remedy = (
                "its SparseAutoEncoder keeps the strongest numbers of a dense vector, which no model kind validates"
            )
        raise ConfigError(f"{path}: transformer_task is {saved!r}, and this kind of model needs {task!r}: {remedy}")
    options = {**(config.get("model_args") or {}), **(config.get("model_kwargs") or {})}
    if not options.keys() <= HARMLESS:
        unknown = ", ".join(sorted(options.keys() - HARMLESS))
        raise ConfigError(f"{path}: options of loading the model that are not supported: {unknown}")
    _check_output(config, task, path)
    processing = _processing(config, path)
    return EncodeSettings(
        prompts=prompts,
        default_prompt="" if default is None else prompts[default],
        truncate_dim=positive_count(settings, "truncate_dim", folder / SETTINGS),
        max_seq_length=positive_count(config, "max_seq_length", path),
        max_length=positive_count(processing.get("text") or {}, "max_length", path),
        truncate=(processing.get("text") or {}).get("truncation", True) in (True, "longest_first", "only_first"),
        lower_case=bool(config.get("do_lower_case")),
        tokenizer=_options(config, "tokenizer_args", "processor_kwargs"),
        config=_options(config, "config_args", "config_kwargs"),
        chat=_chat(config, processing, path),
        dtype=options.get("dtype", options.get("torch_dtype")),
        similarity=_similarity(settings, folder / SETTINGS),
    )


OUTPUTS: Mapping[str, str] = {
    "feature-extraction": "last_hidden_state",
    "fill-mask": "logits",
    "sequence-classification": "logits",
}
"""The output of the model that is read, by task."""


def _check_output(config: Mapping[str, Any], task: str, where: Path | None) -> None:
    """Refuse a module that reads another output of the model.

    Raises:
        ConfigError: it does.
    """
    text = (config.get("modality_config") or {}).get("text")
    if text is None or config.get("module_output_name") == VECTOR:  # see `text_features`
        return
    names = text.get("method_output_name")
    names = [names] if isinstance(names, str) else names
    if text.get("method") != "forward" or names != [OUTPUTS[task]]:
        raise ConfigError(
            f"{where}: the module reads {names!r} of {text.get('method')!r}; supported is {OUTPUTS[task]} of forward"
        )


MAXSIM = ("maxsim", "meanmaxsim")
"""Similarities of multi-vector directories, which that kind of model computes in any case."""

TEXT_OPTIONS = frozenset({"max_length", "pad_to_multiple_of", "padding", "padding_side", "truncation"})
"""Options of calling the tokenizer that are supported; those of padding change no row alone."""


def _processing(config: Mapping[str, Any], where: Path | None) -> Mapping[str, Any]:
    """Return the options of calling the tokenizer; raises ConfigError for those that are not supported."""
    processing = config.get("processing_kwargs") or {}
    unknown = [f"text: {name}" for name in (processing.get("text") or {}) if name not in TEXT_OPTIONS]
    unknown += [f"common: {name}" for name in (processing.get("common") or {}) if name != "return_tensors"]
    if unknown:
        raise ConfigError(f"{where}: processing_kwargs that are not supported: {', '.join(sorted(unknown))}")
    return processing


def _chat(config: Mapping[str, Any], processing: Mapping[str, Any], where: Path | None) -> ChatFormat | None:
    message = (config.get("modality_config") or {}).get("message")
    if message is None:
        return None
    form = message.get("format")
    if form not in ("flat", "structured") or message.get("method_output_name") != "last_hidden_state":
        raise ConfigError(
            f"{where}: texts become messages of a chat, as {message!r} says, which is not supported; supported is the"
            " last_hidden_state of messages whose format is flat or structured"
        )
    options = {
        name: value for name, value in (processing.get("chat_template") or {}).items() if name != "restore_suffix"
    }
    return ChatFormat(form == "structured", options)


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


def _similarity(settings: Mapping[str, Any], where: Path) -> str | None:
    name = settings.get("similarity_fn_name")
    if isinstance(name, str) and name.lower() in MAXSIM:
        return None
    if name is not None and name not in SIMILARITIES:
        raise ConfigError(f"{where}: similarity_fn_name is {name!r}; there are {', '.join(SIMILARITIES)}")
    return None if name is None else str(name)


def _options(config: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    options = {**(config.get(old) or {}), **(config.get(new) or {})}
    return {name: value for name, value in options.items() if name != "trust_remote_code"}


def positive_count(config: Mapping[str, Any], name: str, where: Path | None) -> int | None:
    """Return an entry of a file, at least 1; None if it is missing.

    Raises:
        ConfigError: it is something else.
    """
    value = config.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ConfigError(f"{where}: {name} is {value!r}, wanted a number from 1")
