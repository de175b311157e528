# SPDX-License-Identifier: Apache-2.0
"""Loads causal language models and applies PEFT adapters. Each step is validated before it changes a model.

model, tokenizer = load_model_and_tokenizer({"source": "random:llama"})
adapted = apply_peft(model, {"peft_method": "lora", "r": 4, "init": "random"})
"""

from __future__ import annotations

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
from qeff_validate.models.adapters.base_state import BaseState, base_parameters, is_base_weight
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

PROMPT = "prompt_embeddings"
"""Name of the learnt tokens in files of PEFT."""

NOISE = 0.05
"""Standard deviation of the noise that ``init: random`` adds to the weights of a new adapter."""


def load_model_and_tokenizer(config: Any) -> tuple[Any, Any]:
    """Load a causal LM in float32, in eval mode, and its tokenizer.

    Args:
        config: a case, or a mapping (or pydantic options) with ``source`` and, if wanted, ``revision``, ``config`` and
            ``seed``, as in a case. Further keys must make an adapter, as `generate_peft_config` takes them.

    Returns:
        The model, and the tokenizer or None. A tokenizer without a padding token pads with its end token.

    Raises:
        ConfigError: a key or value is wrong.
        Unavailable: the source is not available here.

    Examples:
        >>> model, tokenizer = load_model_and_tokenizer({"source": "random:llama"})  # has no tokenizer
        >>> type(model).__name__, tokenizer
        ('LlamaForCausalLM', None)
    """
    if isinstance(config, Case):
        case = config
    else:
        options = as_mapping(config)
        if options.keys() & {"peft_method", "peft_type", "adapter"}:
            generate_peft_config(options)  # report errors in the adapter before the slow loading
        else:
            for key in options.keys() - {*MODEL_KEYS, *APPLY_KEYS}:
                raise ConfigError(f"load_model_and_tokenizer: unknown key {key!r}.{suggest(str(key), MODEL_KEYS)}")
        case = _case({key: options[key] for key in MODEL_KEYS if key in options})
    source = resolve(case)
    tokenizer = source.pretrained_tokenizer()
    if tokenizer is not None and tokenizer.pad_token_id is None:  # 0 is a valid token id
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {case.source} has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
        LOG.info("%s: no padding token, so the end token %r pads", case.source, tokenizer.eos_token)
    return source.causal_lm(), tokenizer


def _case(options: Mapping[str, Any]) -> Case:
    from pydantic import ValidationError

    try:
        return Case(name="model", **options)
    except ValidationError as exc:
        raise ConfigError(explain(exc, "load_model_and_tokenizer", options)) from exc


def apply_peft(model: Any, config: Any, *, seed: int | None = None, init: str | float | None = None) -> Any:
    """Apply an adapter to a causal LM, which PEFT changes in place; on an error it is left unchanged.

    Args:
        model: a causal LM of transformers without an adapter.
        config: what `generate_peft_config` takes or returns. ``adapter: DIR`` loads a saved adapter;
            ``use_peft: false`` returns the model unchanged. It may contain ``seed`` and ``init`` as well.
        seed: of the initial weights; None: that of the config, else 0.
        init: ``peft``: PEFT's initialization, for most methods without effect; ``random`` or a number: seeded noise
            with this standard deviation (`NOISE`) on all trainable weights, so that the adapter has an effect.

    Returns:
        A `peft.PeftModel`, in the mode (train or eval) of the model; only the adapter is trainable.

    Raises:
        ConfigError: the model has an adapter, or this one does not fit it.

    Examples:
        >>> model, tokenizer = load_model_and_tokenizer({"source": "random:llama", "seed": 0})
        >>> adapted = apply_peft(model, {"peft_method": "lora", "r": 4, "target_modules": ["q_proj"], "init": "random"})
        >>> sorted({name.split(".")[-2] for name in adapter_tensors(adapted)})
        ['lora_A', 'lora_B']
    """
    options = as_mapping(config)
    if not _boolean(options, "use_peft"):
        return model
    seed = _seed(options.get("seed", 0) if seed is None else seed)
    noise = _noise(options.get("init", "peft") if init is None else init)
    wanted, folder = generate_peft_config(options), options.get("adapter")
    if folder is not None and noise:
        raise ConfigError("init: an adapter that is loaded has weights already: leave init out")
    tensors = None if folder is None else read_adapter(folder)[1]
    _refuse_adapters(model)
    _check_names(model, wanted)
    wanted.base_model_name_or_path = None  # PEFT sets that of the model
    base = {id(parameter) for parameter in model.parameters()}
    action = f"put what {type(wanted).__name__} says on {type(model).__name__}"
    with _restored_on_error(model, action), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model: Any = get_peft_model(model, wanted)
        _check_layers(peft_model, wanted)
        _only_adapter_trains(peft_model, base, wanted)
        if tensors is not None:
            _load(peft_model, tensors, folder)
        if noise:
            _add_noise(peft_model, noise)
        return peft_model.train(model.training)


