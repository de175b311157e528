# SPDX-License-Identifier: Apache-2.0
"""Mutants of sessions, on a session of a few lines of numpy; and all tables of embeddings together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from bounds import close

from qeff_validate.mutation.mutant import FaultySession, Inapplicable, SessionMutant, mutants
from qeff_validate.mutation.session_mutants import SESSION_MUTANTS
from qeff_validate.tensors import Shapes, Tensors, TensorSpec

NAMED = {mutant.name: mutant for mutant in SESSION_MUTANTS}
LENGTHS = (48, 5, 0, 33)
"""Tokens of the rows; one has none."""

FAMILIES = {"layers", "attention", "norms", "activations", "weights", "positions", "tokens", "masks", "pooling", "rows",
            "values", "numbers"}  # fmt: skip


class Means:
    """A session whose vectors are weighted means of a table's rows; places and token types matter too."""

    inputs: tuple[TensorSpec, ...] = tuple(
        TensorSpec(name, ("batch_size", "seq_len"), "int64")
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    outputs: tuple[TensorSpec, ...] = (TensorSpec("output", ("batch_size", 64), "float32"),)
    shapes: tuple[Shapes, ...] = ()

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).standard_normal((1000, 64))
        self.forgotten = 0
        self.returned: list[np.ndarray] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        ids, mask, types = (feeds[spec.name] for spec in self.inputs)
        assert all(array.flags.c_contiguous and array.dtype == np.int64 for array in feeds.values())
        place = 1 + 0.1 * np.arange(ids.shape[1])[None, :, None]
        weight = mask[..., None] * place
        total = ((self.table[ids] + types[..., None]) * weight).sum(1) / np.maximum(weight.sum(1), 1)
        self.returned.append(total.astype(np.float32))
        return {"output": self.returned[-1]}

    def reset(self) -> None:
        self.forgotten += 1


