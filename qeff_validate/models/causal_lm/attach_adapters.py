# SPDX-License-Identifier: Apache-2.0
"""A causal LM with a fresh adapter on it, and the tensors of every adapter of a case in its place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import adapter_tensors, apply_peft, load_adapter_tensors
from qeff_validate.models.adapters.config import generate_peft_config
from qeff_validate.models.adapters.files import NOT_CONTENT
from qeff_validate.models.adapters.names import key_differences
from qeff_validate.models.causal_lm.kv_cache import state_shapes
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.tensors import Array, Tensors

OFF = ("init_lora_weights", "init_weights", "init_ia3_weights")
"""Options that say how an adapter starts; PEFT's default mostly is a start without effect."""

UNEXPORTABLE: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) looks for its invocation tokens in each prompt",
    "arrow_config": "Arrow chooses among adapters for each token",
    "target_parameters": "LoRA on parameters, such as the experts of a mixture, computes whole weights in each run",
}
"""Options of PEFT that work in PyTorch and have no graph here, and why."""

SAME = 1e-5
"""Greatest relative L2 of logits with an adapter that has no effect: DoRA and OFT round, others change no bit."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to be wrapped.

    Attributes:
        model: float32, eval mode, with a fresh adapter if there are adapters.
        dims: for each layer ``(heads, head_dim)`` of keys and of values.
        live: saved name of each adapter tensor and its name in ``model``.
        adapters: tensors of ``base`` and of each adapter, by saved names.
        eos: ids that end a text.
        brought: the model came with its adapters, and they are off for good.
    """

    model: Any
    dims: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    live: Mapping[str, str]
    adapters: Mapping[str, Tensors]
    eos: frozenset[int]
    brought: bool = False

    def off(self) -> Any:
        """Return the model as `adapt` takes it, None if it came with adapters; ``model`` is of no use afterwards."""
        if self.brought:
            return None
        return self.model.unload() if self.live else self.model

    def interface(self) -> dict[str, Any]:
        """Return what the graph's interface is made from, as plain data."""
        return {"dims": self.dims, "vocab": self.model.config.get_text_config().vocab_size}


def adapt(model: Any, named: Mapping[str, str | Mapping[str, Any]]) -> Loaded:
    """Make every adapter's tensors, and put a fresh adapter on a model.

    Args:
        model: a causal LM, changed in place; a PeftModel brings its own adapters.
        named: the case's adapters.

    Raises:
        ConfigError: an adapter does not fit the model, or the adapters cannot share a graph.
    """
    brought = isinstance(model, PeftModel)
    if brought:
        if named:
            raise ConfigError("a PeftModel brings its own adapters: leave out options.adapters and peft_method")
        configs, tensors, model = _taken_off(model)
    else:
        configs, tensors = _made(model, named)
    with translated_errors(f"run {type(model).__name__} with keys and values kept"):
        dims = state_shapes(model)
    eos = _eos(model)
    if not configs:
        return Loaded(model, dims, {}, {BASE: {}}, eos)
    _alike(configs)
    _refuse_unexportable(next(iter(configs.values())))
    plain = _probe(model)
    adapted = apply_peft(model, fresh(next(iter(configs.values()))))
    _take_out_effect(adapted, plain)
    off = adapter_tensors(adapted)
    _same_shapes(off, tensors)
    live = live_names(adapted)
    _refuse_unequal_views(live, adapted, tensors)
    return Loaded(adapted, dims, live, {BASE: off, **tensors}, eos, brought)


def _refuse_unexportable(config: PeftConfig) -> None:
    for option, why in UNEXPORTABLE.items():
        if getattr(config, option, None):
            raise ConfigError(f"adapter option {option} is not supported: {why}, and that does not export to ONNX")


def fresh(config: PeftConfig) -> PeftConfig:
    """Return a config whose adapter starts as PEFT starts one by default, mostly without effect."""
    made = copy.deepcopy(config)
    for field in dataclasses.fields(made):
        if field.name in OFF:
            setattr(made, field.name, field.default)
    return made


def _probe(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([[0, 1]])).logits
    return found


def _take_out_effect(adapted: Any, plain: torch.Tensor) -> None:
    """Make a fresh adapter one without effect: it is the model that is called base.

    Raises:
        ConfigError: neither PEFT's start nor zeros are without effect.
    """
    for zero in (False, True):
        if zero:
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.zero_()
        if (_probe(adapted) - plain).norm() <= SAME * plain.norm():
            return
    raise ConfigError(
        f"neither a fresh adapter of {type(adapted.active_peft_config).__name__} nor one of zeros is without effect, so"
        " the graph cannot be the model without an adapter"
    )


