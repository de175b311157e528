# SPDX-License-Identifier: Apache-2.0
"""The decode loop over a session in numpy that keeps what it is fed and knows what each row must have read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qeff_validate.errors import RunError
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.tensors import Tensors, TensorSpec

VOCAB, PAD, CTX = 100, 7, 64
ADAPTER = {"lora": np.array([3.0], np.float32)}


class Fake:
    """Keeps a text for each row, writes tokens at their positions, and answers with what `next_token` says."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]] = (), *, dtype: str = "int64", every: bool = False, slots: bool = False
    ) -> None:
        ids = [TensorSpec(name, dtype, ("b", "s")) for name in ("input_ids", "position_ids")]
        ids += [TensorSpec("batch_index", dtype, ("b", 1))] if slots else []
        self.inputs = (*ids, TensorSpec("past_key.0", "float32", ("b", "ctx")), TensorSpec("lora", "float16", (1,)))
        self.outputs: tuple[TensorSpec, ...] = (TensorSpec("logits", "float32", ("b", 1, VOCAB)),)
        self.shapes = tuple({"input_ids": shape} for shape in shapes)
        self.fed: list[dict[str, Any]] = []
        self._every = every
        self._texts: dict[int, dict[int, int]] = {}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        assert fetch == ["logits"]
        self.fed.append({name: array.copy() for name, array in feeds.items()})
        ids, places = feeds["input_ids"], feeds["position_ids"]
        assert ids.shape == places.shape
        out = np.zeros((*ids.shape, VOCAB), np.float32)
        slots = feeds.get("batch_index", np.arange(len(ids))[:, None])
        assert slots.shape == (len(ids), 1)
        assert len(set(slots.ravel().tolist())) == len(ids), "two rows have the same slot"
        for row, (slot, tokens, at) in enumerate(zip(slots[:, 0].tolist(), ids, places, strict=True)):
            text = self._texts.setdefault(slot, {})
            for column, (token, place) in enumerate(zip(tokens, at, strict=True)):
                if place < 0:
                    assert token == PAD, "a token without a place"
                    continue
                assert place <= len(text), "a place that is not the next"
                for later in [at for at in text if at >= place]:
                    del text[later]
                text[int(place)] = int(token)
                out[row, column, next_token(list(text.values()))] = 1
        if self._every:
            return {"logits": out}
        return {"logits": out[np.arange(len(ids)), places.argmax(axis=1)][:, None]}

    def reset(self) -> None:
        self._texts = {}


def next_token(text: Sequence[int]) -> int:
    """Return a token that depends on all of a text and its order."""
    return int(sum((at + 2) * token for at, token in enumerate(text)) % VOCAB)


def alone(prompt: Sequence[int], steps: int, eos: frozenset[int]) -> list[int]:
    """The oracle: one row, token by token, without any batch, chunk or padding."""
    text = list(prompt)
    for _ in range(steps):
        text.append(next_token(text))
        if text[-1] in eos:
            break
    return text[len(prompt) :]


def plan(**changes: Any) -> Plan:
    usual = {"batch_size": 2, "prefill_lengths": (4,), "padding_side": "right", "pad": PAD, "eos": frozenset(),
             "max_new_tokens": 5}  # fmt: skip
    return Plan(**{**usual, **changes})


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(8, VOCAB, length) for length in lengths]


def chosen(found: Sequence[np.ndarray]) -> list[list[int]]:
    return [rows.argmax(axis=1).tolist() for rows in found]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=7),
    batch=st.integers(1, 4),
    chunk=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
    ends=st.frozensets(st.integers(0, VOCAB - 1), max_size=40),
    steps=st.integers(1, 6),
)
def test_every_row_says_what_it_says_alone(
    lengths: list[int], batch: int, chunk: int, side: str, ends: frozenset[int], steps: int
) -> None:
    rows = prompts(*lengths, seed=sum(lengths))
    wanted = [alone(row.tolist(), steps, ends) for row in rows]
    sizes = plan(batch_size=batch, prefill_lengths=(chunk,), padding_side=side, eos=ends, max_new_tokens=steps)
    session = Fake()
    assert chosen(generate(session, rows, sizes)) == wanted
    assert {feeds["input_ids"].shape for feeds in session.fed} <= {(batch, chunk), (batch, 1)}
    forced = [np.array(text) for text in wanted]
    assert chosen(generate(Fake(every=True), rows, sizes, forced=forced)) == wanted


