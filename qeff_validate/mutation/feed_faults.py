# SPDX-License-Identifier: Apache-2.0
"""Faults of what a session with a language model is fed.

Rows, slots and numbers of batches that are fixed here are part of a fault, as its size is.
"""

from __future__ import annotations

import numpy as np

from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Feeds, Numbers

CUT = 8
"""Tokens of a prompt that are left of a longer one."""


def at_places(feeds: Feeds, places: Numbers) -> Feeds:
    """Return feeds with other positions; padding stays where it is."""
    wanted = feeds["position_ids"]
    return {**feeds, "position_ids": np.where(wanted >= 0, places, -1).astype(wanted.dtype)}


def stays_on(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Leave the adapter before in its place when the base, which comes first, comes again."""
    off = session.began and session.again and session.adapter == 0
    return {name: array for name, array in feeds.items() if not off or name not in session.weights}


def of_the_first_prompt(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Serve every row with the adapter of the very first one."""
    ids = session.memory.setdefault("ids", feeds["adapter_ids"][:1].copy())
    return {**feeds, "adapter_ids": np.full_like(feeds["adapter_ids"], ids[0])}


def of_the_next_row(_: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Serve each row with its neighbour's adapter."""
    return {**feeds, "adapter_ids": np.roll(feeds["adapter_ids"], 1)}


def leaks(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Let the second row read a slot of the first one: not slot 0, where all may have the same token."""
    if not session.decoding:
        return feeds
    state = session.kept()
    for array in state.values():
        array[1, :, 1] = array[0, :, 1]
    return {**feeds, **state}


def goes_on(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Append every second batch of prompts to what the first one left in the cache."""
    if session.batch % 2 == 0:
        return feeds
    return at_places(feeds, np.minimum(feeds["position_ids"] + 1 + session.before[:, None], session.context - 1))


def starts_again(_: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Give later chunks the positions of the first one."""
    width = feeds["position_ids"].shape[1]
    return at_places(feeds, feeds["position_ids"] % width) if width > 1 else feeds


def one_further(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Decode one position further than where the text ends."""
    return at_places(feeds, feeds["position_ids"] + 1) if session.decoding else feeds


def padding_is_text(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Read padding on the left as text. Where prompts have it on the right, it is moved in the chunk first."""
    places, limit = feeds["position_ids"], session.context - 1
    if session.decoding:
        return at_places(feeds, np.minimum(places + session.memory["shift"][:, None], limit))
    if session.began:
        session.memory.update(column=0, shift=np.zeros(len(places), np.int64))
    width = places.shape[1]
    columns = np.minimum(session.memory["column"] + np.arange(width), limit)
    ids, found = feeds["input_ids"].copy(), places.copy()
    for row, own in enumerate(places):
        if session.prompt[row] and not (own >= 0).any():
            continue  # it has ended in a chunk before
        behind = int(np.argmax(own[::-1] >= 0))
        ids[row], found[row] = np.roll(ids[row], behind), columns
        session.memory["shift"][row] = columns[-1] - own.max()
    session.memory["column"] += width
    return {**feeds, "input_ids": ids, "position_ids": found}


def cut(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Cut prompts. The rest of each is its last token once more, at the same place, so it changes nothing."""
    ids, places = feeds["input_ids"].copy(), feeds["position_ids"]
    if session.decoding:
        return at_places(feeds, places - np.maximum(session.prompt - CUT, 0)[:, None])
    kept = session.memory.setdefault("last", {})
    for row, own in enumerate(places):
        if (own == CUT - 1).any():
            kept[row] = ids[row, own == CUT - 1][0]
        ids[row, own >= CUT] = kept.get(row, 0)
    return at_places({**feeds, "input_ids": ids}, np.minimum(places, CUT - 1))


def one_short(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Decode over the last token of each prompt."""
    return at_places(feeds, feeds["position_ids"] - (session.prompt > 1)[:, None]) if session.decoding else feeds


def exchanged(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
    """Exchange the tokens of two prompts."""
    ids = feeds["input_ids"].copy()
    if not session.decoding:
        ids[[0, 1]] = ids[[1, 0]]
    return {**feeds, "input_ids": ids}
