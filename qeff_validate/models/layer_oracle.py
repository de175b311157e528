# SPDX-License-Identifier: Apache-2.0
"""Modules of sentence-transformers after the pooling, in numpy and float64, for the reference.

It shares no formula with `layers`, which is validated against it, but for activations, which are torch's in float64.
"""

from __future__ import annotations

import numpy as np

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import ConfigError
from qeff_validate.models.activations import VectorFunction, activation_oracle
from qeff_validate.models.sources.sentence_directory import Layer


def vector_function(layer: Layer) -> VectorFunction:
    """Return the function of a module.

    Raises:
        ConfigError: its weights are missing, or do not fit.
        Unavailable: its weights cannot be read.
    """
    if layer.kind == "Normalize":
        return _normalized
    if layer.kind == "TextProjection":
        weight = _weights(layer, "linear.weight")["linear.weight"]
        return lambda vectors: np.asarray(vectors @ weight.T)
    return _dense(layer) if layer.kind == "Dense" else _layer_norm(layer)


def _normalized(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def _dense(layer: Layer) -> VectorFunction:
    tensors = _weights(layer, "linear.weight")
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias", np.float64(0.0))
    own = {name.partition(".")[2]: array for name, array in tensors.items() if name.startswith("activation_function.")}
    activate = activation_oracle(str(layer.config.get("activation_function", "torch.nn.modules.activation.Tanh")), own)
    residual = bool(layer.config.get("use_residual", False))

    def function(vectors: Floats) -> Floats:
        if vectors.shape[-1] != weight.shape[-1]:
            raise ConfigError(
                f"{layer.folder}: the Dense module takes vectors of {weight.shape[-1]} numbers, and gets"
                f" {vectors.shape[-1]}"
            )
        projected = activate(np.asarray(vectors @ weight.T + bias))
        if not residual:
            return projected
        side = vectors @ tensors["residual.weight"].T if "residual.weight" in tensors else vectors
        return np.asarray(projected + side)

    return function


def _layer_norm(layer: Layer) -> VectorFunction:
    tensors = _weights(layer, "norm.weight", "norm.bias")

    def function(vectors: Floats) -> Floats:
        centred = vectors - vectors.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
        return np.asarray(scaled * tensors["norm.weight"] + tensors["norm.bias"])

    return function


def _weights(layer: Layer, *needed: str) -> dict[str, Floats]:
    """Return the weights of a module by name, some of which it must have."""
    from qeff_validate.models.layers import layer_weights

    tensors = {name: tensor.double().numpy() for name, tensor in layer_weights(layer).items()}
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ConfigError(
            f"the weights in {layer.folder} are those of no {layer.kind} module: {', '.join(missing)} is missing"
        )
    return tensors