@pytest.mark.parametrize(
    ("side", "places"),
    [
        ("right", [[0, 1, 2, 3, 4, -1], [0, -1, -1, -1, -1, -1]]),
        ("left", [[-1, 0, 1, 2, 3, 4], [-1, -1, -1, -1, -1, 0]]),
    ],
)
def test_chunks_cover_the_longest_row_and_padding_has_no_place(side: str, places: list[list[int]]) -> None:
    session = Fake()
    generate(session, prompts(5, 1), plan(prefill_lengths=(3,), padding_side=side, max_new_tokens=1))
    assert np.concatenate([feeds["position_ids"] for feeds in session.fed], axis=1).tolist() == places
    assert [feeds["input_ids"].shape[1] for feeds in session.fed] == [3, 3]


def test_rows_go_on_at_their_own_places_and_what_has_ended_feeds_padding() -> None:
    rows = prompts(2, 6)
    first = alone(rows[0].tolist(), 5, frozenset())
    session = Fake()
    found = generate(session, rows, plan(eos=frozenset({first[1]})))
    assert [len(row) for row in found] == [2, 5]
    decode = [feeds for feeds in session.fed if feeds["input_ids"].shape[1] == 1]
    assert [feeds["position_ids"][:, 0].tolist() for feeds in decode] == [[2, 6], [-1, 7], [-1, 8], [-1, 9]]
    assert [feeds["input_ids"][0, 0] for feeds in decode] == [first[0], PAD, PAD, PAD]


def test_the_loop_stops_when_every_row_has_ended() -> None:
    rows = prompts(3, 4)
    ends = frozenset(alone(row.tolist(), 1, frozenset())[0] for row in rows)
    session = Fake()
    assert [len(row) for row in generate(session, rows, plan(eos=ends))] == [1, 1]
    assert [feeds["input_ids"].shape for feeds in session.fed] == [(2, 4)]


def test_places_without_a_row_feed_padding_and_give_nothing() -> None:
    session = Fake()
    assert len(generate(session, prompts(3, 2, 5), plan(batch_size=2))) == 3
    last = session.fed[-1]
    assert (last["input_ids"][1].tolist(), last["position_ids"][1].tolist()) == ([PAD], [-1])


def test_forced_tokens_are_fed_and_decide_the_length_whatever_the_session_would_choose() -> None:
    rows, forced = prompts(3, 4), [np.array([50, 51, 52]), np.array([60])]
    session = Fake()
    found = generate(session, rows, plan(eos=frozenset({50, 51})), forced=forced)
    assert [len(row) for row in found] == [3, 1]
    decode = [feeds["input_ids"][:, 0].tolist() for feeds in session.fed if feeds["input_ids"].shape[1] == 1]
    assert decode == [[50, PAD], [51, PAD]]
    for step in range(3):
        assert found[0][step].argmax() == next_token([*rows[0].tolist(), *forced[0].tolist()[:step]])


def test_state_is_fed_once_in_its_dtype_however_many_chunks_and_batches_follow() -> None:
    session = Fake()
    generate(session, prompts(9, 2, 3), plan(), state=ADAPTER)
    assert ["lora" in feeds for feeds in session.fed] == [True] + [False] * (len(session.fed) - 1)
    assert session.fed[0]["lora"].dtype == np.float16


