# SPDX-License-Identifier: Apache-2.0
"""The simulated SDK obeys the contract of the real one, rule by rule, as a client sees it: objects and descriptions.

Each test is named after its rule, and its docstring has the section of card-contract; §4 is in
test_simulated_execution.py and §8 in test_simulated_faults.py. Graphs are made by hand and compiled by the simulated
compiler; expected values are numpy's. Where the contract is silent, the choice is listed in docs/simulated-sdk.md.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from simulated_client import OK, Client, iodesc
from simulated_graphs import CTX, INT64, PHASES, cached, counter, graph, helper, scaled

from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

pytestmark = pytest.mark.usefixtures("fresh_cards")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


class TestEnums:
    def test_statuses(self):
        """§2.1"""
        names = "SUCCESS PERM AGAIN NOMEM BUSY NODEV INVAL NOSPC BADFD TIMEDOUT PROTOCOL UNSUPPORTED DATA_CRC_ERROR"
        want = {f"QS_{name}": number for number, name in enumerate(names.split())}
        assert {s.name: int(s) for s in rt.QStatus} == {**want, "QS_DEV_ERROR": 300, "QS_ERROR": 500}

    def test_states_levels_and_directions(self):
        """§2.1: and the directions of mappings are not those of the protobuf."""
        assert [int(level) for level in rt.QLogLevel] == [0, 1, 2, 3]
        assert {s.name[4:]: int(s) for s in rt.QDevStatus} == {"INITIALIZING": 0, "READY": 1, "ERROR": 2}
        states = {"INIT": 0, "LOADED": 1, "FULLY_ACTIVATED": 2, "ERROR": 100, "LOAD_ERROR": 101, "ACTIVATE_ERROR": 102}
        assert {s.name: int(s) for s in rt.QProgramState} == states
        assert rt.BufferIoTypeEnum.BUFFER_IO_TYPE_OUTPUT == rt.BufferIoTypeEnum.OUTPUT == 2
        assert aicapi.BUFFER_IO_TYPE_OUTPUT == 1


class TestObjects:
    def test_constructors_raise_and_methods_return(self, compiled, tmp_path):
        """§2, §10 rule 3"""
        with pytest.raises(RuntimeError, match="no device"):
            rt.Context(rt.QIDList([5]))
        with pytest.raises(RuntimeError, match="Failed to open file"):
            rt.Qpc(str(tmp_path))
        program = rt.Program(rt.Context(), 0, rt.Qpc(compiled(scaled())), rt.QAicProgramProperties())
        assert program.activate() == rt.QStatus.QS_INVAL
        assert [type(value) for value in rt.Qpc.getIoDescriptor(program.qpc)] == [rt.QStatus, rt.QBuffer]

    def test_qpc_takes_the_directory_as_text(self, compiled, tmp_path):
        """§2.2"""
        directory = compiled(scaled())
        with pytest.raises(TypeError):
            rt.Qpc(tmp_path)
        with pytest.raises(RuntimeError, match="directory that holds"):
            rt.Qpc(f"{directory}/programqpc.bin")

    def test_qid_lists_grow(self):
        """§2.2"""
        qids = rt.QIDList([0])
        qids.append(1)
        assert list(qids) == [0, 1]

    def test_mappings_have_names_sizes_and_partial(self, compiled):
        """§2.2"""
        x, total, y, twin = rt.Qpc(compiled(counter(), "-retained-state")).getBufferMappings()
        assert [(m.bufferName, m.index, m.ioType, m.size) for m in (x, total, y, twin)] == [
            ("x", 0, 1, 24), ("total", 1, 1, 24), ("y", 2, 2, 24), ("total_RetainedState", 3, 2, 24)
        ]  # fmt: skip
        assert [m.isPartialBufferAllowed for m in (x, total, y, twin)] == [False, True, False, True]

    def test_properties_reject_unknown_attributes(self):
        """§2.4: SubmitRetryTimeoutMs is gone from 1.22.0.120 on, the version that is simulated."""
        props = rt.QAicProgramProperties()
        for name in ("dataPathTimeoutMs", "devMapping", "selectMask", "submitNumRetries"):
            assert hasattr(props, name)
        for name in ("SubmitRetryTimeoutMs", "SubmitNumRetries"):
            assert not hasattr(props, name)
            with pytest.raises(AttributeError):
                setattr(props, name, 1)
        with pytest.raises(AttributeError):
            rt.QAicQueueProperties().threads = 1

    def test_exec_objs_have_ids(self, compiled):
        """§2.2, as vLLM's older sessions use them."""
        client = Client(compiled(scaled()))
        assert client.execobj.getId() != rt.ExecObj(client.context, client.program).getId()

    def test_buffers_are_bytes_with_a_size(self):
        """§2.3"""
        buffer = rt.QBuffer(X)
        assert (buffer.size, bytes(buffer)) == (24, X.tobytes())
        assert np.array_equal(np.frombuffer(buffer, np.float32), X.ravel())
        assert rt.QBuffer(bytes(3)).size == 3

    def test_dims_read_back_as_lists(self):
        """§2.3: clients compare with [0]."""
        dims = rt.BufferDimensionsVecRef([(4, [2, 3])])
        dims[0] = (8, (0,))
        assert (dims[0], list(dims)) == ((8, [0]), [(8, [0])])

    def test_the_minimal_call_sequence(self, compiled):
        """§2.5"""
        client = Client(compiled(scaled()))
        assert np.array_equal(client.run({"x": X})["y"], X * 2)
        client.execobj = None
        assert client.program.deactivate() == OK
        assert client.program.unload() == OK


