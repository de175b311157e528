# SPDX-License-Identifier: Apache-2.0
"""Attaches an adapter without effect to a causal LM, and reads or creates the tensors of every adapter of a case."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import get_peft_model_state_dict

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.apply import (
    adapter_tensors,
    apply_peft,
    load_adapter_tensors,
)
from qeff_validate.models.adapters.base_state import PREFIX, BaseState, base_name, base_parameters, split_base_weights
from qeff_validate.models.adapters.config import generate_peft_config
from qeff_validate.models.adapters.files import NOT_CONTENT
from qeff_validate.models.adapters.names import key_differences
from qeff_validate.models.adapters.shared_lora import (
    INVOCATION,
    LoraLayers,
    lora_layers,
    not_shareable,
    shared_options,
    shared_tensors,
)
from qeff_validate.models.causal_lm.decoder_state import StateShapes, state_shapes
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.causal_lm.vector_choices import decisive_adapters
from qeff_validate.models.causal_lm.virtual_tokens import VirtualTokens, virtual_tokens
from qeff_validate.models.framework_calls import first_line, translated_errors
from qeff_validate.tensors import Array, Tensors

INIT_OPTIONS = ("init_lora_weights", "init_weights", "init_ia3_weights")
"""PEFT options for the initialization of an adapter; by default most adapters start without effect."""

UNSUPPORTED: Mapping[str, str] = {
    "arrow_config": "Arrow chooses among adapters for each token, and that does not export to ONNX",
    "coft": "constrained OFT projects its weights anew in each run, so that no run repeats another",
}
"""PEFT options that are not supported, and why."""

STRUCTURAL: Mapping[PeftType, str] = {PeftType.MISS: "init_weights"}
"""Options for the initialization that also say what an adapter computes, and the sizes of its tensors."""

NEUTRAL_TOLERANCE = 1e-5
"""Accepted relative L2 of logits with an adapter without effect: DoRA and OFT round, other methods change no bit."""


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """A causal LM with an adapter attached.

    Attributes:
        model: float32, eval mode, with an adapter without effect if the case has adapters.
        states: what the model keeps between runs.
        parameter_names: the name in ``model`` of each adapter tensor, by its saved name.
        adapters: tensors of ``base`` and of each adapter, by saved name.
        eos: token ids that end a text.
        virtual: the adapters' virtual tokens; None: they have none.
        invocation: tokens of a prompt from which on the adapters act; empty: they always do.
        before: the state of the model without the adapter; None: it was a PeftModel, whose adapters have been removed.
        shared: PEFT options of the layers that serve adapters of different shape; None: all have the same options.
    """

    model: Any
    states: StateShapes
    parameter_names: Mapping[str, str]
    adapters: Mapping[str, Tensors]
    eos: frozenset[int]
    before: BaseState | None = None
    shared: Mapping[str, Any] | None = None
    virtual: VirtualTokens | None = None
    invocation: tuple[int, ...] = ()

    def base_model(self) -> Any:
        """Return the model without adapters, None if it had its own; ``model`` must not be used afterwards."""
        return None if self.before is None else self.before.restore()

    def interface(self) -> dict[str, Any]:
        """Return the sizes that determine the graph's interface, as plain data."""
        states = {"dims": self.states.dims, "recurrent": self.states.recurrent}
        return {**states, "vocab": self.model.config.get_text_config().vocab_size}


