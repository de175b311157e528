# SPDX-License-Identifier: Apache-2.0
"""Converts the options of a case to a PEFT config. Options are neither ignored nor coerced: a misfit is an error."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import re
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType, TaskType
from pydantic import BaseModel, TypeAdapter, ValidationError

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.models.framework_calls import first_line

LOG = logging.getLogger(__name__)

MODEL_KEYS = ("source", "revision", "config", "seed")
"""Keys of a config that select the model."""

APPLY_KEYS = ("adapter", "init", "use_peft")
"""Keys that are options of `apply_peft`; the others are the method and its options."""

ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
}
"""Names of variants: the method, and the options that they set."""

REFUSED: Mapping[str, str] = {
    "adaption_prompt": "it lets each layer attend to learned tokens of its own beside the text, with a gate, which is"
    " neither a change of weights nor a token of the cache",
    "cartridge": "its keys and values come from another text's cache; prefix_tuning's are served",
    "cpt": "it trains on examples in the prompt, whose types each run needs beside the tokens",
    "multitask_prompt_tuning": "each run needs task_ids beside the tokens; prompt_tuning is served",
    "lily": "its router averages over all tokens of a run, so a text's answer depends on padding, on its neighbours in"
    " the batch and on tokens that follow",
    "frod": "its rotations are sparse tensors, for which ONNX has no operators",
    "poly": "each run needs task_ids beside the tokens",
    "shira": "its weights are sparse tensors, for which ONNX has no operators",
    "shadow": "it runs a second model beside the base",
    "xlora": "it mixes other adapters by a run of its own, and needs the cache off",
}
"""PEFT methods that are not supported here, and why."""

METHODS: Mapping[str, type[PeftConfig]] = {
    kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value.lower() not in REFUSED
}
"""Supported methods by PEFT's lower-case names."""

ZERO_IS_OFF = frozenset({"boft_block_num", "boft_block_size", "oft_block_size", "r"})
"""Options of which BOFT and OFT need one of a pair, and 0 for the other."""

INITS_OF_A = ("eva",)
"""Initializations from data that leave the base unchanged; a file holds their result."""

INITS = (True, False, None, "gaussian", "orthogonal")
"""Initializations of LoRA that leave the base unchanged and need no data."""

MEANT_EMPTY = ("feedforward_modules", "target_modules")
"""Options for which an empty list in a file says something else than none: IA3 may scale outputs alone."""

NOT_OPTIONS = frozenset({"runtime_config", *(field.name for field in dataclasses.fields(PeftConfig))})


def generate_peft_config(config: Any) -> PeftConfig:
    """Return the PEFT config for a causal LM.

    Args:
        config: a mapping (or pydantic options) with ``peft_method`` (a PEFT method in lower case, ``rslora`` or
            ``dora``) and the method's options, beside it or in a mapping under its name; or with ``adapter``, the
            directory of a saved adapter. A PEFT config, or its ``to_dict``, is validated and copied.

    Raises:
        ConfigError: the method or an option is unknown or invalid; the message says what is valid.

    Examples:
        >>> generate_peft_config({"peft_method": "rslora", "r": 4}).use_rslora
        True
    """
    options = {key: value for key, value in as_mapping(config).items() if key not in (*MODEL_KEYS, *APPLY_KEYS)}
    adapter = as_mapping(config).get("adapter")
    if adapter is not None:
        if options:
            raise ConfigError(f"adapter: {adapter} has a config of its own: leave out {', '.join(sorted(options))}")
        from qeff_validate.models.adapters.files import read_adapter

        return config_from_dict(read_adapter(adapter)[0], f"{adapter}/adapter_config.json")
    if "peft_type" in options:
        return config_from_dict({k: v for k, v in as_mapping(config).items() if k not in APPLY_KEYS}, "the config")
    name = options.pop("peft_method", None)
    method, fixed = _method(name)
    where = f"peft_method {name}"
    method_options = dict(_flattened(options, method, where))
    for key, value in fixed.items():
        if method_options.setdefault(key, value) is not value:
            raise ConfigError(f"{where}: {key}: {name} means {value}, got {method_options[key]!r}: leave it out")
    check_options(method, method_options, where)
    return _create_config(method, method_options, where)


