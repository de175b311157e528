# SPDX-License-Identifier: Apache-2.0
"""Faults of sessions, on one in numpy whose logits are a record of what was read.

A row of its logits holds, slot by slot, the tokens that the row's last token sees, and the adapter behind them. So what
a fault does to a text is written down here, and the decode loop of `models.causal_lm.adapter_schedule` is the caller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bounds import close

from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.adapter_schedule import run_batched, run_sequentially
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.mutation.causal_lm_mutants import CAUSAL_LM_MUTANTS, DECODE_MUTANTS, serving
from qeff_validate.mutation.mutant import Inapplicable, Mutant
from qeff_validate.mutation.tracking_session import DecodeTrackingSession
from qeff_validate.tensors import Array, Tensors, TensorSpec

NAMED = {mutant.name: mutant for mutant in CAUSAL_LM_MUTANTS}
CTX, PAD, STEPS = 64, 3, 3
LENGTHS = (2, 15, 8, 1, 17, 7)
PROMPTS = [[100 * (row + 1) + at for at in range(size)] for row, size in enumerate(LENGTHS)]
FORCED = [[1000 * (row + 1) + at for at in range(STEPS)] for row in range(len(LENGTHS))]
WEIGHT = "x.layers.0.v.lora_B.weight"
ADAPTERS = {name: {WEIGHT: np.array([at], np.float32)} for at, name in enumerate(("base", "a", "b"))}


class Record:
    """Writes tokens at their positions, and gives back what is seen of them."""

    def __init__(
        self, *, mixed: bool = False, adapted: bool = True, shapes: Sequence[Any] = (), dtype: str = "float32"
    ) -> None:
        tokens = ["input_ids", "position_ids", *(["adapter_ids"] if mixed else [])]
        ids = [TensorSpec(name, "int64", ("b", "s")[: 1 if name == "adapter_ids" else 2]) for name in tokens]
        state = [TensorSpec("past_key.0", "float32", ("b", 1, "ctx", 1))]
        state += [TensorSpec(WEIGHT, dtype, (3, 1) if mixed else (1,))] if adapted else []
        self.inputs = (*ids, *state)
        twins = [TensorSpec(f"{spec.name}_RetainedState", "float32", spec.shape) for spec in state]
        self.outputs = (TensorSpec("logits", "float32", ("b", 1, CTX + 1)), *twins)
        self.shapes = tuple(shapes)
        self._mixed = mixed
        self._held: dict[str, Array] = {WEIGHT: np.full((3, 1) if mixed else (1,), np.nan, np.float32)}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        assert set(feeds) <= {spec.name for spec in self.inputs}
        ids, positions = feeds["input_ids"], feeds["position_ids"]
        self._held.setdefault("past_key.0", np.full((len(ids), 1, CTX, 1), np.nan, np.float32))
        self._held.update({name: array.copy() for name, array in feeds.items() if name in (WEIGHT, "past_key.0")})
        state = self._held["past_key.0"]
        logits = np.zeros((len(ids), 1, CTX + 1), np.float32)
        for row, (tokens, at) in enumerate(zip(ids, positions, strict=True)):
            assert at.max() < CTX
            for place in range(int(at.max()) + 1):
                fed = set(tokens[at == place].tolist())
                assert len(fed) <= 1, "one slot is written with two tokens"
                if fed:
                    state[row, 0, place, 0] = fed.pop()
            last = max(int(at.max()), 0)
            logits[row, 0, : last + 1] = state[row, 0, : last + 1, 0]
            weight = self._held[WEIGHT]
            logits[row, 0, CTX] = weight[feeds["adapter_ids"][row], 0] if self._mixed else weight[0]
        state_outputs = {f"{name}_RetainedState": array.copy() for name, array in self._held.items()}
        outputs = {"logits": logits, **state_outputs}
        return {name: outputs[name] for name in (outputs if fetch is None else fetch)}

    def reset(self) -> None:
        self._held = {}


def run(
    fault: Callable[[Any], Any],
    *,
    side: str = "right",
    mixed: bool = False,
    rows: int = 2,
    adapters: Mapping[str, Tensors] = ADAPTERS,
    dtype: str = "float32",
) -> Array:
    """Return what was read, ``[visits, prompts, steps, CTX + 1]``: visits to base, a, b, base and a."""
    prompts = tuple(np.array(prompt) for prompt in PROMPTS)
    inputs = SimpleNamespace(ids=prompts, adapters=adapters, fed=lambda name: prompts)
    plan = Plan(rows, (8,), side, PAD, frozenset(), STEPS)
    forced = [np.array(text) for text in FORCED] * len(ADAPTERS)
    outputs = (run_batched if mixed else run_sequentially)(
        fault(Record(mixed=mixed, dtype=dtype)), inputs, plan, forced
    )
    whole = np.concatenate([outputs["logits"], outputs["again"]])
    return whole.reshape(-1, len(LENGTHS), STEPS, CTX + 1)


def read(row: Array) -> list[int]:
    """Return the tokens that were seen; an unwritten slot that was read is −1, one of zeros is 0."""
    seen = np.where(np.isnan(row[:CTX]), -1, row[:CTX]).astype(int).tolist()
    return seen[: max((at + 1 for at, token in enumerate(seen) if token), default=0)]


def healthy(prompt: int, step: int) -> list[int]:
    return PROMPTS[prompt] + FORCED[prompt][:step]


def all_read(records: Array, wanted: Callable[[int, int], list[int]]) -> None:
    """Check each text at each visit."""
    for visit in records:
        for prompt in range(len(LENGTHS)):
            for step in range(STEPS):
                assert read(visit[prompt, step]) == wanted(prompt, step), (prompt, step)


def fault(name: str) -> Callable[[Any], Any]:
    return serving(NAMED[name], ADAPTERS)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mixed", [False, True])
def test_session_without_fault_reads_every_text_and_is_followed(side: str, mixed: bool) -> None:
    seen: list[tuple[Any, ...]] = []

    def out(session: DecodeTrackingSession, outputs: dict[str, Array]) -> dict[str, Array]:
        assert session.batch or session.before.tolist() == [-1, -1]
        if session.began:
            seen.append((session.batch, session.visit, session.adapter, session.again))
        if session.decoding:
            wanted = session.reach + 1 - session.prompt
            assert ((wanted > 0) & (wanted < STEPS) | (session.reach < 0)).all()
        return outputs

    records = run(lambda session: DecodeTrackingSession(session, out=out), side=side, mixed=mixed)
    all_read(records, healthy)
    if mixed:
        assert seen == [(batch, int(batch > 8), None, batch > 8) for batch in range(18)]
    else:
        visited = [(0, False), (1, False), (2, False), (0, True), (1, True)]
        assert seen == [(batch, batch // 3, *visited[batch // 3]) for batch in range(15)]


def test_batches_are_told_apart_that_do_not_decode() -> None:
    session = DecodeTrackingSession(Record())
    plan = Plan(2, (8,), "right", PAD, frozenset(), 1)
    generate(session, [np.array(prompt) for prompt in PROMPTS], plan, state=ADAPTERS["a"])
    assert (session.batch, session.visit) == (2, 0)


def test_prompts_are_cut() -> None:
    for side in ("right", "left"):
        all_read(run(fault("prompts cut to 8 tokens"), side=side), lambda p, s: PROMPTS[p][:8] + FORCED[p][:s])


def test_last_token_is_dropped() -> None:
    for side in ("right", "left"):
        all_read(
            run(fault("last token of each prompt dropped"), side=side),
            lambda p, s: PROMPTS[p][: max(len(PROMPTS[p]) - 1, 1)] + FORCED[p][:s],
        )


def test_first_token_comes_from_the_token_before() -> None:
    all_read(
        run(fault("first token from the token before the last")),
        lambda p, s: healthy(p, s) if s else PROMPTS[p][: max(len(PROMPTS[p]) - 1, 1)],
    )


def test_first_token_comes_from_padding() -> None:
    """Where a prompt ends in a chunk that its neighbour fills: a row of padding sees slot 0."""
    records = run(fault("first token from padding in the last chunk"))
    all_read(records, lambda p, s: PROMPTS[p][:1] if (p, s) in {(0, 0), (3, 0), (5, 0)} else healthy(p, s))


def test_later_chunks_overwrite_the_first() -> None:
    records = run(fault("later chunks at the first one's positions"))
    for prompt in range(len(LENGTHS)):
        size = LENGTHS[prompt]
        start = (size - 1) // 8 * 8
        assert read(records[0, prompt, 0]) == PROMPTS[prompt][start:]


def test_decoding_leaves_a_slot_out() -> None:
    records = run(fault("position + 1 at decode"))
    assert read(records[0, 4, 2]) == [*PROMPTS[4], 0, *FORCED[4][:2]]  # the first batch of that length: zeros
    assert read(records[0, 4, 0]) == PROMPTS[4]
    undefined = run(fault("position + 1 at decode, into undefined memory"))
    assert read(undefined[0, 4, 2]) == [*PROMPTS[4], -1, *FORCED[4][:2]]


def test_second_row_sees_a_token_of_the_first() -> None:
    def wanted(prompt: int, step: int) -> list[int]:
        text = healthy(prompt, step)
        if prompt % 2 and step and len(text) > 2:  # slot 1 is there before the run
            text[1] = healthy(prompt - 1, step)[1]
        return text

    all_read(run(fault("a row sees its neighbour's slot")), wanted)


def test_every_second_batch_goes_on_behind_the_one_before() -> None:
    records = run(fault("keys and values not reset")).reshape(-1, 2, STEPS, CTX + 1)
    for batch, rows in enumerate(records):
        for row, steps in enumerate(rows):
            prompt, before = 2 * (batch % 3) + row, 2 * ((batch - 1) % 3) + row
            left = healthy(before, STEPS - 1) if batch % 2 else []
            for step in range(STEPS):
                assert read(steps[step]) == left + healthy(prompt, step)


def test_tokens_of_neighbours_are_exchanged() -> None:
    records = run(fault("tokens of two prompts exchanged"))
    assert read(records[0, 0, 0]) == PROMPTS[1][:2]
    assert read(records[0, 1, 1]) == [*PROMPTS[0], *[PAD] * 13, FORCED[1][0]]


def test_padding_on_the_left_is_read() -> None:
    widths = (16, 16, 8, 8, 24, 24)
    all_read(
        run(fault("padding on the left read as text"), side="left"),
        lambda p, s: [PAD] * (widths[p] - LENGTHS[p]) + healthy(p, s),
    )


def test_padding_on_the_right_is_moved_to_the_left_and_read() -> None:
    whole = [size // 8 * 8 for size in LENGTHS]
    all_read(
        run(fault("padding on the left read as text")),
        lambda p, s: PROMPTS[p][: whole[p]] + [PAD] * (-LENGTHS[p] % 8) + healthy(p, s)[whole[p] :],
    )


def served_at(records: Array) -> list[set[float]]:
    """Return the adapters that were served at each visit."""
    return [set(visit[..., CTX].ravel().tolist()) for visit in records]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("an adapter stays on", [{0}, {1}, {2}, {2}, {1}]),
        ("base served for the first adapter", [{0}, {0}, {2}, {0}, {0}]),
        ("first two adapters swapped", [{0}, {2}, {1}, {0}, {2}]),
        ("alpha / r dropped, x 0.5", [{0}, {0.5}, {1}, {0}, {0.5}]),
    ],
)
def test_other_adapters_are_served_one_by_one(name: str, wanted: list[set[float]]) -> None:
    records = run(fault(name))
    assert served_at(records) == wanted
    all_read(records, healthy)


def test_other_adapters_are_served_side_by_side() -> None:
    assert served_at(run(fault("first two adapters swapped"), mixed=True)) == [{0}, {2}, {1}, {0}, {2}]
    assert served_at(run(fault("adapter of the first prompt for all"), mixed=True)) == [{0}] * 5
    assert all(len(ids) > 1 for ids in served_at(run(fault("adapter of the next row"), mixed=True)))


@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_are_known_again_in_the_type_of_a_device(mixed: bool) -> None:
    thirds = {name: {WEIGHT: np.array([at / 3], np.float32)} for at, name in enumerate(("base", "a", "b"))}
    swapped = serving(NAMED["first two adapters swapped"], thirds)
    one, two = (float(np.float16(at / 3)) for at in (1, 2))
    records = run(swapped, mixed=mixed, adapters=thirds, dtype="float16")
    assert served_at(records) == [{0}, {two}, {one}, {0}, {two}]
    if not mixed:
        with pytest.raises(IncomparableError, match="none of the adapters"):
            run(swapped, adapters=ADAPTERS)


def test_what_is_missing_is_said() -> None:
    cases = {
        "an adapter stays on": (Record(mixed=True), "each row has its own adapter"),
        "adapter of the first prompt for all": (Record(), "one adapter serves all rows"),
        "a row sees its neighbour's slot": (Record(shapes=[{"input_ids": (1, 8)}]), "1 row"),
    }
    for name, (session, said) in cases.items():
        with pytest.raises(Inapplicable, match=said):
            fault(name)(session)
    with pytest.raises(Inapplicable, match="no adapter"):
        fault("an adapter stays on")(Record(adapted=False))
    for name in ("tokens of two prompts exchanged", "rows of the batch shifted by one"):
        with pytest.raises(Inapplicable, match="row"):
            run(fault(name), rows=1)


def runs(change: Callable[[Any], Any], count: int = 1) -> tuple[list[Array], list[Array]]:
    """Return the logits of decode steps with and without a fault."""
    rng = np.random.default_rng(2)
    healthy_logits = [rng.standard_normal((4, 1, 2000)).astype(np.float32) for _ in range(count)]
    copies, queue = [array.copy() for array in healthy_logits], list(healthy_logits)
    session = SimpleNamespace(inputs=(), outputs=(), shapes=(), run=lambda feeds, fetch: {"logits": queue.pop(0)})
    session_with_fault = change(session)
    places = {"input_ids": np.full((4, 1), PAD), "position_ids": np.array([[1], [2], [-1], [0]])}
    faulty_logits = [session_with_fault.run(places, fetch=["logits"])["logits"] for _ in range(count)]
    for array, before in zip(healthy_logits, copies, strict=True):
        np.testing.assert_array_equal(array, before)
    assert all(array.dtype == np.float32 and array.shape == (4, 1, 2000) for array in faulty_logits)
    return copies, faulty_logits


def logits(name: str) -> tuple[Array, Array]:
    (before,), (after,) = runs(NAMED[name].change)
    return before, after


@pytest.mark.numeric
def test_logits_are_changed_as_much_as_the_name_says() -> None:
    for name, size in (("one column + 1e-3", 1e-3), ("one column + 0.05", 0.05)):
        before, after = logits(name)
        hit = np.flatnonzero((before != after).any(axis=(0, 1)))
        assert hit.tolist() == [500]
        close((after - before)[..., hit], size, atol=1e-6)
    for name, factor in (("temperature 1.01", 1.01), ("temperature 1.001", 1.001)):
        before, after = logits(name)
        close(after, factor * before, rtol=1e-6)
    for name, size in (("noise 0.004", 0.004), ("noise 0.05", 0.05)):
        before, after = logits(name)
        assert np.std(after - before) == pytest.approx(size, rel=0.05)
        np.testing.assert_array_equal(after, logits(name)[1])


def test_logits_of_rows_and_columns_change_places() -> None:
    before, after = logits("rows of the batch shifted by one")
    np.testing.assert_array_equal(after, before[[3, 0, 1, 2]])
    before, after = logits("two columns exchanged")
    order = np.arange(2000)
    order[[500, 1000]] = [1000, 500]
    np.testing.assert_array_equal(after, before[..., order])


def test_logits_are_no_numbers_or_none() -> None:
    assert np.argwhere(np.isnan(logits("NaN in one row")[1])).tolist() == [[0, 0, 5]]
    assert not logits("zeros")[1].any()


def test_great_logits_are_made_and_lost() -> None:
    before, after = logits("padding of the vocabulary unmasked")
    np.testing.assert_array_equal(after[..., -1], before.max(axis=-1))
    np.testing.assert_array_equal(after[..., :-1], before[..., :-1])
    before, after = logits("logits clipped at the 99.9th percentile")
    assert (before != after).sum(axis=-1).tolist() == [[2]] * 4  # of 2000
    assert (after <= before).all()


def test_logits_of_the_run_before_are_given() -> None:
    before, after = runs(NAMED["logits of the run before"].change, 3)
    for wanted, logits_of_run in zip([before[0], before[0], before[1]], after, strict=True):
        np.testing.assert_array_equal(logits_of_run, wanted)


def test_padding_is_chosen_now_and_then() -> None:
    before, after = runs(NAMED["early end"].change, 4)
    hit = [int(logits_of_run[0, 0].argmax()) == PAD for logits_of_run in after]
    assert hit == [True, False, False, True]
    np.testing.assert_array_equal(after[0][1:], before[0][1:])


def test_one_bit_and_one_nan_at_one_visit() -> None:
    whole = run(DecodeTrackingSession)
    bit = run(fault("one bit at a second visit"))
    hit = np.argwhere(~((bit == whole) | (np.isnan(bit) & np.isnan(whole))))
    assert {(visit, step > 0) for visit, _, step, _ in hit.tolist()} == {(4, True)}
    assert np.abs(bit - whole).max() <= np.spacing(np.float32(whole.max()))
    nan = run(fault("NaN with one adapter at decode"))
    assert {(visit, step > 0) for visit, _, step, _ in np.argwhere(np.isnan(nan)).tolist()} == {(1, True), (4, True)}
    mixed = run(fault("NaN with one adapter at decode"), mixed=True)
    assert {(visit, step > 0) for visit, _, step, _ in np.argwhere(np.isnan(mixed)).tolist()} == {(1, True), (4, True)}


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in DECODE_MUTANTS if mutant.ceiling], ids=lambda mutant: mutant.name
)  # fmt: skip
def test_ceiling_is_measured_on_logits_alone(mutant: Mutant) -> None:
    logits_given = np.random.default_rng(0).standard_normal((6, 1, 50)).astype(np.float32)
    session = SimpleNamespace(inputs=(), outputs=(), shapes=(), run=lambda feeds, fetch: {"logits": logits_given})
    faulty = mutant.change(session)
    outputs = faulty.run({}, fetch=["logits"])["logits"]
    assert outputs.shape == logits_given.shape
    assert not np.array_equal(outputs, logits_given)


def test_table_is_complete() -> None:
    assert len(CAUSAL_LM_MUTANTS) >= 40
    assert max(Counter(mutant.name for mutant in CAUSAL_LM_MUTANTS).values()) == 1
    families = Counter(mutant.family for mutant in CAUSAL_LM_MUTANTS)
    assert set(families) == {"adapters", "state", "positions", "tokens", "rows", "numbers", "values", "choices"}
    assert min(families.values()) >= 1
    assert sum(mutant.ceiling for mutant in CAUSAL_LM_MUTANTS) <= 16