class TestInferenceSet:
    def run_one(self, places: rt.InferenceSet, number: int) -> np.ndarray:
        status, handle = places.getAvailable()
        assert status == OK
        assert handle.setBuffers([rt.QBuffer(X + number), rt.QBuffer(bytes(24))]) == OK
        assert places.submit(handle, number) == OK
        status, handle = places.getCompletedId(number)
        assert status == OK
        result = np.frombuffer(handle.execObj().getData()[1][1], np.float32).reshape(2, 3)
        assert places.putCompleted(handle) == OK
        return result

    def test_places_go_round(self, compiled):
        """§2.6"""
        places = rt.InferenceSet(rt.Context(), rt.Qpc(compiled(scaled())), 0, 2, 2)
        for number in range(6):
            assert np.array_equal(self.run_one(places, number), (X + number) * 2)

    def test_activations_and_set_size(self, compiled):
        """§2.6: each activation takes its own share of the card, each place is one ExecObj."""
        places = rt.InferenceSet(rt.Context(), rt.Qpc(compiled(scaled(), "-aic-num-cores=4")), 0, 2, 3)
        assert rt.Util().getResourceInfo(0)[1].nspFree == 16 - 3 * 4
        taken = [places.getAvailable()[1] for _ in range(6)]
        assert len({handle.execObj().getId() for handle in taken}) == 6
        assert places.getAvailable(timeoutUs=1) == (rt.QStatus.QS_TIMEDOUT, None)
        del places, taken
        assert rt.Util().getResourceInfo(0)[1].nspFree == 16

    def test_too_many_activations_raise(self, compiled):
        """§2.6"""
        with pytest.raises(RuntimeError, match="Error activating program"):
            rt.InferenceSet(rt.Context(), rt.Qpc(compiled(scaled(), "-aic-num-cores=8")), 0, 1, 3)
        assert rt.Util().getResourceInfo(0)[1].nspFree == 16

    def test_submission_of_a_vector_waits_for_a_place(self, compiled):
        """§2.6, as the samples do: results are collected on other threads."""
        qpc = rt.Qpc(compiled(scaled()))
        places = rt.InferenceSet(rt.Context(), qpc, 0, 2, 1)
        results = {}

        def collect(number: int) -> None:
            status, handle = places.getCompletedId(number)
            results[number] = (status, bytes(handle.execObj().getData()[1][1]))
            places.putCompleted(handle)

        threads = [threading.Thread(target=collect, args=(number,)) for number in range(8)]
        for number, thread in enumerate(threads):
            vector = rt.InferenceVector(qpc.getBufferMappings())
            vector.getVector()[0] = rt.QBuffer(X + number)
            assert places.submit(vector, number) == OK
            thread.start()
        for thread in threads:
            thread.join()
        assert places.waitForCompletion() == OK
        assert results == {number: (OK, ((X + number) * 2).tobytes()) for number in range(8)}

    def test_waiting_for_all_and_for_a_place(self, compiled):
        """§2.6"""
        qpc = rt.Qpc(compiled(scaled()))
        places, vectors = rt.InferenceSet(rt.Context(), qpc, 0, 2, 1), []
        for number in range(3):
            vectors.append(rt.InferenceVector(qpc.getBufferMappings()))
            vectors[-1].getVector()[0] = rt.QBuffer(X + number)
        [activation] = {handle.execObj()._program.activation for handle in places._available}
        third = threading.Thread(target=places.submit, args=(vectors[2], 2))
        with activation.lock:  # nothing can finish
            assert [places.submit(vectors[number], number) for number in (0, 1)] == [OK, OK]
            third.start()
        assert places.waitForCompletion() == OK
        for number in (0, 1):
            assert bytes(vectors[number].getVector()[1]) == ((X + number) * 2).tobytes()
        assert places.putCompleted(places.getCompletedId(0)[1]) == OK
        third.join()
        assert places.getCompletedId(2)[0] == OK
        assert bytes(vectors[2].getVector()[1]) == ((X + 2) * 2).tobytes()

    def test_wrong_ids_and_handles_are_refused(self, compiled):
        """§2.6"""
        places = rt.InferenceSet(rt.Context(), rt.Qpc(compiled(scaled())), 0, 2, 1)
        handle, other = places.getAvailable()[1], places.getAvailable()[1]
        for each in (handle, other):
            each.setBuffers([rt.QBuffer(X), rt.QBuffer(bytes(24))])
        assert places.submit(handle, 7) == OK
        assert places.submit(handle, 8) == places.submit(other, 7) == rt.QStatus.QS_INVAL
        assert places.putCompleted(handle) == rt.QStatus.QS_INVAL
        assert places.getCompletedId(9) == (rt.QStatus.QS_INVAL, None)
        assert places.getCompletedId(7) == (OK, handle)


