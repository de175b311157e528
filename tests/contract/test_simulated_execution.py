# SPDX-License-Identifier: Apache-2.0
"""The simulated SDK obeys card-contract §4, rule by rule: states, setData, shapes, cards.

Buffers and state are in test_simulated_state.py; test_simulated_sdk.py says how these tests are named and where their
expectations come from.
"""

from __future__ import annotations

import numpy as np
import pytest
from simulated_client import OK, Client, step
from simulated_graphs import PHASES, Cache, altered, cached, counter, graph, helper, scaled

from qeff_validate.sdk.simulated.bindings import qaicrt as rt

pytestmark = pytest.mark.usefixtures("fresh_cards")
INVAL, FAILED = rt.QStatus.QS_INVAL, rt.QStatus.QS_ERROR
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def decoder(compiled):
    return compiled(cached(), "-retained-state", specs=PHASES, name="decoder")


@pytest.fixture
def summing(compiled):
    return compiled(counter(), "-retained-state", name="summing")


def program(directory, qid=0, props=None, context=None):
    return rt.Program(context or rt.Context(), qid, rt.Qpc(directory), props or rt.QAicProgramProperties())


def mapping(text):
    props = rt.QAicProgramProperties()
    props.devMapping = text
    return props


class TestStates:
    def test_order(self, summing):
        """§4.1: load is idempotent; each step needs the one before."""
        p = program(summing)
        assert [p.activate(), p.deactivate(), p.unload()] == [INVAL] * 3
        assert [p.load(), p.load(), p.activate(), p.load(), p.unload()] == [OK, OK, OK, OK, INVAL]
        assert p.state == rt.QProgramState.FULLY_ACTIVATED
        assert [p.deactivate(), p.deactivate(), p.unload(), p.activate()] == [OK, INVAL, OK, INVAL]

    def test_another_hardware_generation_does_not_load(self, summing, tmp_path, capsys):
        """§4.1, §8"""
        p = program(altered(summing, tmp_path / "other", hw_version="ai200"))
        assert p.load() == rt.QStatus.QS_UNSUPPORTED
        text = "Failed to initialize program, HW Version incompatible, program expects:Major Version"
        assert text in capsys.readouterr().err
        assert p.state == rt.QProgramState.LOAD_ERROR

    def test_exec_objs_activate_by_themselves_only_with_bit_0x04(self, summing):
        """§4.1"""
        p = program(summing)
        rt.ExecObj(p.context, p)
        assert p.activation is not None
        props = rt.QAicProgramProperties()
        assert props.selectMask & 0x04
        props.selectMask = 0
        other = program(summing, props=props)
        with pytest.raises(RuntimeError, match=r"program is not active \(not activated\)"):
            rt.ExecObj(other.context, other)

    def test_exec_objs_do_not_activate_what_was_activated_by_hand(self, summing):
        """§4.1"""
        p = program(summing)
        assert [p.load(), p.activate(), p.deactivate()] == [OK] * 3
        with pytest.raises(RuntimeError, match="program is not active"):
            rt.ExecObj(p.context, p)

    def test_live_exec_objs_block_deactivation(self, summing, capsys):
        """§4.1, §8"""
        client = Client(summing)
        second = rt.ExecObj(client.context, client.program)
        client.execobj = None
        assert client.program.deactivate() == INVAL
        assert "Cannot deactivate program, it has active ExecObj" in capsys.readouterr().err
        del second
        assert client.program.deactivate() == OK

    def test_programs_share_a_card_by_turns(self, compiled, summing):
        """§4.1: as several QPCs of one model do."""
        large = [compiled(scaled(factor=f), "-aic-num-cores=16", name=f"q{f}") for f in (2.0, 3.0)]
        programs = [program(directory) for directory in large]
        for _ in range(2):
            for p, factor in zip(programs, (2, 3), strict=True):
                assert [p.load(), p.activate()] == [OK, OK]
                client = Client(large[0], program=p)
                assert np.array_equal(client.run({"x": X})["y"], X * factor)
                del client
                assert p.deactivate() == OK

    def test_nsps_and_memory_are_counted_across_programs(self, compiled, capsys):
        """§4.1, §8"""
        directory = compiled(scaled(), "-aic-num-cores=9")
        first, second = program(directory), program(directory)
        assert [first.load(), second.load(), first.activate()] == [OK] * 3
        assert second.activate() == rt.QStatus.QS_DEV_ERROR
        assert second.state == rt.QProgramState.ACTIVATE_ERROR
        err = capsys.readouterr().err
        for text in ("Device 0 activate failed: Memory resource exhausted", "Dev 0 activate failed status 300",
                     "Failed to Activate program", "9 NSPs are needed, 7 of 16 are free"):  # fmt: skip
            assert text in err
        assert first.deactivate() == second.activate() == OK

    def test_a_pair_takes_its_memory_once(self, compiled):
        """§4.1, §4.5: x, total and y of 1,044,000 bytes each are 2.99 MiB."""
        client = Client(compiled(counter(rows=87_000), "-retained-state"))
        resources = rt.Util().getResourceInfo(0)[1]
        assert resources.dramTotal - resources.dramFree == 3
        del client

    def test_an_ignored_activation_failure_shows_at_the_exec_obj(self, compiled):
        """§8"""
        directory = compiled(scaled(), "-aic-num-cores=9")
        first, second = Client(directory), program(directory, context=None)
        second.load()
        second.activate()
        with pytest.raises(RuntimeError, match="Failed to create ExecObj: Error activating program"):
            rt.ExecObj(second.context, second)
        del first


