# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bounds import close
from onnx import numpy_helper, parser

from qeff_validate.builders.onnx_patterns import attribute
from qeff_validate.engine import Runner, load
from qeff_validate.mutation import graph_finder as finder
from qeff_validate.mutation.graph_mutants import GRAPH_MUTANTS
from qeff_validate.mutation.mutant import Inapplicable, mutants
from qeff_validate.protocols import Settings
from qeff_validate.runtimes.ort import OrtRuntime, session_options
from qeff_validate.selftest.float64_graph import Float64Session
from qeff_validate.tensors import Array, Tensors
from tests import microscaling

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CASES = {case.name: case for case in load([CONFIGS / "embedding.yaml", CONFIGS / "peft.yaml"])}
NAMED = {mutant.name.removeprefix("graph: "): mutant for mutant in GRAPH_MUTANTS}
BIAS = "one bias is zero"


def ort(model: onnx.ModelProto, feeds: Tensors) -> Array:
    options = session_options(Settings(threads=1))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: Array = session.run([model.graph.output[0].name], dict(feeds))[0]
    return outputs


def effect(wanted: Array, outputs: Array) -> float:
    return float(np.linalg.norm((outputs - wanted).astype(np.float64)) / np.linalg.norm(wanted.astype(np.float64)))


def mutant_of(clean: onnx.ModelProto, name: str) -> onnx.ModelProto:
    mutated = copy.deepcopy(clean)
    NAMED[name].change(mutated)
    onnx.checker.check_model(mutated, full_check=True)
    return mutated


# --- graphs of both exporters ----------------------------------------------------------------------


