# SPDX-License-Identifier: Apache-2.0
"""Sources whose weights are drawn from a seed: ``random:MODEL_TYPE`` and ``tiny:HUB_ID_OR_DIR``."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, Unavailable, suggest
from qeff_validate.models.framework_calls import quiet_transformers, translated_errors, versions, without_cache
from qeff_validate.models.sources.checkpoint import (
    check_tokenizer,
    digests,
    has_tokenizer,
    read_object,
    refuse_encoder_decoder,
    tokenizer_files,
)
from qeff_validate.models.sources.embedding_tables import module_tables
from qeff_validate.models.sources.shrink import SMALL, WINDOW, shrink
from qeff_validate.models.sources.size_limits import check_memory, check_sizes
from qeff_validate.models.sources.text_encoders import TOWERS, TextEncoder, builds_body
from qeff_validate.models.sources.tokenizers import Tokenize, hashed_words, tokenize_with

MAMBA_HEADS: Mapping[str, Any] = {
    "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
"""Sizes of a hybrid's recurrent layers that fit the width of a ``random:`` body, doubled."""

STEP = 1e-7
"""Least time step of recurrent layers that transformers clamps in runs of a whole text alone, not in a step."""

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    # values of published models that differ from the defaults of transformers
    # head_dim is that of the rotary part (`shrink.CAPS`)
    "deepseek_v2": {"head_dim": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {"head_dim": 8},
    "deberta-v2": {
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 8,
        "relative_attention": True,
        "share_att_key": True,
    },
    "esm": {"mask_token_id": 32, "pad_token_id": 1, "position_embedding_type": "rotary", "vocab_size": 33},
    "eurobert": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA_HEADS},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 1000,
    },
    "cohere": {"logit_scale": 0.8333},  # the default makes logits of random weights level
    "cohere2": {"logit_scale": 0.8333},
    "axk1": {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1], **MAMBA_HEADS},
    "cohere_compass_text": {  # windows turn, full attention knows no positions
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.8333,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"mrope_section": [3, 3, 2], "rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        "layer_types": ["sliding_attention", "full_attention"],
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
        "num_key_value_heads": 2,
        "residual_multiplier": 0.5,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **MAMBA_HEADS},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "mamba2": {"head_dim": 16, "num_heads": 8, "state_size": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"time_step_min": STEP},
    "olmo2": {"num_key_value_heads": 2},
    "phimoe": {"num_local_experts": 2},  # weights jump where the best two of a half are level
    "phi3": {"num_key_value_heads": 2, "sliding_window": WINDOW},
    "qwen2": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_key_value_heads": 2,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
    },
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen3_moe": {"head_dim": 32},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "stablelm": {"num_key_value_heads": 2},
    "starcoder2": {"sliding_window": WINDOW},
    "youtu": {"head_dim": 8},
    "zamba": {
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "adapter_rank": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "hybrid_layer_ids": [1, 2],
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "num_hidden_layers": 3,
        "time_step_min": STEP,
    },
}
"""Config values of ``random:`` bodies that enable the characteristics of a family."""

OF_WINDOWS = frozenset({"layer_types", "sliding_window", "use_sliding_window"})
"""Those of `SPECIAL` that a case leaves out with ``use_sliding_window: false``."""

TIED = 0.25
"""Scale of token embeddings tied to the LM head: unscaled, the most likely next token is the previous one."""

MOST_LAYERS = 9
"""Greatest number of layers that a ``random:`` body gets, so that each kind of its family is there (Jamba needs 5)."""

MOST_PARAMETERS = 32_000_000
"""Maximum parameters of a shrunk body without token embeddings; more means a config with keys unknown to `shrink`."""


