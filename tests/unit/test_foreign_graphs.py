# SPDX-License-Identifier: Apache-2.0
"""Graphs of a body as others export, optimize, convert and quantize them: clean ones pass, one fault in each fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import qefficient_files
import torch
from encode_oracle import TEXTS, WIDTH, WORDS, save_bert

import qeff_validate as qv

pytestmark = pytest.mark.integration

NAMES = ("input_ids", "attention_mask", "token_type_ids")
DYNAMIC = {0: "batch", 1: "sequence"}
"""Names of dims as optimum and sentence-transformers write them, which are not ours."""


class Body(torch.nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(folder, attn_implementation="eager").eval()

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.bert(**inputs).last_hidden_state


def exported(folder: Path, path: Path, opset: int, *, dynamo: bool = False) -> None:
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    examples = (ids, (ids > 0).long(), torch.zeros_like(ids))
    axes: dict[str, Any] = {"dynamic_axes": dict.fromkeys((*NAMES, "last_hidden_state"), DYNAMIC)}
    if dynamo:
        dims = {at: torch.export.Dim(name) for at, name in DYNAMIC.items()}
        axes = {"dynamic_shapes": (dims, dims, dims)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Body(folder), examples, path, input_names=list(NAMES), output_names=["last_hidden_state"],
            opset_version=opset, dynamo=dynamo, verbose=False, external_data=False, **axes,
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with mean pooling and Normalize."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("zoo")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(root / "body")
    save_bert(root / "body")
    modules = [Transformer(str(root / "body")), Pooling(WIDTH, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(root / "saved"))
    return root / "saved"


def optimized(folder: Path, path: Path, level: Any) -> None:
    exported(folder, path.with_suffix(".raw.onnx"), 14)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path.with_suffix(".raw.onnx"), options, providers=["CPUExecutionProvider"])


def halved(folder: Path, path: Path, *, keep_io_types: bool) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    exported(folder, path, 14)
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=keep_io_types), path)


LEVELS = onnxruntime.GraphOptimizationLevel
ZOO: Mapping[str, tuple[Callable[[Path, Path], None], str, list[str]]] = {
    # writes the file | precision that it is judged in on ONNX Runtime | runtimes
    **{
        f"TorchScript, opset {opset}": (partial(exported, opset=opset), "fp32", ["ort", "sim"])
        for opset in range(14, 19)
    },
    # below 17 dynamo writes opset 18, as it has no LayerNormalization before; to 17 it converts
    "dynamo, opset 17": (partial(exported, opset=17, dynamo=True), "fp32", ["ort", "sim"]),
    "ONNX Runtime's level 1": (
        lambda folder, path: optimized(folder, path, LEVELS.ORT_ENABLE_BASIC), "fp32", ["ort", "sim"],
    ),
    "ONNX Runtime's level 2": (
        lambda folder, path: optimized(folder, path, LEVELS.ORT_ENABLE_EXTENDED), "fp32", ["ort"],
    ),
    "float16 within float32": (lambda folder, path: halved(folder, path, keep_io_types=True), "fp16", ["ort", "sim"]),
    "float16 throughout": (lambda folder, path: halved(folder, path, keep_io_types=False), "fp16", ["ort", "sim"]),
}  # fmt: skip


def results(
    folder: Path, path: Path, runtimes: list[str], options: Mapping[str, Any] = {}, **artifacts: Any
) -> list[Any]:
    case = qv.Case(
        name="zoo", source=f"path:{folder}", inputs={"texts": [text for text in TEXTS if text]}, options=options,
        artifacts={"onnx": str(path), **artifacts}, tolerance="table" if options else {},
    )  # fmt: skip
    return qv.validate(case, runtimes=runtimes, store=folder.parent / "store").results


def damage(path: Path, dtype: str = "f") -> None:
    """Take three columns of one square matrix away; all of one of integers, whose noise is greater."""
    model = onnx.load(path)
    weights = (tensor for tensor in model.graph.initializer if "pooler" not in tensor.name)
    square = (tensor for tensor in weights if list(tensor.dims) == [WIDTH, WIDTH])
    tensor = next(tensor for tensor in square if onnx.numpy_helper.to_array(tensor).dtype.str[1:].startswith(dtype))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[:, : 3 if dtype == "f" else None] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("name", ZOO)
def test_clean_file_passes_and_one_fault_fails(name: str, folder: Path, tmp_path: Path) -> None:
    write, precision, runtimes = ZOO[name]
    path = tmp_path / "model.onnx"
    write(folder, path)
    clean = results(folder, path, runtimes)
    assert [(result.status, result.reason) for result in clean] == [("pass", "")] * len(runtimes)
    assert clean[0].precision == precision
    pooled = "the file ends in last_hidden_state, which is pooled on the host: mean, Normalize"
    assert {"the file takes token_type_ids, which are fed with zeros", pooled} <= set(clean[0].findings)
    damage(path)
    assert [result.status for result in results(folder, path, runtimes)] == ["fail"] * len(runtimes)


@pytest.mark.parametrize("pooling", [None, *qefficient_files.POOLINGS])
def test_clean_file_of_qefficient_passes_and_one_fault_fails(pooling: str | None, folder: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    path = tmp_path / "model.onnx"
    body = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    qefficient_files.write(body, path, pooling)
    assert (tmp_path / "model_0.onnx.data").is_file()
    # QEfficient's avg pools each row from the states of the first, which is right in batches of one row
    size = {"batch_size": 1} if pooling == "avg" else {}
    for options in [{"pooling": pooling, "normalize": False}] if pooling else [{"pooling": "none"}, {"pooling": "max"}]:
        clean = results(folder, path, ["ort", "sim"], {**options, **size})
        assert [(result.status, result.reason) for result in clean] == [("pass", "")] * 2
        if pooling is None:  # the body's pooler is the second output, without a name
            said = {"none": "judged is the file's output, as it is, without ", "max": "the file ends in output, which"}
            assert any(finding.startswith(said[options["pooling"]]) for finding in clean[0].findings)
    if pooling == "avg":
        assert [result.status for result in results(folder, path, ["ort", "sim"], options)] == ["fail"] * 2
        return
    damage(path)
    assert [result.status for result in results(folder, path, ["ort", "sim"], options)] == ["fail"] * 2


def test_output_of_another_name_is_pooled_where_it_is_mapped(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    exported(folder, path, 14)
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = ["states" if output == "last_hidden_state" else output for output in node.output]
    model.graph.output[0].name = "states"
    onnx.save(model, path)
    (unknown,) = results(folder, path, ["ort"])
    assert (unknown.status, "output 'states' is unknown" in unknown.reason) == ("error", True)
    (mapped,) = results(folder, path, ["ort"], outputs={"output": "states"})
    assert mapped.status == "pass", mapped.reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("QUInt8", {"per_channel": True}),
        ("QUInt8", {"extra_options": {"MatMulConstBOnly": False}}),
        ("QInt8", {"reduce_range": True}),
        ("QInt8", {}),
    ],
    ids=["uint8 by channel", "attention as well", "int8 of half the range", "int8"],
)
def test_dynamic_int8_is_judged_by_the_noise_of_its_integers_and_no_row_is_blamed_for_its_neighbours(
    weights: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exported(folder, tmp_path / "float.onnx", 14)
    path = tmp_path / "model.onnx"
    quantize_dynamic(tmp_path / "float.onnx", path, weight_type=QuantType[weights], **options)
    on_ort, on_sim = results(folder, path, ["ort", "sim"])
    assert (on_ort.precision, on_sim.precision) == ("fp32+int8", "fp16+int8")
    assert on_sim.status == "pass", on_sim.reason
    if options:
        assert on_ort.status == "pass", on_ort.reason
    else:  # right or wrong by the processor
        assert any("ONNX Runtime saturates sums of uint8 times int8" in finding for finding in on_ort.findings)
    for result in (on_ort, on_sim):
        assert any("one scale for a whole batch" in finding for finding in result.findings)
        assert any("the bounds are those of fp" in finding for finding in result.findings)
        assert not np.isnan([metric.metric.value for metric in result.metrics]).any()
    if weights == "QUInt8":
        damage(path, "u1")
        assert [result.status for result in results(folder, path, ["ort", "sim"])] == ["fail"] * 2
