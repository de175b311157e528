# SPDX-License-Identifier: Apache-2.0
"""Mutants of what is served for an adapter's name. They know PEFT's saved names, and of methods only the shape of them.

A change takes a name and the tensors of ``base`` and of all adapters, and returns the tensors that are served for it.
How strong an adapter is lies in the tensors that are all zero in the base (``lora_B`` of LoRA, ``lora_E`` of AdaLoRA),
or, if there are none (IA3 has ones), in how far all of its tensors are from the base's.
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


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor belongs: the number of its layer (None outside of layers) and the name of its module."""

    layer: int | None
    module: str


def part_of(name: str) -> Part:
    """Read the layer and the target module from PEFT's saved name of a tensor."""
    *path, module, _ = name.removesuffix(".weight").split(".")
    layer = next((int(step) for step in path if step.isdigit()), None)
    return Part(layer, module)


def named(adapters: Adapters, at: int) -> str:
    """Return the name of the adapter at a place, from 1; the base is at 0."""
    names = list(adapters)
    if at >= len(names) or not adapters[names[at]]:
        raise Inapplicable("there is no adapter" if at == 1 else f"there are fewer than {at} adapters")
    return names[at]


def layers(tensors: Tensors) -> list[int]:
    """Return the numbers of two layers or more that have tensors."""
    found = sorted({part.layer for part in map(part_of, tensors) if part.layer is not None})
    if len(found) < 2:
        raise Inapplicable("the adapter is in fewer than two layers")
    return found


def modules(tensors: Tensors) -> list[str]:
    """Return the names of two target modules or more."""
    found = sorted({part.module for part in map(part_of, tensors) if part.layer is not None})
    if len(found) < 2:
        raise Inapplicable("the adapter has one target module only")
    return found


def carriers(name: str, adapters: Adapters) -> list[str]:
    """Return the tensors that an adapter's strength is in."""
    base, own = adapters[BASE], adapters[name]
    floats = [tensor for tensor in own if own[tensor].dtype.kind == "f"]
    zero = [tensor for tensor in floats if not base[tensor].any() and own[tensor].any()]
    return zero or [tensor for tensor in floats if not np.array_equal(own[tensor], base[tensor])]


def moved(array: Numbers, base: Numbers, factor: float) -> Numbers:
    """Return a tensor so many times as far from the base's."""
    found: Numbers = (base + np.float64(factor) * (array.astype(np.float64) - base)).astype(array.dtype)
    return found


def of_each(change: Callable[[str, Adapters], Tensors]) -> Change:
    """Change every adapter; the base is served as it is."""

    def served(name: str, adapters: Adapters) -> Tensors:
        named(adapters, 1)
        return adapters[BASE] if name == BASE else change(name, adapters)

    return served


def instead(*places: int) -> Change:
    """Serve for the base, the first adapter, … what is at these places."""

    def served(name: str, adapters: Adapters) -> Tensors:
        names = list(adapters)
        for place in range(1, max((*places, len(places) - 1)) + 1):
            named(adapters, place)
        at = names.index(name)
        return adapters[names[places[at]] if at < len(places) else name]

    return served


def base_for_all(name: str, adapters: Adapters) -> Tensors:
    """Serve the base whatever is asked for."""
    named(adapters, 1)
    return adapters[BASE if name != BASE else name]


def first_for_all(name: str, adapters: Adapters) -> Tensors:
    """Serve the first adapter for every other."""
    named(adapters, 2)
    return adapters[name if name == BASE else named(adapters, 1)]


def scaled(factor: float, where: Callable[[Part, Tensors], bool] = lambda _, __: True) -> Change:
    """Scale what each adapter adds, in all of its parts or some."""

    @of_each
    def served(name: str, adapters: Adapters) -> Tensors:
        base, own = adapters[BASE], adapters[name]
        hit = {tensor for tensor in carriers(name, adapters) if where(part_of(tensor), own)}
        return {tensor: moved(own[tensor], base[tensor], factor) if tensor in hit else own[tensor] for tensor in own}

    return served


def without(where: Callable[[Part, Tensors], bool]) -> Change:
    """Take an adapter out of some of its parts: the base's tensors are there."""

    @of_each
    def served(name: str, adapters: Adapters) -> Tensors:
        base, own = adapters[BASE], adapters[name]
        return {tensor: base[tensor] if where(part_of(tensor), own) else own[tensor] for tensor in own}

    return served


def last_module(part: Part, tensors: Tensors) -> bool:
    """Say whether a part is of the last target module by name."""
    return part.layer is not None and part.module == modules(tensors)[-1]


def last_layer(part: Part, tensors: Tensors) -> bool:
    """Say whether a part is of the last layer."""
    return part.layer == layers(tensors)[-1]


def one_place(part: Part, tensors: Tensors) -> bool:
    """Say whether a part is of the last target module in the last layer, of two or more places in all."""
    places = sorted({(found.layer, found.module) for found in map(part_of, tensors) if found.layer is not None})
    if len(places) < 2:
        raise Inapplicable("the adapter is in one place only")
    return (part.layer, part.module) == places[-1]


def by_root_of_rank(name: str, adapters: Adapters) -> Tensors:
    """Scale by alpha / r where alpha / √r is meant."""
    ranks = {array.shape[0] for tensor, array in adapters[named(adapters, 1)].items() if ".lora_A" in tensor}
    if len(ranks) != 1 or ranks == {1}:
        raise Inapplicable("the adapters have no lora_A, or none of one rank above 1")
    return scaled(ranks.pop() ** -0.5)(name, adapters)


