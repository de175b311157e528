# SPDX-License-Identifier: Apache-2.0
"""Which input of a graph was fed wrongly: hypotheses are run, and the one that gives a runtime's outputs is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from qeff_validate.errors import ValidateError
from qeff_validate.explain.arrays import relative_error
from qeff_validate.protocols import Session
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Array, Tensors, retained

SAME = 1e-4
"""Relative L2 up to which a hypothesis gives the outputs."""

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of tokens after which a mask may end."""

Change = Callable[[Any, Tensors], Any]
"""Takes the right content of an input and all feeds of the run."""


def _order(mask: Any) -> Any:
    """Number the tokens of each row from 1, 0 for padding."""
    return mask.cumsum(axis=1) * mask


def _next_padding(mask: Any, _: Tensors) -> Any:
    """Count the first place of padding of each row as text."""
    changed = mask.copy()
    for row in changed:
        free = np.flatnonzero(row == 0)
        if free.size:
            row[free[0]] = 1
    return changed


def _until(length: int) -> Change:
    return lambda mask, _: np.where(_order(mask) <= length, mask, 0)


def _shifted(by: int, *, decoding: bool = False) -> Change:
    def change(positions: Any, _: Tensors) -> Any:
        if decoding and positions.shape[1] > 1:
            return positions
        return np.where(positions >= 0, np.maximum(positions + by, 0), positions)

    return change


def _tokens_changed(by: int) -> Change:
    def change(ids: Any, feeds: Tensors) -> Any:
        if "attention_mask" in feeds:
            tokens = feeds["attention_mask"] != 0
        else:
            tokens = np.asarray(feeds.get("position_ids", np.zeros(ids.shape)), np.int64) >= 0
        return np.where(tokens, np.maximum(ids + by, 0), ids)

    return change


HYPOTHESES: Sequence[tuple[str, str, Change]] = (
    ("attention_mask", "is 1 everywhere", lambda mask, _: np.ones_like(mask)),
    ("attention_mask", "leaves out the first token", lambda mask, _: np.where(_order(mask) == 1, 0, mask)),
    (
        "attention_mask",
        "leaves out the last token",
        lambda mask, _: np.where(_order(mask) == mask.sum(axis=1, keepdims=True), 0, mask),
    ),
    ("attention_mask", "counts one place of padding as text", _next_padding),
    ("attention_mask", "is inverted", lambda mask, _: 1 - mask),
    ("attention_mask", "is that of the row before", lambda mask, _: np.roll(mask, 1, axis=0)),
    ("attention_mask", "is that of the row behind", lambda mask, _: np.roll(mask, -1, axis=0)),
    *(("attention_mask", f"ends after {length} tokens", _until(length)) for length in LENGTHS),
    ("token_type_ids", "is 0 everywhere", lambda types, _: np.zeros_like(types)),
    ("token_type_ids", "is 1 everywhere", lambda types, _: np.ones_like(types)),
    ("token_type_ids", "is inverted", lambda types, _: 1 - types),
    ("position_ids", "is one too high", _shifted(1)),
    ("position_ids", "is one too low", _shifted(-1)),
    ("position_ids", "is one too high behind the prompt", _shifted(1, decoding=True)),
    ("position_ids", "is one too low behind the prompt", _shifted(-1, decoding=True)),
    (
        "position_ids",
        "begins at 0 in every run of the prompt",
        lambda positions, _: (
            np.where(positions >= 0, positions % positions.shape[1], positions) if positions.shape[1] > 1 else positions
        ),
    ),
    ("input_ids", "is one too high", _tokens_changed(1)),
    ("input_ids", "is one too low", _tokens_changed(-1)),
    ("input_ids", "is that of the row before", lambda ids, _: np.roll(ids, 1, axis=0)),
    ("input_ids", "is that of the row behind", lambda ids, _: np.roll(ids, -1, axis=0)),
    ("adapter_ids", "is 0 everywhere", lambda ids, _: np.zeros_like(ids)),
    ("adapter_ids", "is that of the row before", lambda ids, _: np.roll(ids, 1, axis=0)),
)
"""Name of an input, what is wrong with it, and the content that it then has."""


class ChangedFeed(SessionWrapper):
    """A session that is fed another content of one input.

    Args:
        session: open.
        name: of the input.
        change: makes the other content.
        state: fed with the first run: what is read beyond the places that were written is then defined.
    """

    def __init__(self, session: Session, name: str, change: Change, state: Tensors) -> None:
        super().__init__(session)
        self._name, self._change, self._state = name, change, state
        self.changed = False
        """Whether any content has become another one."""

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Change the input, and run."""
        if self._name in feeds:
            right = feeds[self._name]
            content = np.ascontiguousarray(self._change(right, feeds).astype(right.dtype))
            self.changed = self.changed or not np.array_equal(content, right)
            feeds = {**self._state, **feeds, self._name: content}
            self._state = {}
        return super().run(feeds, fetch=fetch)


def wrong_feed(
    session: Session,
    infer: Callable[[Session], Array],
    actual: Array,
    sizes: Mapping[str, int] = MappingProxyType({}),
    check: Callable[[], None] = lambda: None,
) -> str:
    """Return which input holds what, if that gives the outputs of a runtime; empty if no hypothesis does.

    Args:
        session: on the right file.
        infer: runs the model on a session, and returns the output.
        actual: what the runtime gave, of the same shape.
        sizes: values of the symbols in the shapes of retained state.
        check: raises when the time is up.
    """
    inputs = {spec.name for spec in session.inputs}
    twins = retained(session.inputs, session.outputs)
    state = {
        spec.name: np.zeros([sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape], spec.dtype)
        for spec in session.inputs
        if spec.name in twins and spec.name.startswith("past_")
    }
    for name, text, change in (item for item in HYPOTHESES if item[0] in inputs):
        check()
        changed = ChangedFeed(session, name, change, state)
        try:
            output = infer(changed)
        except ValidateError:  # such as a token id that the graph does not have
            continue
        if changed.changed and output.shape == actual.shape and relative_error(output, actual) <= SAME:
            return f"{name} {text}"
    return ""