@dataclass(frozen=True, slots=True)
class Random:
    """An architecture with seeded random weights and a tokenizer that hashes words."""

    model_type: str
    config: Mapping[str, Any]
    seed: int

    def body_key(self) -> Mapping[str, Any]:
        """Return what the weights depend on."""
        key = {"random": self.model_type, "config": dict(self.config), "seed": self.seed}
        return {**key, **versions("torch", "transformers")}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what the token ids depend on."""
        return {"words": self.model_type, "config": dict(self.config), **versions("transformers")}

    def tables(self) -> Mapping[str, int]:
        """Return the table sizes of the body, built on the meta device (no weights allocated)."""
        return module_tables(empty_body(self._config(), f"random:{self.model_type}"))

    def body(self) -> Any:
        """Build the body."""
        return draw(self._config(), self.seed, f"random:{self.model_type}")

    def causal_lm(self) -> Any:
        """Build the body with an LM head."""
        return draw_causal(self._config(), self.seed, f"random:{self.model_type}")

    def with_head(self, auto: str) -> Any:
        """Build the model with a head."""
        return draw_with_head(self._config(), self.seed, f"random:{self.model_type}", auto)

    def model_config(self) -> Any:
        """Return the config."""
        return self._config()

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return a tokenizer that needs no file."""
        return words_for(self._config())

    def pretrained_tokenizer(self) -> None:
        """Return None: there is no transformers tokenizer."""

    def _config(self) -> Any:
        from transformers import CONFIG_MAPPING

        if self.model_type not in CONFIG_MAPPING:
            hint = suggest(self.model_type, CONFIG_MAPPING.keys())
            hint = hint if "Did you mean" in hint else ""
            raise ConfigError(f"random:{self.model_type}: transformers knows no such model type.{hint}")
        return copy.deepcopy(_random_config(self.model_type, _Chosen(self.config)))


