# SPDX-License-Identifier: Apache-2.0
"""Causal language models with adapters of PEFT: load, configure, apply. Each step is checked before it changes a model.

model, tokenizer = load_model_and_tokenizer({"source": "random:llama"})
adapted = apply_peft(model, {"peft_method": "lora", "r": 4, "init": "random"})
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from qeff_validate.config.case import Case
from qeff_validate.config.explain import explain
from qeff_validate.errors import ConfigError, ValidateError, suggest
from qeff_validate.models.adapters.config import (
    APPLY_KEYS,
    MODEL_KEYS,
    as_mapping,
    config_from_dict,
    generate_peft_config,
)
from qeff_validate.models.adapters.files import adapter_fingerprint, read_adapter
from qeff_validate.models.adapters.module_patterns import check_patterns
from qeff_validate.models.adapters.names import key_differences
from qeff_validate.models.framework_calls import first_line
from qeff_validate.models.sources.resolve import resolve
from qeff_validate.tensors import Array

__all__ = [
    "adapter_fingerprint",
    "adapter_tensors",
    "apply_peft",
    "generate_peft_config",
    "load_adapter_tensors",
    "load_model_and_tokenizer",
]

LOG = logging.getLogger(__name__)

NOISE = 0.05
"""Standard deviation of what ``init: random`` adds to each number of a fresh adapter."""


def load_model_and_tokenizer(config: Any) -> tuple[Any, Any]:
    """Load a causal LM in float32, in eval mode, and its tokenizer.

    Args:
        config: a case, or a mapping (or pydantic options) with ``source`` and, if wanted, ``revision``, ``config`` and
            ``seed``, as in a case. Further keys must make an adapter, as `generate_peft_config` takes them.

    Returns:
        The model, and the tokenizer or None. A tokenizer without padding token pads with its end token.

    Raises:
        ConfigError: a key or value is wrong.
        Unavailable: the source is not here.
    """
    if isinstance(config, Case):
        case = config
    else:
        given = as_mapping(config)
        if given.keys() & {"peft_method", "peft_type", "adapter"}:
            generate_peft_config(given)  # loading takes long: what is wrong further on is said first
        else:
            for key in given.keys() - {*MODEL_KEYS, *APPLY_KEYS}:
                raise ConfigError(f"load_model_and_tokenizer: unknown key {key!r}.{suggest(str(key), MODEL_KEYS)}")
        case = _case({key: given[key] for key in MODEL_KEYS if key in given})
    source = resolve(case)
    tokenizer = source.pretrained_tokenizer()
    if tokenizer is not None and tokenizer.pad_token_id is None:  # 0 is a token like any other
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {case.source} has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
        LOG.info("%s: no padding token, so the end token %r pads", case.source, tokenizer.eos_token)
    return source.causal_lm(), tokenizer


def _case(given: Mapping[str, Any]) -> Case:
    from pydantic import ValidationError

    try:
        return Case(name="model", **given)
    except ValidationError as exc:
        raise ConfigError(explain(exc, "load_model_and_tokenizer", given)) from exc


def apply_peft(model: Any, config: Any, *, seed: int | None = None, init: str | float | None = None) -> Any:
    """Put an adapter on a causal LM. It is changed in place, as PEFT does, or, on an error, not at all.

    Args:
        model: a causal LM of transformers without an adapter.
        config: what `generate_peft_config` takes or returns. ``adapter: DIR`` loads a saved adapter;
            ``use_peft: false`` returns the model as it is. ``seed`` and ``init`` may stand here too.
        seed: of the initial weights; 0 if none is given.
        init: ``peft``, PEFT's own start, mostly without effect; ``random`` or a number: noise from the seed with this
            standard deviation (`NOISE`) on all that is trained, so that there is an effect to be seen.

    Returns:
        A `peft.PeftModel`, in the mode (train or eval) of the model; what trains is the adapter alone.

    Raises:
        ConfigError: the model has an adapter, or this one does not fit it.

    Examples:
        >>> model, tokenizer = load_model_and_tokenizer({"source": "random:llama", "seed": 0})
        >>> adapted = apply_peft(model, {"peft_method": "lora", "r": 4, "target_modules": ["q_proj"], "init": "random"})
        >>> sorted({name.split(".")[-2] for name in adapter_tensors(adapted)})
        ['lora_A', 'lora_B']
    """
    given = as_mapping(config)
    if not _truth(given, "use_peft"):
        return model
    seed = _seed(given.get("seed", 0) if seed is None else seed)
    noise = _noise(given.get("init", "peft") if init is None else init)
    wanted, folder = generate_peft_config(given), given.get("adapter")
    if folder is not None and noise:
        raise ConfigError("init: an adapter that is loaded has weights already: leave init out")
    tensors = None if folder is None else read_adapter(folder)[1]
    _refuse_adapted(model)
    _check_names(model, wanted)
    wanted.base_model_name_or_path = None  # PEFT writes the model's own
    base = {id(parameter) for parameter in model.parameters()}
    doing = f"put what {type(wanted).__name__} says on {type(model).__name__}"
    with _all_or_nothing(model, doing), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, wanted)
        _check_layers(adapted, wanted)
        _only_adapter_trains(adapted, base)
        if tensors is not None:
            _load(adapted, tensors, folder)
        if noise:
            _add_noise(adapted, noise)
        return adapted.train(model.training)


def load_adapter_tensors(folder: str | Path) -> tuple[PeftConfig, dict[str, Array]]:
    """Read a saved adapter: PEFT's config, and float32 (or integer) arrays under PEFT's saved names.

    Raises:
        ConfigError: a file is missing, broken or pickled, or holds what PEFT or this library does not take.
    """
    data, tensors = read_adapter(folder)
    return config_from_dict(data, f"{folder}/adapter_config.json"), tensors


def adapter_tensors(model: Any, name: str = "default") -> dict[str, Array]:
    """Return copies of the arrays that PEFT would save of an adapted model, under the same names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # embeddings on "auto" would be looked up on the hub
        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().cpu().numpy().copy() for key, tensor in saved.items()}


