# SPDX-License-Identifier: Apache-2.0
"""A fault that shows only with a whole batch is looked for in the graph, and one outside of it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import save_model, save_tokenizer

from qeff_validate.config.case import Artifacts, Case
from qeff_validate.engine import Runner
from qeff_validate.explain.context import ExplainContext, TimeIsUpError
from qeff_validate.pipeline.explanation import explained
from qeff_validate.protocols import Runtime, Settings
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.session_wrapper import SessionWrapper
from qeff_validate.tensors import Tensors

pytestmark = pytest.mark.integration

TEXTS = ["red green", "blue", "one two three", "red , blue . one"]


def scaled_in_large_batches(model: Any) -> None:
    """Scale the output by 1.5 if the batch has four rows or more."""
    graph = model.graph
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    last.output[0] = "right"
    constants = {"four": np.array([4], np.int64), "more": np.float32(1.5), "one": np.float32(1)}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    graph.node.extend([
        helper.make_node("Shape", ["right"], ["rows"], end=1),
        helper.make_node("GreaterOrEqual", ["rows", "four"], ["large"]),
        helper.make_node("Where", ["large", "more", "one"], ["factor"]),
        helper.make_node("Mul", ["right", "factor"], [graph.output[0].name]),
    ])  # fmt: skip


class ScaledSession(SessionWrapper):
    """A session whose outputs are scaled on their way."""

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run, and scale."""
        return {name: array * np.float32(1.5) for name, array in self.session.run(feeds, fetch=fetch).items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save_model(tmp_path_factory.mktemp("model"), "AutoModel")
    save_tokenizer(folder)
    return Case(
        name="batch",
        source=f"path:{folder}",
        exporter="torchscript",
        tolerance="table",
        inputs={"texts": TEXTS},
        options={"pooling": "mean", "seq_len": [16], "batch_size": 4},
    )


def test_rows_that_are_wrong_in_their_batch_alone_are_explained_in_it(case: Case, tmp_path: Path) -> None:
    runner = Runner(store=tmp_path / "store")
    path = runner.pipeline(case).onnx().path
    assert path is not None
    model = onnx.load(str(path))
    scaled_in_large_batches(model)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    faulty = case.model_copy(update={"artifacts": Artifacts(onnx=str(tmp_path / "model.onnx"))})
    found = runner.explained(faulty, "ort").explanation
    assert found is not None
    assert sorted(found.rows) == [0, 1, 2, 3]  # with fewer the file is right
    assert (found.stage, found.module) == ("export", "pooling")
    assert found.finding == "its output is scaled by 1.5"


def test_outputs_that_are_changed_on_their_way_need_no_look_into_graph_or_program(case: Case, tmp_path: Path) -> None:
    pipeline, on = Runner(store=tmp_path / "store").pipeline(case), FaultyRuntime(ScaledSession, "sim")
    result = explained(pipeline, on, pipeline.result(on), Settings(), 600.0).explanation
    assert result is not None
    assert (result.stage, result.module) == ("compiler and runtime", None)
    assert result.finding.endswith("scaled by 1.5")
    assert len(result.rows) < len(TEXTS)  # not the whole batch, to which a fault in the file would lead
    assert (result.program, result.layers) == (None, ())


def with_zero_row(case: Case, runner: Runner, folder: Path) -> Case:
    """Return the case with a file in which a row of a weight is zero."""
    path = runner.pipeline(case).onnx().path
    assert path is not None
    model = onnx.load(str(path))
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [32, 64])
    values = numpy_helper.to_array(weight).copy()
    values[:, 3] = 0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    del model.metadata_props[:]
    onnx.save(model, str(folder / "model.onnx"))
    return case.model_copy(update={"artifacts": Artifacts(onnx=str(folder / "model.onnx"))})


def test_weight_that_differs_is_told_when_the_time_is_up_before_the_layers_are_known(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any) -> Any:
        raise TimeIsUpError("the time limit of 60 s has passed")

    monkeypatch.setattr("qeff_validate.explain.inside_graph.find_layers", too_late)
    runner = Runner(store=tmp_path / "store")
    found = runner.explained(with_zero_row(case, runner, tmp_path), "ort").explanation
    assert found is not None
    assert (found.stage, found.module) == ("export", "encoder.layer.0.intermediate.dense")
    assert found.summary == (
        "layer encoder.layer.0.intermediate.dense, weight row 3 is zero (export); the time limit of 60 s has passed"
    )


@pytest.mark.parametrize("wrong", ["file", "session"])
def test_simulated_card_runs_again_only_if_the_file_does_not_have_the_error(
    wrong: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Recorded(ExplainContext):
        def isolated(self, name: str, settings: Settings | None = None) -> Runtime:
            opened.append(name)
            return super().isolated(name, settings)

    monkeypatch.setattr("qeff_validate.explain.explain.ExplainContext", Recorded)
    runner = Runner(store=tmp_path / "store")
    if wrong == "file":
        found = runner.explained(with_zero_row(case, runner, tmp_path), "sim").explanation
    else:
        pipeline, on = runner.pipeline(case), FaultyRuntime(ScaledSession, "sim")
        found = explained(pipeline, on, pipeline.result(on), Settings(), 600.0).explanation
    assert found is not None
    assert found.stage == ("export" if wrong == "file" else "compiler and runtime")
    assert ("sim" in opened) == (wrong == "session")
