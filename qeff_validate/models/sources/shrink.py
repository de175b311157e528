# SPDX-License-Identifier: Apache-2.0
"""Shrinks the config of a model to a small one of the same architecture. Input and output are plain data.

Characteristics of the architecture are preserved: types of layers, windows (shorter than the texts), the ratio of
query to key heads, head sizes that do not follow from the width, tied weights, norms, activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMALL: Mapping[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 160,
}
"""Maximum sizes of a ``random:`` body, unless the case sets others."""

WINDOW = 8
"""Length of a window in tokens, per side if it has two: a few words."""

MOST_KINDS = 4
"""Maximum number of layer types in a shrunk body; each costs one layer."""

CAPS: Mapping[str, int] = {
    # feed-forward layers of families without intermediate_size
    **dict.fromkeys(("hidden_dim", "ffn_dim", "ffn_hidden_size", "d_ff", "d_inner", "n_inner"), 128),
    # experts
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    # further tables of embeddings
    "vocab_size_per_layer_input": 1000,
    "entity_vocab_size": 100,
    "hidden_size_per_layer_input": 16,
    # low-rank attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    # windows; two-sided ones are given by their total length
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "position_buckets"), WINDOW),
    **dict.fromkeys(("local_attention", "attention_window"), 2 * WINDOW),
    # tokens that a scan computes at once: a shorter text is padded to them
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 2 * WINDOW),
}
"""Maximum values of keys of some families; smaller values are unchanged."""

OTHER_HEADS = ("decoder_attention_heads", "encoder_attention_heads")
"""Numbers of heads of encoder-decoders, of which num_attention_heads is one."""

DEVIATIONS = ("initializer_range", "init_std")
"""Keys of the standard deviation that weights are drawn with."""

OVERRIDES = "per_layer_config"
"""Key of what is set for single layers, by their index."""

BASIC = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Keys that others depend on."""


