# SPDX-License-Identifier: Apache-2.0
"""Modules of sentence-transformers around the pooling, as torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.activations import activation, load_weights
from qeff_validate.models.sources.checkpoint import MOST_VOCABULARY, read_object, tensors, weight_files
from qeff_validate.models.sources.sentence_directory import Layer

WEIGHTS = "model.safetensors"

MOST_WIDTH = 1 << 20
"""Greatest width of a Dense or LayerNorm module."""

TEXT_PROJECTION = "text_projection.weight"
"""Name of the projection of texts in a CLIP checkpoint."""


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
        self.activation_function = activation  # a PReLU has weights, by this name
        self.use_residual = residual
        if residual and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the projected vectors."""
        projected: Tensor = self.activation_function(self.linear(vectors))
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


class Convolutions(nn.Module):
    """The CNN module: convolutions of odd widths over the tokens of each text, side by side; padding counts as zeros.

    Args:
        inputs: width of the vectors of tokens.
        outputs: channels of each convolution.
        sizes: kernel sizes, odd.
    """

    reads = ("attention_mask",)

    def __init__(self, inputs: int, outputs: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(inputs, outputs, size, padding=size // 2) for size in sizes)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return ``[batch, seq, outputs · sizes]`` from ``[batch, seq, inputs]``."""
        channels = torch.where(mask.unsqueeze(-1) > 0, vectors, 0.0).transpose(1, 2)
        return torch.cat([conv(channels) for conv in self.convs], dim=1).transpose(1, 2)


class Recurrent(nn.Module):
    """The LSTM module: runs over the real tokens of each row, in both directions if asked for, wherever padding stands.

    Args:
        inputs: width of the vectors of tokens.
        hidden: width of the state, of each direction.
        layers: number of layers.
        bidirectional: a second LSTM reads each row from its last real token on.
    """

    reads = ("attention_mask",)

    def __init__(self, inputs: int, hidden: int, layers: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.encoder = nn.LSTM(inputs, hidden, num_layers=layers, bidirectional=bidirectional, batch_first=True)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return ``[batch, seq, hidden · directions]`` from ``[batch, seq, inputs]``."""
        places = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
        first = mask.to(torch.int32).argmax(dim=1, keepdim=True)
        count = mask.sum(dim=1, keepdim=True)
        last = mask.shape[1] - 1
        rows = _gathered(vectors, (places + first).clamp(0, last))  # real tokens in front
        backwards = (count - 1 - places).clamp(0, last)
        for layer in range(self.encoder.num_layers):
            states = [self._run(rows, f"l{layer}")]
            if self.encoder.bidirectional:
                states.append(_gathered(self._run(_gathered(rows, backwards), f"l{layer}_reverse"), backwards))
            rows = torch.cat(states, dim=-1)
        return _gathered(rows, (places - first).clamp(0, last))

    def _run(self, rows: Tensor, name: str) -> Tensor:
        weights = [getattr(self.encoder, f"{kind}_{name}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        start = rows.new_zeros(1, rows.shape[0], self.encoder.hidden_size)
        states: Tensor = torch.lstm(rows, (start, start), weights, True, 1, 0.0, False, False, True)[0]
        return states


def _gathered(rows: Tensor, places: Tensor) -> Tensor:
    """Return the vectors ``[batch, seq, width]`` at the places ``[batch, seq]``."""
    return torch.gather(rows, 1, places.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


class WordWeights(nn.Module):
    """Scales the vector of each token by its word's weight.

    Sums of the weights take the place of numbers of tokens in a mean, so vectors are scaled by the ratio of both.

    Args:
        weights: of each word of the vocabulary.
        power: of that ratio: 1 for a mean, 0.5 for a sum over the root of the length, 0 for other poolings.
    """

    reads = ("attention_mask", "input_ids")
    table: Tensor

    def __init__(self, weights: Sequence[float], power: float) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(weights, dtype=torch.float32).unsqueeze(1))
        self.power = power

    def forward(self, vectors: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        """Return the scaled vectors ``[batch, seq, width]``."""
        weights = nn.functional.embedding(ids, self.table).to(vectors.dtype) * mask.unsqueeze(-1)
        if self.power:
            count = mask.sum(dim=1).clamp(min=1).to(vectors.dtype)[:, None, None]
            weights = weights * (count / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)).pow(self.power)
        return vectors * weights


class TokenLayers(nn.Module):
    """A body with modules on its token vectors; it returns ``(hidden_states,)`` and is otherwise like the body.

    Args:
        body: a transformer body, or a table of words.
        layers: `LayerWeights`, which needs the hidden states of all layers, or modules ``[…, in] → […, out]``, which
            name in ``reads`` the inputs of the body that they take besides.
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
            vectors = torch.stack(output.hidden_states) if isinstance(layer, LayerWeights) else hidden
            hidden = layer(vectors, *(inputs[name] for name in getattr(layer, "reads", ())))
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
        load_weights(module, layer_weights(layer), f"the {layer.kind} module in {layer.folder / WEIGHTS}")
    return module.float().eval()


def _create(layer: Layer) -> nn.Module:
    config = layer.config
    if layer.kind == "CNN":
        width = _width(layer, "in_embedding_dimension", "in_word_embedding_dimension")
        return Convolutions(width, int(config.get("out_channels", 256)), config.get("kernel_sizes", (1, 3, 5)))
    if layer.kind == "LSTM":
        width, hidden = _width(layer, "embedding_dimension", "word_embedding_dimension"), _width(layer, "hidden_dim")
        bidirectional = bool(config.get("bidirectional", True))
        return Recurrent(width, hidden, int(config.get("num_layers", 1)), bidirectional=bidirectional)
    if layer.kind == "WordWeights":
        return WordWeights(word_weights(layer.folder), float(config["power"]))
    if layer.kind == "TextProjection":
        outputs, inputs = layer_weights(layer)["linear.weight"].shape
        return Dense(inputs, outputs, bias=False, activation=nn.Identity(), residual=False)
    if layer.kind == "Normalize":
        return Normalize()
    if layer.kind == "LayerNorm":
        return _Named("norm", nn.LayerNorm(_width(layer, "dimension")))
    if layer.kind == "WeightedLayerPooling":
        return LayerWeights(int(config.get("num_hidden_layers", 12)), int(config.get("layer_start", 4)))
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(name, str):
        raise ConfigError(f"{layer.folder}/config.json: activation_function is {name!r}, wanted a class of torch.nn")
    return Dense(
        _width(layer, "in_features"),
        _width(layer, "out_features"),
        bias=bool(config.get("bias", True)),
        activation=activation(name),
        residual=bool(config.get("use_residual", False)),
    )


def _width(layer: Layer, *names: str) -> int:
    """Return a width that a module's config names, by one of its names.

    Raises:
        ConfigError: it names none, or one that no module has.
    """
    name = next((name for name in names if name in layer.config), names[0])
    width = layer.config.get(name)
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= MOST_WIDTH:
        raise ConfigError(
            f"{layer.folder}/config.json: {name} of the {layer.kind} module is {width!r}, wanted a number from 1 to"
            f" {MOST_WIDTH:,}"
        )
    return width


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

    if layer.kind == "TextProjection":
        return {"linear.weight": stored_tensor(layer.folder, TEXT_PROJECTION)}
    path = layer.folder / WEIGHTS
    if not path.is_file():
        if not any(layer.folder.glob("*.bin")):
            raise ConfigError(f"there is no {path}, which the directory's {layer.kind} module needs: copy it whole")
        raise ConfigError(
            f"{layer.folder} holds no {WEIGHTS}: pickled weights are not read; save the model again with"
            " sentence-transformers, which writes safetensors"
        )
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as exc:
        raise Unavailable(f"{path} is no safetensors file, or it is cut short: {exc}") from exc


def word_weights(folder: Path) -> list[float]:
    """Return the weight of each word of a WordWeights module's vocabulary.

    Raises:
        ConfigError: the config is broken.
    """
    config = read_object(folder / "config.json", most_bytes=MOST_VOCABULARY)
    vocabulary, weights, unknown = config["vocab"], config["word_weights"], config.get("unknown_word_weight", 1)
    return [float(weights.get(word, weights.get(word.lower(), unknown))) for word in vocabulary]


def stored_tensor(folder: Path, name: str) -> Tensor:
    """Return a tensor of a checkpoint.

    Raises:
        ConfigError: the checkpoint has no such tensor.
        Unavailable: its file cannot be read.
    """
    from safetensors import safe_open

    stored = tensors(weight_files(folder)).get(name)
    if stored is None:
        raise ConfigError(f"the weights in {folder} hold no {name}, which the vectors of texts are projected with")
    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def token_body(body: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """Return a body with modules on its token vectors; layer weights have an effect if the config asks for all layers.

    Raises:
        ConfigError: an option or the weights of a module do not fit.
        Unavailable: the weights cannot be read.
    """
    every_layer = bool(getattr(getattr(body, "config", None), "output_hidden_states", False))
    modules = [load_layer(layer) for layer in layers if layer.kind != "WeightedLayerPooling" or every_layer]
    return TokenLayers(body, modules).eval() if modules else body
