# SPDX-License-Identifier: Apache-2.0
"""Several LoRA adapters in one batch: their tensors are stacked, and each row of the batch uses those of its adapter.

Index 0 of a stack is the base, a LoRA adapter without effect. PEFT implements the two factors of an adapter as linear
layers, so it is enough that these, and the layers that an adapter replaces as a whole, accept a weight per row; no
architecture needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.exportable_layers import Activation


class RowLinear(nn.Linear):
    """A linear layer whose weight and bias may have a leading batch dim.

    Args:
        linear: the layer that it shares weight and bias with.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the parent's
        """Return ``x Wᵀ + b`` for ``x [batch, seq_len, in]``, ``W [out, in]`` and ``b [out]``, or one each per row.

        Raises:
            ConfigError: the input has no batch dim, as in experts of a mixture.
        """
        if input.ndim != 3:
            raise ConfigError(
                f"mixed_batch: a module with an adapter is given {list(input.shape)}, not [batch, seq_len, features],"
                " so rows are not told apart there: choose other target_modules"
            )
        product: Tensor = input @ self.weight.mT
        bias: Tensor | None = getattr(self, "bias", None)
        if bias is None:
            return product
        return product + (bias[:, None] if bias.ndim == 2 else bias)


class RowEmbedding(nn.Embedding):
    """A table of embeddings that may have a leading batch dim.

    Args:
        table: the layer that it shares the weight with.
    """

    def __init__(self, table: nn.Embedding) -> None:
        nn.Module.__init__(self)
        vars(self).update({key: value for key, value in vars(table).items() if not key.startswith("_")})
        self.weight = table.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the parent's
        """Return rows ``[batch, seq_len, width]`` of a table ``[tokens, width]``, or of one for each row."""
        if self.weight.ndim == 2:
            return super().forward(input)
        return self.weight.gather(1, input[..., None].expand(-1, -1, self.weight.shape[-1]))


def use_row_weights(model: Any, inputs: Collection[str]) -> None:
    """Replace the layers of a PeftModel that hold adapter tensors by layers that accept a weight per row.

    Args:
        model: changed in place.
        inputs: names in the model of the tensors that are inputs of the graph.

    Raises:
        ConfigError: the adapter is not LoRA, its layers compute more than two products (DoRA, embeddings), or a tensor
            belongs to another kind of layer.
    """
    method = model.active_peft_config.peft_type.value
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ConfigError(f"mixed_batch serves lora and rslora, and the adapters are {method.lower()}: leave it out")
    for name, layer in layers.items():
        variants = [variant for variant in layer.lora_variant.values() if not isinstance(variant, Activation)]
        if not isinstance(layer, Linear) or variants:
            why = "DoRA or another variant" if variants else "no plain linear layer"
            raise ConfigError(f"mixed_batch serves plain LoRA, and {name} is {why}: leave mixed_batch out")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(parameters[name]) for name in inputs}
    for name in sorted({key.rpartition(".")[0] for key, parameter in parameters.items() if id(parameter) in wanted}):
        layer = model.get_submodule(name)
        rows = next((row for kind, row in ROW_LAYERS.items() if type(layer) is kind), None)
        if rows is None:
            raise ConfigError(
                f"mixed_batch: the adapters replace weights of {name}, a {type(layer).__name__}, which computes with"
                " one weight for all rows (linear layers and embeddings are served): leave mixed_batch out"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, rows(layer))


ROW_LAYERS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {nn.Linear: RowLinear, nn.Embedding: RowEmbedding}
"""Layers of torch, and those that stand in for them with a weight per row."""
