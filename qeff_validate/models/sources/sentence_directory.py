# SPDX-License-Identifier: Apache-2.0
"""What a directory of sentence-transformers says that ``SentenceTransformer(DIR).encode`` computes. Loads no framework.

`modules.json` lists modules: a Transformer, modules on its token vectors, one Pooling, modules on the text's vector.
Settings of the texts (prompts, greatest length, lower case) and of the result (``truncate_dim``) stand beside it.
Layouts of sentence-transformers 2 to 6 are read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.models.sources.checkpoint import MODULES, inside, modules, read_object

MODES: Mapping[str, str] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""Pooling modes of sentence-transformers, and their names here."""

OLD_MODES: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of a pooling config before version 6, in the order in which their vectors are concatenated."""

TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the Transformer module's config, in the order in which they are looked for."""

SETTINGS = "config_sentence_transformers.json"

VECTOR = "sentence_embedding"
TOKENS = "token_embeddings"
"""Names of the features that modules read and write."""

FIRST = ("Transformer", "MLMTransformer", "StaticEmbedding")
"""Modules that read tokens."""

ROUTERS = ("Router", "Asym")
"""Modules that are made of others; ``Asym`` is the name before version 5."""

SUPPORTED = (*FIRST, "Pooling", "Dense", "LayerNorm", "Normalize", "WeightedLayerPooling", "Dropout")

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
class Layer:
    """A module with weights or an effect.

    Attributes:
        kind: its class, such as ``Dense``.
        folder: its directory.
        config: the content of its config.json.
    """

    kind: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> Mapping[str, Any]:
        """Return plain data that identifies the computation; the weights are part of the body's fingerprint."""
        return {"kind": self.kind, "folder": self.folder.name, "config": dict(self.config)}


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """The modules of a directory.

    Attributes:
        token_layers: modules on the vectors of tokens, before the pooling.
        poolings: names in `options.POOLINGS`; the vectors of several are concatenated.
        include_prompt: tokens of the prompt are pooled.
        layers: modules on the vector of a text, after the pooling.
    """

    token_layers: tuple[Layer, ...]
    poolings: tuple[str, ...]
    include_prompt: bool
    layers: tuple[Layer, ...]


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


def is_sentence_directory(folder: Path | None) -> bool:
    """Return True for a directory with a ``modules.json``."""
    return folder is not None and os.path.lexists(folder / MODULES)


def module_list(folder: Path, route: str | None = None) -> list[tuple[str, Path]]:
    """Return kind and directory of each module, with those of one route in the place of a Router.

    Args:
        folder: a directory, whether or not it has a ``modules.json``.
        route: the route of a Router; None: its default.

    Raises:
        ConfigError: a file is broken, or the Router has no such route.
    """
    kinds: list[tuple[str, Path]] = []
    for name, path in modules(folder):
        kind = name.rpartition(".")[2]
        kinds += _route(path, route) if kind in ROUTERS else [(kind, path)]
    return kinds


def _route(folder: Path, route: str | None) -> list[tuple[str, Path]]:
    path = next((folder / name for name in ("router_config.json", "config.json") if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} holds no router_config.json, which says what its routes are")
    config = read_object(path)
    routes, types = config.get("structure"), config.get("types")
    if not isinstance(routes, dict) or not isinstance(types, dict):
        raise ConfigError(f"{path} names no structure and types of modules")
    chosen = route or (config.get("parameters") or {}).get("default_route")
    if chosen not in routes:
        asked = "which one is to be validated" if chosen is None else f"and none is called {chosen!r}"
        raise ConfigError(f"{path} has the routes {', '.join(sorted(routes))}, {asked}: say options: {{route: NAME}}")
    return [(str(types.get(name, "")).rpartition(".")[2], inside(folder, name, path)) for name in routes[chosen]]


def first_module(folder: Path, route: str | None = None) -> tuple[str, Path]:
    """Return kind and directory of the module that reads tokens: a Transformer or a StaticEmbedding.

    Without a ``modules.json`` the directory itself is a Transformer.

    Raises:
        ConfigError: a file is broken, or the first module is another one.
    """
    entries = module_list(folder, route)
    if not entries:
        return "Transformer", folder
    if entries[0][0] not in FIRST:
        raise ConfigError(
            f"{folder / MODULES} begins with a {entries[0][0]} module; {' and '.join(FIRST)} are supported there"
        )
    return entries[0]


def read_modules(folder: Path, leave_out: Collection[str] = (), route: str | None = None) -> SentenceModules:
    """Return the modules of a directory, without some kinds.

    Raises:
        ConfigError: a file is broken, or a module is not supported; the message names it.
    """
    before: list[Layer] = []
    after: list[Layer] = []
    poolings: tuple[str, ...] = ()
    include_prompt = True
    for kind, path in module_list(folder, route):
        if kind in leave_out:
            continue
        if kind not in SUPPORTED:
            raise ConfigError(
                f"{folder / MODULES} has a {kind} module, which is not supported; supported are {', '.join(SUPPORTED)}."
                f" Name a pooling and leave_out: [{kind}] to validate the model without it"
            )
        if kind == "StaticEmbedding":
            poolings = ("mean",)
        if kind in (*FIRST, "Dropout"):
            continue
        config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
        if kind == "Pooling":
            if poolings:
                raise ConfigError(f"{folder / MODULES} has two Pooling modules; one is supported")
            poolings, include_prompt = _poolings(config, path), config.get("include_prompt") is not False
            continue
        layer = Layer(kind, path, config)
        feature = _feature(layer)
        if feature != (VECTOR if poolings else TOKENS):
            place = "after" if poolings else "before"
            raise ConfigError(f"{path}: a {kind} module {place} the pooling that reads {feature!r} is not supported")
        (after if poolings else before).append(layer)
    if not poolings:
        raise ConfigError(f"{folder / MODULES} names no Pooling module")
    return SentenceModules(tuple(before), poolings, include_prompt, tuple(after))


def weighted_kinds(folder: Path, route: str | None = None) -> list[str]:
    """Return the kinds of modules that change a vector in more than its length, beside Transformer and Pooling.

    Raises:
        ConfigError: ``modules.json`` is broken.
    """
    plain = (*FIRST, "Pooling", "Normalize", "Dropout")
    return [kind for kind, _ in module_list(folder, route) if kind not in plain]


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
    transformer = first_module(folder, route)[1]
    path = next((transformer / name for name in TRANSFORMER_CONFIGS if os.path.lexists(transformer / name)), None)
    config = {} if path is None else read_object(path)
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


def _feature(layer: Layer) -> str:
    """Return the feature that a module reads and writes."""
    if layer.kind == "WeightedLayerPooling":
        return TOKENS
    source = layer.config.get("module_input_name", VECTOR)
    target = layer.config.get("module_output_name") or source
    if source != target:
        raise ConfigError(f"{layer.folder}: a {layer.kind} module from {source!r} to {target!r} is not supported")
    return str(source)


def _poolings(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    modes = config.get("pooling_mode") or [mode for key, mode in OLD_MODES.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ConfigError(f"{folder}/config.json pools with {unknown[0]!r}; supported are {', '.join(MODES)}")
    return tuple(MODES[mode] for mode in modes)
