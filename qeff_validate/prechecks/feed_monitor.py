# SPDX-License-Identifier: Apache-2.0
"""What a model wrapper feeds to a session, seen from outside: masks that leave a token out, positions that jump."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qeff_validate.protocols import Session
from qeff_validate.report.result import Precheck
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec


class FeedMonitor:
    """A session that compares token ids, masks and positions as they are fed with the rows that were to be fed.

    With ``attention_mask``, the tokens under each row's mask must be one of the rows. With ``position_ids``, a row's
    positions must count up from 0 over its runs, -1 being padding, and its tokens must begin with one of the rows.

    Args:
        session: open.
        inputs: from `protocols.Model.inputs`; nothing can be said of those that hold no ``ids``.
    """

    def __init__(self, session: Session, inputs: Any) -> None:
        self._session = session
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.shapes: tuple[Shapes, ...] = session.shapes
        self._rows = [tuple(np.asarray(row).tolist()) for row in getattr(inputs, "ids", ())]
        self._padded: set[tuple[int, ...]] = set()
        self._known, self._left = frozenset(self._rows), set(self._rows)
        self._going: dict[int, list[int]] = {}
        self._wrong: dict[str, str] = {}
        self._fed: set[str] = set()

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Look at the feeds, and run."""
        self._fed |= {"mask"} if "attention_mask" in feeds else set()
        self._fed |= {"positions"} if "position_ids" in feeds else set()
        if self._rows and "input_ids" in feeds:
            ids = feeds["input_ids"]
            if "attention_mask" in feeds:
                self._see_masks(ids, feeds["attention_mask"])
            if "position_ids" in feeds:
                self._see_positions(ids, feeds["position_ids"])
        return self._session.run(feeds, fetch=fetch)

    def reset(self) -> None:
        """Forget retained state."""
        self._session.reset()

    def padded(self) -> frozenset[int]:
        """Return the rows that were fed with padding under an ``attention_mask``."""
        return frozenset(at for at, row in enumerate(self._rows) if row in self._padded)

    def prechecks(self) -> Iterator[Precheck]:
        """Yield the prechecks ``mask`` and ``positions``, once everything was fed."""
        for row in list(self._going):
            self._close(row)
        if self._rows and self._fed and self._left:
            self._wrong.setdefault("mask", f"{len(self._left)} of {len(self._known)} rows were never fed whole")
        said = {
            "mask": "the graph takes no mask; position -1 is padding" if "positions" in self._fed else "",
            "positions": "the graph counts them itself" if "mask" in self._fed else "",
        }
        for name in ("mask", "positions"):
            if name in self._wrong:
                yield Precheck(name, "differs", self._wrong[name])
            elif self._rows and self._fed:
                yield Precheck(name, "same", "" if name in self._fed else said[name])
            else:
                yield Precheck(name, "unknown", "what this kind of model feeds is not known here")

    def _see_masks(self, ids: Array, masks: Array) -> None:
        for at, (row, mask) in enumerate(zip(ids, masks, strict=True)):
            tokens = tuple(row[mask != 0].tolist())
            if len(tokens) < mask.size:
                self._padded.add(tokens)
            if not np.isin(mask, (0, 1)).all():
                self._wrong.setdefault("mask", f"that of row {at} of a batch holds other numbers than 0 and 1")
            elif tokens not in self._known:
                text = f"under that of row {at} of a batch stand {len(tokens)} tokens that are none of the case's rows"
                self._wrong.setdefault("mask", text)
            self._left.discard(tokens)

    def _see_positions(self, ids: Array, places: Array) -> None:
        for at, (row, where) in enumerate(zip(ids, places, strict=True)):
            tokens, positions = row[where >= 0].tolist(), where[where >= 0].tolist()
            if not positions:
                continue
            if positions[0] == 0:
                self._close(at)
            going = self._going.setdefault(at, [])
            if positions != list(range(len(going), len(going) + len(positions))):
                text = f"those of row {at} of a batch go on with {positions[:4]} after {len(going)} tokens"
                self._wrong.setdefault("positions", text)
            going += tokens

    def _close(self, at: int) -> None:
        """Compare what a row of a batch was fed with the rows: a row, and what continues it."""
        fed = tuple(self._going.pop(at, ()))
        begun = {row for row in self._rows if row == fed[: len(row)]}
        if fed and not begun:
            self._wrong.setdefault("mask", f"what row {at} of a batch was fed begins with none of the case's rows")
        self._left -= begun
