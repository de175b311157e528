# SPDX-License-Identifier: Apache-2.0
"""What fp16 does to the values of a graph, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.explain import range_audit
from qeff_validate.explain.graph_values import REAL, GraphValues
from qeff_validate.explain.range_audit import (
    AuditedSession,
    RangeAudit,
    RangeStatistics,
    clip_constants,
    node_ranges,
)
from qeff_validate.runtimes.ort import OrtRuntime

F = TensorProto.FLOAT
RNG = np.random.default_rng(7)
WEIGHT = RNG.normal(size=(8, 8)).astype(np.float32)
FACTORS = np.array([1, 1e6, 1e-8, 3e-6, 1, 1, 1, 1], np.float32)
X = RNG.normal(size=(5, 8)).astype(np.float32)


def of_numpy(array: np.ndarray) -> tuple[float, float, int]:
    """Share that becomes zero, relative L2 of rounding, and elements that overflow."""
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16).astype(np.float64)
    exact = array.astype(np.float64)
    share = np.mean(rounded[exact != 0] == 0)
    return float(share), float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)), int(np.isinf(rounded).sum())


def audited(folder: Path, batches: list[np.ndarray], clip: bool = True) -> RangeAudit:
    """Audit y = relu(x @ weight · factors) + mask, whose nodes the TorchScript exporter could have named."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="/encoder/layer.0/dense/MatMul"),
        helper.make_node("Mul", ["product", "factors"], ["scaled"], name="/encoder/layer.0/Mul"),
        helper.make_node("Relu", ["scaled"], ["positive"], name="/encoder/layer.0/act/Relu"),
        helper.make_node("Min", ["positive", "one"], ["small"], name="Min_3"),
        helper.make_node("Add", ["product", "mask"], ["masked"], name="Add_4"),
    ]
    constants = {"w": WEIGHT, "factors": FACTORS, "one": np.float32(1), "mask": np.float32(-3.4e38)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, ["batch", 8])],
        [helper.make_tensor_value_info(name, F, ["batch", 8]) for name in ("small", "masked")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), folder / "g.onnx")
    work = folder / "work"
    work.mkdir()
    values = GraphValues(folder / "g.onnx", work, OrtRuntime().open)
    clipped = clip_constants(values) if clip else set()
    with values.opened(list(values.index), repaired=True) as opened:
        names = [spec.name for spec in opened.outputs if spec.dtype in REAL]
        session = AuditedSession(opened, values.outputs, names)
        assert [spec.name for spec in session.outputs] == ["small", "masked"]
        for batch in batches:
            assert set(session.run({"x": batch})) == {"small", "masked"}
            assert set(session.run({"x": batch}, fetch=["small"])) == {"small"}
    return RangeAudit(tuple(node_ranges(values, session.statistics, clipped)))


def test_statistics_equal_numpy_over_several_arrays() -> None:
    array = (RNG.normal(size=4000) * 10.0 ** RNG.uniform(-9, 4, size=4000)).astype(np.float32)
    array[:40] = 0
    statistics = RangeStatistics()
    for part in np.split(array, 4):
        statistics.add(part)
    share, error, overflows = of_numpy(array)
    assert 0 < share < 1
    assert overflows == statistics.overflows == 0
    assert statistics.zeroed_share == pytest.approx(share)
    assert statistics.error == pytest.approx(error)
    assert statistics.greatest == np.abs(array).max()


@pytest.mark.parametrize(
    ("value", "zeroed", "overflows"),
    [(2**-25, 1, 0), (np.nextafter(np.float32(2**-25), np.float32(1)), 0, 0), (65519.0, 0, 0), (-65520.0, 0, 1)],
)
def test_ends_of_the_range_are_those_of_rounding_to_nearest(value: float, zeroed: int, overflows: int) -> None:
    statistics = RangeStatistics()
    statistics.add(np.array([value, 0, np.inf, np.nan], np.float32))
    assert (statistics.zeroed, statistics.overflows, statistics.nonzero) == (zeroed, overflows, 1)
    assert statistics.greatest == abs(value)


def test_nodes_of_a_seeded_graph_equal_numpy(tmp_path: Path) -> None:
    audit = audited(tmp_path, [X[:3], X[3:]])
    nodes = {node.output: node for node in audit.nodes}
    product = X @ WEIGHT
    factors = np.minimum(FACTORS, 65504)
    expected = {"product": product, "scaled": product * factors, "positive": np.maximum(product * factors, 0)}
    for name, array in expected.items():
        share, error, overflows = of_numpy(array)
        assert nodes[name].zeroed_share == pytest.approx(share), name
        assert nodes[name].error == pytest.approx(error, rel=1e-3), name
        assert nodes[name].overflows == 2 * overflows, name  # each batch ran twice
        assert nodes[name].greatest == pytest.approx(np.abs(array).max(), rel=1e-5), name
    assert nodes["scaled"].overflows > 0
    assert nodes["scaled"].error == np.inf
    assert [nodes[name].reads_clipped for name in ("product", "scaled", "masked")] == [False, True, True]
    assert [nodes[name].module for name in ("product", "scaled", "small")] == [
        "encoder.layer.0.dense", "encoder.layer.0", "",
    ]  # fmt: skip


def test_nodes_out_of_range_are_those_that_overflow_and_their_readers(tmp_path: Path) -> None:
    audit = audited(tmp_path, [X])
    assert [node.output for node in audit.overflowing()] == ["scaled", "positive"]
    assert audit.out_of_range() == ["scaled", "positive", "small"]
    assert [node.output for node in audit.worst(2)] == ["scaled", "positive"]


def test_mask_overflows_only_where_constants_are_not_clipped(tmp_path: Path) -> None:
    assert "masked" in audited(tmp_path, [X], clip=False).out_of_range()


def test_audit_in_small_groups_of_values_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "groups"):
        (tmp_path / name).mkdir()
    whole = audited(tmp_path / "whole", [X])
    monkeypatch.setattr(range_audit, "MOST_BYTES", 200)  # one value of 160 bytes at a time
    assert audited(tmp_path / "groups", [X]) == whole


def test_no_run_reads_more_than_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(range_audit, "MOST_BYTES", 400)
    read: list[int] = []
    add = RangeStatistics.add
    groups = AuditedSession._groups
    monkeypatch.setattr(RangeStatistics, "add", lambda self, array: (read.append(array.nbytes), add(self, array))[1])
    sizes: list[int] = []
    monkeypatch.setattr(
        AuditedSession, "_groups", lambda self: (sizes.append(len(group)) or group for group in groups(self))
    )
    audited(tmp_path, [X])
    assert sizes[1:] == [2, 2, 1]  # 160 bytes each, once their sizes are known
    assert set(read) == {160}