class TestUtil:
    def test_queries(self, monkeypatch):
        """§2.7"""
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        util = rt.Util()
        assert util.getDeviceIds() == (OK, [0, 1])
        status, info = util.getDeviceInfo(1)
        assert (status, info.devStatus) == (OK, rt.QDevStatus.QDS_READY)
        resources = info.devData.resourceInfo
        assert (OK, resources) == util.getResourceInfo(1)
        for name in ("dram", "nsp", "vc", "mcid", "sem", "pc"):
            assert getattr(resources, f"{name}Total") == getattr(resources, f"{name}Free") > 0
        assert util.getPerformanceInfo(1)[1].nspFrequencyMhz > 0
        for query in (util.getDeviceInfo, util.getResourceInfo, util.getPerformanceInfo):
            assert query(2) == (rt.QStatus.QS_NODEV, None)
        assert util.getAicVersion() == (OK, 1, 22, "0.120", "simulated")
        assert util.checkLibraryVersion() == OK

    def test_an_activation_shows(self, compiled):
        """§2.7, §4.1: NSPs, memory and a virtual channel."""
        client = Client(compiled(scaled(), "-aic-num-cores=3"))
        resources = rt.Util().getResourceInfo(0)[1]
        assert (resources.nspFree, resources.vcFree) == (13, resources.vcTotal - 1)
        assert resources.dramFree < resources.dramTotal
        del client
        assert rt.Util().getResourceInfo(0)[1].vcFree == resources.vcTotal

    def test_locks(self, monkeypatch, tmp_path):
        """§2.7, §1.4: QAIC_SERIALIZE_DEVICE=1 makes lockDevice work."""
        import fcntl
        import tempfile

        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        util = rt.Util()
        assert util.lockDevice(0, True, False) == OK
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setenv("QAIC_SERIALIZE_DEVICE", "1")
        assert util.lockDevice(4, True, False) == rt.QStatus.QS_NODEV
        assert util.lockDevice(0, False, False) == rt.QStatus.QS_INVAL
        assert util.lockDevice(0, True, True) == util.lockDevice(0, True, False) == OK
        assert util.lockDevice(0, False, False) == OK
        [file] = tmp_path.iterdir()
        with file.open() as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            assert util.lockDevice(0, True, False) == rt.QStatus.QS_BUSY
        assert util.lockDevice(0, True, False) == util.lockDevice(0, False, False) == OK


