# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model's tables of token and position embeddings, found by the parameter names of transformers.

They include the length beyond which rotary frequencies change, as ``rope_dynamic`` or ``rope_longrope``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.files import MOST_CONFIG, read_json

TOKENS = re.compile(r"(^|.*\.)(word_embeddings?|embed_tokens|tok_embeddings|embed_in|wte)\.weight")
POSITIONS = re.compile(r"(^|.*\.)(position_embeddings?|embed_positions|wpe)\.weight")

ROPE = "rope_"
"""Prefix, followed by the rope_type, of a length beyond which rotary frequencies depend on the input."""

SPARSE = "sparse_attention"
"""Name of the length beyond which a model attends to blocks of tokens; it attends to all of a shorter text."""

MOST_HEADER = 100 << 20


def tables(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of rows of the token embeddings, ``tokens``, and of learned position embeddings, ``positions``.

    The position table belongs to the same module as the token table, unlike one of image patches. Tables that are not
    found are left out.

    Args:
        shapes: shape of each parameter by name.
    """
    sizes: dict[str, int] = {}
    words = {match[1]: shapes[name] for name in shapes if (match := TOKENS.fullmatch(name)) and len(shapes[name]) == 2}
    if words:
        sizes["tokens"] = max(rows for rows, _ in words.values())
    places = [shapes[name][0] for name in shapes if (match := POSITIONS.fullmatch(name)) and match[1] in words]
    return sizes | ({"positions": max(places)} if places else {})


def module_tables(model: Any) -> dict[str, int]:
    """Return the table sizes of a torch module, its first position, and the length where rotary frequencies change.

    ``first_position`` is the row of the first token, unless it is 0: RoBERTa, XLM-R and MPNet start after the row of
    the padding token, OPT and BART at an offset.
    """
    config: Any = getattr(model, "config", None)
    switch = switches_by_length(config.to_dict()) if hasattr(config, "to_dict") else {}
    sizes = tables({name: tuple(parameter.shape) for name, parameter in model.named_parameters()}) | switch
    if "positions" not in sizes:
        return sizes
    first = max(
        (_first_row(module) for name, module in model.named_modules() if POSITIONS.fullmatch(f"{name}.weight")),
        default=0,
    )
    return sizes | ({"first_position": first} if first else {})


def _first_row(table: Any) -> int:
    padding, offset = getattr(table, "padding_idx", None), getattr(table, "offset", 0)
    return int(offset) if padding is None else int(padding) + 1


def frequency_switch(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the length of a Hugging Face config beyond which rotary frequencies depend on the input.

    ``dynamic`` scales its base with the longest text so far, ``longrope`` switches to other factors; other types have
    no such length.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, Mapping) else config
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return {}
    lengths: dict[str, int] = {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):  # one for each type of layer
        kind = str(part.get("rope_type") or part.get("type") or "")
        places = [config.get("max_position_embeddings")]
        if kind in ("longrope", "su"):
            original = "original_max_position_embeddings"
            kind, places = "longrope", [part.get(original), config.get(original), *places]
        elif "dynamic" in kind:
            kind = "dynamic"
        else:
            continue
        length = next((place for place in places if isinstance(place, int)), None)
        if length is not None:
            name = f"{ROPE}{kind}"
            lengths[name] = min(length, lengths.get(name, length))
    return lengths


def switches_by_length(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the lengths of a Hugging Face config beyond which a model computes in another way.

    They are those of `frequency_switch`, and BigBird's: it attends to blocks beyond two global, three sliding and two
    times its random blocks.
    """
    lengths = frequency_switch(config)
    if config.get("attention_type") == "block_sparse":
        blocks, size = config.get("num_random_blocks"), config.get("block_size")
        if isinstance(blocks, int) and isinstance(size, int):
            lengths[SPARSE] = (5 + 2 * blocks) * size
    return lengths


def folder_switch(config: Path) -> dict[str, int]:
    """Return `switches_by_length` of a config.json; empty if it cannot be read."""
    try:
        content = read_json(config, most_bytes=MOST_CONFIG)
    except ConfigError:
        return {}
    return switches_by_length(content) if isinstance(content, dict) else {}


def file_tables(files: Iterable[Path]) -> dict[str, int]:
    """Return the table sizes of safetensors files, reading headers only; empty if a file cannot be read."""
    shapes: dict[str, Sequence[int]] = {}
    try:
        for file in files:
            shapes |= {name: entry["shape"] for name, entry in header(file)[0].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return tables(shapes)


def header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the entries of tensors in the header of a safetensors file, and the offset of its data.

    Raises:
        ValueError: it is no safetensors file.
    """
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"{file} is no safetensors file")
        entries = json.loads(stream.read(size))
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, 8 + size


def stated_size(file: Path) -> int:
    """Return the size in bytes of a safetensors file according to its header.

    Raises:
        ValueError: it is no safetensors file.
        OSError: it cannot be read.
    """
    try:
        entries, start = header(file)
        return start + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as exc:
        raise ValueError(f"its header is none of a safetensors file: {type(exc).__name__}: {exc}") from exc