def config_from_dict(data: Mapping[str, Any], where: str) -> PeftConfig:
    """Return the config from plain data that PEFT has written.

    Args:
        data: from ``to_dict`` or ``adapter_config.json``.
        where: name of the config in error messages.

    Raises:
        ConfigError: as `generate_peft_config`; also a key that this PEFT lacks, unless its value is false or empty.
    """
    task, name = data.get("task_type"), str(data.get("peft_type")).rpartition(".")[2].lower()
    if task is not None and task != TaskType.CAUSAL_LM:
        raise ConfigError(f"{where}: task_type {task!r}: wanted CAUSAL_LM, the adapter of a causal language model")
    if name not in METHODS and name not in REFUSED:
        raise ConfigError(f"{where}: peft_type {data.get('peft_type')!r} is no method of this PEFT.")
    method, _ = _method(name)
    known = _fields(method)
    method_options = {key: value for key, value in data.items() if key in known and key not in NOT_OPTIONS}
    for key in [key for key, value in method_options.items() if value == [] and key not in MEANT_EMPTY]:
        del method_options[key]  # PEFT takes it as off
    unknown = [key for key, value in data.items() if key not in known and key not in NOT_OPTIONS and not _is_off(value)]
    if unknown:
        raise ConfigError(
            f"{where}: {unknown[0]}: {data[unknown[0]]!r}: PEFT {version('peft')} has no such option (the file was"
            f" written by {data.get('peft_version') or 'an old one'}), so the adapter may compute something else here"
            " than where it was trained. Install the PEFT that wrote it, or take the option out of the file if you know"
            " that it changes nothing"
        )
    initialization = data.get("init_lora_weights")
    if method == "lora" and initialization not in (*INITS, *INITS_OF_A):
        raise ConfigError(
            f"{where}: init_lora_weights: {initialization!r}: PEFT changes weights of the base when it loads such an"
            " adapter, so no other can share that base. Convert it to plain LoRA on the original base:"
            " save_pretrained(DIR, path_initial_model_for_weight_conversion=DIR_OF_THE_INITIAL_ADAPTER)"
        )
    if initialization in INITS_OF_A:
        method_options["init_lora_weights"] = True  # of A alone, which the file holds: PEFT loads the same
    check_options(method, method_options, where)
    return _create_config(method, method_options, where, base=data.get("base_model_name_or_path"), file=True)


def as_mapping(config: Any) -> dict[str, Any]:
    """Return a config as a mapping, without unset options.

    Raises:
        ConfigError: it is no mapping, PEFT config or pydantic model.
    """
    if isinstance(config, PeftConfig):
        return config.to_dict()
    if isinstance(config, BaseModel):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"wanted a mapping with peft_method and its options, got {type(config).__name__}")


def _method(name: Any) -> tuple[str, Mapping[str, Any]]:
    known = [*METHODS, *ALIASES]
    if not isinstance(name, str):
        raise ConfigError(f"peft_method: wanted the name of a method, got {name!r}. Known: {', '.join(sorted(known))}.")
    if name in REFUSED:
        raise ConfigError(f"peft_method {name}: {REFUSED[name]}; choose another, such as lora")
    method, fixed = ALIASES.get(name, (name, {}))
    if method not in METHODS:
        raise ConfigError(f"peft_method: PEFT has no method {name!r}.{suggest(name, known)}")
    return method, fixed


def _flattened(options: Mapping[str, Any], method: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yield options at top level and those nested under the method's name; none may be repeated."""
    seen: set[str] = set()
    for key, value in options.items():
        nested = isinstance(value, Mapping) and (key in METHODS or key in ALIASES)
        if nested and ALIASES.get(key, (key,))[0] != method:
            raise ConfigError(f"{where}: {key}: these are options of another method; name that one, or leave them out")
        for name, item in value.items() if nested else [(key, value)]:
            if name in seen:
                raise ConfigError(f"{where}: {name} stands there twice, flat and under {method}")
            seen.add(name)
            yield name, item


def _fields(method: str) -> dict[str, Any]:
    hints = typing.get_type_hints(METHODS[method])
    return {
        field.name: hints[field.name] for field in dataclasses.fields(METHODS[method]) if field.name not in NOT_OPTIONS
    }


def check_options(method: str, method_options: Mapping[str, Any], where: str) -> None:
    """Check names, types and ranges of a method's options.

    Raises:
        ConfigError: an option is invalid; the message has its name, its value and what is wanted.
    """
    known = _fields(method)
    defaults = {field.name: field.default for field in dataclasses.fields(METHODS[method])}
    for name, value in method_options.items():
        if name not in known:
            owners = [other for other in METHODS if name in _fields(other)]
            if owners:
                raise ConfigError(f"{where}: {name} is an option of {', '.join(sorted(owners))}, not of {method}")
            raise ConfigError(f"{where}: {method} has no option {name!r}.{suggest(str(name), known)}")
        reason = _unsupported(name, value)
        if reason:
            raise ConfigError(f"{where}: {name}: {reason}, got {value!r}")
        if name == "target_modules" and value in ([], set()) and method_options.get("target_parameters"):
            continue  # PEFT's own choice of modules would be added to None
        if value is None and defaults[name] is None:
            continue  # PEFT fills it from the base, whatever type it declares
        wanted = _wanted_instead(name, value, known[name], defaults[name])
        if wanted:
            quoted = isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip())
            remedy = ": write it without quotes" if quoted else ""
            raise ConfigError(f"{where}: {name}: wanted {wanted}, got {value!r}{remedy}")


