# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized weights: dequantized to float32 by the library that can, else refused by its name.

An exported graph holds plain weights, and the compiler quantizes them for the card, so the weights are all that counts:
activations that a method quantizes as well are left in float32. Imports frameworks inside of functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.framework_calls import versions
from qeff_validate.models.sources.checkpoint import CONFIG, read_object

DEQUANTIZED_BY: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("transformers",),
    "gptq": ("gptqmodel", "optimum"),
    "mxfp4": ("transformers",),
}
"""Methods whose weights can be turned into float32, and the distributions that do it."""

WHILE_LOADING = ("compressed-tensors", "fp8", "mxfp4")
"""Methods that transformers dequantizes while it loads, if the config says ``dequantize``."""


PACKED = ("weight", "weight_packed")
"""Ends of the names of tensors that hold weights."""

PARTS = frozenset({
    "absmax", "g_idx", "quant_map", "qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_2",
    "weight_scale_inv", "weight_zero_point",
})  # fmt: skip
"""Last parts of the names of tensors beside or in place of a quantized weight."""


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return the ``quant_method`` that a config.json names, None if the weights are not quantized.

    Raises:
        ConfigError: there is a quantization_config without a method.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(quantization, dict) and any(quantization.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"
    if not isinstance(method, str):
        raise ConfigError("quantization_config in config.json names no quant_method, so its weights cannot be read")
    return method


def check_dequantizable(folder: Path, method: str) -> None:
    """Refuse weights that nothing here turns into float32.

    Raises:
        ConfigError: no library that is known here dequantizes this method.
        Unavailable: the library that does is not installed.
    """
    libraries = DEQUANTIZED_BY.get(method)
    if libraries is None:
        raise ConfigError(
            f"{folder} is quantized with {method!r}, which is not turned into float32 here"
            f" ({', '.join(sorted(DEQUANTIZED_BY))} are): give the original weights, or save it dequantized"
        )
    missing = [name for name, version in versions(*libraries).items() if version is None]
    if missing:
        raise Unavailable(
            f"{folder} is quantized with {method}, and {libraries[0]} turns its weights into float32:"
            f" pip install {' '.join(missing)}, or give the original weights"
        )


def check_parts(folder: Path, method: str | None, dtypes: Mapping[str, str], unexpected: Iterable[str]) -> None:
    """Refuse quantized weights that transformers has read as plain ones.

    Args:
        folder: the model's directory.
        method: that config.json names; None: none.
        dtypes: of the stored tensors by name, as safetensors calls them.
        unexpected: names of stored tensors that were not read.

    Raises:
        ConfigError: scales or packed weights were left out, or 8-bit floats have no scale.
    """
    said = f"config.json says {method}" if method else "config.json names no quantization_config"
    remedy = f"and {said}: take the config.json of the quantized model, or give the original weights"
    parts = sorted(name for name in unexpected if name.rpartition(".")[2] in PARTS)
    if parts:
        raise ConfigError(
            f"{folder} holds {len(parts)} tensors of quantized weights that were not read, first {parts[0]}, {remedy}"
        )
    if method is None:  # weights that were cast to 8 bits are read as such
        return
    scaled = {name.rpartition(".")[0] for name in dtypes if "scale" in name.rpartition(".")[2]}
    bare = [
        name for name, dtype in dtypes.items() if dtype.startswith("F8_E4M3") and name.rpartition(".")[0] not in scaled
    ]
    if bare:
        raise ConfigError(
            f"{folder} holds {len(bare)} tensors of 8-bit floats without a scale, first {bare[0]}, {remedy}"
        )


def dequantized(model: Any, method: str) -> Any:
    """Return a loaded model with float32 weights in plain layers.

    Args:
        model: of transformers; changed in place.
        method: how it is quantized.

    Raises:
        ConfigError: packed weights are left.
    """
    import torch

    if method == "bitsandbytes":
        model = model.dequantize()
    for name, module in list(model.named_modules()):
        if hasattr(module, "qweight") or hasattr(module, "dequantize_weight"):
            parent, _, attribute = name.rpartition(".")
            bias = getattr(module, "bias", None)
            setattr(model.get_submodule(parent), attribute, _linear(_unpacked_weight(module), bias))
    tensors = (*model.named_parameters(), *model.named_buffers())
    packed = [name for name, tensor in tensors if name.endswith(PACKED) and not tensor.is_floating_point()]
    if packed:
        raise ConfigError(
            f"{method}: {len(packed)} weights are packed integers in the loaded model, first {packed[0]}: load it with"
            " dequantize=True in its quantization config if it has such an option, or give the original weights"
        )
    return torch.nn.Module.float(model)


def _unpacked_weight(module: Any) -> Any:
    """Return the weight ``[in, out]`` of a layer of GPTQModel, in the dtype of its scales.

    Its layers for AWQ on a processor have no method for that: they are given the unit vectors.
    """
    import torch

    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight()
    module.bias = None
    with torch.no_grad():
        return module(torch.eye(module.in_features, dtype=module.scales.dtype))


def _linear(weight: Any, bias: Any) -> Any:
    """Return a linear layer with a weight ``[in, out]``, as GPTQModel unpacks it."""
    import torch

    layer = torch.nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
    layer.weight.data = weight.detach().float().T.contiguous()
    if bias is not None:
        layer.bias.data = bias.detach().float()
    return layer


def quantization_notes(folder: Path | None) -> Iterator[str]:
    """Yield a note on a model directory whose weights are dequantized; None: there is no directory."""
    if folder is None or not (folder / CONFIG).is_file():
        return
    method = quantization_method(read_object(folder / CONFIG))
    if method is not None:
        yield (
            f"the base is quantized with {method}: its weights are dequantized to float32, in the reference too;"
            " activations are not quantized"
        )