class TestIoDesc:
    def test_numbers_of_types(self):
        """§3.1"""
        names = "FLOAT FLOAT_16 INT8_Q UINT8_Q INT16_Q INT32_Q INT32_I INT64_I INT8"
        want = {f"{name}_TYPE": number for number, name in enumerate(names.split())}
        got = dict(aicapi.bufferIoDataTypeEnum.items())
        assert got == {**want, "BFLOAT16_TYPE": 11, "TYPE_INVALID": 255}
        assert {name: getattr(aicapi, name) for name in got} == got

    def test_numbers_of_fields(self):
        """§3.2"""
        numbers = {
            name: {field.name: field.number for field in message.fields}
            for name, message in aicapi.DESCRIPTOR.message_types_by_name.items()
        }
        assert numbers["IoDesc"] == {
            "io_sets": 1, "selected_set": 2, "program_name": 3, "dma_buf": 4, "runtime_constants": 5,
            "pre_process_skip_stages": 6, "post_process_skip_stages": 7, "allowed_shapes": 8,
        }  # fmt: skip
        assert numbers["IoBinding"] == {
            "name": 1, "index": 2, "type": 3, "dir": 4, "quant_scale": 5, "quant_offset": 6, "dims": 7, "size": 8,
            "dma_buf_info": 9, "is_partial_buf_allowed": 10, "is_valid": 20,
        }  # fmt: skip
        assert numbers["IoShapes"] == {"shapes": 1}
        assert numbers["TensorShape"] == {"type": 1, "dims": 2}

    def test_the_selected_set_is_default_inputs_first(self, compiled):
        """§3.3: index is position, size is item size times the largest dims."""
        desc = iodesc(compiled(cached(), "-retained-state", specs=PHASES))
        assert (desc.selected_set, desc.selected_set.name) == (desc.io_sets[0], "default")
        assert [(b.name, b.index, b.dir, list(b.dims), b.size, b.is_valid) for b in desc.selected_set.bindings] == [
            ("input_ids", 0, 0, [1, 4], 32, True),
            ("position_ids", 1, 0, [1, 4], 32, True),
            ("past_key.0", 2, 0, [1, CTX, 2], CTX * 8, True),
            ("logits", 3, 1, [1, 4, 2], 32, True),
            ("past_key.0_RetainedState", 4, 1, [1, CTX, 2], CTX * 8, True),
        ]

    def test_allowed_shapes_are_inputs_then_outputs_in_the_order_given(self, compiled):
        """§3.3: and empty without specializations."""
        desc = iodesc(compiled(cached(), specs=PHASES))
        shapes = [[list(shape.dims) for shape in entry.shapes] for entry in desc.allowed_shapes]
        cache = [1, CTX, 2]
        assert shapes == [[[1, n], [1, n], cache, [1, n, 2], cache] for n in (4, 1)]
        assert [shape.type for shape in desc.allowed_shapes[0].shapes] == [7, 7, 0, 0, 0]
        assert len(iodesc(compiled(scaled(), name="static")).allowed_shapes) == 0


