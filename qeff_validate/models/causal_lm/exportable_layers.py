# SPDX-License-Identifier: Apache-2.0
"""Layers of PEFT in a form that exports: the same products, without what no graph has.

The reference runs PEFT's own layers; what is exported is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from peft.tuners.c3a.layer import C3ALinear
from peft.tuners.hra.layer import HRALinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear


class ParameterLora(ParamWrapper):
    """LoRA on parameters of a module, such as the stacked weights of experts.

    PEFT replaces the parameters for the time of a run (``parametrize``), which is no operation of a graph; here the
    module is called with the sums.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the module's output with ``W + scale·B·A`` for each adapted parameter."""
        weights: dict[str, Tensor] = {}
        layer: Any = self
        while hasattr(layer, "parameter_name"):  # one inside of the other, one for each parameter
            weight = getattr(layer.get_base_layer(), layer.parameter_name)
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weight = weight + layer.get_delta_weight(adapter)
            weights[layer.parameter_name] = weight
            layer = layer.base_layer
        output: Tensor = functional_call(layer, weights, (x, *args), kwargs)
        return output


class HouseholderLinear(HRALinear):
    """HRA; PEFT reads the base's weight by ``.data``, whose content an exporter does not follow."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Return ``x (W H)ᵀ + b`` for the product ``H`` of Householder reflections."""
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        for adapter in self.active_adapters:
            if adapter in self.hra_u:
                weight = weight @ self.get_delta_weight(adapter)
        return linear(x, weight, base.bias)


class CirculantLinear(C3ALinear):
    """C3A; PEFT convolves by complex Fourier transforms, here the circulant matrices are written out."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus that of the block-circulant matrix of each kernel ``[out, in, block]``."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter in self.c3a_kernel:
                x = linear(x, circulant(self.c3a_kernel[adapter])) / x.shape[-1]  # PEFT hands the result on, too
                result = result + x
        return result


def circulant(kernel: Tensor) -> Tensor:
    """Return the matrix ``[m·b, n·b]`` whose blocks are circular correlations with ``kernel [m, n, b]``."""
    rows, columns, size = kernel.shape
    places = torch.arange(size)
    blocks = kernel[:, :, (places[None, :] - places[:, None]) % size]  # [m, n, b out, b in]
    return blocks.permute(0, 2, 1, 3).reshape(rows * size, columns * size)


class Activation(ALoraLinearVariant):
    """Activated LoRA: PEFT counts its tokens from the end of each text; here each token is active or not.

    Attributes:
        mask: which tokens of the run are active, bool ``[batch, seq_len]``.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """Return the base's result plus LoRA on the active tokens."""
        assert self.mask is not None
        change = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        return result + torch.where(self.mask[..., None], change, 0.0)


def use_activation(model: nn.Module) -> Activation:
    """Give layers of activated LoRA one mask of active tokens, which is returned."""
    activation = Activation()
    for module in model.modules():
        variants = getattr(module, "lora_variant", None) or {}
        for adapter, variant in variants.items():
            if isinstance(variant, ALoraLinearVariant):
                variants[adapter] = activation
    return activation


def tensor_places(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return, for values of ``names``, all names of that tensor in a model: one for each module that holds it.

    ``functional_call`` with ``tie_weights`` takes a module that two paths lead to (learnt rows of a tied embedding) for
    two, and leaves its replacement where the parameter was.
    """
    held: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # each once
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            held.setdefault(id(tensor), []).append(f"{path}.{key}".lstrip("."))
    places = {name: tuple(paths) for paths in held.values() for name in paths}
    return {saved: places[name] for saved, name in names.items()}


def use_slot_biases(model: nn.Module) -> None:
    """Make position biases (ALiBi of BLOOM) from slots, which are positions, instead of from a two-dimensional mask."""
    for module in model.modules():
        original = getattr(type(module), "build_alibi_tensor", None)
        if original is not None:
            vars(module)["build_alibi_tensor"] = partial(_slot_biases, partial(original, module))


class SlotMask:
    """A table of which tokens see which (GPT-Neo), read at the tokens' positions instead of at the end of the keys.

    Attributes:
        positions: of the tokens of the run, int64 ``[batch, seq_len]``.
    """

    def __init__(self, table: Tensor) -> None:
        self.positions: Tensor | None = None
        self._table = table

    def __getitem__(self, key: Any) -> Tensor:
        """Return which slots the tokens see, bool ``[batch, 1, seq_len, slots]``, for slices ``[:, :, …, :slots]``."""
        assert self.positions is not None
        return self._table[0, 0, :, key[-1]][self.positions][:, None]


def use_slot_masks(model: nn.Module) -> list[SlotMask]:
    """Read attention's own causal tables by position; return them, so that each run sets its positions."""
    tables = []
    for module in model.modules():
        table = module._buffers.get("bias")
        if table is not None and table.dtype == torch.bool and table.ndim == 4:
            del module._buffers["bias"]
            tables.append(SlotMask(table))
            vars(module)["bias"] = tables[-1]
    return tables


def use_constant_cutoffs(model: nn.Module) -> None:
    """Compute the cutoffs of sparse activations (Gemma-3n) once: they are quantiles of the normal distribution.

    PyTorch computes them in each run by the inverse of the error function, for which ONNX has no operator.
    """
    for module in model.modules():
        share: Any = getattr(module, "activation_sparsity", None)
        if hasattr(module, "_gaussian_topk") and share:
            vars(module)["_gaussian_topk"] = partial(_above, NormalDist().inv_cdf(share))


def _above(deviations: float, inputs: Tensor) -> Tensor:
    """Return what exceeds the mean by more than so many standard deviations."""
    mean, deviation = inputs.mean(dim=-1, keepdim=True), inputs.std(dim=-1, keepdim=True, unbiased=False)
    return torch.relu(inputs - (mean + deviation * deviations))


def _slot_biases(original: Callable[..., Tensor], mask: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Return the biases of ``mask.shape[-1]`` slots for each row of a mask ``[batch, 1, seq_len, slots]``."""
    return original(mask.new_ones(mask.shape[0], mask.shape[-1]), *arguments, **options)


EXPORTABLE: Mapping[type[nn.Module], type[nn.Module]] = {
    C3ALinear: CirculantLinear,
    HRALinear: HouseholderLinear,
    ParamWrapper: ParameterLora,
}
"""Layers of PEFT, and those that compute the same in a graph."""


def use_exportable_layers(model: nn.Module) -> None:
    """Give layers of PEFT the class that computes the same in a graph; no tensor is changed."""
    for module in model.modules():
        module.__class__ = EXPORTABLE.get(type(module), type(module))
