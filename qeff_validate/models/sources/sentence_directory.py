# SPDX-License-Identifier: Apache-2.0
"""What a directory of sentence-transformers says that ``SentenceTransformer(DIR).encode`` computes. Loads no framework.

`modules.json` lists modules: a Transformer, modules on its token vectors, one Pooling, modules on the text's vector.
`encode_settings` reads the settings beside it. Layouts of sentence-transformers 2 to 6 are read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.models.sources.checkpoint import CONFIG, MODULES, inside, modules, read_object

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

VECTOR = "sentence_embedding"
TOKENS = "token_embeddings"
"""Names of the features that modules read and write."""

FIRST = ("Transformer", "MLMTransformer", "CLIPModel", "StaticEmbedding", "WordEmbeddings", "BoW")
"""Modules that read tokens."""

POOLED = ("StaticEmbedding", "BoW")
"""Modules that read tokens and give the vector of a text; it is the mean of what they give for tokens here."""

NOT_COMPILED: Mapping[str, str] = {
    "SparseStaticEmbedding": "it looks up one weight for each word of a text, which the host does: nothing is compiled",
}
"""Modules that read texts and are not supported, and why."""

OTHER_KINDS: Mapping[str, str] = {"SpladePooling": "sparse-embedding", "MultiVectorMask": "multi-vector"}
"""Modules of other kinds of models, and the kind that a case is to name."""

ROUTERS = ("Router", "Asym")
"""Modules that are made of others; ``Asym`` is the name before version 5."""

TOKEN_LAYERS: Mapping[str, str] = {
    "CNN": "cnn_config.json",
    "LSTM": "lstm_config.json",
    "WeightedLayerPooling": "config.json",
    "WordWeights": "config.json",
}
"""Modules on the vectors of tokens alone, and the names of their configs."""

WORD_WEIGHT_POWERS: Mapping[str, float] = {"mean": 1.0, "mean_sqrt_len": 0.5}
"""Powers of the ratio of a text's length to the sum of its words' weights that a pooling scales vectors by."""

SUPPORTED = (*FIRST, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout", *TOKEN_LAYERS)


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
    entries = [(name.rpartition(".")[2], path) for name, path in modules(folder)]
    if route is not None and not any(kind in ROUTERS for kind, _ in entries):
        raise ConfigError(f"options: route: {route!r}: {folder / MODULES} has no Router, whose routes have names")
    for kind, path in entries:
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
    """Return kind and directory of the module that reads tokens, one of `FIRST`.

    Without a ``modules.json`` the directory itself is a Transformer.

    Raises:
        ConfigError: a file is broken, or the first module is another one.
    """
    entries = module_list(folder, route)
    if not entries:
        return "Transformer", folder
    if entries[0][0] in NOT_COMPILED:
        kind = entries[0][0]
        raise ConfigError(f"{folder / MODULES} begins with a {kind} module: {NOT_COMPILED[kind]}; it is not supported")
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
    for kind, path in _kept_modules(folder, leave_out, route):
        if kind in POOLED:
            poolings = ("mean",)
        if kind in FIRST and text_features(kind, path):
            poolings = ("last",)
            after.append(Layer("TextProjection", path))
        if kind in (*FIRST, "Dropout"):
            continue
        file = path / TOKEN_LAYERS.get(kind, "config.json")
        config = read_object(file) if file.is_file() and kind != "WordWeights" else {}  # it holds the vocabulary
        if kind == "Pooling":
            if poolings:
                raise ConfigError(f"{folder / MODULES} has two Pooling modules; one is supported")
            if not file.is_file():
                raise ConfigError(f"{folder / MODULES} names a Pooling module, and {file} is missing")
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
    _check_words(first_module(folder, route), before, poolings, folder / MODULES)
    power = {"power": WORD_WEIGHT_POWERS.get(poolings[0], 0.0)}
    before = [replace(layer, config=power) if layer.kind == "WordWeights" else layer for layer in before]
    return SentenceModules(tuple(before), poolings, include_prompt, tuple(after))


def _kept_modules(folder: Path, leave_out: Collection[str], route: str | None) -> list[tuple[str, Path]]:
    """Return kind and directory of each module that is not left out.

    Raises:
        ConfigError: one is not supported, or what is left out is none of the modules.
    """
    kinds = module_list(folder, route)
    found = list(dict.fromkeys(kind for kind, _ in kinds))
    for name in leave_out:
        if name not in (*SUPPORTED, *found):
            raise ConfigError(f"leave_out: {folder / MODULES} has no {name} module; it has {', '.join(found)}")
    kept = [(kind, path) for kind, path in kinds if kind not in leave_out]
    for kind, _ in kept:
        if kind in OTHER_KINDS:
            raise ConfigError(f"{folder / MODULES} has a {kind} module: say model: {OTHER_KINDS[kind]}")
        if kind not in SUPPORTED:
            raise ConfigError(
                f"{folder / MODULES} has a {kind} module, which is not supported; supported are {', '.join(SUPPORTED)}."
                f" Name a pooling and leave_out: [{kind}] to validate the model without it"
            )
    again = next((kind for kind, _ in kept[1:] if kind in FIRST), None)
    if again is not None:
        raise ConfigError(
            f"{folder / MODULES} has a {again} module behind others; a module that reads tokens is supported as the"
            " first one only"
        )
    return kept


def _check_words(first: tuple[str, Path], layers: Sequence[Layer], poolings: Sequence[str], where: Path) -> None:
    """Refuse combinations of modules on the vectors of words that sentence-transformers cannot run either.

    Raises:
        ConfigError: the message names the module and the reason.
    """
    kinds = [layer.kind for layer in layers]
    if "LSTM" in kinds and first[0] != "WordEmbeddings":
        raise ConfigError(
            f"{where} has an LSTM module behind a {first[0]}: it reads the lengths of texts, which WordEmbeddings alone"
            " gives, so sentence-transformers cannot encode with it"
        )
    if first[0] == "WordEmbeddings" and "cls" in poolings:
        raise ConfigError(f"{where} pools WordEmbeddings with 'cls', which sentence-transformers cannot compute")
    simple = len(poolings) == 1 and poolings[0] in ("mean", "mean_sqrt_len", "max", "last")
    if "WordWeights" in kinds[:-1] or ("WordWeights" in kinds and not simple):
        behind = " and ".join([*kinds[kinds.index("WordWeights") + 1 :], *poolings])
        raise ConfigError(
            f"{where} has a WordWeights module before {behind}:"
            " its weights are supported right before one pooling, mean, mean_sqrt_len_tokens, max or lasttoken"
        )
    for layer in layers:
        sizes = layer.config.get("kernel_sizes") if layer.kind == "CNN" else None
        strides = layer.config.get("stride_sizes") or [1]
        if sizes is not None and (any(size % 2 == 0 for size in sizes) or any(stride != 1 for stride in strides)):
            raise ConfigError(
                f"{layer.folder}: a CNN module with kernel_sizes {sizes} and stride_sizes {strides} gives another"
                " number of vectors than there are tokens; supported are odd kernel_sizes with strides of 1"
            )


def text_features(kind: str, folder: Path) -> bool:
    """Return True for a CLIP model whose text features are the vector of a text: its text tower and projection.

    Raises:
        ConfigError: the module gives a text's vector in a way that is not supported.
    """
    if kind == "CLIPModel":
        return True
    path, config = transformer_config(folder) if kind not in POOLED else (None, {})
    if config.get("module_output_name", TOKENS) != VECTOR:
        return False
    model_type = read_object(folder / CONFIG).get("model_type")
    text = (config.get("modality_config") or {}).get("text") or {}
    if model_type != "clip" or text.get("method") != "get_text_features":
        raise ConfigError(
            f"{path}: the {kind} module of a {model_type} model gives {VECTOR} by {text.get('method')!r}; supported is"
            " get_text_features of a clip model. Name a pooling to validate its text tower alone"
        )
    return True


def transformer_config(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the path and the content of a Transformer module's config; None and nothing if there is no such file.

    Raises:
        ConfigError: the file is broken.
    """
    path = next((folder / name for name in TRANSFORMER_CONFIGS if os.path.lexists(folder / name)), None)
    return path, {} if path is None else read_object(path)


