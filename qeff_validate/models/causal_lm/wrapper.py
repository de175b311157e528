# SPDX-License-Identifier: Apache-2.0
"""The torch module of a causal language model with state and adapters as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.batched_lora import use_row_weights
from qeff_validate.models.causal_lm.decoder_state import cache_for, new_states, state_order
from qeff_validate.models.causal_lm.exportable_layers import (
    tensor_places,
    use_activation,
    use_constant_cutoffs,
    use_exportable_layers,
    use_slot_biases,
    use_slot_masks,
)
from qeff_validate.models.causal_lm.grouped_query_attention import NAME
from qeff_validate.models.causal_lm.kv_cache import masks, masks_by_window, prefix_states
from qeff_validate.models.causal_lm.real_rotations import RealRotations, has_complex_rotations
from qeff_validate.models.causal_lm.virtual_tokens import TENSOR, VirtualTokens
from qeff_validate.models.framework_calls import base_of, cache_argument
from qeff_validate.models.sources.exportable_experts import choose_exportable_experts
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Tensors


class Decoder(nn.Module):
    """One step of a causal LM: from tokens and positions to the logits of each row's last real token and the new state.

    Args:
        model: a causal LM of transformers, or a `peft.PeftModel` around one. Its attention is set to
            `grouped_query_attention`, and its LM head is applied to the last real token of each row only.
        layers: number of layers with keys and values.
        adapter: for each adapter tensor that is an input, PEFT's saved name and the name in ``model``.
        mixed: the tensors are stacks of several adapters, and each row selects its adapter (`batched_lora`).
        virtual: virtual tokens of the adapters; None: they have none.
        next_tokens: return the token with the greatest logit too.

    Raises:
        ConfigError: the model has no head, or its adapters cannot be mixed.
    """

    def __init__(
        self,
        model: Any,
        layers: int,
        adapter: Mapping[str, str] | None = None,
        *,
        mixed: bool = False,
        virtual: VirtualTokens | None = None,
        next_tokens: bool = False,
    ) -> None:
        super().__init__()
        self._next_tokens = next_tokens
        self.model = model
        self._layers = layers
        self._adapter = dict(adapter or {})
        self._last: Tensor | None = None
        self._cache_argument = cache_argument(model)
        base = base_of(model)
        base.set_attn_implementation(NAME)
        choose_exportable_experts(base)
        use_exportable_layers(model)
        use_slot_biases(model)
        self._tables = use_slot_masks(model)
        use_constant_cutoffs(model)
        self._activation = use_activation(model)
        self._windowed = masks_by_window(base)
        self._complex = has_complex_rotations(base)
        self._mixed, self._virtual = mixed, virtual
        self._embeddings: tuple[Tensor, Tensor] | None = None
        if virtual is not None and virtual.kind == "prompt":
            base.get_input_embeddings().register_forward_hook(self._with_virtual)
        if mixed and virtual is None:
            use_row_weights(model, self._adapter.values())
        self._places = tensor_places(model, self._adapter)
        head = base.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{type(base).__name__} has no output embeddings, so it is no causal language model")
        head.register_forward_pre_hook(self._only_last)

    def forward(self, input_ids: Tensor, position_ids: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
        """Run one step.

        Args:
            input_ids: int64 ``[batch, seq_len]``.
            position_ids: int64 ``[batch, seq_len]``, −1 for padding.
            **state: ``past_key.i`` and ``past_value.i``, float ``[batch, heads, ctx_len, head_dim]``, recurrent states
                (`recurrent_state`), and the adapter's tensors by PEFT's saved names; if mixed, ``adapter_ids`` int64
                ``[batch]`` too, and for activated LoRA ``adapter_start`` int64 ``[batch]``. With ``batch_index`` int64
                ``[batch, 1]`` states are ``[slots, …]``, and each row has the slot that it names.

        Returns:
            ``logits [batch, 1, vocab]``, ``next_tokens`` int64 ``[batch, 1, 1]`` if asked for, then the new value of
            each state in the order of the graph.
        """
        keys_and_values = None
        if self._virtual is not None:
            is_virtual, content = self._virtual_content(input_ids, state)
            input_ids = torch.where(is_virtual, 0, input_ids)
            if self._virtual.kind == "prompt":
                self._embeddings = (is_virtual, content)
            else:
                keys_and_values = prefix_states(is_virtual, content, state, self._layers)
        cache = cache_for(state, self._layers, position_ids, keys_and_values)
        self._last = position_ids.argmax(dim=1)
        for table in self._tables:
            table.positions = position_ids.clamp(min=0)
        activated: dict[str, Any] = {}
        if "adapter_start" in state:
            self._activation.mask = position_ids >= state["adapter_start"][:, None]
            activated = {"alora_offsets": ()}  # PEFT would look for the invocation in these tokens
        tensors = {saved: self._rows_of(state[saved], state) for saved in self._adapter}
        with RealRotations() if self._complex else nullcontext():
            outputs = functional_call(
                self.model,
                {place: tensors[saved] for saved, places in self._places.items() for place in places},
                tie_weights=False,
                args=(),
                kwargs={
                    "input_ids": input_ids,
                    "position_ids": position_ids.clamp(min=0),
                    "attention_mask": self._masks(position_ids, state),
                    self._cache_argument: cache,
                    "use_cache": True,
                    **activated,
                },
            )
        self._activation.mask = None  # for this run only
        for table in self._tables:
            table.positions = None
        cached = new_states(cache, state_order(list(state), self._layers)).values()
        # cloned, because the exporter renames an input that is returned unchanged
        inputs = (*self._adapter, *((TENSOR,) if self._virtual is not None else ()))
        chosen = (outputs.logits.argmax(dim=-1, keepdim=True),) if self._next_tokens else ()
        return (outputs.logits, *chosen, *cached, *(state[name].clone() for name in inputs))

    def _masks(self, position_ids: Tensor, state: Mapping[str, Tensor]) -> Any:
        """Return the attention masks; None for a model that keeps no keys and values."""
        keys = next((tensor for name, tensor in state.items() if name.startswith("past_key.")), None)
        if keys is None:
            return None
        config = self.model.config.get_text_config()
        return masks(position_ids, keys.shape[2], config, keys.dtype, windowed=self._windowed)

    def _rows_of(self, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return tensor[state["adapter_ids"]] if self._mixed else tensor

    def _virtual_content(self, input_ids: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return which tokens are virtual, bool ``[batch, seq_len]``, and their content ``[batch, seq_len, width]``."""
        assert self._virtual is not None
        content = state[TENSOR]
        is_virtual = input_ids >= self._virtual.first
        places = (input_ids - self._virtual.first).clamp(min=0, max=content.shape[-2] - 1)
        if not self._mixed:
            return is_virtual, content[places]
        rows = content[state["adapter_ids"]]
        return is_virtual, rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))

    def _with_virtual(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        content, self._embeddings = self._embeddings, None  # for this run only
        return output if content is None else torch.where(content[0][..., None], content[1], output)

    def _only_last(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden, last, self._last = inputs[0], self._last, None  # for this run only: others may call the model itself
        if last is None or hidden.ndim != 3:
            return None
        place = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (hidden.gather(1, place), *inputs[1:])


def decoder_examples(graph: Graph, adapter: Tensors | None = None) -> Tensors:
    """Return example inputs; batch size, length and context differ from each other and from every usual bucket."""
    sizes = {"batch_size": 3, "seq_len": 5, "ctx_len": 11, "full_batch_size": 7}
    examples: dict[str, Any] = {}
    for spec in graph.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        if spec.name in ("input_ids", "position_ids"):
            examples[spec.name] = np.broadcast_to(np.arange(shape[1]), shape).copy()
        elif spec.name == "batch_index":
            examples[spec.name] = np.arange(shape[0], dtype=spec.dtype)[:, None]
        else:
            examples[spec.name] = np.zeros(shape, dtype=spec.dtype)  # adapter_ids too: all rows the base
    return {**examples, **(adapter or {})}
