# SPDX-License-Identifier: Apache-2.0
"""Faults of the logits that a session with a language model gives.

Rows, columns and numbers of runs that are fixed here are part of a fault, as its size is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qeff_validate.mutation.mutant import FaultySession, Inapplicable
from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Numbers


def before_last(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Take first tokens from the token before a prompt's last, which is fed once more in the last one's stead."""
    if session.decoding:
        return logits
    ids, places = session.feeds["input_ids"].copy(), session.feeds["position_ids"].copy()
    newest = session.memory.setdefault("newest", {})
    for row, own in enumerate(session.feeds["position_ids"]):
        last, token = int(own.argmax()), ids[row, own.argmax()]
        if own[last] >= 1:
            ids[row, last] = ids[row, own == own[last] - 1][0] if (own == own[last] - 1).any() else newest[row]
            places[row, last] -= 1
        if own[last] >= 0:
            newest[row] = token
    return session.rerun(ids, places)


def of_the_last_chunk(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Take the first token of rows that end before others, which fill the chunk, from padding that follows them."""
    ids, places = session.feeds["input_ids"].copy(), session.feeds["position_ids"].copy()
    ended = (places[:, -1] < 0) & (places >= 0).any(axis=1)
    if session.decoding or not ended.any() or not (places[:, -1] >= 0).any():
        return logits
    ids[ended], places[ended] = session.pad, -1
    found = session.rerun(ids, places)
    return np.where(ended.reshape(-1, 1, 1), found, logits)


def ends_early(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Choose padding, which mostly is what ends a text, at every third run."""
    if session.decoding and session.runs % 3 == 0:
        logits[0, ..., session.pad] = logits[0].max() + 1
    return logits


def one_run_late(session: FaultySession, logits: Numbers) -> Numbers:
    """Give the logits of the run before."""
    before = session.last.get("logits", logits)
    return before.copy() if before.shape == logits.shape else logits


def one_bit(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Change one bit at the second visit to an adapter."""
    if session.again and session.decoding and session.adapter != 0:
        place = (min(1, len(logits) - 1), ..., logits.shape[-1] // 4)
        logits[place] = np.nextafter(logits[place], np.asarray(np.inf, logits.dtype))
    return logits


def not_a_number(_: FaultySession, logits: Numbers) -> Numbers:
    """Put a NaN into the first row."""
    logits[0, ..., 5] = np.nan
    return logits


def not_a_number_of_one(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Put a NaN where rows with the first adapter decode."""
    if session.decoding and session.mixed:
        logits[session.feeds["adapter_ids"] == 1, ..., 5] = np.nan
    elif session.decoding and session.adapter == 1:
        logits[0, ..., 5] = np.nan
    return logits


def shifted_rows(_: FaultySession, logits: Numbers) -> Numbers:
    """Give each row its neighbour's logits."""
    if len(logits) < 2:
        raise Inapplicable("a batch of one row")
    return np.roll(logits, 1, axis=0)


def column(size: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Add to one column of the vocabulary."""

    def out(_: FaultySession, logits: Numbers) -> Numbers:
        logits[..., logits.shape[-1] // 4] += logits.dtype.type(size)
        return logits

    return out


def noise(size: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Add normal noise."""

    def out(session: FaultySession, logits: Numbers) -> Numbers:
        drawn = np.random.default_rng(session.runs).standard_normal(logits.shape)
        return (logits + size * drawn).astype(logits.dtype)

    return out


def warmer(factor: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Multiply."""
    return lambda _, logits: logits * logits.dtype.type(factor)


def swapped_columns(_: FaultySession, logits: Numbers) -> Numbers:
    """Exchange two columns of the vocabulary."""
    one, other = logits.shape[-1] // 4, logits.shape[-1] // 2
    logits[..., [one, other]] = logits[..., [other, one]]
    return logits


def unmasked(_: FaultySession, logits: Numbers) -> Numbers:
    """Give the last column, as one that pads a vocabulary, the greatest value."""
    logits[..., -1] = logits.max(axis=-1)
    return logits


def clipped(_: FaultySession, logits: Numbers) -> Numbers:
    """Clip at the 99.9th percentile of each row."""
    most = np.percentile(logits, 99.9, axis=-1, keepdims=True)
    found: Numbers = np.minimum(logits, most.astype(logits.dtype))
    return found