def exported(name: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Export a case, or take what the suites have exported, with feeds for it."""
    artifact = Runner().pipeline(CASES[name]).onnx()
    assert artifact.path is not None
    rng, sizes = np.random.default_rng(0), {"batch_size": 2, "seq_len": 8, "ctx_len": 24}
    feeds: dict[str, Any] = {}
    with OrtRuntime(Settings(threads=1)).open(artifact) as session:
        for spec in session.inputs:
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
            feeds[spec.name] = (rng.standard_normal(shape) / 10).astype(np.float32)
            if spec.name == "input_ids":
                feeds[spec.name] = rng.integers(3, 1000, shape)
            if spec.name in ("attention_mask", "position_ids"):
                real = np.arange(8) < [[8], [5]]
                feeds[spec.name] = real.astype(np.int64) if "mask" in spec.name else np.where(real, np.arange(8), -1)
    return onnx.load(str(artifact.path)), feeds


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("case", "refused"),
    [
        ("bert-cls", set()),
        ("llama-last", {BIAS}),
        pytest.param("bert-mean", set(), marks=pytest.mark.slow),
        pytest.param("llama-lora", {BIAS}, marks=pytest.mark.slow),
    ],
    ids=["torchscript-encoder", "torchscript-decoder", "dynamo-encoder", "dynamo-language-model"],
)
def test_each_mutant_changes_outputs_by_what_it_changes_in_float64(case: str, refused: set[str]) -> None:
    clean, feeds = exported(case)
    before, output, without = clean.SerializeToString(), clean.graph.output[0].name, set()
    wanted, exact = ort(clean, feeds), Float64Session(clean).run(feeds)[output]
    for name, mutant in NAMED.items():
        try:
            mutated = mutant_of(clean, name)
        except Inapplicable:
            without.add(name)
            continue
        size, least = effect(exact, Float64Session(mutated).run(feeds)[output]), 5e-2 if mutant.gross else 2e-5
        assert size > least, f"{name}: {size}"
        close(effect(wanted, ort(mutated, feeds)), size, rtol=0.1, atol=2e-6, what=name)
    assert without == refused
    assert clean.SerializeToString() == before


# --- a small graph, and the same in numpy ----------------------------------------------------------

EPSILON, SCALE = 1e-3, 0.3
TEXT = """
<ir_version: 8, opset_import: ["" : {opset}]>
small (float[n, 8] x) => (float[n, 40] output)
<float[8, 8] query, float[8, 8] key, float[8] key_bias, float[8, 48] value, float[48, 40] out, float[40] out_bias,
 float epsilon = {{{epsilon}}}, float scale = {{{scale}}}, int64[1] last = {{-1}}>
{{
    square = Mul (x, x)
    mean = ReduceMean {axes}
    above = Add (epsilon, mean)
    root = Sqrt (above)
    normed = Div (x, root)
    q = Gemm <transB = 1> (normed, query)
    k = Gemm <transB = 1> (normed, key, key_bias)
    turned = Transpose <perm = [1, 0]> (k)
    product = MatMul (q, turned)
    scores = Mul (product, scale)
    chances = Softmax <axis = -1> (scores)
    v = MatMul (normed, value)
    mixed = MatMul (chances, v)
    projected = MatMul (mixed, out)
    more = Add (out_bias, projected)
    unused = Add (epsilon, x)
    output = Identity (more)
}}
"""


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"query": (8, 8), "key": (8, 8), "key_bias": (8,), "value": (8, 48), "out": (48, 40), "out_bias": (40,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def small(opset: int = 18) -> onnx.ModelProto:
    axes = "<keepdims = 1> (square, last)" if opset >= 18 else "<axes = [-1], keepdims = 1> (square)"
    model = parser.parse_model(TEXT.format(opset=opset, axes=axes, epsilon=EPSILON, scale=SCALE))
    if opset < 18:
        model.graph.initializer.remove(next(each for each in model.graph.initializer if each.name == "last"))
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in weights().items():
        tensor = held.get(name) or model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def same(values: Any) -> Any:
    return values


def numpy_small(
    x: Any,
    w: dict[str, Any],
    *,
    epsilon: float = EPSILON,
    scale: float = SCALE,
    chance: float = 1,
    rounded: Callable[[Any], Any] = same,
    clipped: Callable[[Any], Any] = same,
) -> Any:
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    scores = (normed @ w["query"].T) @ (normed @ w["key"].T + w["key_bias"]).T * scale
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances = chance * chances / chances.sum(-1, keepdims=True)
    v = clipped(rounded(normed) @ rounded(w["value"]))
    return chances @ v @ w["out"] + w["out_bias"]


def two_rms(values: Any) -> Any:
    limit = 2 * np.sqrt((values**2).mean(-1, keepdims=True))
    return np.clip(values, -limit, limit)


def int8(column: Any) -> Any:
    step = np.abs(column).max() / 127
    return np.array([round(number / step) * step for number in column.tolist()])


def by_hand(name: str, x: Any) -> Any:
    """Compute the small graph with a fault, in float64; the third weight of four is the first of the last third."""
    w = {key: array.astype(np.float64) for key, array in weights().items()}
    value = w["value"]
    changed: dict[str, dict[str, Any]] = {
        "one row of a weight negated": {"value": value * np.where(np.arange(48) == 0, -1, 1)},
        "two weights of one shape exchanged": {"query": w["key"], "key": w["query"]},
        "the largest weight is zero": {"value": 0 * value},
        BIAS: {"out_bias": 0 * w["out_bias"]},
        "one weight rounded to int8": {"value": np.stack([int8(column) for column in value.T], axis=1)},
        "weights rounded to MXFP6": {
            **{key: microscaling.mxfp6(w[key].astype(np.float32), -1) for key in ("query", "key")},
            **{key: microscaling.mxfp6(w[key].astype(np.float32), 0) for key in ("value", "out")},
        },
    }
    options: dict[str, dict[str, Any]] = {
        "one epsilon x 10000, at least 1e-3": {"epsilon": 1e4 * EPSILON},
        "one product of fp16 operands": {"rounded": lambda values: values.astype(np.float16).astype(np.float64)},
        "one product clipped at 2 rms": {"clipped": two_rms},
        "scores of one attention x 0.9": {"scale": 0.9 * SCALE},
        "one softmax gives zeros": {"chance": 0},
    }
    outputs = numpy_small(x.astype(np.float64), {**w, **changed.get(name, {})}, **options.get(name, {}))
    return 1.01 * outputs if name == "output x 1.01" else outputs


@pytest.mark.numeric
@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("name", NAMED)
def test_each_mutant_does_what_its_name_says(name: str, opset: int) -> None:
    x = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)
    clean = small(opset)
    right, wrong = by_hand("none", x), by_hand(name, x)
    close(ort(clean, {"x": x}), right, atol=1e-4)
    apart = np.abs(wrong - right).max()
    outputs = Float64Session(mutant_of(clean, name)).run({"x": x})
    assert apart > 1e-4
    # in float32 what is rounded to fp16 may fall to the other side of a middle
    close(outputs["output"], wrong, rtol=0, atol=2e-7 * np.abs(right).max())


def test_the_epsilon_of_an_operator_is_its_attribute() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]> g (float[n, 4] x, float[4] w) => (float[n, 4] y) {
        a = LayerNormalization <epsilon = 1e-5> (x, w)  b = LayerNormalization <axis = -1> (a, w)
        c = LayerNormalization <epsilon = 1e-12> (b, w)  y = LayerNormalization (c, w) }
    """
    name = "one epsilon x 10000, at least 1e-3"
    epsilons = [attribute(node, "epsilon") for node in mutant_of(parser.parse_model(text), name).graph.node]
    assert epsilons == [pytest.approx(1e-5), None, pytest.approx(1e-3), None]
    text = text.replace("<epsilon = 1e-12>", "<axis = -1>")
    node = mutant_of(parser.parse_model(text), name).graph.node[2]
    assert (attribute(node, "epsilon"), attribute(node, "axis")) == (pytest.approx(0.1), -1)


def test_experts_are_weights_and_tables_of_words_are_none() -> None:
    model = parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 18]> g (int64[n] ids, int64[n, 1] which) => (float[n, 4, 1] y)
    <float[9, 3] words, float[5, 4, 3] experts, float[3, 3] mixing> {
        x = Gather <axis = 0> (words, ids)  turned = Transpose <perm = [1, 0]> (mixing)  same = Identity (turned)
        h = MatMul (x, same)  routed = Softmax (h)
        chosen = GatherND (experts, which)  last = Constant <value_ints = [-1]> ()  u = Unsqueeze (h, last)
        y = MatMul (chosen, u) }
    """)
    rng = np.random.default_rng(5)
    for name, shape in (("words", (9, 3)), ("experts", (5, 4, 3)), ("mixing", (3, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    assert [(weight.tensor.name, weight.summed) for weight in finder.weights(model)] == [
        ("mixing", -1),
        ("experts", -1),
    ]
    mutated = mutant_of(model, "one row of a weight negated")
    before, after = (numpy_helper.to_array(each.graph.initializer[1]) for each in (model, mutated))
    np.testing.assert_array_equal(after[:, 0], -before[:, 0])
    np.testing.assert_array_equal(after[:, 1:], before[:, 1:])
    mutated = mutant_of(model, "the largest weight is zero")  # but for the last
    assert [bool(numpy_helper.to_array(tensor).any()) for tensor in mutated.graph.initializer] == [True, True, False]
    with pytest.raises(Inapplicable, match="no softmax behind a product of queries and keys"):
        mutant_of(model, "one softmax gives zeros")


def test_copies_of_one_weight_are_not_exchanged() -> None:
    model = parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 4] y)
    <float[4, 4] one, float[4, 4] copy, float[4, 4] other> {
        a = MatMul (x, one)  b = MatMul (a, other)  y = MatMul (b, copy) }
    """)
    one = np.arange(16, dtype=np.float32).reshape(4, 4)
    for name, array in (("one", one), ("copy", one), ("other", one + 1)):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    mutated = mutant_of(model, "two weights of one shape exchanged")
    first, _, last = (numpy_helper.to_array(tensor) for tensor in mutated.graph.initializer)
    np.testing.assert_array_equal(first, one + 1)
    np.testing.assert_array_equal(last, one)


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"output x 1.01"}))
def test_a_graph_without_anything_to_change_says_so(name: str) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) <float one = {1}> {
        same = Identity (x)  more = Add (same, one)  root = Sqrt (more)  y = Softmax (root) }
    """
    with pytest.raises(Inapplicable, match="graph"):
        NAMED[name].change(parser.parse_model(text))


@pytest.mark.parametrize("kind", ["embedding", "peft-causal-lm"])
def test_both_model_kinds_have_them_and_each_run_does_not(kind: str) -> None:
    names = [mutant.name for mutant in mutants(kind)]
    assert len(names) == len(set(names))
    assert [mutant for mutant in mutants(kind) if mutant.level == "graph"] == list(GRAPH_MUTANTS)
    assert not any(mutant.ceiling for mutant in GRAPH_MUTANTS)
    assert {mutant.family for mutant in GRAPH_MUTANTS} == {"weights", "norms", "numbers", "attention", "layers"}
