# SPDX-License-Identifier: Apache-2.0
"""Which slot a prompt comes into; that its text is right there is proved with real graphs (tests/meta)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.tensors import Tensors, TensorSpec

VOCAB = 4


class SlotSession:
    """Notes the slot of each prefill, and gives logits that say nothing."""

    def __init__(self) -> None:
        names = ("input_ids", "position_ids", "batch_index")
        self.inputs = tuple(TensorSpec(name, "int64", ("batch_size", "seq_len")) for name in names)
        self.outputs = (TensorSpec("logits", "float32", ("batch_size", 1, VOCAB)),)
        self.shapes: tuple[Any, ...] = ()
        self.prefilled: list[int] = []
        self.decoded: list[list[int]] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> dict[str, Any]:
        slots = feeds["batch_index"][:, 0].tolist()
        if (feeds["position_ids"] == 0).any():
            self.prefilled += slots
        elif feeds["input_ids"].shape[1] == 1:
            self.decoded.append(slots)
        return {"logits": np.zeros((len(feeds["input_ids"]), 1, VOCAB), np.float32)}

    def reset(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(("slots", "prefilled"), [(2, [0, 1, 0, 1, 0]), (3, [0, 1, 2, 0, 1]), (4, [0, 1, 2, 3, 0])])
def test_prompt_takes_the_slot_that_has_been_free_for_the_longest_time(slots: int, prefilled: list[int]) -> None:
    session = SlotSession()
    prompts = [np.array([1, 2, 3])] * len(prefilled)
    logits = generate(session, prompts, Plan(2, (4,), "right", 0, frozenset(), 2, slots=slots))
    assert [len(steps) for steps in logits] == [2] * len(prefilled)
    assert session.prefilled == prefilled
    assert all(len(set(rows)) == 2 for rows in session.decoded), "no two rows are in one slot"