def weighted_kinds(folder: Path, route: str | None = None) -> list[str]:
    """Return the kinds of modules that change a vector in more than its length, beside Transformer and Pooling.

    Raises:
        ConfigError: ``modules.json`` is broken.
    """
    plain = (*FIRST, "Pooling", "Normalize", "Dropout")
    entries = module_list(folder, route)
    projections = ["TextProjection" for kind, path in entries if kind in FIRST and text_features(kind, path)]
    return projections + [kind for kind, _ in entries if kind not in plain]


def _feature(layer: Layer) -> str:
    """Return the feature that a module reads and writes."""
    if layer.kind in TOKEN_LAYERS:
        return TOKENS
    source = layer.config.get("module_input_name", VECTOR)
    target = layer.config.get("module_output_name") or source
    if source != target:
        raise ConfigError(f"{layer.folder}: a {layer.kind} module from {source!r} to {target!r} is not supported")
    return str(source)


def _poolings(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in OLD_MODES.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes:
        raise ConfigError(
            f"{folder}/config.json: pooling_mode is {modes!r}, wanted one or several of {', '.join(MODES)}"
        )
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ConfigError(f"{folder}/config.json pools with {unknown[0]!r}; supported are {', '.join(MODES)}")
    return tuple(MODES[mode] for mode in modes)
