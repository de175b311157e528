# SPDX-License-Identifier: Apache-2.0
"""Several LoRA adapters in one batch: their tensors are stacked, and each row of the batch uses those of its adapter.

Index 0 of a stack is the base, a LoRA adapter without effect. PEFT implements the two factors of an adapter as linear
layers, so it is enough that these accept a weight per row; no architecture needs code of its own.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from qeff_validate.errors import ConfigError


class RowLinear(nn.Linear):
    """A linear layer whose weight may have a leading batch dim.

    Args:
        linear: the layer that it shares weight and bias with.
    """

    def __init__(self, linear: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the parent's
        """Return ``x Wᵀ`` for ``x [batch, seq_len, in]`` and ``W [out, in]`` or ``[batch, out, in]``.

        Raises:
            ConfigError: the input has no batch dim, as in experts of a mixture.
        """
        if input.ndim != 3:
            raise ConfigError(
                f"mixed_batch: a module with an adapter is given {list(input.shape)}, not [batch, seq_len, features],"
                " so rows are not told apart there: choose other target_modules"
            )
        return input @ self.weight.mT


def use_row_weights(model: Any) -> None:
    """Replace the factors of each LoRA layer of a PeftModel by layers that accept a weight per row.

    Raises:
        ConfigError: the adapter is not LoRA, or its layers compute more than two products (DoRA, bias, embeddings).
    """
    method = model.active_peft_config.peft_type.value
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ConfigError(f"mixed_batch serves lora and rslora, and the adapters are {method.lower()}: leave it out")
    for name, layer in layers.items():
        if not isinstance(layer, Linear) or layer.lora_variant or any(layer.lora_bias.values()):
            why = "DoRA or another variant" if getattr(layer, "lora_variant", None) else "no plain linear layer"
            raise ConfigError(f"mixed_batch serves plain LoRA, and {name} is {why}: leave mixed_batch out")
        for factors in (layer.lora_A, layer.lora_B):
            for adapter in factors:
                factors[adapter] = RowLinear(factors[adapter])