def test_sizes_of_a_session_with_fixed_shapes_win_and_its_dtypes_are_fed() -> None:
    session = Fake(shapes=[(3, 1), (3, 5)], dtype="int32")
    assert chosen(generate(session, prompts(6, 2), plan())) == [
        alone(row.tolist(), 5, frozenset()) for row in prompts(6, 2)
    ]
    assert {feeds["input_ids"].shape for feeds in session.fed} == {(3, 5), (3, 1)}
    assert {feeds["position_ids"].dtype.name for feeds in session.fed} == {"int32"}


@pytest.mark.parametrize("shape", [(2, VOCAB), (2, 3, VOCAB), (1, 1, VOCAB)], ids=str)
def test_logits_of_another_shape_are_an_error_that_says_what_is_wanted(shape: tuple[int, ...]) -> None:
    session = Fake()
    session.run = lambda *_, **__: {"logits": np.zeros(shape, np.float32)}  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"logits have shape .*, wanted \[2, 1 or 4, vocab\]"):
        generate(session, prompts(2, 2), plan())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=7),
    rows=st.integers(1, 4),
    more=st.integers(0, 2),
    chunks=st.sets(st.integers(1, 6), min_size=1),
    side=st.sampled_from(["left", "right"]),
    ends=st.frozensets(st.integers(0, VOCAB - 1), max_size=40),
    steps=st.integers(1, 6),
)
def test_every_text_says_in_its_slot_what_it_says_alone(
    lengths: list[int], rows: int, more: int, chunks: set[int], side: str, ends: frozenset[int], steps: int
) -> None:
    texts = prompts(*lengths, seed=sum(lengths))
    wanted = [alone(text.tolist(), steps, ends) for text in texts]
    sizes = plan(batch_size=rows, slots=rows + more, prefill_lengths=tuple(chunks), padding_side=side, eos=ends,
                 max_new_tokens=steps)  # fmt: skip
    session = Fake(slots=True)
    assert chosen(generate(session, texts, sizes)) == wanted
    assert {feeds["input_ids"].shape for feeds in session.fed} <= {*((1, chunk) for chunk in chunks), (rows, 1)}
    assert {int(slot) for feeds in session.fed for slot in feeds["batch_index"].ravel()} <= set(range(rows + more))
    backwards = generate(Fake(slots=True), texts[::-1], sizes, chunk=1, slots=range(rows + more)[::-1])
    assert chosen(backwards[::-1]) == wanted


def test_prompts_come_into_slots_that_others_have_left_while_texts_go_on() -> None:
    session = Fake([(1, 4), (2, 1)], slots=True)
    texts, forced = prompts(3, 4, 2), [np.array([50, 51, 52]), np.array([60]), np.array([70, 71])]
    generate(session, texts, plan(prefill_lengths=(4,)), forced=forced)
    fed = [(feeds["batch_index"].ravel().tolist(), feeds["position_ids"].max(axis=1).tolist()) for feeds in session.fed]
    assert fed == [([0], [2]), ([1], [3]), ([1], [1]), ([0, 1], [3, 2]), ([0, 1], [4, -1])]


def test_a_run_takes_the_smallest_length_that_fits_what_is_left() -> None:
    session = Fake()
    generate(session, prompts(9, 3), plan(prefill_lengths=(2, 4), max_new_tokens=1))
    assert [feeds["input_ids"].shape[1] for feeds in session.fed] == [4, 4, 2]


@pytest.mark.parametrize("slots", [False, True])
def test_what_a_slot_holds_of_a_prompt_is_not_fed_again(slots: bool) -> None:
    session, texts = Fake(slots=slots), prompts(9, 6)
    generate(session, [np.concatenate([text[:4], [1, 2, 3, 4, 5, 6]]) for text in texts], plan(max_new_tokens=1))
    fed = len(session.fed)
    found = generate(session, texts, plan(), kept=[4, 4])
    assert chosen(found) == [alone(text.tolist(), 5, frozenset()) for text in texts]
    assert min(int(array[array >= 0].min()) for array in (f["position_ids"] for f in session.fed[fed:])) == 4
