# SPDX-License-Identifier: Apache-2.0
"""Faults of the logits that a session with a language model returns.

Rows, columns and numbers of runs that are fixed here are part of a fault, as its size is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qeff_validate.mutation.mutant import FaultySession, Inapplicable
from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Numbers


def before_last(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Take first tokens from the token before a prompt's last: it is run once more in place of the last one."""
    if session.decoding:
        return logits
    ids, changed = session.feeds["input_ids"].copy(), session.feeds["position_ids"].copy()
    newest = session.memory.setdefault("newest", {})
    for row, positions in enumerate(session.feeds["position_ids"]):
        last, token = int(positions.argmax()), ids[row, positions.argmax()]
        if positions[last] >= 1:
            previous = positions == positions[last] - 1
            ids[row, last] = ids[row, previous][0] if previous.any() else newest[session.places[row]]
            changed[row, last] -= 1
        if positions[last] >= 0:
            newest[session.places[row]] = token
    return session.rerun(ids, changed)


def of_the_last_chunk(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Take the first token of rows that end within a chunk, while others fill it, from a chunk of padding."""
    ids, positions = session.feeds["input_ids"].copy(), session.feeds["position_ids"].copy()
    ended = (positions[:, -1] < 0) & (positions >= 0).any(axis=1)
    if session.decoding or not ended.any() or not (positions[:, -1] >= 0).any():
        return logits
    ids[ended], positions[ended] = session.pad, -1
    of_padding = session.rerun(ids, positions)
    return np.where(ended.reshape(-1, 1, 1), of_padding, logits)


def ends_early(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Give padding, which is mostly the end of a text too, the greatest logit in every third run."""
    if session.decoding and session.runs % 3 == 0:
        logits[0, ..., session.pad] = logits[0].max() + 1
    return logits


def one_run_late(session: FaultySession, logits: Numbers) -> Numbers:
    """Return the logits of the run before."""
    before = session.last.get("logits", logits)
    return before.copy() if before.shape == logits.shape else logits


def one_bit(session: DecodeTrackingSession, logits: Numbers) -> Numbers:
    """Change one bit at the second visit to an adapter."""
    if session.again and session.decoding and session.adapter != 0:
        index = (min(1, len(logits) - 1), ..., logits.shape[-1] // 4)
        logits[index] = np.nextafter(logits[index], np.asarray(np.inf, logits.dtype))
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


def shifted_rows(session: FaultySession, logits: Numbers) -> Numbers:
    """Return the logits of each row for its neighbour; with slots, a prompt that is prefilled alone has none."""
    if len(logits) < 2 and not ("batch_index" in session.feeds and session.feeds["position_ids"].shape[1] > 1):
        raise Inapplicable("a batch of one row")
    return np.roll(logits, 1, axis=0)


def column(size: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Return a fault that adds a number to one column of the vocabulary."""

    def out(_: FaultySession, logits: Numbers) -> Numbers:
        logits[..., logits.shape[-1] // 4] += logits.dtype.type(size)
        return logits

    return out


def noise(size: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Return a fault that adds normal noise of a standard deviation."""

    def out(session: FaultySession, logits: Numbers) -> Numbers:
        unit_noise = np.random.default_rng(session.runs).standard_normal(logits.shape)
        return (logits + size * unit_noise).astype(logits.dtype)

    return out


def warmer(factor: float) -> Callable[[FaultySession, Numbers], Numbers]:
    """Return a fault that multiplies the logits by a factor."""
    return lambda _, logits: logits * logits.dtype.type(factor)


def swapped_columns(_: FaultySession, logits: Numbers) -> Numbers:
    """Exchange two columns of the vocabulary."""
    first, second = logits.shape[-1] // 4, logits.shape[-1] // 2
    logits[..., [first, second]] = logits[..., [second, first]]
    return logits


def unmasked(_: FaultySession, logits: Numbers) -> Numbers:
    """Give the last column, as one that pads the vocabulary, the greatest logit."""
    logits[..., -1] = logits.max(axis=-1)
    return logits


def clipped(_: FaultySession, logits: Numbers) -> Numbers:
    """Clip at the 99.9th percentile of each row."""
    limit = np.percentile(logits, 99.9, axis=-1, keepdims=True)
    clipped_logits: Numbers = np.minimum(logits, limit.astype(logits.dtype))
    return clipped_logits
