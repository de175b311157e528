# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from qeff_validate.builders import export_onnx
from qeff_validate.builders.check_export import check_interface
from qeff_validate.errors import BuildError
from qeff_validate.protocols import Graph
from qeff_validate.tensors import TensorSpec

GRAPH = Graph(
    inputs=(TensorSpec("x", "float32", ("batch_size", "seq_len")),),
    outputs=(TensorSpec("output", "float32", ("batch_size", "n")),),
    buckets=({"batch_size": 2, "seq_len": 4},),
)
EXAMPLE = {"x": np.ones((2, 5), np.float32)}


class Good(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(300.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1, keepdim=True) * self.weight


class Fixes(Good):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(x.shape[0], 5))


class Refuses(Good):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # depends on data, so it cannot be traced
            return super().forward(x)
        return x


class Angles(Good):
    """Switches gradients off for a part of it, as rotary embeddings do, and on for another."""

    grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            angles = torch.cos(x * 2)
        with torch.set_grad_enabled(self.grad):
            return super().forward(x * angles + 1)


class Trained(Angles):
    grad = True


class Cache(torch.nn.Module):
    def forward(self, new: torch.Tensor, at: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(past.shape[0])
        written = past.index_put((rows[:, None], at), new)
        return new * 2, written


def test_a_written_state_is_copied_by_no_identity_transpose(tmp_path: Path) -> None:
    inputs = (
        TensorSpec("new", "float32", ("batch_size", "seq_len", 4)),
        TensorSpec("at", "int64", ("batch_size", "seq_len")),
        TensorSpec("past", "float32", ("batch_size", "ctx_len", 4)),
    )
    outputs = (
        TensorSpec("output", "float32", ("batch_size", "seq_len", 4)),
        TensorSpec("past_RetainedState", "float32", ("batch_size", "ctx_len", 4)),
    )
    examples = {
        "new": np.ones((2, 3, 4), np.float32),
        "at": np.tile(np.arange(3), (2, 1)),
        "past": np.zeros((2, 7, 4), np.float32),
    }
    graph = Graph(inputs, outputs, ({"batch_size": 2, "seq_len": 3, "ctx_len": 7},))
    export_onnx.export_onnx(Cache().eval(), examples, graph, tmp_path)
    nodes = onnx.load(str(tmp_path / "model.onnx")).graph.node
    (scatter,) = [node for node in nodes if node.op_type == "ScatterND"]
    assert (scatter.input[0], scatter.output[0]) == ("past", "past_RetainedState")


def test_file_is_the_same_without_work_that_is_spared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for name in ("spared", "done"):
        (tmp_path / name).mkdir()
        export_onnx.export_onnx(Angles(), EXAMPLE, GRAPH, tmp_path / name)
        files.append(onnx.load(str(tmp_path / name / "model.onnx")))
        monkeypatch.setattr(export_onnx, "no_repeated_work", contextlib.nullcontext)
    spared, done = files
    for node in (*spared.graph.node, *done.graph.node):
        del node.metadata_props[:]  # where it stands in the model's source
    assert "Cos" in {node.op_type for node in spared.graph.node}
    assert spared == done


def test_a_region_with_gradients_is_exported(tmp_path: Path) -> None:
    """The exporter alone ends with an IndexError, as the region holds a parameter."""
    export_onnx.export_onnx(Trained(), EXAMPLE, GRAPH, tmp_path)
    (output,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, EXAMPLE)
    with torch.no_grad():
        wanted = Good()(torch.cos(torch.tensor(2.0)) * torch.ones(2, 5) + 1)
    np.testing.assert_array_max_ulp(output, wanted.numpy(), maxulp=8)


def test_names_symbols_and_opset_are_those_of_the_interface(tmp_path: Path) -> None:
    export_onnx.export_onnx(Good().eval(), EXAMPLE, GRAPH, tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert [value.name for value in model.graph.input] == ["x"]
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["batch_size", "seq_len"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {export_onnx.OPSET}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "small weights stay inside"


def test_large_weights_go_to_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_onnx, "EXTERNAL_BYTES", 1000)
    export_onnx.export_onnx(Good().eval(), EXAMPLE, GRAPH, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.load(str(tmp_path / "model.onnx"))


def test_no_path_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    export_onnx.export_onnx(Good().eval(), EXAMPLE, GRAPH, tmp_path)
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_what_cannot_be_exported_is_a_build_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"torch\.onnx\.export failed: .*data-dependent"):
        export_onnx.export_onnx(Refuses().eval(), EXAMPLE, GRAPH, tmp_path)


class Unknown(Good):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.special.i0e(x))


def test_what_cannot_be_traced_is_tried_with_the_other_exporter(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"torch\.onnx\.export failed: .*; try exporter: dynamo$"):
        export_onnx.export_onnx(Unknown().eval(), EXAMPLE, GRAPH, tmp_path, exporter="torchscript")


def test_a_dim_that_was_fixed_is_a_build_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"seq_len"):
        export_onnx.export_onnx(Fixes().eval(), EXAMPLE, GRAPH, tmp_path)


def test_the_check_compares_names_and_symbols(tmp_path: Path) -> None:
    export_onnx.export_onnx(Good().eval(), EXAMPLE, GRAPH, tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, str(tmp_path / "fixed.onnx"))
    with pytest.raises(BuildError, match=r"fixed \['seq_len'\] of 'x'"):
        check_interface(tmp_path / "fixed.onnx", GRAPH)
    other = Graph(GRAPH.inputs, (TensorSpec("vectors", "float32", ("batch_size", "n")),), GRAPH.buckets)
    with pytest.raises(BuildError, match=r"outputs \['output'\], wanted \['vectors'\]"):
        check_interface(tmp_path / "model.onnx", other)


def test_the_checker_is_asked(tmp_path: Path) -> None:
    export_onnx.export_onnx(Good().eval(), EXAMPLE, GRAPH, tmp_path)
    data = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(BuildError, match=r"the ONNX checker refuses cut\.onnx"):
        check_interface(tmp_path / "cut.onnx", GRAPH)
