# SPDX-License-Identifier: Apache-2.0
"""Adapters in users' graphs, lifted to inputs; the oracle is PEFT with other weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bounds import close
from onnx import helper, numpy_helper
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from qeff_validate.builders.export_contexts import silent
from qeff_validate.builders.lift_adapters import lift_adapters
from qeff_validate.errors import BuildError
from qeff_validate.runtimes.ort import session_options

IDS = torch.arange(10).reshape(2, 5)
MASK = torch.ones(2, 5, dtype=torch.int64)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def adapted(*, zero_b: bool, layers: int = 2) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, num_hidden_layers=layers, **SIZES, attn_implementation="eager")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=zero_b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by a deprecated name
        return get_peft_model(LlamaForCausalLM(config), lora).eval()


def saved(model: PeftModel) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in get_peft_model_state_dict(model).items()}


def export(model: PeftModel, path: Path, *, dynamo: bool, **options: Any) -> Path:
    """Export a model as users do: adapter weights are initializers, without metadata about the adapter."""
    with silent():
        torch.onnx.export(
            Logits(model).eval(), (IDS, MASK), str(path), input_names=["ids", "mask"], output_names=["logits"],
            dynamo=dynamo, opset_version=18, verbose=False, external_data=False, **options,
        )  # fmt: skip
    return path


def drawn(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(scale=0.5, size=array.shape).astype(np.float32) for name, array in arrays.items()}


def with_weights(model: PeftModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    other = copy.deepcopy(model)
    set_peft_model_state_dict(other, {name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.inference_mode():
        return other(input_ids=IDS, use_cache=False).logits.numpy()


def run(model: onnx.ModelProto | Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, session_options(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"ids": IDS.numpy(), "mask": MASK.numpy(), **arrays}), strict=True))


def agrees(lifted: onnx.ModelProto, model: PeftModel) -> None:
    """Check that two sets of weights on one graph give PEFT's logits, and that the twins return them."""
    onnx.checker.check_model(lifted, full_check=True)
    for arrays in (saved(model), drawn(saved(model))):
        outputs = run(lifted, arrays)
        close(outputs.pop("logits"), with_weights(model, arrays), atol=1e-5)
        assert set(outputs) == {f"{name}_RetainedState" for name in arrays}
        assert all(np.array_equal(outputs[f"{name}_RetainedState"], array) for name, array in arrays.items())