class TestRetainedPairs:
    @pytest.mark.parametrize("twin", ["past_key.0_RetainedState", "past_key.0_InternalRetainedState"])
    def test_pairing_is_by_name_and_both_bindings_may_be_partial(self, twin, compiled):
        """§4.5, §3.3: input X with output X_RetainedState, or the name that sub-functions leave."""
        bindings = iodesc(compiled(cached(twin), "-retained-state", specs=PHASES)).selected_set.bindings
        assert [b.name for b in bindings if b.is_partial_buf_allowed] == ["past_key.0", twin]

    def test_nothing_is_paired_without_the_flag(self, compiled):
        """§4.5: the flag is -retained-state."""
        bindings = iodesc(compiled(cached(), specs=PHASES)).selected_set.bindings
        assert not any(b.is_partial_buf_allowed for b in bindings)

    def test_a_flag_without_a_pair_is_a_warning(self, compiled, capsys):
        """§4.5: unknown of the real compiler, so a choice."""
        compiled(counter(twin="total_new"), "-retained-state")
        assert "warning: -retained-state: no output X_RetainedState" in capsys.readouterr().err

    def test_a_pair_has_one_type(self, compiled, capsys):
        """§6.3: a custom precision is given for input and output alike."""
        half = " - IOName: total\n   Precision: float16\n"
        both = half + " - IOName: total_RetainedState\n   Precision: float16\n"
        bindings = iodesc(compiled(counter(), "-retained-state", custom_io=both)).selected_set.bindings
        assert [b.type for b in bindings] == [0, 1, 0, 1]
        with pytest.raises(ValueError, match="refuses"):
            compiled(counter(), "-retained-state", custom_io=half, name="half")
        assert "'total' and 'total_RetainedState' are one retained state" in capsys.readouterr().err

    def test_a_pair_has_one_shape(self, compiled, capsys):
        """§4.5: they share device memory."""
        with pytest.raises(ValueError, match="refuses"):
            compiled(counter(kept=[1, 3]), "-retained-state")
        assert "'total' [1, 3] is retained as 'total_RetainedState' [2, 3]" in capsys.readouterr().err

    def test_an_input_has_one_twin(self, compiled, capsys):
        """§4.5: which of two would be the state can not be told."""
        model = counter()
        twin = "total_InternalRetainedState"
        model.graph.node.append(helper.make_node("Identity", ["y"], [twin]))
        model.graph.output.append(helper.make_tensor_value_info(twin, 1, [2, 3]))
        with pytest.raises(ValueError, match="refuses"):
            compiled(model, "-retained-state")
        assert "'total' has two retained outputs" in capsys.readouterr().err


class TestStandIn:
    def test_any_type_of_the_right_item_size_passes(self, compiled):
        """§10 rule 7: only bytes travel, so float32 given as int32 can not be noticed."""
        client = Client(compiled(scaled()))
        assert np.array_equal(client.run({"x": X.view(np.int32)})["y"], X * 2)
        client.set({"x": X.astype(np.float16)})
        assert client.status() == rt.QStatus.QS_INVAL

    def test_half_precision_rounds_at_the_border(self, compiled):
        """§10 rule 8: bindings stay float32, values become fp16."""
        x = np.array([[1 / 3, 2049, 7e4]] * 2, np.float32)
        got = Client(compiled(scaled(factor=1.0), "-convert-to-fp16")).run({"x": x})["y"]
        with np.errstate(over="ignore"):
            assert np.array_equal(got, x.astype(np.float16).astype(np.float32))

    def test_scalars_travel_as_one_element(self, compiled):
        """§2.3"""
        nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
        model = graph(nodes, {"a": (INT64, []), "b": (INT64, [])}, {"y": (INT64, [])})
        got = Client(compiled(model)).run({"a": np.int64(2), "b": np.int64(3)}, y=())
        assert got["y"].tolist() == [5]
