# SPDX-License-Identifier: Apache-2.0
"""An input that is fed wrongly is told from the outputs alone; the faults here are written down once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from qeff_validate.errors import RunError
from qeff_validate.explain.wrong_feed import wrong_feed
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Tensors, TensorSpec

LENGTHS = (3, 9, 6, 20)
WIDTH = max(LENGTHS) + 1
IDS = np.random.default_rng(3).integers(5, 40, (len(LENGTHS), WIDTH))
MASK = np.array([[1] * length + [0] * (WIDTH - length) for length in LENGTHS])
TYPES = np.array([[0] * (length // 2) + [1] * (WIDTH - length // 2) for length in LENGTHS]) * MASK
TABLE = np.random.default_rng(4).normal(size=(64, 8))


class Encoder:
    """A session that pools embeddings of tokens, types and places."""

    shapes = ()
    inputs = tuple(TensorSpec(n, "int64", ("b", "s")) for n in ("input_ids", "attention_mask", "token_type_ids"))
    outputs = (TensorSpec("output", "float32", ("b", 8)),)

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        ids, mask, types = (feeds[spec.name] for spec in self.inputs)
        if ids.max() >= len(TABLE):
            raise RunError("no such token")
        places = np.arange(1, ids.shape[1] + 1)[:, None] / ids.shape[1]
        states = TABLE[ids] * places + TABLE[types + 50]
        return {"output": (states * mask[..., None]).sum(1) / np.maximum(mask.sum(1, keepdims=True), 1)}

    def reset(self) -> None:
        pass


def infer(session: Any) -> Any:
    feeds = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
    halves = [session.run({name: array[rows] for name, array in feeds.items()}) for rows in ([0, 1], [2, 3])]
    return np.concatenate([half["output"] for half in halves])


class Faulty(SessionWrapper):
    def __init__(self, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(Encoder())
        self._fault = change

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        changed = {name: array.copy() for name, array in feeds.items()}
        self._fault(changed)
        return super().run(changed, fetch=fetch)


def every_place(feeds: dict[str, Any]) -> None:
    feeds["attention_mask"][:] = 1


def first_token(feeds: dict[str, Any]) -> None:
    feeds["attention_mask"][:, 0] = 0


def last_token(feeds: dict[str, Any]) -> None:
    for row in feeds["attention_mask"]:
        row[row.sum() - 1] = 0


def one_more(feeds: dict[str, Any]) -> None:
    for row in feeds["attention_mask"]:
        row[row.sum()] = 1


def short(feeds: dict[str, Any]) -> None:
    feeds["attention_mask"][:, 8:] = 0


def no_types(feeds: dict[str, Any]) -> None:
    feeds["token_type_ids"][:] = 0


def one_type(feeds: dict[str, Any]) -> None:
    feeds["token_type_ids"][:] = 1


def lower(feeds: dict[str, Any]) -> None:
    feeds["input_ids"] -= feeds["attention_mask"]


def neighbours_mask(feeds: dict[str, Any]) -> None:
    feeds["attention_mask"][:] = feeds["attention_mask"][::-1].copy()  # two rows a run


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (every_place, "attention_mask is 1 everywhere"),
        (first_token, "attention_mask leaves out the first token"),
        (last_token, "attention_mask leaves out the last token"),
        (one_more, "attention_mask counts one place of padding as text"),
        (short, "attention_mask ends after 8 tokens"),
        (no_types, "token_type_ids is 0 everywhere"),
        (one_type, "token_type_ids is 1 everywhere"),
        (lower, "input_ids is one too low"),
        (neighbours_mask, "attention_mask is that of the row before"),
    ],
)
def test_wrong_feed_is_told(fault: Callable[[dict[str, Any]], None], text: str) -> None:
    assert wrong_feed(Encoder(), infer, infer(Faulty(fault))) == text


def test_outputs_that_no_hypothesis_gives_are_not_explained() -> None:
    actual = infer(Encoder()) * 1.01
    assert wrong_feed(Encoder(), infer, actual) == ""
    assert wrong_feed(Encoder(), infer, infer(Encoder())) == ""  # right outputs are nobody's fault


class Decoder:
    """A session that adds up what is written into its places: a place that is left out is seen."""

    shapes = ()
    inputs = (
        TensorSpec("input_ids", "int64", ("batch_size", "seq_len")),
        TensorSpec("position_ids", "int64", ("batch_size", "seq_len")),
        TensorSpec("past_key.0", "float32", ("batch_size", "ctx_len")),
    )
    outputs = (TensorSpec("logits", "float32", (1, 1)), TensorSpec("past_key.0_RetainedState", "float32", (1, "c")))

    def __init__(self) -> None:
        self.reset()

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        self._cache = feeds["past_key.0"][0].copy() if "past_key.0" in feeds else self._cache
        kept = feeds["position_ids"][0] >= 0
        self._cache[feeds["position_ids"][0][kept]] = feeds["input_ids"][0][kept]
        until = feeds["position_ids"].max() + 1
        return {"logits": np.array([[(self._cache[:until] * np.arange(1, until + 1)).sum()]])}

    def reset(self) -> None:
        self._cache = np.full(16, np.nan)


def decode(session: Any) -> Any:
    runs = [([4, 5, 6], [0, 1, 2]), ([7, 8, 0], [3, 4, -1]), ([9], [5]), ([3], [6])]
    outputs = [
        session.run({"input_ids": np.array([ids]), "position_ids": np.array([places])})["logits"]
        for ids, places in runs
    ]
    return np.concatenate(outputs)


class OneFurther(SessionWrapper):
    """Decodes at one position too far, on a machine that clears its memory."""

    def __init__(self) -> None:
        super().__init__(Decoder())
        self._state: dict[str, Any] = {"past_key.0": np.zeros((1, 16), np.float32)}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        places = feeds["position_ids"]
        feeds = {**self._state, **feeds, "position_ids": places + 1 if places.shape[1] == 1 else places}
        self._state = {}
        return super().run(feeds, fetch=fetch)


def test_positions_of_a_decode_loop_are_told() -> None:
    sizes = {"batch_size": 1, "ctx_len": 16}
    text = wrong_feed(Decoder(), decode, decode(OneFurther()), sizes)
    assert text == "position_ids is one too high behind the prompt"