Exported = Callable[[bool, bool], tuple[PeftModel, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model and its graph, by exporter and by whether lora_B is zero; each exported once."""
    made: dict[tuple[bool, bool], tuple[PeftModel, Path]] = {}

    def get(dynamo: bool, zero_b: bool) -> tuple[PeftModel, Path]:
        if (dynamo, zero_b) not in made:
            model = adapted(zero_b=zero_b)
            path = tmp_path_factory.mktemp("graph") / "model.onnx"
            made[dynamo, zero_b] = model, export(model, path, dynamo=dynamo)
        return made[dynamo, zero_b]

    return get


@pytest.mark.numeric
@pytest.mark.parametrize("zero_b", [False, True], ids=["random", "zero-B"])
@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False], ids=["dynamo", "torchscript"])
def test_lifted_graph_with_other_weights_says_what_peft_says(exported: Exported, dynamo: bool, zero_b: bool) -> None:
    model, path = exported(dynamo, zero_b)
    before = path.read_bytes()
    lifted = lift_adapters(path, saved(model))
    agrees(lifted, model)
    assert path.read_bytes() == before
    inside = [tensor.name for tensor in lifted.graph.initializer if len(tensor.dims) == 2 and 2 in tensor.dims]
    assert not inside, "weights of the adapter (rank 2) are still there"


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_exporters_do_merge_equal_weights(exported: Exported, dynamo: bool) -> None:
    """The exporter merges equal tensors: fewer initializers with the shapes of lora_B than tensors."""
    model, path = exported(dynamo, True)
    zeros = [t for t in onnx.load(path).graph.initializer if len(t.dims) == 2 and not numpy_helper.to_array(t).any()]
    assert len(zeros) < sum("lora_B" in name for name in saved(model))


@pytest.mark.numeric
def test_names_alone_do_where_the_exporter_has_kept_them(tmp_path: Path) -> None:
    model = adapted(zero_b=True)
    path = export(model, tmp_path / "model.onnx", dynamo=False, do_constant_folding=False)
    assert any("lora_A.default" in tensor.name for tensor in onnx.load(path).graph.initializer)
    agrees(lift_adapters(onnx.load(path), list(saved(model))), model)


def test_names_alone_are_not_enough_where_weights_were_renamed(exported: Exported) -> None:
    model, path = exported(False, False)
    with pytest.raises(BuildError, match=r"not use 8 of 8 adapter tensors: \['base_model.*Give the arrays too"):
        lift_adapters(path, saved(model).keys())


@pytest.mark.numeric
def test_initializer_that_has_the_saved_name_itself_gives_it_to_the_input(exported: Exported) -> None:
    model, path = exported(False, False)
    graph = onnx.load(path)
    arrays = saved(model)
    name = next(name for name in arrays if "lora_A" in name)
    (held,) = [t for t in graph.graph.initializer if np.array_equal(numpy_helper.to_array(t), arrays[name].T)]
    for node in graph.graph.node:
        node.input[:] = [name if value == held.name else value for value in node.input]
    held.name = name
    agrees(lift_adapters(graph, arrays), model)


@pytest.mark.numeric
def test_weights_in_a_file_of_their_own_stay_there(exported: Exported, tmp_path: Path) -> None:
    model, path = exported(False, True)
    onnx.save(
        onnx.load(path), tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )
    lifted = lift_adapters(tmp_path / "model.onnx", saved(model))
    embeddings = [tensor for tensor in lifted.graph.initializer if list(tensor.dims) == [32, 16]]
    assert embeddings
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in embeddings)
    onnx.save(lifted, tmp_path / "lifted.onnx")
    arrays = drawn(saved(model))
    logits = run(tmp_path / "lifted.onnx", arrays)["logits"]
    close(logits, with_weights(model, arrays), atol=1e-5)
    with pytest.raises(BuildError, match="give the path"):
        lift_adapters(onnx.load(tmp_path / "model.onnx", load_external_data=False), saved(model))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_equal_weights_without_the_names_of_modules_are_refused(exported: Exported, dynamo: bool) -> None:
    model, path = exported(dynamo, True)
    graph = onnx.load(path)
    for node in graph.graph.node:
        node.name = ""
        del node.metadata_props[:]
    with pytest.raises(BuildError, match="equal weights") as caught:
        lift_adapters(graph, saved(model))
    listed = [name for name in saved(model) if repr(name) in str(caught.value)]
    assert listed == [name for name in saved(model) if "lora_B" in name]


@pytest.mark.numeric
def test_different_weights_are_found_without_the_names_of_modules(exported: Exported) -> None:
    model, path = exported(True, False)
    graph = onnx.load(path)
    for node in graph.graph.node:
        node.name = ""
        del node.metadata_props[:]
    agrees(lift_adapters(graph, saved(model)), model)


def test_unknown_name_and_changed_weights_are_listed(exported: Exported) -> None:
    model, path = exported(False, False)
    arrays = saved(model)
    first = next(iter(arrays))
    unknown = {**arrays, "base_model.model.no.lora_A.weight": np.ones((2, 16), np.float32)}
    with pytest.raises(BuildError, match=r"1 of 9 adapter tensors: \['base_model.model.no.lora_A.weight'\]"):
        lift_adapters(path, unknown)
    changed = {**arrays, first: np.nextafter(arrays[first], np.float32(9))}
    with pytest.raises(BuildError, match=rf"1 of 8 adapter tensors: \['{first}'\]"):
        lift_adapters(path, changed)


def test_graph_without_the_adapter_is_refused(exported: Exported, tmp_path: Path) -> None:
    model, _ = exported(False, False)
    merged = copy.deepcopy(model).merge_and_unload()
    path = export(merged, tmp_path / "model.onnx", dynamo=False)
    with pytest.raises(BuildError, match="not use 8 of 8"):
        lift_adapters(path, saved(model))


def test_lifted_graph_is_not_lifted_again_and_no_names_are_refused(exported: Exported) -> None:
    model, path = exported(False, False)
    with pytest.raises(BuildError, match="names already"):
        lift_adapters(lift_adapters(path, saved(model)), saved(model))
    with pytest.raises(BuildError, match="no adapter tensor is named"):
        lift_adapters(path, {})
    with pytest.raises(BuildError, match=r"cannot read .*nowhere"):
        lift_adapters(path.parent / "nowhere.onnx", saved(model))


def small(value: np.ndarray, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """``x [1, 2]`` and one initializer ``w``."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(value, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_square_zeros_stand_as_a_linear_layer_uses_them(operator: str) -> None:
    """Content does not show whether they are transposed: MatMul takes ``[in, out]``, Gemm with transB ``[out, in]``."""
    options = {"transB": 1} if operator == "Gemm" else {}
    model = small(np.zeros((2, 2), np.float32), [helper.make_node(operator, ["x", "w"], ["y"], "n", **options)])
    lifted = lift_adapters(model, {"base_model.model.p.lora_B.weight": np.zeros((2, 2), np.float32)})
    session = onnxruntime.InferenceSession(lifted.SerializeToString(), providers=["CPUExecutionProvider"])
    x, b = np.array([[1, 2]], np.float32), np.array([[1, 2], [3, 5]], np.float32)
    output = session.run(["y"], {"x": x, "base_model.model.p.lora_B.weight": b})[0]
    assert np.array_equal(output, x @ b.T)


def test_zeros_that_the_base_uses_too_stay_where_the_base_uses_them() -> None:
    zeros = np.zeros((2, 2), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "/p/lora_B/default/MatMul"),
        helper.make_node("MatMul", ["x", "w"], ["b"], "/head/MatMul"),
        helper.make_node("Add", ["a", "b"], ["y"], "/Add"),
    ]
    lifted = lift_adapters(small(zeros, nodes), {"base_model.model.p.lora_B.weight": zeros})
    assert [tensor.name for tensor in lifted.graph.initializer] == ["w"]
    readers = {node.name: node.input[1] for node in lifted.graph.node if node.op_type == "MatMul"}
    assert readers["/head/MatMul"] == "w"
    assert readers["/p/lora_B/default/MatMul"] != "w"
    nodes[1].name = ""  # nobody says whose it is
    with pytest.raises(BuildError, match="equal weights"):
        lift_adapters(small(zeros, nodes), {"base_model.model.p.lora_B.weight": zeros})
