# SPDX-License-Identifier: Apache-2.0
"""Nodes in float32 between nodes in fp16, and the reverse; the oracle is numpy with the same rounding rules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper

F = TensorProto.FLOAT
node = helper.make_node
RNG = np.random.default_rng(11)
X = RNG.normal(size=(4, 64)).astype(np.float32)
K = np.float32(0.1)


def half(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float16).astype(np.float32)


@pytest.fixture
def run(tmp_path, make_model, compile_onnx, client):
    count = itertools.count()

    def run(nodes, outputs, weights, *flags, fp16=True, fp16_names=(), fp32_names=(), warns="", x=X):
        m = make_model(nodes, {"x": (F, list(x.shape))}, {name: (F, list(x.shape)) for name in outputs}, weights)
        path = tmp_path / "npi.yaml"
        lists = {"FP16NodeInstanceNames": list(fp16_names), "FP32NodeInstanceNames": list(fp32_names)}
        path.write_text(yaml.safe_dump({key: names for key, names in lists.items() if names}))
        flags = [*flags, *(["-convert-to-fp16"] if fp16 else [])]
        compiled = compile_onnx(m, f"-node-precision-info={path}", *flags, name=f"qpc{next(count)}")
        assert compiled.code == 0
        assert warns in compiled.err
        assert bool(compiled.err) == bool(warns)
        return client(compiled.directory).run(x=x)

    return run


CHAIN = [node("Mul", ["x", "k"], ["a"]), node("Mul", ["a", "k"], ["b"]), node("Mul", ["b", "x"], ["y"])]


def test_neighbours_in_float32_round_nothing_between(run):
    actual = run(CHAIN, ["y"], {"k": K}, fp32_names=["a", "b", "y"])["y"]
    assert np.array_equal(actual, X * K * K * X), "inputs and constants are not rounded either"
    assert not np.array_equal(actual, half(actual))


def test_a_node_in_fp16_reads_the_rounded_value(run):
    actual = run(CHAIN, ["a", "b", "y"], {"k": K}, fp32_names=["a", "b"])
    b = X * K * K
    assert np.array_equal(actual["a"], X * K), "as an output it is what its node hands on"
    assert np.array_equal(actual["b"], b)
    assert np.array_equal(actual["y"], half(half(b) * half(X)))


def test_a_node_in_float32_reads_rounded_values_of_nodes_in_fp16(run):
    actual = run(CHAIN, ["y"], {"k": K}, fp32_names=["b"])["y"]
    b = half(half(X) * half(K)) * K
    assert np.array_equal(actual, half(half(b) * half(X)))


def test_moves_between_are_nodes_in_fp16_unless_named(run):
    nodes = [node("Mul", ["x", "k"], ["a"]), node("Neg", ["a"], ["n"]), node("Mul", ["n", "k"], ["y"])]
    assert np.array_equal(run(nodes, ["y"], {"k": K}, fp32_names=["a", "y"])["y"], half(-(X * K)) * K)
    assert np.array_equal(run(nodes, ["y"], {"k": K}, fp32_names=["a", "n", "y"])["y"], -(X * K) * K)


def test_large_squares_survive_in_float32(run):
    """The purpose of the list: a norm whose squares overflow in fp16."""
    nodes = [node("Mul", ["x", "x"], ["s"]), node("Sqrt", ["s"], ["r"]), node("Div", ["x", "r"], ["y"])]
    x = np.full((1, 4), 300, np.float32)
    assert np.array_equal(run(nodes, ["y"], {}, x=x)["y"], np.zeros((1, 4), np.float32))
    assert np.array_equal(run(nodes, ["y"], {}, fp32_names=["s", "r"], x=x)["y"], np.ones((1, 4), np.float32))


@pytest.mark.parametrize("named", [["y"], ["h", "y"]])
def test_streamed_weights_stay_exact_if_only_float32_reads_them(named, run):
    weight = RNG.normal(size=(64, 64)).astype(np.float32)
    nodes = [node("Add", ["x", "W"], ["h"]), node("Mul", ["h", "W"], ["y"])]
    x = RNG.normal(size=(64, 64)).astype(np.float32)
    actual = run(nodes, ["y"], {"W": weight}, fp32_names=named, x=x)["y"]
    shared = named == ["y"]  # the other reader, h, is in fp16, so the weight is rounded for both
    expected = half(half(x) + half(weight)) * half(weight) if shared else (x + weight) * weight
    assert np.array_equal(actual, expected)


def test_unknown_names_are_warnings(run):
    actual = run(CHAIN, ["y"], {"k": K}, fp32_names=["nowhere"], warns="nowhere")["y"]
    assert np.array_equal(actual, half(half(half(half(X) * half(K)) * half(K)) * half(X)))
    run(CHAIN, ["y"], {"k": K}, "-keep-original-precision-for-nodes=Gelu", warns="no operator Gelu")


def test_operators_by_type(run):
    nodes = [node("Mul", ["x", "k"], ["a"]), node("Add", ["a", "k"], ["y"])]
    actual = run(nodes, ["y"], {"k": K}, "-keep-original-precision-for-nodes=Mul,Add")["y"]
    assert np.array_equal(actual, X * K + K)
    actual = run(nodes, ["y"], {"k": K}, "-execute-nodes-in-fp16=Mul", fp16=False)["y"]
    assert np.array_equal(actual, half(half(X) * half(K)) + K)
    actual = run(nodes, ["y"], {"k": K}, fp16=False, fp16_names=["y"])["y"]
    assert np.array_equal(actual, half(half(X * K) + half(K)))
    actual = run(nodes, ["y"], {"k": K}, "-keep-original-precision-for-nodes=Mul,Add", fp16_names=["y"])["y"]
    assert np.array_equal(actual, half(half(X * K) + half(K))), "a name decides before an operator"


def test_named_constant_that_is_read_in_both_precisions(run):
    value = helper.make_tensor("value", F, [1], [float(K)])
    nodes = [
        node("ConstantOfShape", ["shape"], ["k"], name="constant", value=value),
        node("Mul", ["x", "k"], ["a"]),
        node("Mul", ["a", "k"], ["y"]),
    ]
    actual = run(nodes, ["y"], {"shape": np.array([1], np.int64)}, fp16=False, fp16_names=["y"])["y"]
    assert np.array_equal(actual, half(half(X * K) * half(K)))


def test_nodes_of_subgraphs(make_model, compile_onnx, client, tmp_path):
    def branch(name):
        nodes = [node("Mul", ["a", "k"], [f"{name}1"]), node("Mul", [f"{name}1", "k"], [f"{name}2"])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}2", F, None)])

    nodes = [
        node("Mul", ["x", "k"], ["a"]),
        node("If", ["flag"], ["y"], then_branch=branch("then"), else_branch=branch("other")),
    ]
    inputs = {"x": (F, [4, 64]), "flag": (TensorProto.BOOL, [])}
    m = make_model(nodes, inputs, {"y": (F, [4, 64])}, {"k": K})
    (tmp_path / "npi.yaml").write_text("FP32NodeInstanceNames: [a, then1, then2, y]")
    compiled = compile_onnx(m, "-convert-to-fp16", f"-node-precision-info={tmp_path / 'npi.yaml'}")
    c = client(compiled.directory)
    inside = c.run(x=X, flag=np.array([1], np.int8))["y"]
    assert np.array_equal(inside, half(X * K * K * K)), "what a branch hands out is rounded"
    assert np.array_equal(c.run(x=X, flag=np.array([0], np.int8))["y"], half(half(half(X * K) * half(K)) * half(K)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "nothing else"),
        ("FP8NodeInstanceNames: [a]", "nothing else"),
        ("FP32NodeInstanceNames: a", "list of names"),
        ("FP32NodeInstanceNames: [[a]]", "list of names"),
        ("FP32NodeInstanceNames: [a]\nFP16NodeInstanceNames: [a]", "'a' is to be in FP16 and in FP32"),
        ("[", "not YAML"),
    ],
)
def test_bad_files_are_refused(text, message, tmp_path, make_linear, compile_onnx):
    (tmp_path / "npi.yaml").write_text(text)
    compiled = compile_onnx(make_linear(2), "-convert-to-fp16", f"-node-precision-info={tmp_path / 'npi.yaml'}")
    assert compiled.code == 255
    assert message in compiled.err
    assert not compiled.directory.exists()


def test_an_empty_file_changes_nothing(run):
    assert np.array_equal(run(CHAIN, ["y"], {"k": K}, fp16=False)["y"], X * K * K * X)