def live_names(model: Any, adapter: str = "default") -> dict[str, str]:
    """Return the name in the model of each tensor that PEFT would save, found by its storage and layout.

    With ``ensure_weight_tying`` an adapter of the head is a transposed view of the embedding's, so storage alone is
    not enough.

    Raises:
        ConfigError: PEFT saves a tensor that is none of the model's own.
    """
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    names = {_memory(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    live = {}
    for name, tensor in saved.items():
        if _memory(tensor) not in names:
            raise ConfigError(f"adapter tensor {name!r} is no parameter of the model, so it cannot become an input")
        live[name] = names[_memory(tensor)]
    return live


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _made(
    model: Any, named: Mapping[str, str | Mapping[str, Any]]
) -> tuple[dict[str, PeftConfig], dict[str, dict[str, Array]]]:
    """Read saved adapters; make the others with seeded noise on a structure of the model alone."""
    configs: dict[str, PeftConfig] = {}
    tensors: dict[str, dict[str, Array]] = {}
    for name, made in named.items():
        if isinstance(made, str):
            configs[name], tensors[name] = load_adapter_tensors(made)
            continue
        options = {"init": "random", **made}
        configs[name] = generate_peft_config(made)
        adapted = apply_peft(model, options)
        tensors[name] = adapter_tensors(adapted)
        model = adapted.unload()
    return configs, tensors


def _taken_off(model: Any) -> tuple[dict[str, PeftConfig], dict[str, dict[str, Array]], Any]:
    """Return the adapters of a PeftModel and its base."""
    configs = dict(model.peft_config)
    tensors = {name: adapter_tensors(model, name) for name in configs}
    if BASE in configs:
        raise ConfigError(f"an adapter cannot be called {BASE!r}: that is the model without one")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ConfigError("an adapter is merged into the weights of the PeftModel: call its unmerge_adapter() first")
    return configs, tensors, model.unload()


def _alike(configs: Mapping[str, PeftConfig]) -> None:
    first, *others = configs
    wanted = _content(configs[first])
    for name in others:
        got = _content(configs[name])
        differing = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
        if differing:
            said = "; ".join(f"{key}: {wanted.get(key)!r} and {got.get(key)!r}" for key in differing[:4])
            raise ConfigError(f"adapters {first!r} and {name!r} cannot share a graph: {said}; give each a case")


def _content(config: PeftConfig) -> dict[str, Any]:
    plain = config.to_dict()
    kept = {key: value for key, value in plain.items() if key not in NOT_CONTENT and key not in OFF}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def _same_shapes(wanted: Tensors, others: Mapping[str, Tensors]) -> None:
    for adapter, tensors in others.items():
        reason = key_differences(_shapes_of(tensors), _shapes_of(wanted))
        if reason:
            raise ConfigError(f"adapter {adapter!r}: {reason}")


def _shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def _refuse_unequal_views(live: Mapping[str, str], model: Any, adapters: Mapping[str, Tensors]) -> None:
    """Refuse adapters whose copies of a tied tensor differ: PEFT keeps one, whichever it loads last.

    Raises:
        ConfigError: they differ.
    """
    state = dict((*model.named_parameters(), *model.named_buffers()))
    views: dict[int, list[str]] = {}
    for saved, name in live.items():
        views.setdefault(state[name].data_ptr(), []).append(saved)
    for first, *others in views.values():
        for other in others:
            for adapter, tensors in adapters.items():
                same = state[live[first]].shape == state[live[other]].shape
                if not np.array_equal(tensors[first], tensors[other] if same else tensors[other].T):
                    raise ConfigError(
                        f"adapter {adapter!r}: {first} and {other} are one tied tensor (ensure_weight_tying), and the"
                        " adapter has two different ones: save it anew with PEFT"
                    )


def _eos(model: Any) -> frozenset[int]:
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(config, "eos_token_id", None)
        found |= {int(one) for one in (value if isinstance(value, (list, tuple)) else [value]) if one is not None}
        if found:
            break
    return frozenset(found)


def set_tensors(model: Any, tensors: Tensors, live: Mapping[str, str]) -> None:
    """Copy adapter tensors into a model."""
    state = dict((*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        for name, array in tensors.items():
            state[live[name]].copy_(torch.from_numpy(np.ascontiguousarray(array)))
