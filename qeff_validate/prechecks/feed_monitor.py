# SPDX-License-Identifier: Apache-2.0
"""Checks what a model wrapper feeds to a session: masks that leave out a token, positions that skip one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qeff_validate.protocols import Session
from qeff_validate.report.result import Precheck
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Array, Tensors


class FeedMonitor(SessionWrapper):
    """A session that compares the token ids, masks and positions of its feeds with the rows of the inputs.

    With ``attention_mask``, the tokens under each row's mask must be one of the rows. With ``position_ids``, a row's
    positions must count up from 0 over its runs, where -1 is padding, and its tokens must begin with one of the rows.
    With ``batch_index``, what stands here of a row holds for the slot that it names.

    Args:
        session: open.
        inputs: from `protocols.Model.inputs`; without ``ids`` the prechecks are unknown.
    """

    def __init__(self, session: Session, inputs: Any) -> None:
        super().__init__(session)
        self._rows = [tuple(np.asarray(row).tolist()) for row in _attended(inputs)]
        self._padded: set[tuple[int, ...]] = set()
        self._known, self._missing = frozenset(self._rows), set(self._rows)
        self._sequences: dict[int, list[int]] = {}
        self._errors: dict[str, str] = {}
        self._fed: set[str] = set()
        self._place = "row"

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Check the feeds, and run."""
        self._fed |= {"mask"} if "attention_mask" in feeds else set()
        self._fed |= {"positions"} if "position_ids" in feeds else set()
        if self._rows and "input_ids" in feeds:
            ids = feeds["input_ids"]
            if "attention_mask" in feeds:
                self._check_masks(ids, feeds["attention_mask"])
            if "position_ids" in feeds:
                slots = feeds.get("batch_index")
                self._place = "row" if slots is None else "slot"
                places = range(len(ids)) if slots is None else slots.reshape(-1).tolist()
                self._check_positions(ids, feeds["position_ids"], places)
        return super().run(feeds, fetch=fetch)

    def padded(self) -> frozenset[int]:
        """Return the numbers of the rows that were fed with padding and an ``attention_mask``."""
        return frozenset(number for number, row in enumerate(self._rows) if row in self._padded)

    def prechecks(self) -> Iterator[Precheck]:
        """Yield the prechecks ``mask`` and ``positions``; to be called after the last run."""
        for row in list(self._sequences):
            self._close(row)
        if self._rows and self._fed and self._missing:
            self._errors.setdefault("mask", f"{len(self._missing)} of {len(self._known)} rows were never fed whole")
        remarks = {
            "mask": "the graph takes no mask; position -1 is padding" if "positions" in self._fed else "",
            "positions": "the graph counts them itself" if "mask" in self._fed else "",
        }
        for name in ("mask", "positions"):
            if name in self._errors:
                yield Precheck(name, "differs", self._errors[name])
            elif self._rows and self._fed:
                yield Precheck(name, "same", "" if name in self._fed else remarks[name])
            else:
                yield Precheck(name, "unknown", "what this kind of model feeds is not known here")

    def _check_masks(self, ids: Array, masks: Array) -> None:
        for number, (row, mask) in enumerate(zip(ids, masks, strict=True)):
            tokens = tuple(row[mask != 0].tolist())
            if len(tokens) < mask.size:
                self._padded.add(tokens)
            if not np.isin(mask, (0, 1)).all():
                self._errors.setdefault("mask", f"that of row {number} of a batch holds other numbers than 0 and 1")
            elif tokens not in self._known:
                text = (
                    f"under that of row {number} of a batch are {len(tokens)} tokens that are none of the case's rows"
                )
                self._errors.setdefault("mask", text)
            self._missing.discard(tokens)

    def _check_positions(self, ids: Array, positions: Array, places: Sequence[int]) -> None:
        for number, row, row_positions in zip(places, ids, positions, strict=True):
            is_token = row_positions >= 0
            tokens, numbers = row[is_token].tolist(), row_positions[is_token].tolist()
            if not numbers:
                continue
            if numbers[0] == 0:
                self._close(number)
            sequence = self._sequences.setdefault(number, [])
            if numbers != list(range(len(sequence), len(sequence) + len(numbers))):
                text = (
                    f"those of {self._place} {number} of a batch go on with {numbers[:4]} after {len(sequence)} tokens"
                )
                self._errors.setdefault("positions", text)
            sequence += tokens

    def _close(self, number: int) -> None:
        """Check that the tokens fed to a row of a batch begin with one of the rows; a continuation may follow."""
        fed = tuple(self._sequences.pop(number, ()))
        complete = {row for row in self._rows if row == fed[: len(row)]}
        if fed and not complete:
            self._errors.setdefault(
                "mask", f"what {self._place} {number} of a batch was fed begins with none of the case's rows"
            )
        self._missing -= complete


def _attended(inputs: Any) -> Sequence[Array]:
    """Return the ids of each row that are under the mask; none for inputs without ids."""
    ids: Sequence[Array] = getattr(inputs, "attended_ids", getattr(inputs, "ids", ()))
    return ids
