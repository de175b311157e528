# SPDX-License-Identifier: Apache-2.0
"""Mutants of the tensors that are served for an adapter. They rely on PEFT's saved names, and on no method.

A change takes a name and the tensors of ``base`` and of all adapters, and returns the tensors that are served for it.
An adapter's strength is in the tensors that are all zero in the base (``lora_B`` of LoRA, ``lora_E`` of AdaLoRA), or,
if there are none (IA3 has ones), in the distance of all of its tensors from the base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.mutation.mutant import AdapterMutant, Inapplicable
from qeff_validate.tensors import Tensors

Numbers = NDArray[Any]
Adapters = Mapping[str, Tensors]
Change = Callable[[str, Adapters], Tensors]
Where = Callable[["Location", Tensors], bool]
"""Takes a location and the tensors of an adapter: whether a fault is there."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor belongs: the number of its layer (None outside of layers) and the name of its target module."""

    layer: int | None
    module: str


def location_of(name: str) -> Location:
    """Read the layer and the target module from PEFT's saved name of a tensor."""
    *path, module = name.removesuffix(".weight").split(".")[:-1] or [name]  # virtual tokens belong to no module
    layer = next((int(step) for step in path if step.isdigit()), None)
    return Location(layer, module)


def adapter_name(adapters: Adapters, number: int) -> str:
    """Return the name of an adapter by its number; the base is number 0."""
    names = list(adapters)
    if number >= len(names) or not adapters[names[number]]:
        raise Inapplicable("there is no adapter" if number == 1 else f"there are fewer than {number} adapters")
    return names[number]


def layers(tensors: Tensors) -> list[int]:
    """Return the numbers of the layers that have tensors; at least two."""
    numbers = sorted({location.layer for location in map(location_of, tensors) if location.layer is not None})
    if len(numbers) < 2:
        raise Inapplicable("the adapter is in fewer than two layers")
    return numbers


def modules(tensors: Tensors) -> list[str]:
    """Return the names of the target modules; at least two."""
    names = sorted({location.module for location in map(location_of, tensors) if location.layer is not None})
    if len(names) < 2:
        raise Inapplicable("the adapter has one target module only")
    return names


def strength_tensors(name: str, adapters: Adapters) -> list[str]:
    """Return the names of the tensors that hold an adapter's strength."""
    base, adapter = adapters[BASE], adapters[name]
    floats = [tensor for tensor in adapter if adapter[tensor].dtype.kind == "f"]
    zero_in_base = [tensor for tensor in floats if not base[tensor].any() and adapter[tensor].any()]
    return zero_in_base or [tensor for tensor in floats if not np.array_equal(adapter[tensor], base[tensor])]


def scaled_tensor(array: Numbers, base: Numbers, factor: float) -> Numbers:
    """Multiply the distance of a tensor from the base's by a factor."""
    result: Numbers = (base + np.float64(factor) * (array.astype(np.float64) - base)).astype(array.dtype)
    return result


def except_base(change: Change) -> Change:
    """Change every adapter, and serve the base as it is."""

    def served(name: str, adapters: Adapters) -> Tensors:
        adapter_name(adapters, 1)
        return adapters[BASE] if name == BASE else change(name, adapters)

    return served


def reordered(*numbers: int) -> Change:
    """Serve for the base, the first adapter, … the adapters of these numbers."""

    def served(name: str, adapters: Adapters) -> Tensors:
        names = list(adapters)
        for number in range(1, max((*numbers, len(numbers) - 1)) + 1):
            adapter_name(adapters, number)
        asked = names.index(name)
        return adapters[names[numbers[asked]] if asked < len(numbers) else name]

    return served


def base_for_all(name: str, adapters: Adapters) -> Tensors:
    """Serve the base for every adapter."""
    adapter_name(adapters, 1)
    return adapters[BASE if name != BASE else name]


def first_for_all(name: str, adapters: Adapters) -> Tensors:
    """Serve the first adapter for every other adapter."""
    adapter_name(adapters, 2)
    return adapters[name if name == BASE else adapter_name(adapters, 1)]


def scaled(factor: float, where: Where = lambda _, __: True) -> Change:
    """Scale what each adapter adds, everywhere or in some locations."""

    @except_base
    def served(name: str, adapters: Adapters) -> Tensors:
        base, adapter = adapters[BASE], adapters[name]
        tensors = {key for key in strength_tensors(name, adapters) if where(location_of(key), adapter)}
        return {
            key: scaled_tensor(array, base[key], factor) if key in tensors else array for key, array in adapter.items()
        }

    return served