def shrink(full: Mapping[str, Any], limits: Mapping[str, int], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a small config.

    Args:
        full: the original config; width, layers and heads are named as in `SMALL`.
        limits: maximum values of some keys of `SMALL`.
        chosen: values that are set unchanged; dependent values are derived from them.
    """
    small = {key: _capped(value, {**CAPS, **limits}.get(key)) for key, value in full.items()}
    small.update({key: chosen[key] for key in BASIC if key in chosen})
    if not all(isinstance(small.get(key, 0), int) for key in BASIC):
        return {**small, **chosen}  # transformers raises the error
    for derive in (_layers, _heads, _overrides, _widths, _rope):
        small.update(derive(full, small))
    for key in DEVIATIONS:
        if isinstance(full.get(key), float):
            # 0.02 suits widths around 1000; at 64 all scores would be near 0 and attention uniform, hiding its faults
            small[key] = small["hidden_size"] ** -0.5
    small.update(chosen)
    return {**small, **{key: value for key, value in _special_ids(small).items() if key not in chosen}}


def _capped(value: Any, limit: int | None) -> Any:
    if limit is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [_capped(item, limit) for item in value]
    return min(value, limit) if isinstance(value, int) else value


def _layer_lists(full: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the lists of a config with one entry per layer, and its overrides of single layers as such a list."""
    count = full.get("num_hidden_layers")
    lists = {
        key: value
        for key, value in full.items()
        if isinstance(value, list) and len(value) == count and not key.endswith("_token_id")
    }
    overrides = {int(layer): values for layer, values in (full.get(OVERRIDES) or {}).items()}
    if overrides and isinstance(count, int):
        lists[OVERRIDES] = [overrides.get(layer) for layer in range(count)]
    return lists


def _selected_layers(full: Mapping[str, Any], wanted: int) -> list[int]:
    """Return layers so that each kind is included; beyond the last, the first follow."""
    count = full["num_hidden_layers"]
    # a list of layer indices does not distinguish types
    telling = [value for value in _layer_lists(full).values() if value != list(range(count))]
    kinds = [repr([value[layer] for value in telling]) for layer in range(count)]
    first = [layer for layer, kind in enumerate(kinds) if kinds.index(kind) == layer][:MOST_KINDS]
    rest = [layer for layer in range(max(count, wanted)) if layer not in first]
    return [layer % count for layer in sorted((first + rest)[: max(wanted, len(first))])]


def _layers(full: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Select layers so that each type is included, and shorten every list with one entry per layer."""
    count, wanted, lists = full.get("num_hidden_layers"), small.get("num_hidden_layers"), _layer_lists(full)
    if not lists or count is None or wanted is None:
        return {}
    layers = _selected_layers(full, wanted)
    return {
        "num_hidden_layers": len(layers),
        **{key: [small[key][layer] for layer in layers] for key in lists if key != OVERRIDES},
    }


def _overrides(full: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Select and shrink what is set for single layers: head sizes keep their ratio to the others'."""
    of_layers = _layer_lists(full).get(OVERRIDES)
    if of_layers is None:
        return {}

    def shrunk(key: str, value: Any) -> Any:
        if key == "head_dim" and isinstance(full.get(key), int) and isinstance(value, int):
            return value * small[key] // full[key]
        return _capped(value, {**CAPS, "num_key_value_heads": small.get("num_key_value_heads")}.get(key))

    layers = _selected_layers(full, small["num_hidden_layers"])
    return {
        OVERRIDES: {
            place: {key: shrunk(key, value) for key, value in of_layers[layer].items()}
            for place, layer in enumerate(layers)
            if of_layers[layer]
        }
    }


def _heads(full: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    heads = small.get("num_attention_heads")
    if not isinstance(heads, int):
        return {}
    derived: dict[str, Any] = {key: heads for key in OTHER_HEADS if isinstance(full.get(key), int)}
    for key in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(full.get(key), int):
            grouped = 1 if full[key] == 1 else max(1, heads // 2)
            derived[key] = heads if full[key] == full["num_attention_heads"] else grouped
    plain = small["hidden_size"] // heads
    for key in ("head_dim", "d_kv", "d_head"):
        if isinstance(full.get(key), int):
            follows = full[key] * full["num_attention_heads"] == full["hidden_size"]
            derived[key] = plain if follows else 2 * plain
    if "head_dim" in full and full["head_dim"] is None:  # not every class derives it
        derived["head_dim"] = plain
    return derived


def _widths(full: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    hidden, derived = small.get("hidden_size"), {}
    for key in ("embedding_size", "word_embed_proj_dim", "pooler_hidden_size"):
        if isinstance(full.get(key), int) and hidden is not None:
            derived[key] = hidden if full[key] == full["hidden_size"] else hidden // 2
    if "num_hidden_groups" in full:
        derived["num_hidden_groups"] = min(full["num_hidden_groups"], small["num_hidden_layers"])
    return derived


def _rope(full: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten the lists of a rotary embedding that have one factor per pair of features."""

    def size(config: Mapping[str, Any]) -> int:
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return value[: len(value) * size(small) // size(full)]
        return value

    return {key: cut(full[key]) for key in ("rope_parameters", "rope_scaling") if isinstance(full.get(key), dict)}


def _special_ids(small: Mapping[str, Any]) -> dict[str, Any]:
    """Map special token ids beyond the vocabulary to free ids within it; equal ids stay equal, others distinct."""
    size = small.get("vocab_size")
    if not isinstance(size, int):
        return {}
    special = {key: value for key, value in small.items() if key.endswith("_token_id")}
    used = sorted({token for value in special.values() for token in _ids(value)})
    free = iter([token for token in range(size) if token not in used])
    new = {token: token if 0 <= token < size else next(free, 0) for token in used if token >= 0}
    return {
        key: [new.get(token) for token in value] if isinstance(value, list) else new.get(value)
        for key, value in special.items()
        if value is not None
    }


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]