class _Chosen:
    """Values that a case sets, as the key of a cache."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._text = json.dumps(self.values, sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chosen) and self._text == other._text


@lru_cache(maxsize=64)
def _random_config(model_type: str, chosen: _Chosen) -> Any:
    """Return the small config of a model type, with as many layers as its family needs.

    Raises:
        ConfigError: the type reads no tokens, is made of parts, or its default config builds no small model.
    """
    from transformers import AutoConfig

    name = f"random:{model_type}"
    with translated_errors(f"make a config for {name}"), quiet_transformers():
        default = AutoConfig.for_model(model_type)
        default = default.text_config if model_type in TOWERS else default
    _refuse_parts(default, name)
    if not builds_body(default):
        raise ConfigError(f"{name}: transformers builds no body of this type by itself; it is a part of other models")
    special = SPECIAL.get(model_type, {})
    if chosen.values.get("use_sliding_window") is False:
        special = {key: value for key, value in special.items() if key not in OF_WINDOWS}
    small = family_config(default, name, SMALL, chosen.values, special=special)
    _refuse_large(small, name)
    return small


def family_config(
    full: Any, name: str, limits: Mapping[str, int], chosen: Mapping[str, Any], *, special: Mapping[str, Any] = {}
) -> Any:
    """Return the small config of `small_config`, with as many layers as its family needs, up to `MOST_LAYERS`.

    Raises:
        ConfigError: as `small_config`; also a body that lacks a class of modules that the original has.
    """
    original = copy.deepcopy(full)
    for key, value in chosen.items():
        if key not in SMALL and "layer" not in key:  # another activation, say, is no loss
            setattr(original, key, value)
    for layers in range(limits["num_hidden_layers"], MOST_LAYERS + 1):
        small = small_config(full, name, {**limits, "num_hidden_layers": layers}, chosen, special=special)
        lost = lost_classes(original, small, name)
        if not lost:
            return small
        if "num_hidden_layers" in chosen:
            break
    raise ConfigError(
        f"{name}: shrunk to {small.num_hidden_layers} layers it loses {', '.join(sorted(lost)[:3])}, which the family"
        " has: set what keeps them in config: {…}, such as num_hidden_layers, or take a saved model by path:"
    )


def _refuse_parts(default: Any, name: str) -> None:
    """Refuse a config of a model that reads no tokens, or that is made of parts, of which one does.

    Raises:
        ConfigError: the message names the type of the part that reads texts.
    """
    from transformers import CONFIG_MAPPING

    if hasattr(default, "hidden_size") and hasattr(default, "vocab_size"):
        return
    part = getattr(getattr(default, "text_config", None), "model_type", None)
    if part is None and getattr(default, "sub_configs", None):
        parts = ", ".join(default.sub_configs)
        raise ConfigError(f"{name} is made of parts ({parts}), which are not shrunk: take a saved model by path:")
    if part is None:
        raise ConfigError(
            f"{name} has no vocab_size and hidden_size in its config: it is no model of texts with a vocabulary"
        )
    alone = part in CONFIG_MAPPING and builds_body(default.text_config)
    remedy = f": take random:{part}" if alone else ", of which transformers builds no body by itself"
    raise ConfigError(f"{name} is made of parts; what reads texts is its text_config, of the type {part!r}{remedy}")


def lost_classes(full: Any, small: Any, name: str) -> set[str]:
    """Return the names of the classes of modules that a body of a config has, and of its shrunk config has not.

    Raises:
        ConfigError: transformers builds no body of the shrunk config.
    """
    try:
        kept = _classes(small, name)
    except Unavailable as exc:
        raise ConfigError(
            f"{exc}: its default config, shrunk, is none of a whole model; set what is missing in config: {{…}}, or"
            " take tiny: with a published config"
        ) from exc
    try:
        return _classes(full, name) - kept
    except Unavailable:  # the default alone is no model, what the case sets makes it one
        return set()


def _classes(config: Any, name: str) -> set[str]:
    from transformers.initialization import no_init_weights

    # drawing takes half of the time even without memory for weights; tied ones are two without it, so sizes need it
    with no_init_weights():
        return {type(module).__name__ for module in empty_body(config, name).modules()}


@dataclass(frozen=True, slots=True)
class Tiny:
    """The architecture of a config, shrunk, with seeded random weights.

    Attributes:
        name: the model in the user's config.
        file: the config; a tokenizer beside it is used if ``whole``.
        whole: ``file`` is in a user's directory, not in a cache that may hold only parts of a model.
        config: overrides of the shrunk config.
        seed: of the weights.
    """

    name: str
    file: Path
    whole: bool
    config: Mapping[str, Any]
    seed: int

    def body_key(self) -> Mapping[str, Any]:
        """Return what the weights depend on; the vocabulary size comes from the tokenizer."""
        key = {"tiny": self._content(), "config": dict(self.config), "seed": self.seed}
        return {**key, "vocabulary": self._tokenizer_files(), **versions("torch", "transformers")}

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what the token ids depend on."""
        key = {"words": self._content(), "config": dict(self.config), "files": self._tokenizer_files()}
        return {**key, **versions("transformers", "tokenizers")}

    def tables(self) -> Mapping[str, int]:
        """Return the table sizes of the body, built on the meta device (no weights allocated)."""
        return module_tables(empty_body(self._config(), f"tiny:{self.name}"))

    def body(self) -> Any:
        """Build the body.

        Raises:
            ConfigError: transformers has no such architecture, or the shrunk body is too large.
        """
        config = self._config()
        _refuse_large(config, f"tiny:{self.name}")
        return draw(config, self.seed, f"tiny:{self.name}")

    def causal_lm(self) -> Any:
        """Build the body with an LM head; raises like `body`."""
        config = self._config()
        _refuse_large(config, f"tiny:{self.name}")
        return draw_causal(config, self.seed, f"tiny:{self.name}")

    def with_head(self, auto: str) -> Any:
        """Build the model with a head; raises like `body`."""
        config = self._config()
        _refuse_large(config, f"tiny:{self.name}")
        return draw_with_head(config, self.seed, f"tiny:{self.name}", auto)

    def model_config(self) -> Any:
        """Return the config."""
        return self._config()

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the directory's tokenizer, else one that hashes words."""
        loaded = self.pretrained_tokenizer()
        return words_for(self._config()) if loaded is None else tokenize_with(loaded)

    def _content(self) -> Any:
        data = read_object(self.file)
        if not isinstance(data.get("model_type"), str):
            raise ConfigError(f"tiny:{self.name}: {self.file} names no model_type")
        check_sizes(data, f"tiny:{self.name}")
        return data

    def _tokenizer_files(self) -> dict[str, str]:
        folder = self.file.parent
        if not self.whole or not has_tokenizer(folder):
            return {}
        return digests(tokenizer_files(folder), folder)

    def pretrained_tokenizer(self) -> Any:
        """Return the directory's transformers tokenizer, None if it has none."""
        if not self._tokenizer_files():
            return None
        from transformers import AutoTokenizer

        check_tokenizer(self.file.parent)
        with translated_errors(f"load the tokenizer in {self.file.parent}"), quiet_transformers():
            return AutoTokenizer.from_pretrained(self.file.parent, trust_remote_code=False, local_files_only=True)

    def _config(self) -> Any:
        from transformers import CONFIG_MAPPING

        data = self._content()
        name, kind = f"tiny:{self.name}", data["model_type"]
        if kind not in CONFIG_MAPPING:
            raise ConfigError(f"{name}: transformers has no model type {kind!r}, and code from a model is not run")
        data.pop("quantization_config", None)
        with translated_errors(f"read the config of {name}"), quiet_transformers():
            full = CONFIG_MAPPING[kind].from_dict(data).get_text_config()
        limits = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
        loaded = self.pretrained_tokenizer()
        if loaded is not None:
            ids = [*loaded.get_vocab().values(), *(_positive(full, key) for key in vars(full) if key.endswith("_id"))]
            limits["vocab_size"] = max(ids) + 1
        return family_config(full, name, limits, self.config)


