# SPDX-License-Identifier: Apache-2.0
"""Finds and checks the files of a model directory that are read when the model is loaded.

Weights are found as transformers finds them: by ``transformers_weights`` in the config, else ``model.safetensors``,
else the index of shards, whose files may lie in subfolders. Which files a tokenizer reads depends on its class, so
all files at the top of the directory are included, except types that no tokenizer reads. Loads no framework.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_files
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.files import MOST_CONFIG, read_json, reason, regular_file
from qeff_validate.models.adapters.files import CONFIG as ADAPTER
from qeff_validate.models.sources.embedding_tables import header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODULES = "modules.json"
TEMPLATES = "additional_chat_templates"

SENTENCE_TRANSFORMERS = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")

NO_TOKENIZER = frozenset({
    ".bin", ".ckpt", ".data", ".gguf", ".h5", ".md", ".mlmodel", ".msgpack", ".npz", ".onnx", ".onnx_data", ".ot",
    ".pb", ".pt", ".pth", ".py", ".safetensors", ".tflite", ".zip",
})  # fmt: skip
"""Suffixes of files in a model directory that no tokenizer reads."""

VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "spm.model",
              "sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "tokenizer_config.json")  # fmt: skip
"""Files that show that a directory holds a tokenizer."""

HALF: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16"}
"""Half precisions of safetensors and torch."""

SMALL = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
"""Files that hold one small JSON object."""

MOST_INDEX, MOST_VOCABULARY = 64 << 20, 512 << 20
"""Maximum size in bytes of an index of shards, and of a tokenizer file."""


def check_directory(folder: Path) -> Mapping[str, Any]:
    """Refuse a directory that cannot be loaded, and return its config.

    Raises:
        ConfigError: there is no config or no weights, an adapter lies beside the weights, or a file is no regular file,
            too large or broken.
        Unavailable: a file of weights is cut short.
    """
    if os.path.lexists(folder / ADAPTER):
        if not os.path.lexists(folder / CONFIG):
            raise ConfigError(
                f"{folder} holds an adapter ({ADAPTER}) and no model: name its base model as source, and this directory"
                " in options.adapters of a case with model: peft-causal-lm"
            )
        refuse_adapter(folder)
    if not os.path.lexists(folder / CONFIG):
        raise ConfigError(f"{folder} holds no config.json, so it is no Hugging Face model")
    config = read_object(folder / CONFIG)
    tensors(weight_files(folder))
    return config


def refuse_encoder_decoder(name: str, *, is_encoder_decoder: Any) -> None:
    """Refuse a model whose decoder reads an encoder's output, which a causal LM's graph has no input for.

    Args:
        name: of the model, for the message.
        is_encoder_decoder: the value of that name in its config.

    Raises:
        ConfigError: it is one.
    """
    if is_encoder_decoder:
        raise ConfigError(
            f"{name} is an encoder-decoder, whose decoder also reads another text: peft-causal-lm serves decoders alone"
            " (its encoder is a body of model: embedding)"
        )


def refuse_adapter(folder: Path) -> None:
    """Refuse a model directory with an adapter config: transformers would apply the adapter to the weights.

    Raises:
        ConfigError: there is an adapter config.
    """
    if os.path.lexists(folder / ADAPTER):
        raise ConfigError(
            f"{folder} holds {ADAPTER} beside a model, and transformers would put that adapter on by itself: move"
            f" {ADAPTER} and its weights to a directory of their own, and name that in options.adapters of a case with"
            " model: peft-causal-lm if the adapter is to be validated"
        )


def read_object(path: Path, *, most_bytes: int = MOST_CONFIG) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    data = read_json(path, most_bytes=most_bytes)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, and an object is needed")
    return data


def inside(folder: Path, name: Any, where: Path) -> Path:
    """Return the path of a file that another file names; links are not resolved, because a hub cache consists of them.

    Raises:
        ConfigError: the name is empty or no text, absolute, or outside of the directory.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigError(f"{where}: {name!r} is no name of a file")
    path = os.path.normpath(name)
    if os.path.isabs(path) or path == ".." or path.startswith("../"):
        raise ConfigError(f"{where}: {name!r} lies outside of {folder}; name files inside of it")
    return folder / path


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads, in order of their names.

    Raises:
        ConfigError: there are none, or the index is broken or names files outside of the directory.
    """
    files = [path for path in weights_with_index(folder) if not path.name.endswith(".json")]
    return sorted(files)


def weights_with_index(folder: Path) -> list[Path]:
    """Return the weight files with their index; raises like `weight_files`."""
    explicit = read_object(folder / CONFIG).get("transformers_weights")
    if explicit is not None:
        path = inside(folder, explicit, folder / CONFIG)
    else:
        path = next((folder / name for name in (SINGLE, INDEX) if os.path.lexists(folder / name)), folder / SINGLE)
        if not os.path.lexists(path):
            raise ConfigError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: no .safetensors weights that transformers finds; pickled"
                " weights are not read: convert them with model.save_pretrained(DIR)"
            )
    if not path.name.endswith(".json"):
        return checked([path])
    names = read_object(path, most_bytes=MOST_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{path} holds no weight_map, so it is no index of safetensors files")
    shards = sorted({inside(folder, name, path) for name in names.values()})
    for shard in shards:
        if shard.suffix != ".safetensors":
            raise ConfigError(f"{path} names {shard.name}, which is no .safetensors file; others are not read")
    return checked([path, *shards], most_bytes=None)


def head_tensors(folder: Path) -> tuple[str, list[str]]:
    """Return the architecture of a checkpoint with a task head, and the names of the head's tensors.

    A head's tensors lie beside the body's, which most names begin with. Without a head there are no names, nor for an
    encoder-decoder, of which an embedding takes the encoder.
    """
    config = read_object(folder / CONFIG)
    architecture = str((config.get("architectures") or [""])[0])
    if not re.search("For[A-Z]", architecture) or config.get("is_encoder_decoder"):
        return architecture, []
    groups: dict[str, list[str]] = {}
    for name in tensors(weight_files(folder)):
        groups.setdefault(name.partition(".")[0], []).append(name)
    body = max(groups, key=lambda group: len(groups[group]))
    return architecture, sorted(name for group, names in groups.items() if group != body for name in names)


def config_files(folder: Path) -> list[Path]:
    """Return the configs of a model and its generation; transformers may select one by its version."""
    return checked([*folder.glob("config*.json"), *folder.glob("generation_config*.json")])


def module_files(folder: Path) -> list[Path]:
    """Return the files of sentence-transformers: its configs and the directories that ``modules.json`` names.

    Raises:
        ConfigError: ``modules.json`` is broken, or names a directory outside of this one.
    """
    files = [folder / name for name in SENTENCE_TRANSFORMERS if os.path.lexists(folder / name)]
    for _, path in modules(folder):
        if path != folder:
            files += [entry for entry in path.rglob("*") if not entry.is_dir()]
    return checked(files)


def modules(folder: Path) -> list[tuple[str, Path]]:
    """Return class and directory of each module in ``modules.json``; none if there is no such file.

    Raises:
        ConfigError: the file is broken, or names a directory outside of this one.
    """
    path = folder / MODULES
    if not os.path.lexists(path):
        return []
    entries = read_json(path, most_bytes=MOST_CONFIG)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"type", "path"} <= entry.keys() for entry in entries
    ):
        raise ConfigError(f"{path} is no list of modules, each with type and path")
    return [(str(entry["type"]), inside(folder, entry["path"] or ".", path)) for entry in entries]


def half_precision(dtypes: Iterable[str]) -> str:
    """Return the half precision of tensors that are all in one, as torch calls it, else ``float32``."""
    stored = set(dtypes)
    return next((name for dtype, name in HALF.items() if stored == {dtype}), "float32")


def has_tokenizer(folder: Path) -> bool:
    """Return True if a directory holds a tokenizer."""
    return any(os.path.lexists(folder / name) for name in VOCABULARY)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return all files at the top of a directory that a tokenizer may read, and its chat templates.

    Raises:
        ConfigError: one is no regular file, or too large.
    """
    entries = [path for path in folder.iterdir() if not path.is_dir() or path.name in VOCABULARY]
    files = [path for path in entries if path.suffix not in NO_TOKENIZER and not path.name.startswith(".")]
    return checked([*files, *(folder / TEMPLATES).glob("*.jinja")], most_bytes=MOST_VOCABULARY)


