# SPDX-License-Identifier: Apache-2.0
"""What model kinds give to be timed: plain feeds that a session takes, in the sizes that their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qeff_validate as qv
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.models.causal_lm.workloads import decoder_workloads
from qeff_validate.models.row_model import ArrayRows, RowModel
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import Graph
from qeff_validate.tensors import TensorSpec


class Session:
    """Takes everything and computes nothing."""

    def __init__(self, *inputs: TensorSpec, shapes: Any = ()) -> None:
        self.inputs, self.outputs, self.shapes = inputs, (), shapes


TOKENS = [TensorSpec(name, "int32", ("batch_size", "seq_len")) for name in ("input_ids", "attention_mask")]
ROWS = TokenRows((np.array([7, 8, 9]), np.array([5])), 0, ("a", "b"))


def test_embedding_fills_every_allowed_shape_without_padding() -> None:
    model = qv.model(qv.Case(name="a", source="random:bert", options={"seq_len": [4, 6], "batch_size": 3}))
    free = model.workloads(Session(*TOKENS), ROWS)
    assert [(item.name, item.rows) for item in free] == [
        ("seq_len 4, batch 1", 1), ("seq_len 4, batch 3", 3), ("seq_len 6, batch 1", 1), ("seq_len 6, batch 3", 3),
    ]  # fmt: skip
    (fixed,) = model.workloads(Session(*TOKENS, shapes=({"input_ids": (2, 5), "attention_mask": (2, 5)},)), ROWS)
    (feeds,) = fixed.feeds
    assert feeds["input_ids"].tolist() == [[7, 8, 9, 5, 7], [8, 9, 5, 7, 8]]
    assert (feeds["attention_mask"] == 1).all()
    assert {array.dtype.name for array in feeds.values()} == {"int32"}


DECODER = (
    TensorSpec("input_ids", "int64", ("batch_size", "seq_len")),
    TensorSpec("position_ids", "int64", ("batch_size", "seq_len")),
    TensorSpec("w", "float16", (2,)),
)
PLAN = Plan(2, (4,), "right", 0, frozenset(), 3)


def decoder(states: list[Any], *extra: TensorSpec, ctx_len: int = 10) -> dict[str, Any]:
    made = decoder_workloads(Session(*DECODER, *extra), PLAN, np.arange(3), states, ctx_len)
    return {item.name: item for item in made}


def test_decoder_prefills_in_chunks_and_decodes_behind_them() -> None:
    base, first, second = ({"w": np.full(2, value, np.float32)} for value in (0, 1, 2))
    made = decoder([base, first, second])
    assert list(made) == [
        "prefill 4, batch 2", "context 4, batch 2", "prefill 8, batch 2", "context 8, batch 2", "swap, batch 2",
    ]  # fmt: skip
    prefill, decode, swap = made["prefill 8, batch 2"], made["context 8, batch 2"], made["swap, batch 2"]
    places = [feeds["position_ids"].tolist() for feeds in prefill.feeds]
    assert places == [[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]
    assert prefill.feeds[1]["input_ids"].tolist() == [[1, 2, 0, 1]] * 2
    (step,) = decode.feeds
    assert step["position_ids"].tolist() == [[8], [8]]
    assert decode.before[1:] == prefill.feeds
    assert decode.before[0]["w"].dtype == np.float16
    assert (decode.rows, decode.tokens, prefill.tokens) == (0, 2, 0)
    assert ([feeds["w"][0] for feeds in swap.feeds], swap.count) == ([1, 2], 2)
    assert (swap.feeds[0]["position_ids"] == -1).all(), "a swap leaves the cache alone"


@pytest.mark.parametrize("ctx_len", [4, 3])
def test_context_without_room_behind_a_chunk_has_no_prefill(ctx_len: int) -> None:
    assert decoder([{}], ctx_len=ctx_len) == {}


def test_mixed_batch_and_a_model_without_adapters_swap_nothing() -> None:
    ids = TensorSpec("adapter_ids", "int64", ("batch_size",))
    state = {"w": np.zeros(2, np.float32)}
    assert "swap, batch 2" not in decoder([state, state], ids)
    assert decoder([state, state], ids)["context 4, batch 2"].feeds[0]["adapter_ids"].tolist() == [0, 0]
    assert "swap, batch 2" not in decoder([{}])


def test_row_model_times_its_batch() -> None:
    class Kind(RowModel):
        graph = Graph((), (), ({"batch_size": 4},))

    model = Kind(qv.Case(name="a", source="x"), None)
    inputs = ArrayRows({"x": np.arange(3, dtype=np.float64)[:, None]}, ("a", "b", "c"))
    (made,) = model.workloads(Session(TensorSpec("x", "float32", ("batch_size", 1))), inputs)
    assert made.feeds[0]["x"].ravel().tolist() == [0, 1, 2, 0]
    assert (made.quantity, made.rows, made.feeds[0]["x"].dtype.name) == ("latency", 4, "float32")
