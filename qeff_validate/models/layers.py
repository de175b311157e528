# SPDX-License-Identifier: Apache-2.0
"""Modules of sentence-transformers around the pooling, as torch modules: Dense, LayerNorm, Normalize, layer weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.activations import activation
from qeff_validate.models.sources.sentence_directory import Layer

WEIGHTS = "model.safetensors"


def normalized(vectors: Tensor) -> Tensor:
    """Scale each vector of the last axis to length 1; zeros stay zeros.

    Divides by the maximum magnitude first, so that the sum of squares lies between 1 and the width in any dtype.
    """
    magnitude = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(magnitude > 0, magnitude, 1.0)
    return scaled / scaled.square().sum(dim=-1, keepdim=True).clamp(min=1.0).sqrt()


class Dense(nn.Module):
    """A linear layer with an activation, and optionally a residual connection: ``[…, in] → […, out]``."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation
        self.use_residual = residual
        if residual and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the projected vectors."""
        projected: Tensor = self.activation(self.linear(vectors))
        if not self.use_residual:
            return projected
        return projected + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class Normalize(nn.Module):
    """Scales each vector to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the scaled vectors."""
        return normalized(vectors)


class LayerWeights(nn.Module):
    """The weighted mean of the hidden states of layers, from ``start`` on: ``[layers, …] → […]``."""

    def __init__(self, layers: int, start: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.ones(layers + 1 - start))
        self.start = start

    def forward(self, states: Tensor) -> Tensor:
        """Return the mean over the first axis."""
        weights = self.layer_weights / self.layer_weights.sum()
        mean: Tensor = torch.tensordot(weights, states[self.start :], dims=1)
        return mean


class TokenLayers(nn.Module):
    """A body with modules on its token vectors; it returns ``(hidden_states,)`` and is otherwise like the body.

    Args:
        body: a transformer body.
        layers: `LayerWeights`, which needs the hidden states of all layers, or modules ``[…, in] → […, out]``.
    """

    def __init__(self, body: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.body = body
        self.layers = nn.ModuleList(layers)

    def __getattr__(self, name: str) -> Any:
        """Return the body's attribute where this module has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("body"), name)

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """Return the token vectors ``[batch, seq, width]``."""
        every_layer = any(isinstance(layer, LayerWeights) for layer in self.layers)
        output = self.body(**inputs, **({"output_hidden_states": True} if every_layer else {}))
        hidden: Tensor = output[0]
        for layer in self.layers:
            hidden = layer(torch.stack(output.hidden_states) if isinstance(layer, LayerWeights) else hidden)
        return (hidden,)


def load_layer(layer: Layer) -> nn.Module:
    """Return a module in eval mode with its weights in float32.

    Raises:
        ConfigError: an option is missing or wrong, or the weights do not fit.
        Unavailable: the weights cannot be read.
    """
    try:
        module = _create(layer)
    except (KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise ConfigError(f"{layer.folder}/config.json describes no {layer.kind} module: {exc!r}") from exc
    if list(module.parameters()):
        try:
            module.load_state_dict(layer_weights(layer))
        except RuntimeError as exc:
            reason = " ".join(str(exc).split())
            raise ConfigError(f"{layer.folder / WEIGHTS} does not fit its config.json: {reason}") from exc
    return module.float().eval()


def _create(layer: Layer) -> nn.Module:
    config = layer.config
    if layer.kind == "Normalize":
        return Normalize()
    if layer.kind == "LayerNorm":
        return _Named("norm", nn.LayerNorm(int(config["dimension"])))
    if layer.kind == "WeightedLayerPooling":
        return LayerWeights(int(config.get("num_hidden_layers", 12)), int(config.get("layer_start", 4)))
    return Dense(
        int(config["in_features"]),
        int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=activation(config.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(config.get("use_residual", False)),
    )


class _Named(nn.Sequential):
    """One module under the name that its weights have in the file."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def layer_weights(layer: Layer) -> dict[str, Tensor]:
    """Return the tensors of a module by name.

    Raises:
        ConfigError: there is no safetensors file.
        Unavailable: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = layer.folder / WEIGHTS
    if not path.is_file():
        raise ConfigError(
            f"{layer.folder} holds no {WEIGHTS}: pickled weights are not read; save the model again with"
            " sentence-transformers, which writes safetensors"
        )
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as exc:
        raise Unavailable(f"{path} is no safetensors file, or it is cut short: {exc}") from exc


def token_body(body: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """Return a body with modules on its token vectors; layer weights have an effect if the config asks for all layers.

    Raises:
        ConfigError: an option or the weights of a module do not fit.
        Unavailable: the weights cannot be read.
    """
    every_layer = bool(getattr(getattr(body, "config", None), "output_hidden_states", False))
    modules = [load_layer(layer) for layer in layers if layer.kind != "WeightedLayerPooling" or every_layer]
    return TokenLayers(body, modules).eval() if modules else body