def check_tokenizer(folder: Path) -> None:
    """Check that the files of a tokenizer can be read; raises like `tokenizer_files` and `read_object`."""
    for path in tokenizer_files(folder):
        if path.name in SMALL:
            read_object(path)


def checked(files: Iterable[Path], *, most_bytes: int | None = None) -> list[Path]:
    """Return the files sorted and without duplicates, after checking that all are regular files within the size limit.

    Raises:
        ConfigError: a file is missing, no regular file, or too large.
    """
    paths = sorted(set(files))
    for path in paths:
        try:
            size = regular_file(path).st_size
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read {path}: {reason(exc)}") from exc
        if most_bytes is not None and size > most_bytes:
            raise ConfigError(f"{path} has {size:,} bytes, and at most {most_bytes:,} are read")
    return paths


def digests(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Return the digest of each file by its path in the directory.

    Raises:
        ConfigError: a file cannot be read.
    """
    try:
        return digest_files(files, root=folder)
    except OSError as exc:
        raise ConfigError(f"cannot read {exc.filename or folder}: {reason(exc)}") from exc


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the header of a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return all tensors of safetensors files by name, reading headers only.

    Raises:
        Unavailable: a file is cut short, or no safetensors file.
        ConfigError: a tensor is complex.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            entries, start = header(file)
            ends = [0]
            for name, entry in entries.items():
                stored[name] = StoredTensor(file, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                ends.append(int(entry["data_offsets"][1]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
            raise Unavailable(f"{file} is no safetensors file, or it is cut short: {exc}") from exc
        size = file.stat().st_size
        if size != start + max(ends):
            raise Unavailable(
                f"{file} has {size:,} bytes, and its header names {start + max(ends):,}: it is cut short or damaged:"
                " copy it again"
            )
    for name, tensor in stored.items():
        if tensor.dtype.startswith("C"):
            raise ConfigError(f"{tensor.file}: {name} is complex ({tensor.dtype}), and weights must be real numbers")
    return stored
