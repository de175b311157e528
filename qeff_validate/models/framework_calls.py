# SPDX-License-Identifier: Apache-2.0
"""Wraps calls into transformers: no terminal output, translated exceptions; and reads installed versions.

Frameworks are imported inside the functions that need them, so that a fingerprint costs no import of torch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qeff_validate.errors import ConfigError, Unavailable, ValidateError, as_missing_package
from qeff_validate.memory import without_collection

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache of a causal LM, among its arguments and outputs."""

OWN_CODE = (
    "it brings Python code of its own (auto_map in config.json or tokenizer_config.json), and code from a model is"
    " never run; load it yourself and give qv.validate the model in memory"
)


def versions(*names: str) -> dict[str, str | None]:
    """Return installed versions without importing the packages; None where one is missing."""
    return {name: _version(name) for name in names}


@cache  # it reads the package's files, some 2 ms each time
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def import_frameworks() -> None:
    """Import what most stages need, 4 s of work, while another process makes the same tensors.

    What needs these tensors is not in the store either, so it will be needed here too.
    """
    with without_collection(), suppress(ImportError):
        import torch  # noqa: F401
        import transformers.modeling_utils  # noqa: F401


def without_cache(body: Any) -> Any:
    """Return the body in eval mode, with ``use_cache`` off so that a decoder returns no keys and values."""
    config = getattr(body, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False
    return body.eval()


def with_full_attention(model: Any) -> Any:
    """Let BigBird attend to all tokens, as it does from its first short text on; other models are left as they are."""
    for module in list(model.modules()):
        if getattr(module, "attention_type", None) == "block_sparse" and hasattr(module, "config"):
            module.set_attention_type("original_full")
    return model


def cache_argument(model: Any) -> str:
    """Return the name of the argument by which a causal LM takes its cache.

    It is ``cache`` from transformers 5.24 on, where ``past_key_values`` is deprecated; Mamba has ``cache_params``.

    Args:
        model: a transformers model, or a PeftModel around one, whose own ``forward`` passes keywords on.
    """
    names = _arguments(model)
    return next((name for name in CACHE_NAMES if name in names), "past_key_values")


def last_logits(model: Any, count: int) -> dict[str, int]:
    """Return the argument by which a causal LM computes the logits of the last tokens alone, if it has one.

    Args:
        model: as in `cache_argument`.
        count: of tokens.
    """
    return {"logits_to_keep": count} if "logits_to_keep" in _arguments(model) else {}


def _arguments(model: Any) -> Mapping[str, Any]:
    return inspect.signature(base_of(model).forward).parameters


def base_of(model: Any) -> Any:
    """Return the transformers model that a PeftModel is around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_source(model: Any) -> str:
    """Return the text of the file of a model's class; empty if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(type(model)) or type(model))
    except (OSError, TypeError):
        return ""


def returned_cache(outputs: Any) -> Any:
    """Return the cache in the outputs of a causal LM under its newer or older name; None if there is none."""
    caches = (getattr(outputs, name, None) for name in CACHE_NAMES)
    return next((cache for cache in caches if cache is not None), None)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class, and afterwards its previous value; without the attribute do nothing."""
    if name not in vars(owner):
        yield
        return
    previous = vars(owner)[name]  # of a class, without binding it
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


@contextmanager
def translated_errors(action: str) -> Iterator[None]:
    """Translate exceptions of transformers, safetensors and torch, which share no base class.

    Args:
        action: for the message: ``cannot {action}: …``.

    Raises:
        ConfigError: the model needs ``trust_remote_code``.
        MissingPackage: a package of an extra is not installed.
        Unavailable: any other exception that is not ours.
    """
    try:
        yield
    except ValidateError:
        raise
    except Exception as exc:
        missing = as_missing_package(exc)
        if missing is not None:
            raise missing from exc
        if "trust_remote_code" in str(exc):
            raise ConfigError(f"cannot {action}: {OWN_CODE}") from exc
        raise Unavailable(f"cannot {action}: {type(exc).__name__}: {first_line(exc)}") from exc


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars, load reports and deprecation warnings of transformers, beside our own progress output."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loud = level < logging.ERROR  # a change of level makes logging look at thousands of loggers
    if loud:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between transformers and PEFT; not ours to fix
            yield
    finally:
        if loud:
            logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def first_line(exc: BaseException) -> str:
    """Return the first line of an exception's message, joined with the next if it ends with a colon; else its class."""
    lines = [line.strip() for line in (str(exc).strip() or type(exc).__name__).splitlines()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
