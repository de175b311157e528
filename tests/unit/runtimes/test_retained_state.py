# SPDX-License-Identifier: Apache-2.0
"""Retained state is one contract: the same hand-made graph behaves alike on torch, ONNX Runtime and the simulated card.

total' = total + x and y = total' · w, where total and w are state; the size of total is told by no fed input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from simulated_graphs import compile_to, graph

from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError
from qeff_validate.protocols import Graph, Session, runtime
from qeff_validate.runtimes.retained_state import RetainedState
from qeff_validate.tensors import TensorSpec, undefined

ROWS, CTX = 2, 4
NAMES = ("torch", "ort", "sim")
X = np.array([[1.0], [2.0]], np.float32)
TOTAL = np.arange(8, dtype=np.float32).reshape(ROWS, CTX)
W = np.array([10.0], np.float32)
BUCKETS = ({"b": ROWS, "ctx": CTX},)
INPUTS = tuple(TensorSpec(n, "float32", d) for n, d in (("x", ("b", 1)), ("total", ("b", "ctx")), ("w", (1,))))
OUTPUTS = tuple(
    TensorSpec(n, "float32", d)
    for n, d in (("y", ("b", "ctx")), ("total_RetainedState", ("b", "ctx")), ("w_RetainedState", (1,)))
)


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor, total: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = total + x
        return made * w, made, w


def network() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Add", ["total", "x"], ["total_RetainedState"]),
        helper.make_node("Mul", ["total_RetainedState", "w"], ["y"]),
        helper.make_node("Identity", ["w"], ["w_RetainedState"]),
    ]
    values = [{spec.name: (TensorProto.FLOAT, list(spec.shape)) for spec in specs} for specs in (INPUTS, OUTPUTS)]
    return graph(nodes, values[0], values[1])


def artifact(name: str, folder: Path, buckets: Sequence[Any] = BUCKETS) -> Artifact:
    if name == "torch":
        return Artifact("module", None, "0" * 64, payload=(Module(), Graph(INPUTS, OUTPUTS, tuple(buckets))))
    if name == "sim":
        specs = [{key: str(size) for key, size in BUCKETS[0].items()}]
        return Artifact("qpc", Path(compile_to(folder / "p", network(), "-retained-state", specs=specs)), "0" * 64)
    onnx.save(network(), str(folder / "model.onnx"))
    return Artifact("onnx", folder / "model.onnx", "0" * 64, buckets=tuple(buckets))


@pytest.fixture(params=NAMES)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    with runtime(request.param).open(artifact(request.param, tmp_path)) as made:
        yield made


def y(session: Session, **feeds: np.ndarray) -> np.ndarray:
    return np.asarray(session.run({"x": X, **feeds}, fetch=["y"])["y"])


def test_state_is_undefined_until_it_is_written_the_first_run_included(session: Session) -> None:
    assert np.isnan(y(session)).all()
    assert np.isnan(y(session, total=TOTAL)).all(), "w has never been fed"
    np.testing.assert_array_equal(y(session, total=TOTAL, w=W), (TOTAL + X) * W)


def test_state_that_was_fed_replaces_what_was_there_and_stays(session: Session) -> None:
    np.testing.assert_array_equal(y(session, total=TOTAL, w=W), (TOTAL + X) * W)
    np.testing.assert_array_equal(y(session), (TOTAL + 2 * X) * W)
    np.testing.assert_array_equal(y(session, w=W + 1), (TOTAL + 3 * X) * (W + 1))
    np.testing.assert_array_equal(y(session, total=-TOTAL), (X - TOTAL) * (W + 1))
    np.testing.assert_array_equal(y(session), (2 * X - TOTAL) * (W + 1))


def test_a_reset_forgets_everything_and_the_session_goes_on(session: Session) -> None:
    y(session, total=TOTAL, w=W)
    session.reset()
    assert np.isnan(y(session, w=W)).all()
    session.reset()
    assert np.isnan(y(session, total=TOTAL)).all()
    np.testing.assert_array_equal(y(session, total=TOTAL, w=W), (TOTAL + X) * W)


def test_a_reset_before_the_first_run_is_harmless(session: Session) -> None:
    session.reset()
    np.testing.assert_array_equal(y(session, total=TOTAL, w=W), (TOTAL + X) * W)


@pytest.mark.parametrize(
    ("fetch", "names"),
    [
        (["y"], ["y"]),
        (["total_RetainedState"], ["total_RetainedState"]),
        (["w_RetainedState", "y"], ["w_RetainedState", "y"]),
        (["y", "y"], ["y"]),
        ([], []),
        (None, ["y", "total_RetainedState", "w_RetainedState"]),
    ],
    ids=str,
)
def test_a_twin_is_returned_only_if_it_is_fetched_and_kept_all_the_same(
    session: Session, fetch: Any, names: list[str]
) -> None:
    outputs = session.run({"x": X, "total": TOTAL, "w": W}, fetch=fetch)
    assert sorted(outputs) == sorted(names)
    expected = {"y": (TOTAL + X) * W, "total_RetainedState": TOTAL + X, "w_RetainedState": W}
    for name, array in outputs.items():
        np.testing.assert_array_equal(array, expected[name])
    np.testing.assert_array_equal(y(session), (TOTAL + 2 * X) * W)


def test_results_and_feeds_are_nobody_elses_memory(session: Session) -> None:
    total, w = TOTAL.copy(), W.copy()
    outputs = session.run({"x": X, "total": total, "w": w})
    for array in (*outputs.values(), total, w):
        array[...] = -99  # must reach neither the state nor a later result
    np.testing.assert_array_equal(y(session), (TOTAL + 2 * X) * W)
    before = session.run({"x": X})
    kept = {name: array.copy() for name, array in before.items()}
    y(session)
    for name, array in before.items():
        np.testing.assert_array_equal(array, kept[name], err_msg=f"a later run wrote into {name}")


def test_a_run_that_is_refused_leaves_the_state_as_it_was(session: Session) -> None:
    y(session, total=TOTAL, w=W)
    for wrong in ({"x": X.astype(np.float64)}, {"x": X, "totl": TOTAL}, {"x": X, "w": np.zeros(2, np.float32)}):
        with pytest.raises(RunError):
            session.run(wrong)
    np.testing.assert_array_equal(y(session), (TOTAL + 2 * X) * W)


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_other_sizes_than_the_state_has_are_an_error_with_the_advice_to_reset(name: str, tmp_path: Path) -> None:
    with runtime(name).open(artifact(name, tmp_path, [])) as session:
        y(session, total=TOTAL, w=W)
        three = {"x": np.ones((3, 1), np.float32)}
        with pytest.raises(RunError, match=r"'total' has shape \[2, 4\].*\['b', 'ctx'\].*reset\(\) the session"):
            session.run(three)
        session.reset()
        longer = np.zeros((3, 9), np.float32)
        np.testing.assert_array_equal(session.run({**three, "total": longer, "w": W})["y"], longer + 10)


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_a_size_that_nothing_tells_is_an_error_with_the_advice_to_feed_the_state(name: str, tmp_path: Path) -> None:
    with runtime(name).open(artifact(name, tmp_path, [])) as session:
        with pytest.raises(RunError, match=r"no fed input has the symbol 'ctx'; nothing tells its size: feed the"):
            y(session)
        np.testing.assert_array_equal(y(session, total=TOTAL, w=W), (TOTAL + X) * W)


@pytest.mark.parametrize("name", ["torch", "ort"])
def test_sizes_come_from_the_buckets_that_fit_what_is_fed(name: str, tmp_path: Path) -> None:
    buckets = [{"b": 2, "ctx": 4}, {"b": 1, "ctx": 8}]
    with runtime(name).open(artifact(name, tmp_path, buckets)) as session:
        assert y(session).shape == (2, 4)
        session.reset()
        assert session.run({"x": X[:1]})["y"].shape == (1, 8)
    two = artifact(name, tmp_path, [{"ctx": 4}, {"ctx": 8}])
    with runtime(name).open(two) as session, pytest.raises(RunError, match=r"the buckets allow \[4, 8\]"):
        y(session)


def test_only_what_has_a_twin_is_state() -> None:
    made: RetainedState[Any] = RetainedState(
        INPUTS, OUTPUTS[:2], BUCKETS, make=undefined, shape=lambda value: value.shape
    )
    assert made.twins == {"total": "total_RetainedState"}
