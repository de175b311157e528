# SPDX-License-Identifier: Apache-2.0
"""Reads adapters from disk as plain data and numpy arrays. Loads no framework, so that fingerprints are fast."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from qeff_validate.artifact import fingerprint
from qeff_validate.errors import ConfigError
from qeff_validate.files import MOST_CONFIG, expand_user, read_json, regular_file
from qeff_validate.models.adapters.pruned_ranks import with_all_ranks
from qeff_validate.models.sources.embedding_tables import header, stated_size
from qeff_validate.tensors import Array

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
INDEX = "adapter_model.safetensors.index.json"

EMBEDDING = re.compile(
    r"(^|\.)(embed\w*|wte|lm_head|word_embeddings)\.((modules_to_save|original_module|token_adapter|base_layer)\.)*weight$"
)
"""Names of weights with a row for each token."""

DTYPES: Mapping[str, str] = {
    "BF16": "<u2", "BOOL": "?", "F16": "<f2", "F32": "<f4", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1",
}  # fmt: skip
"""Dtypes of a safetensors file and of numpy; floats are converted to float32, as PEFT does."""

MOST_NAMED = 5
"""Adapters in subdirectories that a message names."""

NOT_CONTENT = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
})  # fmt: skip
"""Keys of a config about the origin of an adapter, not its computation."""


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read the config and the tensors of an adapter that PEFT has saved.

    Returns:
        The content of adapter_config.json, and the arrays by saved name: float32 and integers. Ranks that AdaLoRA has
        pruned are zeros.

    Raises:
        ConfigError: a file is missing, broken or pickled, or a tensor is of another type or not finite.
    """
    folder = expand_user(folder)
    config = read_config(folder)
    tensors: dict[str, Array] = {}
    for path in weight_files(folder):
        tensors |= _tensors(path)
    return with_all_ranks(config, dict(sorted(tensors.items())))


def weight_files(folder: Path) -> list[Path]:
    """Return the files of an adapter's tensors: one, or the shards that an index names.

    Raises:
        ConfigError: there is none, or the index is broken or names files outside of the directory.
    """
    if os.path.lexists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if os.path.lexists(folder / INDEX):
        try:
            names = read_json(folder / INDEX, most_bytes=MOST_CONFIG)["weight_map"].values()
            files = sorted({str(name) for name in names})
        except (ConfigError, KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(f"adapter: {folder / INDEX} names no shards (weight_map): {exc}") from exc
        if any(os.path.basename(name) != name or not name.endswith(".safetensors") for name in files):
            raise ConfigError(f"adapter: {folder / INDEX} names a file that is no safetensors file beside it")
        return [folder / name for name in files]
    if (folder / PICKLE).is_file():
        raise ConfigError(
            f"adapter: {folder / PICKLE} is a pickle, which may run code and is not read. Where you trust it:"
            " PeftModel.from_pretrained(base, DIR).save_pretrained(NEW_DIR) writes safetensors"
        )
    raise ConfigError(f"adapter: {folder} holds no {WEIGHTS}; PEFT's save_pretrained(DIR) writes it")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of an adapter, from the headers of its files.

    Raises:
        ConfigError: a file is missing or broken.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        check_size(path)
        try:
            shapes |= {name: tuple(entry["shape"]) for name, entry in header(path)[0].items()}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(f"adapter: cannot read {path}: {exc}") from exc
    return shapes


def vocabulary(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of tokens that an adapter has embeddings for; 0 if it has none.

    Args:
        shapes: of its tensors, by saved name.
    """
    rows = [shape[0] for name, shape in shapes.items() if EMBEDDING.search(name) and len(shape) == 2]
    return max(rows, default=0)


def holds_base_weights(names: Iterable[str]) -> bool:
    """Return True if some tensors of an adapter may be weights of the base: embeddings, heads or biases."""
    return any(EMBEDDING.search(name) or name.endswith(".bias") for name in names)


def adapter_fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """Return the hex SHA-256 of an adapter's options and tensors, without its origin."""
    digests = {
        name: [str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()]
        for name, array in tensors.items()
    }
    return fingerprint({"config": content(config), "tensors": digests})


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config that determine an adapter's computation, as plain data in a fixed order."""
    return {key: _ordered(value) for key, value in config.items() if key not in NOT_CONTENT}


def _ordered(value: Any) -> Any:
    """Sort lists of names, because they come from sets in random order."""
    if isinstance(value, (set, frozenset)) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return sorted(value)
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a saved adapter.

    Raises:
        ConfigError: the directory or its config is missing, or the config is broken.
    """
    if folder.is_file():
        raise ConfigError(f"adapter: {folder} is a file: name the directory that PEFT's save_pretrained wrote")
    if not folder.is_dir():
        raise ConfigError(f"adapter: directory {folder} does not exist")
    path = folder / CONFIG
    if not os.path.lexists(path):
        named = sorted(child.name for child in folder.iterdir() if (child / CONFIG).is_file())
        if named:  # PEFT's default name alone has no directory of its own
            raise ConfigError(
                f"adapter: {folder} holds no {CONFIG}, but adapters in directories of their names"
                f" ({', '.join(named[:MOST_NAMED])}): name {folder / named[0]}"
            )
        raise ConfigError(f"adapter: {folder} holds no {CONFIG}, so it is no adapter of PEFT")
    try:
        data = read_json(path, most_bytes=MOST_CONFIG)
    except ConfigError as exc:
        raise ConfigError(f"adapter: {exc}") from exc
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise ConfigError(f"adapter: {path} names no peft_type")
    return data


def check_size(path: Path) -> None:
    """Check the size of a safetensors file against its header, before its content is read.

    Raises:
        ConfigError: the sizes differ, or it is no safetensors file.
    """
    try:
        size, stated = regular_file(path).st_size, stated_size(path)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"adapter: cannot read {path}: {exc}") from exc
    if size != stated:
        raise ConfigError(
            f"adapter: {path} has {size:,} bytes, and its header names {stated:,}: it is cut short or damaged"
        )


def _tensors(path: Path) -> dict[str, Array]:
    check_size(path)
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"adapter: cannot read {path}: {exc}") from exc
    if not entries:
        raise ConfigError(f"adapter: {path} holds no tensor")
    tensors = {}
    for name, entry in sorted(entries):
        if entry["dtype"] not in DTYPES:
            raise ConfigError(f"adapter: {path}: {name} is {entry['dtype']}; wanted one of {', '.join(DTYPES)}")
        array = np.frombuffer(entry["data"], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(f"adapter: {path}: {name} holds numbers that are not finite")
        tensors[name] = np.array(array)
    return tensors
