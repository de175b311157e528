# SPDX-License-Identifier: Apache-2.0
"""MXFP6 weights and an MXINT8 cache on the simulated card (configs/mxfp6.yaml), and artifacts that are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qeff_validate.config.case import Artifacts, Case, Inputs, Precision
from qeff_validate.engine import Runner, load
from qeff_validate.models.corpus import TEXTS
from qeff_validate.report.result import Result
from qeff_validate.sdk.simulated import qpc

CASES = {case.name: case for case in load([Path(__file__).parents[2] / "configs" / "mxfp6.yaml"])}
FEW_TEXTS = Inputs(texts=list(TEXTS[::4]))
"""For MiniLM: measuring the noise of all texts takes half a minute more."""
LLAMA = CASES["llama-mxfp6-mxint8"]
SMALL = Case(
    name="bert-mxfp6",
    source="random:bert",
    options={"pooling": "mean", "seq_len": [32, 64], "batch_size": 4},
    precision=Precision(weights="mxfp6"),
)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


def ratios(result: Result) -> dict[str, float]:
    """Value over what legitimate runs give, of errors that are of one size in all runs."""
    gates = [item for item in result.metrics if "error" in item.metric.name or "rel_l2" in item.metric.name]
    return {item.metric.name: item.metric.value / item.bound.floor for item in gates if item.bound and item.bound.floor}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_compressed_as_asked_for_and_not_more(case: Case, runner: Runner) -> None:
    if case.model == "embedding":
        case = case.model_copy(update={"inputs": FEW_TEXTS})
    result = runner.result(case, "sim")
    assert (result.status, result.reason) == ("pass", "")
    assert result.precision == case.precision.profile
    assert 0.7 < max(ratios(result).values()) < 1.2, (
        "an artifact without MXFP6 would be much nearer to the reference than legitimate runs"
    )
    header = qpc.read(Path(result.artifact["path"])).header
    states = {f"past_{part}.{layer}" for part in ("key", "value") for layer in (0, 1)}
    assert set(header["mxint8"]) == (states if case.precision.kv else set())


def rows_negated(model: onnx.ModelProto, at: int = -1) -> None:
    """A third of the rows of one weight."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [
        tensors[node.input[1]] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in tensors
    ]
    array = numpy_helper.to_array(weights[at]).copy()
    array[: len(array) // 3] *= -1
    weights[at].CopyFrom(numpy_helper.from_array(array, weights[at].name))


def wide_epsilon(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1.0


def broken(runner: Runner, case: Case, damage: Callable[[onnx.ModelProto], None], folder: Path) -> Result:
    path = runner.pipeline(case).onnx().path
    assert path is not None
    model = onnx.load(path)
    damage(model)
    onnx.save(model, folder / "model.onnx")
    given = Artifacts(onnx=str(folder / "model.onnx"))
    return runner.result(case.model_copy(update={"artifacts": given}), "sim")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "damage"),
    [(SMALL, rows_negated), (SMALL, wide_epsilon), (LLAMA, rows_negated)],
    ids=["bert-rows", "bert-epsilon", "llama-rows"],
)
def test_a_fault_beyond_the_noise_of_the_format_fails(
    case: Case, damage: Callable[[onnx.ModelProto], None], runner: Runner, tmp_path: Path
) -> None:
    result = broken(runner, case, damage, tmp_path)
    assert result.status == "fail"
    assert "(floor)" in result.reason
    intact = broken(runner, case, lambda model: None, tmp_path)
    assert intact.status == "pass", intact.reason


def test_a_recorded_reference_without_a_floor_in_the_precision_is_inconclusive(runner: Runner, tmp_path: Path) -> None:
    plain = SMALL.model_copy(update={"precision": Precision()})
    recorded = runner.pipeline(plain).record(tmp_path)
    case = SMALL.model_copy(update={"artifacts": Artifacts(reference=str(recorded))})
    result = runner.result(case, "sim")
    assert result.status == "inconclusive"
    assert "no sound bound for rel_l2" in result.reason


def test_the_table_has_no_bounds_for_compressed_weights_and_measured_noise_has(runner: Runner) -> None:
    result = runner.result(SMALL.model_copy(update={"tolerance": "table"}), "sim")
    assert result.status == "inconclusive"
    assert "no sound bound for rel_l2" in result.reason
    measured = runner.result(SMALL, "sim")
    assert measured.status == "pass", measured.reason
    assert {item.bound.source for item in measured.metrics if item.bound} == {"floor", "exact"}


def test_an_embedding_has_no_keys_and_values_to_keep(runner: Runner) -> None:
    result = runner.result(SMALL.model_copy(update={"precision": Precision(kv="mxint8")}), "sim")
    assert (result.status, result.stage) == ("error", "config")
    assert "precision.kv" in result.reason


@pytest.mark.slow
def test_relations_hold_and_merging_is_left_out(runner: Runner) -> None:
    pipeline, adapter = runner.pipeline(LLAMA), runner.runtime("sim")
    for name in ("other_chunks", "row_alone", "poisoned_state"):
        result = pipeline.relation(adapter, name)
        assert (result.status, result.reason) == ("pass", ""), name
    merged = pipeline.relation(adapter, "merged")
    assert merged.status == "not_run"
    assert "this session keeps mxfp6+mxint8" in merged.reason


def test_neighbours_are_compared_by_the_noise_that_was_measured(runner: Runner) -> None:
    result = runner.result(SMALL, "sim")
    assert result.status == "pass", result.reason
    (order,) = [item for item in result.metrics if item.metric.name == "output.neighbour_order"]
    (rel_l2,) = [item for item in result.metrics if item.metric.name == "output.rel_l2"]
    assert rel_l2.bound is not None
    noise = rel_l2.bound.floor
    assert noise is not None
    assert np.isclose(order.metric.worst["gap"], 2 * (2 * noise + noise**2))
