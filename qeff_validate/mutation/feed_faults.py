# SPDX-License-Identifier: Apache-2.0
"""Faults of the inputs of a session with a language model: tokens, positions, adapters, keys and values.

Rows, slots and numbers of batches that are fixed here are part of a fault, as its size is.
"""

from __future__ import annotations

import numpy as np

from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Feeds, Numbers

CUT = 8
"""Number of tokens that a longer prompt is cut to."""


def at_positions(feeds: Feeds, positions: Numbers) -> Feeds:
    """Return feeds with other positions ``[rows, seq]``; padding stays padding."""
    correct = feeds["position_ids"]
    return {**feeds, "position_ids": np.where(correct >= 0, positions, -1).astype(correct.dtype)}


def stays_on(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Do not feed the base's tensors at its second visit, so that the last adapter stays in place."""
    base_again = session.began and session.again and session.adapter == 0
    return {name: array for name, array in feeds.items() if not base_again or name not in session.weights}


def of_the_first_prompt(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Serve every row with the adapter of the very first row."""
    ids = session.memory.setdefault("ids", feeds["adapter_ids"][:1].copy())
    return {**feeds, "adapter_ids": np.full_like(feeds["adapter_ids"], ids[0])}


def of_the_next_row(_: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Serve each row with the adapter of its neighbour."""
    return {**feeds, "adapter_ids": np.roll(feeds["adapter_ids"], 1)}


def leaks(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Copy slot 1 of the first row into the second row; slot 0 may hold the same token in all rows."""
    if not session.decoding:
        return feeds
    state = session.retained()
    for array in state.values():
        array[1, :, 1] = array[0, :, 1]
    return {**feeds, **state}


def goes_on(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Append every second batch of prompts to the batch that is in the cache."""
    if session.batch % 2 == 0:
        return feeds
    return at_positions(feeds, np.minimum(feeds["position_ids"] + 1 + session.before[:, None], session.context - 1))


def starts_again(_: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Give later chunks the positions of the first one."""
    width = feeds["position_ids"].shape[1]
    return at_positions(feeds, feeds["position_ids"] % width) if width > 1 else feeds


def one_further(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Decode at one position too far, so that a slot is left out."""
    return at_positions(feeds, feeds["position_ids"] + 1) if session.decoding else feeds


def padding_is_text(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Read padding on the left as text. Padding on the right is moved to the left of its chunk first."""
    positions, limit = feeds["position_ids"], session.context - 1
    if session.decoding:
        return at_positions(feeds, np.minimum(positions + session.memory["shift"][:, None], limit))
    if session.began:
        session.memory.update(column=0, shift=np.zeros(len(positions), np.int64))
    width = positions.shape[1]
    columns = np.minimum(session.memory["column"] + np.arange(width), limit)
    ids, shifted = feeds["input_ids"].copy(), positions.copy()
    for row, row_positions in enumerate(positions):
        if session.prompt[row] and not (row_positions >= 0).any():
            continue  # its prompt ended in a chunk before
        padding_on_right = int(np.argmax(row_positions[::-1] >= 0))
        ids[row], shifted[row] = np.roll(ids[row], padding_on_right), columns
        session.memory["shift"][row] = columns[-1] - row_positions.max()
    session.memory["column"] += width
    return {**feeds, "input_ids": ids, "position_ids": shifted}


def cut(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Cut prompts to `CUT` tokens: later tokens repeat the last one at its position, which changes nothing."""
    ids, positions = feeds["input_ids"].copy(), feeds["position_ids"]
    if session.decoding:
        return at_positions(feeds, positions - np.maximum(session.prompt - CUT, 0)[:, None])
    last_tokens = session.memory.setdefault("last", {})
    for row, row_positions in enumerate(positions):
        if (row_positions == CUT - 1).any():
            last_tokens[session.places[row]] = ids[row, row_positions == CUT - 1][0]
        ids[row, row_positions >= CUT] = last_tokens.get(session.places[row], 0)
    return at_positions({**feeds, "input_ids": ids}, np.minimum(positions, CUT - 1))


def one_short(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Overwrite the last token of each prompt with the first decoded one."""
    return at_positions(feeds, feeds["position_ids"] - (session.prompt > 1)[:, None]) if session.decoding else feeds


def exchanged(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Exchange the tokens of the first two prompts of a batch."""
    ids = feeds["input_ids"].copy()
    if not session.decoding:
        ids[[0, 1]] = ids[[1, 0]]
    return {**feeds, "input_ids": ids}


def invoked_late(_: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Let activated adapters act from the second token of their invocation on."""
    return {**feeds, "adapter_start": feeds["adapter_start"] + 1}


def virtual_one_late(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Put virtual tokens, and the texts behind them, one position too far: slot 0 is left out."""
    ids, positions = feeds["input_ids"], feeds["position_ids"]
    late = session.memory.setdefault("late", {})
    for row, place in enumerate(session.places.tolist()):
        if (positions[row] == 0).any():
            late[place] = int(ids[row, positions[row] == 0][0] >= session.vocabulary)
    shift = np.array([late.get(place, 0) for place in session.places.tolist()])
    return at_positions(feeds, np.minimum(positions + shift[:, None], session.context - 1))


def state_goes_on(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Do not let recurrent states begin anew with a text, which they do at position 0."""
    positions = feeds["position_ids"]
    return at_positions(feeds, np.where(session.before[:, None] >= 0, np.maximum(positions, 1), positions))


def into_the_next_slot(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Prefill each prompt into the slot behind its own."""
    slots = feeds["batch_index"]
    return feeds if session.decoding else {**feeds, "batch_index": (slots + 1) % session.slots}


def of_each_other(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Let each row decode in the slot of its neighbour."""
    slots = feeds["batch_index"]
    return {**feeds, "batch_index": np.roll(slots, 1, axis=0)} if session.decoding else feeds


def behind_the_former(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Decode behind what a longer text has left in the slot, which is seen then."""
    if not session.decoding:
        return feeds
    shift = np.maximum(session.before + 1 - session.prompt, 0)
    return at_positions(feeds, np.minimum(feeds["position_ids"] + shift[:, None], session.context - 1))