def attach(model: Any, named: Mapping[str, str | Mapping[str, Any]], known: int | None = None) -> AdaptedModel:
    """Read or create the tensors of every adapter, and attach an adapter without effect to the model.

    Args:
        model: a causal LM, changed in place; a PeftModel has its own adapters.
        named: the case's adapters: directories, or PEFT options of random ones.
        known: number of tokens of the base before its vocabulary grew to that of its adapters; None: it has not.

    Raises:
        ConfigError: an adapter does not fit the model, or the adapters cannot share a graph.
    """
    own_adapters = isinstance(model, PeftModel)
    if own_adapters:
        if named:
            raise ConfigError("a PeftModel brings its own adapters: leave out options.adapters and peft_method")
        configs, tensors, model = _detach_adapters(model)
    else:
        configs, tensors = _create_adapters(model, named)
    before = None if own_adapters else BaseState(model)
    with translated_errors(f"run {type(model).__name__} with keys and values kept"):
        states = state_shapes(model)
    eos = _eos_ids(model)
    if not configs:
        return AdaptedModel(model, states, {}, {BASE: {}}, eos, before)
    for config in configs.values():
        _refuse_unsupported(config)
    if any(config.is_prompt_learning for config in configs.values()):
        sizes, kind = _widths(model, states), model.config.get_text_config().model_type
        virtual, padded = virtual_tokens(configs, tensors, BASE, sizes, kind)
        return AdaptedModel(model, states, {}, padded, eos, before, virtual=virtual)
    difference = _option_difference(configs)
    layers: dict[str, LoraLayers] = {}
    shared: dict[str, Any] | None = None
    if difference:
        _check_shareable(configs, difference)
        for name, config in configs.items():
            layers[name], model = lora_layers(model, config)
        shared = shared_options(configs, layers)
    config = next(iter(configs.values())) if shared is None else generate_peft_config(shared)
    base = base_parameters(model)
    base_logits = _probe_logits(model)
    with _together(shared and configs):
        peft_model = apply_peft(model, with_default_init(config))
        _make_neutral(peft_model, base_logits, base.values())
    neutral = adapter_tensors(peft_model)
    rows = known or int(model.get_input_embeddings().weight.shape[0])
    replaced: dict[str, dict[str, Array]] = {}
    for name, arrays in tensors.items():
        own = neutral if shared is None else layers[name].shapes
        tensors[name], replaced[name] = split_base_weights(arrays, own, base, name, rows)
        _check_shapes(_shapes_of(neutral) if shared is None else layers[name].shapes, {name: tensors[name]})
    parameter_names = find_parameter_names(peft_model)
    if shared is not None:
        for name, arrays in tensors.items():
            tensors[name], biases = _without_biases(arrays, neutral)
            replaced[name] |= biases
            tokens = shared.get("trainable_token_indices", ())
            tensors[name] = shared_tensors(tensors[name], layers[name], neutral, tokens)
    neutral, tensors = _with_base_weights(neutral, tensors, replaced, base, peft_model, parameter_names)
    _refuse_unequal_views(parameter_names, peft_model, tensors)
    # one order everywhere: PEFT's is that of the modules, a stored file's is alphabetical
    parameter_names = dict(sorted(parameter_names.items()))
    topk = getattr(config, "topk", None) if config.peft_type == PeftType.VBLORA else None
    adapters = decisive_adapters({BASE: neutral, **tensors}, topk)
    ordered = {name: dict(sorted(arrays.items())) for name, arrays in adapters.items()}
    invocation = tuple(getattr(config, "alora_invocation_tokens", None) or ())
    return AdaptedModel(peft_model, states, parameter_names, ordered, eos, before, shared, invocation=invocation)


@contextmanager
def _together(sharing: Collection[str] | None) -> Iterator[None]:
    """Say of an error with the layers that adapters share that these cannot be on one module, or that one alone can.

    Args:
        sharing: names of the adapters; None or empty: they share no layers.
    """
    try:
        yield
    except ConfigError as exc:
        if not sharing:
            raise
        raise ConfigError(
            f"adapters {', '.join(map(repr, sharing))} fit the base one by one, and cannot share a graph: PEFT does not"
            f" put on one module what they have there ({first_line(exc.__cause__ or exc)}): give each a case"
        ) from exc


def _widths(model: Any, states: StateShapes) -> dict[str, int]:
    """Return the number of tokens, the width of their embeddings, and that of their keys and values in all layers."""
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    layers = [pair for pair in states.dims if pair is not None]
    alike = len({sizes for pair in layers for sizes in pair}) == 1 and len(layers) == len(states.dims)
    cache = sum(heads * size for pair in layers for heads, size in pair) if alike and not states.recurrent else 0
    return {"vocab": int(vocabulary), "hidden": int(hidden), "cache": cache}


