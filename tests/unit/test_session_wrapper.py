# SPDX-License-Identifier: Apache-2.0
"""A wrapped session looks and behaves like the session itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Tensors, TensorSpec


class RecordingSession:
    """Records its calls and returns its feeds."""

    inputs = (TensorSpec("x", "float32", ("n",)),)
    outputs = (TensorSpec("y", "float32", ("n",)),)
    shapes = ({"x": (2,), "y": (2,)},)

    def __init__(self) -> None:
        self.calls: list[object] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        self.calls.append(("run", list(feeds), fetch))
        return feeds

    def reset(self) -> None:
        self.calls.append("reset")


def test_specs_runs_and_resets_are_those_of_the_wrapped_session() -> None:
    session = RecordingSession()
    wrapper = SessionWrapper(session)
    assert (wrapper.inputs, wrapper.outputs, wrapper.shapes) == (session.inputs, session.outputs, session.shapes)
    feeds = {"x": np.zeros(2, np.float32)}
    assert wrapper.run(feeds, fetch=["y"]) is feeds
    wrapper.reset()
    assert session.calls == [("run", ["x"], ["y"]), "reset"]