def _truth(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, True)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}: wanted true or false, got {value!r}")
    return value


def _seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"seed: wanted an integer of at least 0, got {value!r}")
    return value


def _noise(value: Any) -> float:
    if value in ("peft", "random"):
        return NOISE if value == "random" else 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ConfigError(f"init: wanted peft, random, or a standard deviation above 0 and up to 1, got {value!r}")


def _refuse_adapted(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(f"wanted a causal language model of transformers, got {type(model).__name__}")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"the model ({type(model).__name__}) has an adapter already: take the base"
            " (model.unload() of PEFT gives it back), or add a second adapter to it with load_adapter"
        )


def _check_names(model: Any, config: Any) -> None:
    """Refuse names of modules that match none: PEFT complains only if not one of them does."""
    names = [name for name, _ in model.named_modules() if name]
    check_patterns(config, names)
    for option in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        wanted = getattr(config, option, None)
        for part in [] if wanted is None or isinstance(wanted, str) else sorted(wanted):
            if not any(name == part or name.endswith(f".{part}") for name in names):
                known = {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}
                raise ConfigError(
                    f"{option}: {type(model).__name__} has no module {part!r}.{suggest(part, known)} Another base?"
                )
    for option in ("rank_pattern", "alpha_pattern"):
        for part in getattr(config, option, None) or {}:
            if not any(re.search(rf"(^|\.)({part})(\.|$)", f"{name}.weight") for name in names):
                raise ConfigError(f"{option}: {type(model).__name__} has no module that matches {part!r}")


def _check_layers(adapted: Any, config: Any) -> None:
    """Refuse layer numbers that reach nothing."""
    wanted = getattr(config, "layers_to_transform", None)
    layers = {int(part) for name in adapted.base_model.targeted_module_names for part in name.split(".")
              if part.isdigit()}  # fmt: skip
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        if layer not in layers:
            raise ConfigError(f"layers_to_transform: no target module in layer {layer}; reached: {sorted(layers)}")


@contextmanager
def _all_or_nothing(model: nn.Module, doing: str) -> Iterator[None]:
    """Translate what PEFT raises, and give the model its modules back; notes of PEFT go to the log."""
    modules = list(model.modules())
    kept = [(module, type(module), _shallow(vars(module))) for module in modules]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()):
            warnings.simplefilter("always")
            yield
    except Exception as exc:
        for module, kind, state in kept:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        for parameter, required in trains:
            parameter.requires_grad_(required)
        if isinstance(exc, ValidateError):
            raise
        raise ConfigError(f"cannot {doing}: {first_line(exc)}") from exc
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        LOG.info("%s: %s", doing, text)


def _shallow(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a module's attributes and its tables of children, parameters and hooks, but no tensor."""
    return {key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in state.items()}


def _only_adapter_trains(adapted: Any, base: set[int]) -> None:
    trained = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    theirs = [name for name, parameter in trained if id(parameter) in base]
    if theirs:
        raise ConfigError(f"the adapter would train {len(theirs)} weights of the base, first {theirs[0]!r}")
    if not trained:
        raise ConfigError("the adapter has nothing to train")


def _load(adapted: Any, tensors: Mapping[str, Array], folder: Any) -> None:
    """Set an adapter's weights; each must be there, no other, and in the shape that config and base give."""
    expected = {name: array.shape for name, array in adapter_tensors(adapted).items()}
    shapes = {name: array.shape for name, array in tensors.items()}
    reason = key_differences(shapes, expected)
    if reason:
        raise ConfigError(f"adapter {folder}: {reason}")
    result: Any = set_peft_model_state_dict(adapted, {name: torch.from_numpy(array) for name, array in tensors.items()})
    if result.unexpected_keys:
        raise ConfigError(f"adapter {folder}: PEFT has no place for {sorted(result.unexpected_keys)[0]!r}")


def _add_noise(adapted: Any, size: float) -> None:
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)