def without(where: Where) -> Change:
    """Serve the base's tensors in some locations of each adapter."""

    @except_base
    def served(name: str, adapters: Adapters) -> Tensors:
        base, adapter = adapters[BASE], adapters[name]
        return {key: base[key] if where(location_of(key), adapter) else array for key, array in adapter.items()}

    return served


def in_last_module(location: Location, tensors: Tensors) -> bool:
    """Return True in the last target module by name."""
    return location.layer is not None and location.module == modules(tensors)[-1]


def in_last_layer(location: Location, tensors: Tensors) -> bool:
    """Return True in the last layer."""
    return location.layer == layers(tensors)[-1]


def at_last_location(location: Location, tensors: Tensors) -> bool:
    """Return True in the last target module of the last layer; there must be two locations in all."""
    in_layers = [other for other in map(location_of, tensors) if other.layer is not None]
    locations = sorted({(other.layer, other.module) for other in in_layers})
    if len(locations) < 2:
        raise Inapplicable("the adapter is in one place only")
    return (location.layer, location.module) == locations[-1]


def scaled_by_rank(name: str, adapters: Adapters) -> Tensors:
    """Scale by alpha / r in place of alpha / √r."""
    ranks = {array.shape[0] for tensor, array in adapters[adapter_name(adapters, 1)].items() if ".lora_A" in tensor}
    if len(ranks) != 1 or ranks == {1}:
        raise Inapplicable("the adapters have no lora_A, or none of one rank above 1")
    return scaled(ranks.pop() ** -0.5)(name, adapters)


@except_base
def without_magnitude(name: str, adapters: Adapters) -> Tensors:
    """Serve the base's magnitudes for DoRA."""
    base, adapter = adapters[BASE], adapters[name]
    if not any("magnitude" in tensor for tensor in adapter):
        raise Inapplicable("the adapter has no magnitudes: it is no DoRA")
    return {tensor: base[tensor] if "magnitude" in tensor else adapter[tensor] for tensor in adapter}


def _in_layer(tensor: str, number: int) -> str:
    return re.sub(r"\.\d+\.", f".{number}.", tensor, count=1)


def _with_layers(adapter: Tensors, source: Tensors, source_layers: Mapping[int, int]) -> Tensors:
    """Return tensors with those of some layers replaced by those of the source's layers, where shapes allow."""

    def served(tensor: str) -> Numbers:
        layer = source_layers.get(location_of(tensor).layer)  # type: ignore[arg-type]  # None is in no mapping
        replacement = None if layer is None else source.get(_in_layer(tensor, layer))
        if replacement is None or replacement.shape != adapter[tensor].shape:
            return adapter[tensor]
        return replacement

    return {tensor: served(tensor) for tensor in adapter}


@except_base
def exchanged_layers(name: str, adapters: Adapters) -> Tensors:
    """Exchange the tensors of the first and the last layer."""
    first, *_, last = layers(adapters[name])
    return _with_layers(adapters[name], adapters[name], {first: last, last: first})


@except_base
def one_buffer(name: str, adapters: Adapters) -> Tensors:
    """Serve one tensor for all that are equal in the base: exporters merge equal initializers of a fresh adapter."""
    base, adapter = adapters[BASE], adapters[name]
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    served = {key: adapter[first.setdefault((base[key].shape, base[key].tobytes()), key)] for key in adapter}
    if len(first) == len(adapter):
        raise Inapplicable("no two tensors of the base are equal")
    return served


def layer_of_another(name: str, adapters: Adapters) -> Tensors:
    """Serve one layer of each adapter from the next one."""
    others = [adapter for adapter in adapters if adapter != BASE]
    adapter_name(adapters, 2)
    if name == BASE:
        return adapters[BASE]
    last = layers(adapters[name])[-1]
    return _with_layers(adapters[name], adapters[others[others.index(name) - 1]], {last: last})


def _nonzero_elsewhere(name: str, tensor: str, adapters: Adapters) -> Numbers | None:
    """Return the tensor of another adapter that is not zero in places where this one's is; None if there is none."""
    zero = adapters[name][tensor] == 0
    others = [adapters[other][tensor] for other in adapters if other not in (BASE, name)]
    return next((array for array in others if (array[zero] != 0).any()), None)