class TestSetData:
    def test_one_entry_per_binding(self, summing):
        """§4.2, §10 rule 5"""
        client = Client(summing)
        assert client.execobj.setData(client.buffers[:3], client.dims) == INVAL
        assert client.execobj.setData(client.buffers, rt.BufferDimensionsVecRef([(4, [2, 3])])) == INVAL

    def test_bytes_are_item_size_times_dims(self, summing, capsys):
        """§10 rule 7, §8"""
        client = Client(summing)
        client.buffers[0] = rt.QBuffer(bytes(20))
        assert client.execobj.setData(client.buffers, client.dims) == FAILED
        assert "Unexpected buffer size at index 0" in capsys.readouterr().err

    def test_no_buffer_is_larger_than_its_binding_if_one_is_partial(self, summing, compiled, capsys):
        """§4.2 (b) and (c): then it is an error of setData, else of the wait."""
        client = Client(summing)
        client.set({"y": np.zeros((3, 3), np.float32)})
        assert client.execobj.setData(client.buffers, client.dims) == FAILED
        assert "Unexpected buffer size at index 2" in capsys.readouterr().err
        plain = Client(compiled(scaled()))
        plain.set({"y": np.zeros((3, 3), np.float32)})
        assert plain.status() == INVAL

    def test_dims_may_be_left_out_without_specializations_only(self, summing, decoder):
        """§2.2"""
        client = Client(summing)
        client.run({"x": X, "total": X})
        buffers = [rt.QBuffer(X), rt.QBuffer(b""), rt.QBuffer(bytes(24)), rt.QBuffer(b"")]
        assert client.execobj.run(buffers) == OK
        assert np.array_equal(np.frombuffer(buffers[2], np.float32).reshape(2, 3), X * 3)
        other = Client(decoder)
        assert other.execobj.setData(other.buffers) == INVAL

    def test_one_inference_is_in_flight_per_exec_obj(self, summing):
        """§4.6, §10 rule 4"""
        client = Client(summing)
        client.set({"total": X})
        assert client.execobj.setData(client.buffers, client.dims) == OK
        with client.program.activation.lock:  # it can not finish
            assert client.queue.enqueue(client.execobj) == OK
            assert client.queue.enqueue(client.execobj) == rt.QStatus.QS_BUSY
            assert client.execobj.setData(client.buffers, client.dims) == rt.QStatus.QS_BUSY
            assert client.execobj.getData() == (rt.QStatus.QS_BUSY, [])
        assert client.execobj.waitForCompletion() == OK

    def test_a_pipeline_of_exec_objs_keeps_the_order_of_a_queue(self, summing):
        """§4.6: with one state, order decides the result."""
        first = Client(summing)
        first.run({"x": X * 0, "total": X * 0})
        clients = [Client(summing, program=first.program) for _ in range(4)]
        for number, client in enumerate(clients):
            client.set({"x": X * 0 + 10.0**number})
            assert client.execobj.setData(client.buffers, client.dims) == OK
        for client in clients:
            assert first.queue.enqueue(client.execobj) == OK
        sums = []
        for client in reversed(clients):
            assert client.execobj.waitForCompletion() == OK
            sums.append(np.frombuffer(client.buffers[2], np.float32)[0])
        assert sums == [1111, 111, 11, 1]