def _without_biases(tensors: Tensors, neutral: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the tensors without biases of the base, which the shared options do not make part of an adapter."""
    biases = {name: array for name, array in tensors.items() if name.endswith(".bias") and name not in neutral}
    return (
        {name: array for name, array in tensors.items() if name not in biases},
        {base_name(name): array for name, array in biases.items()},
    )


def _with_base_weights(
    neutral: Tensors,
    tensors: Mapping[str, Tensors],
    replaced: Mapping[str, Tensors],
    base: Mapping[str, torch.nn.Parameter],
    peft_model: Any,
    parameter_names: dict[str, str],
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """Make weights of the base that some adapter replaces inputs of the graph; the others bring the base's own.

    Args:
        neutral: tensors of an adapter without effect, by saved name.
        tensors: of each adapter.
        replaced: weights that each adapter replaces, by their name in the base.
        base: parameters of the base, by name.
        peft_model: the base with an adapter.
        parameter_names: name in the model of each input; those of the weights are added.
    """
    wanted = sorted({name for weights in replaced.values() for name in weights})
    places = {id(parameter): name for name, parameter in peft_model.named_parameters()}
    neutral, adapters = dict(neutral), {name: dict(arrays) for name, arrays in tensors.items()}
    for name in wanted:
        saved, weight = f"{PREFIX}{name}", base[name]
        tied = sum(other is weight for other in base.values()) > 1
        if saved in neutral:  # the shared graph has a copy of the module (modules_to_save)
            for adapter, weights in replaced.items():
                adapters[adapter][saved] = weights.get(name, adapters[adapter][saved])
            if not tied:
                continue
            saved = f"{PREFIX}{name} (tied)"
        neutral[saved] = weight.detach().float().numpy().copy()
        parameter_names[saved] = places[id(weight)]
        for adapter, weights in replaced.items():
            adapters[adapter][saved] = weights.get(name, neutral[saved])
    return neutral, adapters


def _refuse_unsupported(config: PeftConfig) -> None:
    for option, why in UNSUPPORTED.items():
        if getattr(config, option, None):
            raise ConfigError(f"adapter option {option} is not supported: {why}")


def with_default_init(config: PeftConfig) -> PeftConfig:
    """Return a copy of a config with PEFT's default initialization, for most methods without effect."""
    fresh_config = copy.deepcopy(config)
    for field in dataclasses.fields(fresh_config):
        if field.name in INIT_OPTIONS and STRUCTURAL.get(PeftType(config.peft_type)) != field.name:
            setattr(fresh_config, field.name, field.default)
    return fresh_config


def _probe_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[0, 1]])).logits
    return logits


def _adapted_logits(peft_model: Any) -> torch.Tensor:
    """Return `_probe_logits` of a model with an adapter.

    Raises:
        ConfigError: PEFT has put the adapter on a module that it cannot run.
    """
    try:
        return _probe_logits(peft_model)
    except (AttributeError, RuntimeError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"PEFT does not run {type(peft_model.get_base_model()).__name__} with this adapter ({first_line(exc)}):"
            " leave modules that are no plain layers, such as routers, out of target_modules (exclude_modules)"
        ) from exc


def _make_neutral(peft_model: Any, base_logits: torch.Tensor, base: Iterable[torch.nn.Parameter]) -> None:
    """Make sure that a new adapter has no effect, by setting it to zeros if needed: it stands for the base model.

    Raises:
        ConfigError: neither PEFT's initialization nor zeros are without effect.
    """
    own = {id(parameter) for parameter in base}
    for zero in (False, True):
        if zero:
            with torch.no_grad():
                for parameter in peft_model.parameters():
                    if parameter.requires_grad and id(parameter) not in own:
                        parameter.zero_()
        if (_adapted_logits(peft_model) - base_logits).norm() <= NEUTRAL_TOLERANCE * base_logits.norm():
            return
    config = type(peft_model.active_peft_config).__name__
    raise ConfigError(
        f"neither a fresh adapter of {config} nor one of zeros is without effect, so"
        " the graph cannot be the model without an adapter"
    )