def _wanted_instead(name: str, value: Any, hint: Any, default: Any) -> str | None:
    """Return what is wanted instead of an invalid value, None if it is valid."""
    if "alpha" in name and isinstance(value, float) and hint is int:
        return None if value > 0 and math.isfinite(value) else "a positive number"  # PEFT only divides by the rank
    try:
        TypeAdapter(hint).validate_json(json.dumps(value, default=_plain), strict=True)
    except (ValidationError, TypeError, ValueError):
        return re.sub(r"typing\.|<class '(?:\w+\.)*(\w+)'>", r"\1", str(hint)).replace("NoneType", "None")
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _out_of_range(name, value, default)
    empty = isinstance(value, Collection) and not isinstance(value, (str, Mapping)) and not value
    if empty and name != "feedforward_modules":  # IA3 may scale outputs alone
        return "at least one entry, or leave it out"
    patterns = value.values() if isinstance(value, Mapping) and name in {"rank_pattern", "alpha_pattern"} else ()
    return None if all(_positive(item, name) for item in patterns) else "positive numbers"


def _positive(item: Any, name: str) -> bool:
    if isinstance(item, list):  # AdaLoRA lists which ranks remain
        return all(isinstance(entry, bool) for entry in item)
    kinds = (int,) if name == "rank_pattern" else (int, float)
    return isinstance(item, kinds) and not isinstance(item, bool) and item > 0


def _out_of_range(name: str, value: float, default: Any) -> str | None:
    if "dropout" in name:
        return None if 0 <= value < 1 else "at least 0 and less than 1"
    if not isinstance(default, int) or isinstance(default, bool) or default < 0 or "seed" in name or "_key" in name:
        return None
    least = 0 if default == 0 or (name in ZERO_IS_OFF and name != "r") else 1
    return None if value >= least else f"at least {least}"


def _unsupported(name: str, value: Any) -> str | None:
    """Return why an option of PEFT is not supported: the base would not stay unchanged."""
    if name == "save_only_topk_weights" and value:
        return "its file holds indices and the greatest weights, which do not become inputs: save it without"
    if name == "layer_replication" and value:
        return "this gives the base other layers: build such a base first"
    if name == "init_lora_weights" and value not in INITS:
        return "wanted true, false, 'gaussian' or 'orthogonal': others change weights of the base or need data"
    return None


def _is_off(value: Any) -> bool:
    """Return True for values with which an option has no effect: false, empty, or a mapping of such values."""
    return not value or (isinstance(value, Mapping) and all(map(_is_off, value.values())))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is no plain data")


def _create_config(
    method: str, method_options: Mapping[str, Any], where: str, *, base: str | None = None, file: bool = False
) -> PeftConfig:
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        try:
            config = METHODS[method](
                task_type=TaskType.CAUSAL_LM, base_model_name_or_path=base, **copy.deepcopy(dict(method_options))
            )
        except Exception as exc:  # each config class raises its own exceptions
            raise ConfigError(f"{where}: {' '.join(str(exc).split()) or first_line(exc)}") from exc
    for warning in caught_warnings:
        text = " ".join(str(warning.message).split())
        if "ignored" in text and not file:
            raise ConfigError(f"{where}: {text}")
        LOG.info("%s: %s", where, text)
    assert config.peft_type == PeftType[method.upper()]
    return config