def filled(*, modules_alone: bool) -> Change:
    """Serve another adapter's numbers where an adapter that shares the graph with it is padded with zeros.

    Args:
        modules_alone: in modules that the adapter lacks; else beyond its rank.
    """

    @except_base
    def served(name: str, adapters: Adapters) -> Tensors:
        result = {}
        for tensor, array in adapters[name].items():
            lacking = not array.any()
            other = _nonzero_elsewhere(name, tensor, adapters) if lacking == modules_alone else None
            result[tensor] = array if other is None else np.where(array == 0, other, array)
        return result

    def change(name: str, adapters: Adapters) -> Tensors:
        everything = {adapter: served(adapter, adapters) for adapter in adapters}
        if all(array is adapters[adapter][key] for adapter in everything for key, array in everything[adapter].items()):
            padded = "lacks a module that another has" if modules_alone else "has a smaller rank than another"
            raise Inapplicable(f"no adapter {padded}")
        return everything[name]

    return change


@except_base
def transposed(name: str, adapters: Adapters) -> Tensors:
    """Exchange the factors of LoRA on square weights, which transposes what they add: B A becomes Aᵀ Bᵀ."""
    adapter = adapters[name]
    result = dict(adapter)
    for tensor, array in adapter.items():
        other = tensor.replace(".lora_A.", ".lora_B.")
        if other != tensor and other in adapter and adapter[other].T.shape == array.shape:
            result |= {tensor: adapter[other].T, other: array.T}
    if all(result[tensor] is adapter[tensor] for tensor in adapter):
        raise Inapplicable("no adapter has lora_A and lora_B of a square weight")
    return result


def rounded(rounding: Callable[[Numbers], Numbers]) -> Change:
    """Round every float32 number of the adapters."""

    @except_base
    def served(name: str, adapters: Adapters) -> Tensors:
        adapter = adapters[name]
        return {key: rounding(array) if array.dtype == np.float32 else array for key, array in adapter.items()}

    return served


def to_float16(array: Numbers) -> Numbers:
    """Round float32 numbers to float16, to infinity where they are too great."""
    with np.errstate(over="ignore"):
        result: Numbers = array.astype(np.float16).astype(np.float32)
    return result


def to_bfloat16(array: Numbers) -> Numbers:
    """Round float32 numbers to bfloat16, to the nearest and halves to even."""
    bits = np.ascontiguousarray(array).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    result: Numbers = bits.astype(np.uint32).view(np.float32)
    return result


def _mutant(
    name: str, change: Change, source: str = "validation-methods §12.6", *, gross: bool = False, ceiling: bool = True
) -> AdapterMutant:
    return AdapterMutant(name, "adapters", change, source, gross, ceiling)


ADAPTER_MUTANTS: tuple[AdapterMutant, ...] = (
    _mutant("base served for every adapter", base_for_all, gross=True),
    _mutant("base served for the first adapter", reordered(0, 0), "validation-methods §12.6, PEFT #2090"),
    _mutant("first two adapters swapped", reordered(0, 2, 1), gross=True),
    _mutant("first adapter served for base", reordered(1), ceiling=False),
    _mutant("first adapter served for all adapters", first_for_all, ceiling=False),
    _mutant("alpha / r dropped, x 0.5", scaled(0.5)),
    _mutant("merged and fed, x 2", scaled(2.0), ceiling=False),
    _mutant("alpha / r squared, x 4", scaled(4.0), ceiling=False),
    _mutant("alpha / r where alpha / sqrt(r) is meant", scaled_by_rank, "upstream §2.4", ceiling=False),
    _mutant(
        "alpha_pattern of one target module ignored, x 0.5",
        scaled(0.5, in_last_module),
        "upstream §2.4",
        ceiling=False,
    ),
    _mutant("DoRA's magnitudes ignored", without_magnitude, "upstream §2.4", ceiling=False),
    _mutant("sign of adapters flipped", scaled(-1.0), "this project", ceiling=False),
    _mutant("adapters x 1.02", scaled(1.02), "this project"),
    _mutant("one target module without adapter", without(in_last_module)),
    _mutant("one layer without adapter", without(in_last_layer)),
    _mutant("one module of one layer without adapter", without(at_last_location), "this project"),
    _mutant("two layers' tensors exchanged", exchanged_layers, "this project"),
    _mutant("one layer from another adapter", layer_of_another, "this project", ceiling=False),
    _mutant("padding beyond an adapter's rank not zero", filled(modules_alone=False), "this project", ceiling=False),
    _mutant("a module served from another adapter", filled(modules_alone=True), "this project", ceiling=False),
    _mutant("adapters of square weights transposed", transposed, "this project", ceiling=False),
    _mutant("one buffer for tensors that are equal in the base", one_buffer, "upstream §2.3"),
    _mutant("adapters rounded to fp16", rounded(to_float16), "upstream §2.3", ceiling=False),
    _mutant("adapters rounded to bf16", rounded(to_bfloat16), "this project", ceiling=False),
)
