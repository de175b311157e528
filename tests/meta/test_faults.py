# SPDX-License-Identifier: Apache-2.0
"""Faults that suites with one short prompt and a mean difference let through, each as somebody's ONNX file on ``ort``.

A small seeded BERT is the model; every variant is exported from a changed copy of it, or is an edit of its graph,
and judged through ``artifacts: {onnx: …}``. FaultyRuntime ones must fail, legitimate ones must pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from bounds import close
from torch import Tensor, nn

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.models.embedding.pooling import POOLINGS, PooledModel
from qeff_validate.models.sources.synthetic import Random

CONFIG = {"hidden_act": "gelu", "initializer_range": 0.2}
OPTIONS = {"pooling": "mean", "seq_len": [48, 64]}
SOURCE = Random("bert", CONFIG, 0)


def case(path: Path | None = None, **artifacts: Any) -> qv.Case:
    given = {**({"onnx": str(path)} if path else {}), **artifacts}
    return qv.Case(
        name="variant", source="random:bert", config=CONFIG, options=OPTIONS, artifacts=given, runtimes=["ort"],
        exporter="torchscript",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


class Variant(nn.Module):
    """The wrapper with something around the body: ``feed`` changes the inputs, ``states`` the hidden states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def feed(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "attention_mask": mask}

    def states(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return hidden

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return POOLINGS["mean"](hidden, mask)

    def out(self, vectors: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return vectors

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(**self.feed(input_ids, attention_mask)).last_hidden_state
        hidden = self.states(hidden, input_ids, attention_mask)
        return self.out(self.pool(hidden, attention_mask), input_ids, attention_mask)


def with_method(**methods: Callable[..., Any]) -> Callable[[], nn.Module]:
    """Return a maker of the wrapper in which some methods are replaced."""

    def make() -> nn.Module:
        body = SOURCE.body()
        body.set_attn_implementation("eager")
        return type("Changed", (Variant,), methods)(body)

    return make


def with_body(change: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    """Return a maker of the wrapper in which the body was changed."""

    def make() -> nn.Module:
        body = SOURCE.body()
        body.set_attn_implementation("eager")
        with torch.no_grad():
            change(body)
        return Variant(body)

    return make


def set_all(body: nn.Module, name: str, attribute: str, value: Any) -> None:
    for path, module in body.named_modules():
        if path.endswith(name):
            setattr(module, attribute, value)


def layer(body: Any, index: int = 1) -> Any:
    return body.encoder.layer[index]


class Shifted(nn.Module):
    """Adds a constant to the position ids of an embedding."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.roll(table.weight.detach(), -1, 0))

    def forward(self, positions: Tensor) -> Tensor:
        return nn.functional.embedding(positions, self.weight)


class Clipped(nn.Module):
    def __init__(self, inner: nn.Module, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden).clamp(-self.limit, self.limit)


def scale_attention(factor: float) -> Callable[[nn.Module], None]:
    def change(body: nn.Module) -> None:
        for module in body.modules():
            if hasattr(module, "scaling"):
                module.scaling *= factor

    return change


def garbage_unknown(body: Any) -> None:
    words = body.embeddings.word_embeddings.weight
    words[UNKNOWN] += torch.randn_like(words[UNKNOWN])


def fp16_weights(body: nn.Module) -> None:
    for parameter in body.parameters():
        parameter.copy_(parameter.half().float())


def without_bias(body: Any) -> None:
    layer(body).output.dense.bias.zero_()


def swap_heads(body: Any) -> None:
    weight = layer(body).attention.output.dense.weight
    weight.copy_(torch.roll(weight, 16, 1))


def last_layer_dropped(body: Any) -> None:
    body.encoder.layer = body.encoder.layer[:-1]


def swap_layers(body: Any) -> None:
    body.encoder.layer = nn.ModuleList([body.encoder.layer[1], body.encoder.layer[0]])


def word_of(text: str) -> int:
    tokenize, _ = SOURCE.tokenizer()
    return tokenize(text)[1]


UNKNOWN = word_of("floccinaucinihilipilification")


def truncated_at(limit: int) -> Callable[..., Any]:
    def feed(self: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        keep = (torch.arange(ids.shape[1])[None] < limit).to(mask.dtype)
        return {"input_ids": ids, "attention_mask": mask * keep}

    return feed


def pooled_at_most(limit: int) -> Callable[..., Any]:
    def pool(self: Any, hidden: Tensor, mask: Tensor) -> Tensor:
        keep = (torch.arange(mask.shape[1])[None] < limit).to(mask.dtype)
        return POOLINGS["mean"](hidden, mask * keep)

    return pool


def long_rows(mask: Tensor, limit: int = 40) -> Tensor:
    return mask.sum(dim=1, keepdim=True) > limit


FAULTS: dict[str, Callable[[], nn.Module]] = {
    "cls instead of mean": with_method(pool=lambda s, h, m: POOLINGS["cls"](h, m)),
    "max instead of mean": with_method(pool=lambda s, h, m: POOLINGS["max"](h, m)),
    "last instead of mean": with_method(pool=lambda s, h, m: POOLINGS["last"](h, m)),
    "weighted instead of plain mean": with_method(pool=lambda s, h, m: POOLINGS["weighted_mean"](h, m)),
    "mask ignored in pooling": with_method(pool=lambda s, h, m: h.mean(dim=1)),
    "mask ignored in attention": with_method(
        feed=lambda s, i, m: {"input_ids": i, "attention_mask": torch.ones_like(m)}
    ),
    "special tokens left out of the mean": with_method(
        pool=lambda s, h, m: POOLINGS["mean"](h, m * (torch.arange(m.shape[1])[None] > 0).to(m.dtype))
    ),
    "sum instead of mean": with_method(pool=lambda s, h, m: (h * m.unsqueeze(-1)).sum(dim=1)),
    "mean over n + 1": with_method(
        pool=lambda s, h, m: (h * m.unsqueeze(-1)).sum(1) / (m.sum(1, keepdim=True) + 1).to(h.dtype)
    ),
    "row 0 for all": with_method(states=lambda s, h, i, m: h[:1].expand_as(h)),
    "rows rolled": with_method(out=lambda s, v, i, m: torch.roll(v, 1, 0)),
    "attention cut at 16 tokens": with_method(feed=truncated_at(16)),
    "pooling cut at 30 tokens": with_method(pool=pooled_at_most(30)),
    "pooling cut at 63 tokens": with_method(pool=pooled_at_most(63)),
    "NaN in rows beyond 40 tokens": with_method(
        out=lambda s, v, i, m: torch.where(long_rows(m), torch.full_like(v, float("nan")), v)
    ),
    "zeros in rows beyond 40 tokens": with_method(out=lambda s, v, i, m: torch.where(long_rows(m), 0.0, v)),
    "normalized where it was not asked for": with_method(out=lambda s, v, i, m: nn.functional.normalize(v, dim=1)),
    "scaled by 1.0002": with_method(out=lambda s, v, i, m: v * 1.0002),
    "one element off": with_method(out=lambda s, v, i, m: v + 1e-3 * (torch.arange(v.shape[1]) == 9)),
    "sign of one element": with_method(out=lambda s, v, i, m: v * (1 - 2.0 * (torch.arange(v.shape[1]) == 5))),
    "rounded to fp16": with_method(out=lambda s, v, i, m: v.half().float()),
    "token type 1": with_method(
        feed=lambda s, i, m: {"input_ids": i, "attention_mask": m, "token_type_ids": torch.ones_like(i)}
    ),
    "position + 1": with_body(
        lambda body: setattr(body.embeddings, "position_embeddings", Shifted(body.embeddings.position_embeddings))
    ),
    "epsilon 1e-5 for 1e-12": with_body(lambda body: set_all(body, "LayerNorm", "eps", 1e-5)),
    "epsilon of the last norm": with_body(lambda body: set_all(layer(body).output, "LayerNorm", "eps", 1e-4)),
    "dropped bias": with_body(without_bias),
    "GELU by tanh": with_body(
        lambda body: set_all(body, "intermediate", "intermediate_act_fn", nn.GELU(approximate="tanh"))
    ),
    "ReLU in one layer": with_body(lambda body: setattr(layer(body).intermediate, "intermediate_act_fn", nn.ReLU())),
    "attention scale 0.99": with_body(scale_attention(0.99)),
    "attention scale 1.001": with_body(scale_attention(1.001)),
    "one garbage [UNK] row": with_body(garbage_unknown),
    "fp16 weights served as fp32": with_body(fp16_weights),
    "clipped activations": with_body(lambda body: setattr(layer(body), "output", ClippedOutput(layer(body).output))),
    "heads swapped": with_body(swap_heads),
    "last layer dropped": with_body(last_layer_dropped),
    "layers swapped": with_body(swap_layers),
    "norm weights not applied": with_body(lambda body: layer(body).output.LayerNorm.weight.fill_(1.0)),
}


class ClippedOutput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.inner(hidden, residual).clamp(-2.0, 2.0)


def exported(module: nn.Module, path: Path, **more: Any) -> Path:
    """Export with the TorchScript exporter: it takes a tenth of a second, and shares nothing with the product's."""
    ids = torch.arange(1, 19).reshape(2, 9)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    axes = {name: {0: "batch_size", 1: "seq_len"} for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"opset_version": 17, "dynamo": False, "do_constant_folding": True, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old exporter is deprecated, and says so in many ways
        torch.onnx.export(
            module.eval(),
            (ids, mask),
            str(path),
            input_names=list(axes),
            output_names=["output"],
            dynamic_axes={**axes, "output": {0: "batch_size"}},
            **options,
        )
    return path


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails(name: str, runner: Runner, tmp_path: Path) -> None:
    result = runner.result(case(exported(FAULTS[name](), tmp_path / "model.onnx")), "ort")
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"


def test_there_are_at_least_thirty_faults() -> None:
    assert len(FAULTS) >= 30


# --- legitimate variants ---------------------------------------------------------------------------


def permuted_neurons(body: Any) -> None:
    order = torch.randperm(layer(body).intermediate.dense.weight.shape[0])
    inner, outer = layer(body).intermediate.dense, layer(body).output.dense
    inner.weight.copy_(inner.weight[order].clone())
    inner.bias.copy_(inner.bias[order].clone())
    outer.weight.copy_(outer.weight[:, order].clone())


def einsum_pooling(self: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)
    return torch.einsum("bsh,bs->bh", hidden, weights) / weights.sum(1, keepdim=True).clamp(min=1.0)


def sdpa() -> nn.Module:
    body = SOURCE.body()
    body.set_attn_implementation("sdpa")
    return Variant(body)


def optimized(path: Path) -> Path:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_name("fused.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fused = path.with_name("fused.onnx")
    assert {node.domain for node in onnx.load(str(fused)).graph.node} & {"com.microsoft"}, "nothing was fused"
    return fused


PLAIN = with_method()
LEGITIMATE: dict[str, Callable[[Path], Path]] = {
    "the other exporter": lambda path: exported(PLAIN(), path),
    "another opset": lambda path: exported(PLAIN(), path, opset_version=14),
    "no constant folding": lambda path: exported(PLAIN(), path, do_constant_folding=False),
    "sdpa": lambda path: exported(sdpa(), path),
    "permuted neurons": lambda path: exported(with_body(permuted_neurons)(), path),
    "pooling by einsum": lambda path: exported(with_method(pool=einsum_pooling)(), path),
    "a fused graph": lambda path: optimized(exported(PLAIN(), path)),
    "weights in another file": lambda path: external(exported(PLAIN(), path)),
}


def external(path: Path) -> Path:
    model = onnx.load(str(path))
    onnx.save(model, str(path.with_name("split.onnx")), save_as_external_data=True, size_threshold=100)
    return path.with_name("split.onnx")


@pytest.mark.parametrize("name", LEGITIMATE)
def test_a_legitimate_variant_passes(name: str, runner: Runner, tmp_path: Path) -> None:
    result = runner.result(case(LEGITIMATE[name](tmp_path / "model.onnx")), "ort")
    assert result.status == "pass", f"{name}: {result.status} {result.reason}"


# --- the files themselves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(PLAIN(), tmp_path_factory.mktemp("good") / "model.onnx")


def judged(runner: Runner, path: Path, **artifacts: Any) -> Any:
    return runner.result(case(path, **artifacts), "ort")


def test_a_truncated_file_is_an_error_that_names_it(runner: Runner, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(good.read_bytes()[:-500])
    result = judged(runner, path)
    assert result.status == "error"
    assert str(path) in result.reason


def test_missing_external_data_is_an_error_that_names_the_file(runner: Runner, good: Path, tmp_path: Path) -> None:
    model = onnx.load(str(good))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=100)
    (tmp_path / "weights.data").unlink()
    result = judged(runner, path)
    assert (result.status, "weights.data" in result.reason) == ("error", True), result.reason


def renamed(good: Path, path: Path, names: dict[str, str]) -> Path:
    model = onnx.load(str(good))
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, str(path))
    return path


def test_other_names_are_an_error_that_lists_both_sides_until_they_are_mapped(
    runner: Runner, good: Path, tmp_path: Path
) -> None:
    path = renamed(good, tmp_path / "model.onnx", {"input_ids": "ids", "output": "vectors"})
    result = judged(runner, path)
    assert result.status == "error"
    for words in ("'input_ids' is missing", "'ids' is unknown", "it has", "wanted is", "vectors: float32"):
        assert words in result.reason, result.reason
    mapped = judged(runner, path, inputs={"input_ids": "ids"}, outputs={"output": "vectors"})
    assert mapped.status == "pass", mapped.reason


def test_a_second_output_fails_unless_the_mapping_names_the_one_that_is_meant(
    runner: Runner, good: Path, tmp_path: Path
) -> None:
    model = onnx.load(str(good))
    extra = copy.deepcopy(model.graph.output[0])
    extra.name = "more"
    model.graph.node.append(onnx.helper.make_node("Identity", ["output"], ["more"]))
    model.graph.output.append(extra)
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert "output 'more' is unknown" in judged(runner, tmp_path / "model.onnx").reason
    assert judged(runner, tmp_path / "model.onnx", outputs={"output": "output"}).status == "pass"


def test_float64_inputs_are_an_error(runner: Runner, good: Path, tmp_path: Path) -> None:
    model = onnx.load(str(good))
    double = onnx.TensorProto.DOUBLE
    model.graph.input[1].type.tensor_type.elem_type = double
    cast = onnx.helper.make_node("Cast", ["attention_mask"], ["mask64"], to=onnx.TensorProto.INT64)
    for node in model.graph.node:
        node.input[:] = ["mask64" if name == "attention_mask" else name for name in node.input]
    model.graph.node.insert(0, cast)
    onnx.save(model, str(tmp_path / "model.onnx"))
    result = judged(runner, tmp_path / "model.onnx")
    assert "'attention_mask' has dtype float64, wanted int64" in result.reason


def test_a_missing_file_is_a_config_error(runner: Runner, tmp_path: Path) -> None:
    result = judged(runner, tmp_path / "none.onnx")
    assert (result.status, result.stage) == ("error", "config")
    assert "none.onnx" in result.reason


def test_a_qpc_can_be_brought_and_one_that_is_none_is_refused(runner: Runner, tmp_path: Path) -> None:
    made = qv.build(qv.model(case()), "qpc")
    brought = runner.result(case(qpc=str(made.path)), "sim")
    assert brought.status == "pass", brought.reason
    (tmp_path / "programqpc.bin").write_bytes(b"no QPC at all" * 100)
    refused = runner.result(case(qpc=str(tmp_path)), "sim")
    assert refused.status == "error"
    assert str(tmp_path) in refused.reason


def test_a_recorded_reference_needs_no_model_and_keeps_its_floor(runner: Runner, good: Path, tmp_path: Path) -> None:
    path = runner.pipeline(case()).record(tmp_path)
    again = case(good, reference=str(path)).model_copy(update={"source": "path:/nowhere", "config": {}})
    result = Runner(store=tmp_path / "empty").result(again, "ort")
    assert (result.status, result.reference) == ("pass", "recorded"), result.reason
    live = runner.result(case(good), "ort")
    assert [item.bound for item in live.metrics] == [item.bound for item in result.metrics]
    path.write_bytes(path.read_bytes()[:-9])
    cut = Runner(store=tmp_path / "empty").result(again, "ort")
    assert cut.status == "error"
    assert str(path) in cut.reason


@pytest.mark.numeric
def test_a_wrapper_of_ours_is_no_variant() -> None:
    """The plain variant equals the product's wrapper, so a fault differs in the fault alone."""
    ids, mask = torch.arange(1, 19).reshape(2, 9), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.inference_mode():
        ours, theirs = PooledModel(SOURCE.body(), "mean").eval()(ids, mask), PLAIN().eval()(ids, mask)
    close(ours, theirs, rtol=1e-5, atol=3e-6)
