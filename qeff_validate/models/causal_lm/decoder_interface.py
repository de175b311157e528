# SPDX-License-Identifier: Apache-2.0
"""The interface of a decoder's graph: its inputs, outputs and specializations (design §3). Loads no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, PositiveInt

from qeff_validate.models.causal_lm.next_tokens import NEXT_TOKENS
from qeff_validate.models.causal_lm.options import PeftCausalLMOptions
from qeff_validate.protocols import Graph
from qeff_validate.tensors import RETAINED, Tensors, TensorSpec

RECURRENT = ("past_conv", "past_recurrent")
"""Names of convolutional and recurrent states; the number of the layer follows, and that of a state if it is not 0."""


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
    texts = "batch_size" if options.full_batch_size is None else "full_batch_size"
    state = [
        TensorSpec(f"past_{name}.{layer}", "float32", (texts, heads, "ctx_len", size))
        for layer, pair in enumerate(interface.dims)
        if pair is not None
        for name, (heads, size) in zip(("key", "value"), pair, strict=True)
    ]
    slots = {"ctx_len": options.ctx_len} if state else {}
    recurrent: dict[str, tuple[int | str, ...]] = {name: (texts, *shape) for name, shape in interface.recurrent.items()}
    state += [TensorSpec(name, "float32", shape) for name, shape in recurrent.items()]
    if options.full_batch_size is not None:
        tokens.append(TensorSpec("batch_index", "int64", ("batch_size", 1)))
    if options.mixed_batch:
        tokens.append(TensorSpec("adapter_ids", "int64", ("batch_size",)))
    if starts:
        tokens.append(TensorSpec("adapter_start", "int64", ("batch_size",)))
    weights = [TensorSpec(name, array.dtype.name, array.shape) for name, array in adapter.items()]
    twins = [TensorSpec(f"{spec.name}{RETAINED}", spec.dtype, spec.shape) for spec in (*state, *weights)]
    lengths = (1,) if recurrent else (*reversed(options.prefill_lengths), 1)
    outputs = [TensorSpec("logits", "float32", ("batch_size", 1, interface.vocab))]
    if options.next_tokens:
        outputs.append(TensorSpec(NEXT_TOKENS, "int64", ("batch_size", 1, 1)))
    return Graph(
        inputs=(*tokens, *state, *weights),
        outputs=(*outputs, *twins),
        buckets=_buckets(lengths, slots, options, fixed=bool(recurrent)),
        why={
            "logits": "logits are what is compared, and tokens that a graph has chosen do not tell how near others"
            " were: export it with logits beside them"
        },
    )


def _buckets(
    lengths: Sequence[int], slots: Mapping[str, int], options: PeftCausalLMOptions, *, fixed: bool
) -> tuple[Mapping[str, int], ...]:
    """Return the specializations: each length of a prefill, then one token of each row; with slots as upstream's.

    Args:
        lengths: tokens of a row, the last of a decode run.
        slots: ``ctx_len``, if there are keys and values.
        options: numbers of rows and slots.
        fixed: the graph takes one token of each row, so its length is no symbol.
    """
    by_length = [({} if fixed else {"seq_len": length}) | dict(slots) for length in lengths]
    decode = {"batch_size": options.rows, **by_length[-1]}
    if options.full_batch_size is None:
        buckets = [*({"batch_size": options.rows, **sizes} for sizes in by_length), decode]
    else:
        prefill = ({"batch_size": 1, **sizes} for sizes in (by_length if fixed else by_length[:-1]))
        buckets = [{**sizes, "full_batch_size": options.slots} for sizes in (*prefill, decode)]
    return tuple(bucket for at, bucket in enumerate(buckets) if bucket not in buckets[:at])
