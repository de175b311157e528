# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from bounds import close
from onnx import TensorProto, helper

from qeff_validate.sdk.simulated import device
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

OK, INVAL, BUSY = rt.QStatus.QS_SUCCESS, rt.QStatus.QS_INVAL, rt.QStatus.QS_BUSY
F, I64 = TensorProto.FLOAT, TensorProto.INT64
SPECS = [{"batch_size": "1"}, {"batch_size": "2"}, {"batch_size": "4"}]


@pytest.fixture
def static(make_linear, compile_onnx):
    compiled = compile_onnx(make_linear(2), name="static")
    assert compiled.code == 0
    return compiled.directory


@pytest.fixture
def buckets(make_model, compile_onnx):
    """Two symbols, two outputs of different type; four allowed sets of shapes."""
    nodes = [helper.make_node("Gather", ["T", "ids"], ["y"]), helper.make_node("Mul", ["ids", "two"], ["z"])]
    table = np.arange(100, dtype=np.float32).reshape(50, 2) / 3
    m = make_model(nodes, {"ids": (I64, ["b", "s"])}, {"y": (F, ["b", "s", 2]), "z": (I64, ["b", "s"])},
                   {"T": np.tile(table, (4, 1)), "two": np.array(2)})  # fmt: skip
    specs = [{"b": str(b), "s": str(s)} for b in (1, 3) for s in (4, 8)]
    compiled = compile_onnx(m, specs=specs, name="buckets")
    assert compiled.code == 0
    return compiled.directory


def program(directory, context=None, qid=0, props=None):
    return rt.Program(context or rt.Context(), qid, rt.Qpc(str(directory)), props or rt.QAicProgramProperties())


def free() -> tuple[int, int]:
    status, info = rt.Util().getResourceInfo(0)
    assert status == OK
    assert info is not None
    return info.nspFree, info.dramFree


class TestValues:
    def test_it_says_that_it_is_a_simulation(self):
        assert rt.SIMULATED is True

    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", np.array([[0x0201], [0x0403]], np.int16).T])
    def test_buffers(self, data):
        buffer = rt.QBuffer(data)
        assert buffer.size == 4
        assert bytes(buffer) == b"\x01\x02\x03\x04"
        assert np.frombuffer(buffer, np.uint8).tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize("data", [5, "text", [1, 2], None])
    def test_buffers_of_something_else(self, data):
        with pytest.raises(TypeError):
            rt.QBuffer(data)

    def test_an_empty_array_makes_an_empty_buffer(self):
        assert rt.QBuffer(np.array([])).size == 0

    def test_dims_read_back_as_lists(self):
        dims = rt.BufferDimensionsVecRef([(4, [2, 3]), (np.int64(8), (np.int64(0),))])
        assert dims[1] == (8, [0])
        assert len(dims) == 2
        dims[0] = (2, (5,))
        assert list(dims) == [(2, [5]), (8, [0])]
        dims[0][1].append(9)
        assert dims[0] == (2, [5])
        with pytest.raises(IndexError):
            dims[2]
        with pytest.raises(TypeError):
            dims[0] = (4, [1.5])

    def test_constructors_raise(self, static, tmp_path):
        with pytest.raises(RuntimeError, match="7"):
            rt.Context(rt.QIDList([0, 7]))
        with pytest.raises(TypeError):
            rt.Context([0])  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="device 1"):
            rt.Queue(rt.Context(), 1)
        with pytest.raises(RuntimeError, match="device 1"):
            program(static, qid=1)
        with pytest.raises(TypeError):
            rt.Qpc(static)
        with pytest.raises(RuntimeError, match="Failed to open file"):
            rt.Qpc(str(tmp_path))

    def test_contexts_without_devices(self, monkeypatch):
        monkeypatch.setenv("QAIC_SIM_DEVICES", "0")
        with pytest.raises(RuntimeError, match="no devices"):
            rt.Context()
        monkeypatch.setenv("QAIC_SIM_DEVICES", "many")
        with pytest.raises(RuntimeError, match="QAIC_SIM_DEVICES"):
            rt.Context()

    def test_small_setters(self):
        context = rt.Context()
        assert context.setLogLevel(rt.QLogLevel.QL_WARN) == OK
        assert rt.Queue(context, 0).initProperties(rt.QAicQueueProperties()) == OK