def _positive(config: Any, key: str) -> int:
    value = getattr(config, key)
    return value if isinstance(value, int) else 0


def small_config(
    full: Any, name: str, limits: Mapping[str, int], chosen: Mapping[str, Any], *, special: Mapping[str, Any] = {}
) -> Any:
    """Return a small transformers config of the same class.

    Raises:
        ConfigError: a chosen key is unknown, or the values are inconsistent.
    """
    for key in chosen:
        if not hasattr(full, key):
            known = [*full.to_dict(), *full.attribute_map]
            raise ConfigError(f"{name} has no config key {key!r}.{suggest(key, known)}")
    check_sizes(chosen, name)
    native: Mapping[str, str] = full.attribute_map
    common = {value: key for key, value in native.items() if key in SMALL or value not in SMALL}

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {common.get(native.get(key, key), native.get(key, key)): value for key, value in values.items()}

    values = {**renamed(full.to_dict()), **special}
    small = shrink(values, limits, {**special, **renamed(chosen)})
    if "num_labels" in small:
        for key in ("id2label", "label2id"):  # transformers names the labels
            small.pop(key, None)
    if "use_cache" in small:
        small["use_cache"] = False  # else keys and values of a decoder become outputs of the graph
    try:
        return type(full).from_dict({native.get(key, key): value for key, value in small.items()})
    except Exception as exc:  # each config class raises its own exceptions
        raise ConfigError(f"{name}: the config's values do not go together: {' '.join(str(exc).split())}") from exc


def draw(config: Any, seed: int, name: str) -> Any:
    """Build a body with seeded weights; biases and norms are random too, so that losing one is detected."""
    return without_cache(_build_seeded(TextEncoder, config, seed, name))


def draw_causal(config: Any, seed: int, name: str) -> Any:
    """Build a causal LM with seeded weights that does not repeat one token forever and routes decisively.

    Experts use ``batched_mm``, the implementation of transformers that can be exported.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from qeff_validate.models.sources.decisive_routers import make_decisive

    refuse_encoder_decoder(name, is_encoder_decoder=getattr(config, "is_encoder_decoder", False))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{name} is no causal language model: transformers has none of the type {config.model_type!r} (encoders are"
            " bodies of model: embedding)"
        )
    model = _build_seeded(AutoModelForCausalLM, config, seed, name, experts_implementation="batched_mm")
    model.config.use_cache = True
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        make_decisive(model)
        if head is not None and embedding.weight is head.weight:
            embedding.weight.mul_(TIED)
    return model.eval()


def draw_with_head(config: Any, seed: int, name: str, auto: str) -> Any:
    """Build a model with the head of an Auto class of transformers, whose matrices are large enough to tell rows apart.

    Raises:
        ConfigError: transformers has no such head for this architecture.
    """
    import torch
    import transformers

    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a decoder finds the last token of a padded row by it
    try:
        model = without_cache(_build_seeded(getattr(transformers, auto), config, seed, name))
    except Unavailable as exc:
        raise ConfigError(f"{name} has no head of {auto}: {exc}") from exc
    body = {id(parameter) for parameter in getattr(model, model.base_model_prefix, model).parameters()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 2 and id(parameter) not in body:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def _build_seeded(auto: Any, config: Any, seed: int, name: str, **options: Any) -> Any:
    import torch

    check_memory(empty_body(config, name, auto), name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        with translated_errors(f"build {name}"), quiet_transformers():
            model = auto.from_config(config, trust_remote_code=False, dtype=torch.float32, **options)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def words_for(config: Any) -> tuple[Tokenize, int]:
    """Return a tokenizer that hashes words into a config's vocabulary."""
    return hashed_words(config.vocab_size, getattr(config, "pad_token_id", None) or 0)


def empty_body(config: Any, name: str, auto: Any = None) -> Any:
    """Instantiate a body, or a model of an Auto class, on the meta device (no weights allocated)."""
    import torch

    with torch.device("meta"), translated_errors(f"build {name}"), quiet_transformers():
        return (auto or TextEncoder).from_config(config, trust_remote_code=False)


def _refuse_large(config: Any, name: str) -> None:
    model = empty_body(config, name)
    size = sum(parameter.numel() for parameter in model.parameters() if config.vocab_size not in parameter.shape)
    if size > MOST_PARAMETERS:
        worst, parameter = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise ConfigError(
            f"{name}: shrunk it still has {size / 1e6:.0f} M parameters, most in {worst!r} {list(parameter.shape)};"
            f" make it smaller with config: {{KEY: VALUE}}; its keys: {', '.join(sorted(config.to_dict()))}"
        )