@of_each
def without_magnitude(name: str, adapters: Adapters) -> Tensors:
    """Leave the magnitudes of DoRA as they are in the base."""
    base, own = adapters[BASE], adapters[name]
    if not any("magnitude" in tensor for tensor in own):
        raise Inapplicable("the adapter has no magnitudes: it is no DoRA")
    return {tensor: base[tensor] if "magnitude" in tensor else own[tensor] for tensor in own}


def _layer_renamed(tensor: str, number: int) -> str:
    return re.sub(r"\.\d+\.", f".{number}.", tensor, count=1)


def _from_layer(own: Tensors, source: Tensors, pairs: Mapping[int, int]) -> Tensors:
    """Return tensors of which those of some layers come from other layers of the source, where shapes allow."""

    def of(tensor: str) -> Numbers:
        to = pairs.get(part_of(tensor).layer)  # type: ignore[arg-type]  # None is in no mapping
        found = None if to is None else source.get(_layer_renamed(tensor, to))
        return own[tensor] if found is None or found.shape != own[tensor].shape else found

    return {tensor: of(tensor) for tensor in own}


@of_each
def exchanged_layers(name: str, adapters: Adapters) -> Tensors:
    """Exchange the tensors of the first and the last layer."""
    first, *_, last = layers(adapters[name])
    return _from_layer(adapters[name], adapters[name], {first: last, last: first})


@of_each
def one_buffer(name: str, adapters: Adapters) -> Tensors:
    """Let tensors that are equal in the base have one input: exporters merge equal initializers of a fresh adapter."""
    base, own = adapters[BASE], adapters[name]
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    served = {tensor: own[first.setdefault((base[tensor].shape, base[tensor].tobytes()), tensor)] for tensor in own}
    if len(first) == len(own):
        raise Inapplicable("no two tensors of the base are equal")
    return served


def layer_of_another(name: str, adapters: Adapters) -> Tensors:
    """Serve one layer of each adapter from the next one."""
    others = [adapter for adapter in adapters if adapter != BASE]
    named(adapters, 2)
    if name == BASE:
        return adapters[BASE]
    last = layers(adapters[name])[-1]
    return _from_layer(adapters[name], adapters[others[others.index(name) - 1]], {last: last})


def rounded(to: Callable[[Numbers], Numbers]) -> Change:
    """Round every number of the adapters."""

    @of_each
    def served(name: str, adapters: Adapters) -> Tensors:
        own = adapters[name]
        return {tensor: to(array) if array.dtype == np.float32 else array for tensor, array in own.items()}

    return served


def half(array: Numbers) -> Numbers:
    """Round to float16, with infinities where the number is too great."""
    with np.errstate(over="ignore"):
        found: Numbers = array.astype(np.float16).astype(np.float32)
    return found


def brain(array: Numbers) -> Numbers:
    """Round to bfloat16, to the nearest and halves to even."""
    bits = np.ascontiguousarray(array).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    found: Numbers = bits.astype(np.uint32).view(np.float32)
    return found


def _mutant(
    name: str, change: Change, source: str = "validation-methods §12.6", *, gross: bool = False, ceiling: bool = True
) -> AdapterMutant:
    return AdapterMutant(name, "adapters", change, source, gross, ceiling)


ADAPTER_MUTANTS: tuple[AdapterMutant, ...] = (
    _mutant("base served for every adapter", base_for_all, gross=True),
    _mutant("base served for the first adapter", instead(0, 0), "validation-methods §12.6, PEFT #2090"),
    _mutant("first two adapters swapped", instead(0, 2, 1), gross=True),
    _mutant("first adapter served for base", instead(1), ceiling=False),
    _mutant("first adapter served for all adapters", first_for_all, ceiling=False),
    _mutant("alpha / r dropped, x 0.5", scaled(0.5)),
    _mutant("merged and fed, x 2", scaled(2.0), ceiling=False),
    _mutant("alpha / r squared, x 4", scaled(4.0), ceiling=False),
    _mutant("alpha / r where alpha / sqrt(r) is meant", by_root_of_rank, "upstream §2.4", ceiling=False),
    _mutant(
        "alpha_pattern of one target module ignored, x 0.5",
        scaled(0.5, last_module),
        "upstream §2.4",
        ceiling=False,
    ),
    _mutant("DoRA's magnitudes ignored", without_magnitude, "upstream §2.4", ceiling=False),
    _mutant("sign of adapters flipped", scaled(-1.0), "this project", ceiling=False),
    _mutant("adapters x 1.02", scaled(1.02), "this project"),
    _mutant("one target module without adapter", without(last_module)),
    _mutant("one layer without adapter", without(last_layer)),
    _mutant("one module of one layer without adapter", without(one_place), "this project"),
    _mutant("two layers' tensors exchanged", exchanged_layers, "this project"),
    _mutant("one layer from another adapter", layer_of_another, "this project", ceiling=False),
    _mutant("one buffer for tensors that are equal in the base", one_buffer, "upstream §2.3"),
    _mutant("adapters rounded to fp16", rounded(half), "upstream §2.3", ceiling=False),
    _mutant("adapters rounded to bf16", rounded(brain), "this project", ceiling=False),
)