class TestShapes:
    def test_outputs_take_part_in_the_choice(self, decoder, capsys):
        """§4.3: the prefill-sized logits buffer fails in decode, at the wait, and the session stays usable."""
        client, want = Client(decoder), Cache()
        ids, at = np.array([[3, 5, 7, 9]]), np.array([[0, 1, 2, 3]])
        assert np.array_equal(step(client, ids, at), want.step(ids, at))
        client.set({"input_ids": np.array([[2]]), "position_ids": np.array([[4]])})
        assert client.status() == INVAL
        err = capsys.readouterr().err
        assert "No matching dimension found" in err
        assert "'logits': [1, 4, 2]" in err
        assert np.array_equal(step(client, [[2]], [[4]]), want.step(np.array([[2]]), np.array([[4]])))

    @pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 4, 1), (4,)])
    def test_dims_that_are_not_allowed(self, shape, decoder):
        """§4.3: nothing is padded, cut or reshaped."""
        client = Client(decoder)
        client.set({"input_ids": np.zeros(shape, np.int64)})
        assert client.status() == INVAL

    def test_skipped_bindings_do_not_take_part(self, decoder):
        """§4.3: logits skipped, inputs decide."""
        client = Client(decoder)
        client.skip("logits")
        client.set({"input_ids": np.array([[1]]), "position_ids": np.array([[0]])})
        assert client.status() == OK

    def test_a_choice_that_is_not_clear_is_refused(self, compiled, capsys):
        """§4.3: two shapes of the state alone, and the state skipped."""
        model = graph(
            [helper.make_node("Identity", ["s"], ["s_RetainedState"]), helper.make_node("Neg", ["x"], ["y"])],
            {"x": (1, [2]), "s": (1, ["n"])}, {"y": (1, [2]), "s_RetainedState": (1, ["n"])},
        )  # fmt: skip
        client = Client(compiled(model, "-retained-state", specs=[{"n": "2"}, {"n": "3"}]))
        assert client.status() == INVAL
        assert "more than one specialization fits" in capsys.readouterr().err
        for length in (3, 2):
            assert client.run({"s": np.ones(length, np.float32)}, s_RetainedState=(length,))["s_RetainedState"].all()


class TestSeveralDevices:
    @pytest.fixture
    def pair(self, compiled, tmp_path, monkeypatch):
        monkeypatch.setenv("QAIC_SIM_DEVICES", "3")
        return altered(compiled(counter(), "-retained-state", "-aic-num-cores=10"), tmp_path / "pair", num_devices=2)

    def free(self):
        return [rt.Util().getResourceInfo(qid)[1].nspFree for qid in rt.Util().getDeviceIds()[1]]

    def test_dev_mapping_names_the_devices(self, pair):
        """§4.7: each gives its share, and gets it back."""
        client = Client(pair, qid=None, props=mapping("0:2"))
        assert self.free() == [6, 16, 6]
        assert np.array_equal(client.run({"x": X, "total": X})["y"], X * 2)
        client.execobj = None
        assert client.program.deactivate() == OK
        assert self.free() == [16, 16, 16]

    @pytest.mark.parametrize(("qid", "text"), [(0, ""), (None, "1"), (None, "0:1:2"), (None, "")])
    def test_the_number_of_ids_must_be_that_of_the_qpc(self, qid, text, pair, capsys):
        """§4.7, §8"""
        assert program(pair, qid=qid, props=mapping(text)).load() == INVAL
        assert "Failed to initialize program, it needs 2 devices" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["0:2", "0:9", "0:x"])
    def test_the_context_must_list_all_devices(self, text, pair, capsys):
        """§4.7"""
        context = rt.Context(rt.QIDList([0, 1]))
        assert program(pair, qid=None, props=mapping(text), context=context).load() == INVAL
        assert "devMapping" in capsys.readouterr().err

    def test_all_devices_or_none(self, pair, capsys):
        """§4.1: what was taken is given back if another device has not enough."""
        first = Client(pair, qid=None, props=mapping("0:1"))
        second = program(pair, qid=None, props=mapping("2:1"))
        assert [second.load(), second.activate()] == [OK, rt.QStatus.QS_DEV_ERROR]
        assert "Device 1 activate failed" in capsys.readouterr().err
        assert self.free() == [6, 6, 16]
        del first

    def test_no_device_chosen_means_any(self, compiled, monkeypatch):
        """§2.4"""
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        directory = compiled(scaled(), "-aic-num-cores=16")
        clients = [Client(directory, qid=None) for _ in range(2)]
        assert self.free() == [0, 0]
        del clients
