# SPDX-License-Identifier: Apache-2.0
"""The interface of a decoder's graph: its inputs, outputs and specializations (design §3). Loads no framework."""

from __future__ import annotations

from pydantic import BaseModel, PositiveInt

from qeff_validate.models.causal_lm.options import PeftCausalLMOptions
from qeff_validate.protocols import Graph
from qeff_validate.tensors import RETAINED, Tensors, TensorSpec


class Interface(BaseModel):
    """Sizes of a model that shape its graph.

    Attributes:
        dims: number of heads and head size of each layer's keys and values; None for a layer without.
        vocab: vocabulary size.
        recurrent: shapes of recurrent states without their batch dim, by the name of the input.
    """

    dims: list[tuple[tuple[PositiveInt, PositiveInt], tuple[PositiveInt, PositiveInt]] | None]
    vocab: PositiveInt
    recurrent: dict[str, tuple[PositiveInt, ...]] = {}


def decoder_graph(interface: Interface, adapter: Tensors, options: PeftCausalLMOptions, *, starts: bool) -> Graph:
    """Return the interface of the graph that serves an adapter.

    Args:
        interface: sizes of the model.
        adapter: tensors of one adapter, or the stack of all, as the graph takes them.
        options: sizes of runs.
        starts: the graph takes ``adapter_start`` (activated LoRA).
    """
    length: str | int = 1 if interface.recurrent else "seq_len"  # transformers continues recurrent states by one token
    tokens = [TensorSpec(name, "int64", ("batch_size", length)) for name in ("input_ids", "position_ids")]
    state = [
        TensorSpec(f"past_{name}.{layer}", "float32", ("batch_size", heads, "ctx_len", size))
        for layer, pair in enumerate(interface.dims)
        if pair is not None
        for name, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]
    slots = {"ctx_len": options.ctx_len} if state else {}
    recurrent: dict[str, tuple[int | str, ...]] = {
        name: ("batch_size", *shape) for name, shape in interface.recurrent.items()
    }
    state += [TensorSpec(name, "float32", shape) for name, shape in recurrent.items()]
    if options.mixed_batch:
        tokens.append(TensorSpec("adapter_ids", "int64", ("batch_size",)))
    if starts:
        tokens.append(TensorSpec("adapter_start", "int64", ("batch_size",)))
    weights = [TensorSpec(name, array.dtype.name, array.shape) for name, array in adapter.items()]
    twins = [TensorSpec(f"{spec.name}{RETAINED}", spec.dtype, spec.shape) for spec in (*state, *weights)]
    sizes = {"batch_size": options.batch_size, **slots}
    lengths = dict.fromkeys((options.prefill_seq_len, 1))
    buckets = tuple({"seq_len": length, **sizes} for length in lengths)
    return Graph(
        inputs=(*tokens, *state, *weights),
        outputs=(TensorSpec("logits", "float32", ("batch_size", 1, interface.vocab)), *twins),
        buckets=(sizes,) if recurrent else buckets,
    )