def find_parameter_names(model: Any, adapter: str = "default") -> dict[str, str]:
    """Return the name in the model of each tensor that PEFT would save, identified by storage and layout.

    With ``ensure_weight_tying`` an adapter of the head is a transposed view of the embedding's, so the storage alone is
    ambiguous.

    Raises:
        ConfigError: PEFT saves a tensor that is no parameter or buffer of the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on biases of LoRA
        saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    names = {_memory(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    parameter_names = {}
    for name, tensor in saved.items():
        if _memory(tensor) not in names:
            raise ConfigError(f"adapter tensor {name!r} is no parameter of the model, so it cannot become an input")
        parameter_names[name] = names[_memory(tensor)]
    return parameter_names


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _create_adapters(
    model: Any, named: Mapping[str, str | Mapping[str, Any]]
) -> tuple[dict[str, PeftConfig], dict[str, dict[str, Array]]]:
    """Read saved adapters, and create the others with seeded noise."""
    configs: dict[str, PeftConfig] = {}
    tensors: dict[str, dict[str, Array]] = {}
    for name, spec in named.items():
        if isinstance(spec, str):
            configs[name], tensors[name] = load_adapter_tensors(spec)
            continue
        options = {"init": "random", **spec}
        configs[name] = generate_peft_config(spec)
        biases = [key for key in base_parameters(model) if key.endswith(".bias")]
        before = BaseState(model, biases)
        tensors[name] = adapter_tensors(apply_peft(model, options))
        before.restore()
    return configs, tensors


def _detach_adapters(model: Any) -> tuple[dict[str, PeftConfig], dict[str, dict[str, Array]], Any]:
    """Return configs and tensors of the adapters of a PeftModel, and its base model."""
    configs = dict(model.peft_config)
    if any(config.is_prompt_learning for config in configs.values()):
        raise ConfigError(
            "a PeftModel in memory with virtual tokens is not taken: save it with save_pretrained(DIR), and name DIR in"
            " options.adapters"
        )
    tensors = {name: adapter_tensors(model, name) for name in configs}
    if BASE in configs:
        raise ConfigError(f"an adapter cannot be called {BASE!r}: that is the model without one")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ConfigError("an adapter is merged into the weights of the PeftModel: call its unmerge_adapter() first")
    return configs, tensors, model.unload()


def _option_difference(configs: Mapping[str, PeftConfig]) -> str:
    """Return two adapters whose options differ, and how; empty if all have the same."""
    first, *others = configs
    wanted = _options_of(configs[first])
    for name in others:
        got = _options_of(configs[name])
        differing = sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))
        if differing:
            values = "; ".join(f"{key}: {wanted.get(key)!r} and {got.get(key)!r}" for key in differing[:4])
            return f"adapters {first!r} and {name!r} differ ({values})"
    return ""


def _check_shareable(configs: Mapping[str, PeftConfig], difference: str) -> None:
    """Refuse adapters of different options that no single graph serves, and propose the groups that can be.

    Raises:
        ConfigError: an adapter is more than the product of two matrices.
    """
    same = len({repr(getattr(config, INVOCATION, None)) for config in configs.values()}) == 1
    reasons = {
        name: reason for name, config in configs.items() if (reason := not_shareable(config, same_invocation=same))
    }
    if not reasons:
        return
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        key = repr(_options_of(config)) if name in reasons else "plain LoRA"
        groups.setdefault(key, []).append(name)
    cases = "; ".join(", ".join(names) for names in groups.values())
    name, reason = next(iter(reasons.items()))
    raise ConfigError(
        f"{difference}, and cannot share a graph: {name!r} has {reason}, and only plain LoRA of different rank, scale"
        f" and target modules can. Give each of these groups a case: {cases}"
    )


def _options_of(config: PeftConfig) -> dict[str, Any]:
    options = config.to_dict()
    compared = {key: value for key, value in options.items() if key not in NOT_CONTENT and key not in INIT_OPTIONS}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in compared.items()}


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], others: Mapping[str, Tensors]) -> None:
    for adapter, tensors in others.items():
        reason = key_differences(_shapes_of(tensors), wanted)
        if reason:
            raise ConfigError(f"adapter {adapter!r}: {reason}")


def _shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def _refuse_unequal_views(parameter_names: Mapping[str, str], model: Any, adapters: Mapping[str, Tensors]) -> None:
    """Refuse adapters whose copies of a tied tensor differ: PEFT uses the one that it loads last.

    Raises:
        ConfigError: they differ.
    """
    state = dict((*model.named_parameters(), *model.named_buffers()))
    views: dict[int, list[str]] = {}
    for saved, name in parameter_names.items():
        views.setdefault(state[name].data_ptr(), []).append(saved)
    for first, *others in views.values():
        for other in others:
            for adapter, tensors in adapters.items():
                same = state[parameter_names[first]].shape == state[parameter_names[other]].shape
                if not np.array_equal(tensors[first], tensors[other] if same else tensors[other].T):
                    raise ConfigError(
                        f"adapter {adapter!r}: {first} and {other} are one tied tensor (ensure_weight_tying), and the"
                        " adapter has two different ones: save it anew with PEFT"
                    )


def _eos_ids(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(config, "eos_token_id", None)
        values = value if isinstance(value, (list, tuple)) else [value]
        ids |= {int(token) for token in values if token is not None}
        if ids:
            break
    return frozenset(ids)


def set_adapter_tensors(model: Any, tensors: Tensors, parameter_names: Mapping[str, str]) -> None:
    """Copy adapter tensors into a model."""
    state = dict((*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        for name, array in tensors.items():
            state[parameter_names[name]].copy_(torch.from_numpy(np.ascontiguousarray(array)))