def batches(left: bool = False) -> list[dict[str, np.ndarray]]:
    """Three batches that may not be written to."""
    rng, runs = np.random.default_rng(1), []
    for _ in range(3):
        mask = (np.arange(48)[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
        mask = mask[:, ::-1].copy() if left else mask
        ids = rng.integers(3, 1000, mask.shape) * mask
        runs.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    for feeds in runs:
        for array in feeds.values():
            array.flags.writeable = False
    return runs


def results(session: Any, runs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    return [session.run(feeds)["output"] for feeds in runs]


def faulty(name: str, left: bool = False) -> list[np.ndarray]:
    return results(NAMED[name].change(Means()), batches(left))


HEALTHY = results(Means(), batches())


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mutant", SESSION_MUTANTS, ids=lambda mutant: mutant.name)
def test_a_session_with_a_fault_returns_other_vectors_of_the_same_shape(mutant: SessionMutant, left: bool) -> None:
    healthy, inner = results(Means(), batches(left)), Means()
    session = mutant.change(inner)
    assert isinstance(session, FaultySession)
    assert (session.inputs, session.outputs, session.shapes) == (inner.inputs, inner.outputs, inner.shapes)
    vectors = results(session, batches(left))
    assert [(array.shape, array.dtype) for array in vectors] == [((4, 64), np.float32)] * 3
    difference = np.concatenate(vectors) - np.concatenate(healthy)
    size = float(np.linalg.norm(difference) / np.linalg.norm(np.concatenate(healthy)))
    assert not size <= (1e-4 if mutant.gross else 1e-6), size
    session.reset()
    assert inner.forgotten == 1
    if mutant.family in {"rows", "values", "numbers"}:
        assert all(np.array_equal(*pair) for pair in zip(inner.returned, healthy, strict=True)), "outputs are no copies"


def test_token_types_need_an_input() -> None:
    class Plain(Means):
        inputs = Means.inputs[:2]

    with pytest.raises(Inapplicable, match="token_type_ids"):
        NAMED["token types 1"].change(Plain())


# --- inputs ----------------------------------------------------------------------------------


class Recorder(Means):
    """Keeps the feeds of its last run."""

    feeds: Tensors

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        self.feeds = feeds
        return super().run(feeds, fetch=fetch)


def feeds_of(name: str, left: bool) -> tuple[dict[str, np.ndarray], Tensors]:
    inner, feeds = Recorder(), batches(left)[0]
    NAMED[name].change(inner).run(feeds)
    return feeds, inner.feeds


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mask ignored", (48, 48, 48, 48)),
        ("cut at 16 tokens", (16, 5, 0, 16)),
        ("one padding token counted as text", (48, 6, 0, 34)),
        ("first token dropped", (47, 4, 0, 32)),
    ],
)
def test_masks_keep_this_number_of_tokens(name: str, counts: tuple[int, ...], left: bool) -> None:
    before, after = feeds_of(name, left)
    assert after["attention_mask"].sum(axis=1).tolist() == list(counts)
    for row, ids in enumerate(before["input_ids"]):
        kept = ids[(before["attention_mask"][row] > 0) & (after["attention_mask"][row] > 0)]
        real = ids[before["attention_mask"][row] > 0]
        wanted = real[1:] if name == "first token dropped" else real[: counts[row]]
        assert kept.tolist() == wanted.tolist()


@pytest.mark.parametrize("left", [False, True])
def test_tokens_that_are_changed(left: bool) -> None:
    before, after = feeds_of("two tokens swapped", left)
    lower = feeds_of("token ids one too low", left)[1]["input_ids"]
    for row, length in enumerate(LENGTHS):
        real = before["attention_mask"][row] > 0
        ids, swapped = before["input_ids"][row][real].tolist(), after["input_ids"][row][real].tolist()
        assert swapped == ([ids[0], ids[2], ids[1], *ids[3:]] if length > 3 else ids)
        assert lower[row][real].tolist() == [token - 1 for token in ids]
        assert not lower[row][~real].any()


# --- outputs --------------------------------------------------------------------------------


def by_hand(change: Callable[[np.ndarray], Any]) -> list[np.ndarray]:
    return [np.array(change(array.astype(np.float64))) for array in HEALTHY]


def edited(index: Any, change: Callable[[Any, float], Any]) -> list[np.ndarray]:
    arrays = [array.astype(np.float64) for array in HEALTHY]
    for array in arrays:
        for row in array:
            row[index] = change(row[index], float(np.sqrt((row**2).mean())))
    return arrays


def unit(array: np.ndarray) -> Any:
    return array / np.array([[np.sqrt((row**2).sum()) or 1.0] for row in array])


WANTED: dict[str, list[np.ndarray]] = {
    "rows rolled": by_hand(lambda array: array[[3, 0, 1, 2]]),
    "first row of each batch zero": by_hand(lambda array: [0 * array[0], *array[1:]]),
    "first row of each batch NaN": by_hand(lambda array: [np.nan * array[0], *array[1:]]),
    "first row given to its neighbour": by_hand(lambda array: array[[0, 0, 2, 3]]),
    "rows beyond 40 tokens zero": by_hand(lambda array: [0 * array[0], *array[1:]]),
    "first batch all zeros": [0 * HEALTHY[0], HEALTHY[1], HEALTHY[2]],
    "answers of the run before": [HEALTHY[0], HEALTHY[0], HEALTHY[1]],
    "every other batch answers the one before": [HEALTHY[0], HEALTHY[0], HEALTHY[2]],
    "dims rolled": by_hand(lambda array: array[:, [63, *range(63)]]),
    "scaled by 1.02": by_hand(lambda array: 1.02 * array),
    "scaled by 1.0002": by_hand(lambda array: 1.0002 * array),
    "all elements + 0.001 rms": edited(slice(None), lambda values, rms: values + rms / 1000),
    "one element + 0.001 rms": edited(9, lambda value, rms: value + rms / 1000),
    "sign of one element": edited(5, lambda value, rms: -value),
    "normalized": by_hand(unit),
    "outputs rounded to fp16": [array.astype("e").astype("d") for array in HEALTHY],
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", WANTED)
def test_outputs_are_what_the_name_says(name: str) -> None:
    for outputs, wanted in zip(faulty(name), WANTED[name], strict=True):
        close(outputs, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("noise of 1 %", 5e-3, 2e-2), ("noise of 0.01 %", 5e-5, 2e-4), ("outputs rounded to bf16", 1e-3, 4e-3)],
)
def test_noise_is_as_large_as_it_says_and_the_same_each_time(name: str, least: float, most: float) -> None:
    first, again = np.concatenate(faulty(name)), np.concatenate(faulty(name))
    assert np.array_equal(first, again)
    healthy = np.concatenate(HEALTHY)
    assert least < np.linalg.norm(first - healthy) / np.linalg.norm(healthy) < most


def test_clipping_takes_one_element_of_a_hundred() -> None:
    for outputs, healthy in zip(faulty("clipped at the 99th percentile"), HEALTHY, strict=True):
        assert 1 <= (outputs != healthy).sum() <= 3
        assert (np.abs(outputs) <= np.abs(healthy)).all()


# --- the tables ------------------------------------------------------------------------------------


def test_embeddings_have_enough_mutants_of_every_family() -> None:
    table = mutants("embedding")
    assert len(table) == len({mutant.name for mutant in table}) >= 44
    assert {mutant.family for mutant in table} == FAMILIES
    assert 12 <= sum(mutant.ceiling for mutant in table) <= 18
    assert sum(mutant.gross and mutant.ceiling for mutant in table) >= 4
    assert all(mutant.source for mutant in table)
    assert mutants("of a plug-in") == ()