class TestStates:
    def test_cores_and_memory_are_taken_and_given_back(self, make_linear, compile_onnx):
        directory = compile_onnx(make_linear(2), "-aic-num-cores=6").directory
        p = program(directory)
        assert p.load() == OK
        assert free() == (16, 32768)
        assert p.activate() == OK
        assert free() == (10, 32767)
        assert p.deactivate() == OK
        assert free() == (16, 32768)
        assert p.activate() == OK
        del p
        gc.collect()
        assert free() == (16, 32768), "a dropped program gives back what it holds"

    def test_too_little_memory(self, static, monkeypatch, capsys):
        device.card(0).dram_free_mb = 0
        p = program(static)
        assert p.load() == OK
        assert p.activate() != OK
        assert "1 MB are needed, 0 of 32768 MB" in capsys.readouterr().err
        assert free() == (16, 0)

    def test_an_exec_obj_needs_its_programs_context(self, static):
        with pytest.raises(RuntimeError, match="another context"):
            rt.ExecObj(rt.Context(), program(static))


class TestRun:
    def test_every_bucket(self, buckets, client):
        c = client(buckets)
        rng = np.random.default_rng(0)
        for b, s in [(1, 4), (3, 8), (1, 8), (3, 4), (1, 4)]:
            ids = rng.integers(0, 200, (b, s))
            c.set(y=np.zeros((b, s, 2), np.float32), z=np.zeros((b, s), np.int64))
            actual = c.run(ids=ids)
            expected = np.tile(np.arange(100, dtype=np.float32).reshape(50, 2) / 3, (4, 1))[ids]
            assert np.array_equal(actual["y"], expected)
            assert np.array_equal(actual["z"], ids * 2)

    @pytest.mark.parametrize(
        ("ids", "y"),
        [
            ((2, 4), (2, 4, 2)),
            ((1, 8), (1, 4, 2)),
            ((1, 4), (3, 8, 2)),
            ((1, 4), (1, 4, 2, 1)),
            ((4, 1), (1, 4, 2)),
        ],
    )
    def test_shapes_that_match_nothing_and_recovery(self, ids, y, buckets, client, capsys):
        c = client(buckets)
        c.set(ids=np.zeros(ids, np.int64), y=np.zeros(y, np.float32), z=np.zeros(ids, np.int64))
        assert c.status() == INVAL
        err = capsys.readouterr().err
        assert "No matching dimension found" in err
        assert str(list(y)) in err
        c.set(y=np.zeros((1, 4, 2), np.float32), z=np.zeros((1, 4), np.int64))
        assert c.run(ids=np.ones((1, 4), np.int64))["z"].tolist() == [[2, 2, 2, 2]]

    def test_static_programs_match_their_binding_dims(self, static, client, capsys):
        c = client(static)
        c.set(x=np.ones((1, 32), np.float32))
        assert c.status() == INVAL
        assert "No matching dimension found" in capsys.readouterr().err

    def test_skipped_outputs(self, buckets, client):
        c = client(buckets)
        c.set(y=np.array([]), z=np.zeros((3, 8), np.int64))
        actual = c.run(ids=np.ones((3, 8), np.int64))
        assert list(actual) == ["z"]
        assert (actual["z"] == 2).all()
        c.set(z=np.array([]))
        assert c.run(ids=np.ones((3, 8), np.int64)) == {}

    def test_outputs_land_in_the_clients_buffers(self, static, client):
        c = client(static)
        c.run(x=np.ones((2, 32), np.float32))
        status, buffers = c.execobj.getData()
        assert status == OK
        assert all(a is b for a, b in zip(buffers, c.buffers, strict=True))
        assert np.frombuffer(c.buffers[1], np.float32).any()

    def test_scalars_reach_the_graph_as_scalars(self, make_model, compile_onnx, client):
        nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
        m = make_model(nodes, {"x": (F, [3, 4]), "i": (I64, [])}, {"y": (F, [4])})
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        assert np.array_equal(client(compile_onnx(m).directory).run(x=x, i=np.int64(2))["y"], x[2])

    def test_bool_inputs_and_outputs(self, make_model, compile_onnx, client):
        nodes = [helper.make_node("Not", ["x"], ["y"])]
        m = make_model(nodes, {"x": (TensorProto.BOOL, [3])}, {"y": (TensorProto.BOOL, [3])})
        actual = client(compile_onnx(m).directory).run(x=np.array([0, 1, 5], np.int8))["y"]
        assert actual.dtype == np.int8
        assert actual.tolist() == [1, 0, 0]

    def test_a_failing_graph_is_a_status(self, buckets, client, capsys):
        c = client(buckets)
        c.set(ids=np.full((3, 8), 10**6))
        assert c.status() == rt.QStatus.QS_ERROR
        assert "Error running program" in capsys.readouterr().err
        assert c.run(ids=np.ones((3, 8), np.int64))

    def test_an_output_of_another_shape_is_never_reshaped(self, make_model, compile_onnx, client, capsys):
        def branch(name, weight):
            info = helper.make_tensor_value_info(name, F, None)
            return helper.make_graph([helper.make_node("Mul", [weight, weight], [name])], name, [], [info])

        branches = {"then_branch": branch("two", "a"), "else_branch": branch("three", "b")}
        nodes = [helper.make_node("If", ["flag"], ["y"], **branches)]
        weights = {"a": np.array([1, 2], np.float32), "b": np.ones(3, np.float32)}
        c = client(
            compile_onnx(make_model(nodes, {"flag": (TensorProto.BOOL, [])}, {"y": (F, [2])}, weights)).directory
        )
        assert c.run(flag=np.array([1], np.int8))["y"].tolist() == [1, 4]
        c.set(flag=np.array([0], np.int8))
        assert c.status() == rt.QStatus.QS_ERROR
        assert "Output y is [3], not [2]" in capsys.readouterr().err

    def test_wait_and_get_without_a_run(self, static, client):
        c = client(static)
        assert c.execobj.waitForCompletion() == INVAL
        assert c.execobj.getData() == (INVAL, [])
        assert c.queue.enqueue(c.execobj) == INVAL
        assert c.execobj.run() == INVAL

    def test_inactive_programs_take_no_data(self, static, client):
        c = client(static)
        c.program.activation = None
        assert c.execobj.setData(c.buffers, c.dims) == INVAL


class TestAsync:
    def test_an_exec_obj_may_be_deleted_while_it_runs(self, static, client):
        c = client(static)
        assert c.execobj.setData(c.buffers, c.dims) == OK
        with c.program.activation.lock:
            assert c.queue.enqueue(c.execobj) == OK
            c.execobj = None
            assert c.program.deactivate() == OK

    def test_cards_count_under_threads(self, static):
        card = device.card(0)

        def take() -> None:
            for _ in range(200):
                card.reserve(2, 1)
                card.release(2, 1)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (card.nsp_free, card.dram_free_mb, card.networks_active) == (16, 32768, 0)


@pytest.mark.numeric
def test_specialized_batches(make_linear, compile_onnx, client):
    c = client(compile_onnx(make_linear(), "-convert-to-fp16", specs=SPECS).directory)
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    whole = c.run(x=x)["y"].copy()
    for n in (1, 2):
        c.set(y=np.zeros((n, 32), np.float32))
        close(c.run(x=x[:n])["y"], whole[:n], rtol=2e-3)
    assert [list(b.dims) for b in c.bindings] == [[4, 32]] * 2
    assert c.bindings[0].type == aicapi.FLOAT_TYPE