def load_adapter_tensors(folder: str | Path) -> tuple[PeftConfig, dict[str, Array]]:
    """Read a saved adapter: PEFT's config, and float32 (or integer) arrays under PEFT's saved names.

    Raises:
        ConfigError: a file is missing, broken or pickled, or is not supported by PEFT or this library.
    """
    data, tensors = read_adapter(folder)
    return config_from_dict(data, f"{folder}/adapter_config.json"), tensors


def adapter_tensors(model: Any, name: str = "default") -> dict[str, Array]:
    """Return copies of the arrays that PEFT would save for an adapter, under its saved names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # "auto" would look up embeddings on the hub
        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().cpu().numpy().copy() for key, tensor in saved.items()}


def _boolean(options: Mapping[str, Any], key: str) -> bool:
    value = options.get(key, True)
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


def _refuse_adapters(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(f"wanted a causal language model of transformers, got {type(model).__name__}")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            f"the model ({type(model).__name__}) has an adapter already: take the base"
            " (model.unload() of PEFT gives it back), or add a second adapter to it with load_adapter"
        )


def _check_names(model: Any, config: Any) -> None:
    """Refuse module names that match no module: PEFT raises only if none of them matches."""
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
    weights = [*(f"{name}.weight" for name in names), *(name for name, _ in model.named_parameters())]  # experts' too
    for option in ("rank_pattern", "alpha_pattern"):
        for part in getattr(config, option, None) or {}:
            if not any(re.search(rf"(^|\.)({part})(\.|$)", name) for name in weights):
                raise ConfigError(f"{option}: {type(model).__name__} has no module that matches {part!r}")


def _check_layers(peft_model: Any, config: Any) -> None:
    """Refuse layer indices without a target module."""
    if config.is_prompt_learning:
        return
    wanted = getattr(config, "layers_to_transform", None)
    layers = {int(part) for name in peft_model.base_model.targeted_module_names for part in name.split(".")
              if part.isdigit()}  # fmt: skip
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        if layer not in layers:
            raise ConfigError(f"layers_to_transform: no target module in layer {layer}; reached: {sorted(layers)}")


@contextmanager
def _restored_on_error(model: nn.Module, action: str) -> Iterator[None]:
    """Translate exceptions of PEFT and restore the model on an error; warnings of PEFT are logged."""
    before = BaseState(model)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()):
            warnings.simplefilter("always")
            yield
    except Exception as exc:
        before.restore()
        if isinstance(exc, ValidateError):
            raise
        if "Conv1D" in str(exc):  # PEFT's sentences about it differ, and name its class by the module
            raise ConfigError(
                f"cannot {action}: PEFT does not have this method for the Conv1D layers of this base: take another"
                " method, such as lora or ia3"
            ) from exc
        raise ConfigError(f"cannot {action}: {first_line(exc)}") from exc
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        LOG.info("%s: %s", action, text)


def _only_adapter_trains(peft_model: Any, base: set[int], config: PeftConfig) -> None:
    trained = [(name, parameter) for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    biases = getattr(config, "bias", "none") != "none"  # they are saved with the adapter
    base_parameters = [
        name for name, parameter in trained if id(parameter) in base and not (biases and name.endswith(".bias"))
    ]
    if base_parameters:
        raise ConfigError(
            f"the adapter would train {len(base_parameters)} weights of the base, first {base_parameters[0]!r}"
        )
    if not trained:
        raise ConfigError("the adapter has nothing to train")


def _load(peft_model: Any, tensors: Mapping[str, Array], folder: Any) -> None:
    """Set the weights of an adapter; names and shapes must be those of its config on this base."""
    expected = {name: array.shape for name, array in adapter_tensors(peft_model).items()}
    base = base_parameters(peft_model.get_base_model())
    held = {name for name in tensors if name in expected or not is_base_weight(name, base, tensors[name].shape)}
    shapes = {name: tensors[name].shape for name in held}
    reason = key_differences(shapes, expected)
    if reason:
        raise ConfigError(f"adapter {folder}: {reason}")
    result: Any = set_peft_model_state_dict(
        peft_model, {name: torch.from_numpy(array) for name, array in tensors.items()}
    )
    config = peft_model.active_peft_config
    if config.is_prompt_learning:  # the file holds what a reparametrizing network gave, not its weights
        config.inference_mode = True
    unexpected = set(result.unexpected_keys) - {PROMPT}  # PEFT has set it apart
    if unexpected:
        raise ConfigError(f"adapter {folder}: PEFT has no place for {sorted(unexpected)[0]!r}")


def _add_noise(peft_model: Any, size: float) -> None:
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)
