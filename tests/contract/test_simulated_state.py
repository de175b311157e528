# SPDX-License-Identifier: Apache-2.0
"""The simulated SDK obeys card-contract §4, rule by rule: buffers, retained state, sparse and sliced data.

See test_simulated_sdk.py for how these tests are named and where their expectations come from.
"""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from simulated_client import OK, Client, step
from simulated_graphs import CTX, PHASES, TABLE, Cache, cached, counter, graph, helper

from qeff_validate.sdk.simulated.bindings import qaicrt as rt

pytestmark = pytest.mark.usefixtures("fresh_cards")
INVAL, FAILED = rt.QStatus.QS_INVAL, rt.QStatus.QS_ERROR
X = np.arange(6, dtype=np.float32).reshape(2, 3)
BOTH = "".join(f" - IOName: total{end}\n   Precision: float16\n" for end in ("", "_RetainedState"))


@pytest.fixture
def decoder(compiled):
    return compiled(cached(), "-retained-state", specs=PHASES, name="decoder")


@pytest.fixture
def summing(compiled):
    return compiled(counter(), "-retained-state", name="summing")


class TestPartial:
    def test_a_buffer_stays_until_it_is_replaced(self, decoder):
        """§4.4: set and skipped are sticky, so an input that is not set again is used again."""
        client, want = Client(decoder), Cache()
        ids, at = np.array([[1, 2, 3, 4]]), np.array([[0, 1, 2, 3]])
        first = step(client, ids, at)
        again = client.run({})["logits"]
        assert np.array_equal(first, again)
        assert np.array_equal(again, want.step(ids, at))

    def test_skipped_outputs_are_not_written(self, summing):
        """§4.4"""
        client = Client(summing)
        client.skip("y")
        assert client.run({"x": X, "total": X}) == {}
        assert client.execobj.getData()[1][2].size == 0

    def test_a_skipped_input_without_state_fails(self, summing, capsys):
        """§4.4, §8: Partial buffer not allowed."""
        client = Client(summing)
        client.skip("x")
        assert client.status() == INVAL
        assert "Partial buffer not allowed for: x" in capsys.readouterr().err

    def test_part_of_a_state_replaces_the_beginning_of_it(self, summing):
        """§4.4: dims give the used part; the card keeps the rest."""
        client = Client(summing)
        client.run({"x": X, "total": X * 0})
        client.set({"total": np.full((1, 3), 100, np.float32)})
        assert client.run({"x": X * 0})["y"].tolist() == [[100, 100, 100], [3, 4, 5]]
        client.skip("total")
        got = client.run({"x": X * 0}, total_RetainedState=(1, 3))
        assert got["total_RetainedState"].tolist() == [[100, 100, 100]]

    def test_part_of_a_buffer_is_a_prefix_or_no_match(self, summing):
        """§4.4: bytes are copied from the start, so columns are not a part."""
        client = Client(summing)
        for shape in [(2, 2), (1, 2), (3,), (1, 3, 1)]:
            client.set({"total": np.zeros(shape, np.float32)})
            assert client.status() == INVAL

    def test_part_of_a_buffer_without_dims(self, summing):
        """§2.2, §4.4: the size says which part."""
        client = Client(summing)
        client.run({"x": X * 0, "total": X})
        buffers = [rt.QBuffer(X * 0), rt.QBuffer(np.float32([7, 7, 7])), rt.QBuffer(bytes(24)), rt.QBuffer(b"")]
        assert client.execobj.run(buffers) == OK
        assert np.frombuffer(buffers[2], np.float32).tolist() == [7, 7, 7, 3, 4, 5]

    def test_other_inputs_can_not_be_partial(self, summing):
        """§4.4: is_partial_buf_allowed says which."""
        client = Client(summing)
        client.set({"x": X[:1], "total": X})
        assert client.status() == INVAL


class TestRetainedState:
    def test_prefill_in_chunks_and_decode(self, decoder):
        """§4.5: the state survives between specializations; padding has position -1; nobody uploads zeros first."""
        client, want = Client(decoder), Cache()
        for ids, at in [([[3, 1, 4, 1]], [[0, 1, 2, 3]]), ([[5, 9, 0, 0]], [[4, 5, -1, -1]]), ([[2]], [[6]])]:
            assert np.array_equal(step(client, ids, at), want.step(np.array(ids), np.array(at)))

    @pytest.mark.parametrize(("mode", "content"), [("strict", np.nan), ("lenient", 0), (None, np.nan)])
    def test_initial_content_is_undefined(self, mode, content, summing, monkeypatch):
        """§4.5, §10 rule 6: NaN flags graphs that read what they have not written."""
        if mode:
            monkeypatch.setenv("QAIC_SIM_STATE", mode)
        got = Client(summing).run({"x": X}, total_RetainedState=(2, 3))["total_RetainedState"]
        assert np.array_equal(got, X + content, equal_nan=True)

    def test_initial_content_of_integers_is_the_lowest(self, compiled):
        """§4.5"""
        node = helper.make_node("Identity", ["s"], ["s_RetainedState"])
        model = graph([node], {"s": (6, [2])}, {"s_RetainedState": (6, [2])})
        got = Client(compiled(model, "-retained-state")).run({}, s_RetainedState=(2,))
        assert got["s_RetainedState"].tolist() == [-(2**31)] * 2

    def test_an_unknown_mode_is_an_error(self, summing, monkeypatch, capsys):
        """A typo must not pass for a mode."""
        monkeypatch.setenv("QAIC_SIM_STATE", "zeros")
        client = Client(summing)
        assert client.status() == client.execobj.run() == FAILED
        assert "QAIC_SIM_STATE is strict or lenient, not 'zeros'" in capsys.readouterr().err

    def test_an_upload_becomes_the_state(self, summing):
        """§4.5: non-empty X is uploaded, then X is skipped."""
        client = Client(summing)
        assert np.array_equal(client.run({"x": X, "total": X * 10})["y"], X * 11)
        client.skip("total")
        assert np.array_equal(client.run({"x": X})["y"], X * 12)

    def test_an_upload_is_a_copy(self, compiled):
        """§4.5: the state lives on the card, whatever the client does with its memory afterwards."""
        model = graph(
            [helper.make_node("Identity", ["w"], ["w_RetainedState"]), helper.make_node("Mul", ["x", "w"], ["y"])],
            {"x": (1, [2]), "w": (1, [2])}, {"y": (1, [2]), "w_RetainedState": (1, [2])},
        )  # fmt: skip
        client = Client(compiled(model, "-retained-state"))
        weights, y = np.float32([2, 3]), np.zeros(2, np.float32)
        assert client.execobj.setData([(0, np.ones(2, np.float32)), (1, weights), (2, y)]) == OK
        assert client.execobj.run() == OK
        weights[:] = 0
        assert client.run({"x": np.ones(2, np.float32)})["y"].tolist() == y.tolist() == [2, 3]

    def test_the_state_comes_to_the_host_only_if_asked_for(self, summing):
        """§4.5: and stays on the card in both cases."""
        client = Client(summing)
        assert list(client.run({"x": X, "total": X * 0})) == ["y"]
        client.skip("total")
        got = client.run({"x": X}, total_RetainedState=(2, 3))
        assert np.array_equal(got["total_RetainedState"], X * 2)
        assert np.array_equal(client.run({"x": X})["y"], X * 3)

    def test_exec_objs_of_one_activation_share_the_state(self, decoder):
        """§4.5: prefill and decode on two ExecObjs."""
        prefill, want = Client(decoder), Cache()
        decode = Client(decoder, program=prefill.program)
        for client, ids, at in [(prefill, [[3, 1, 4, 1]], [[0, 1, 2, 3]]), (decode, [[5]], [[4]])]:
            assert np.array_equal(step(client, ids, at), want.step(np.array(ids), np.array(at)))

    def test_an_activation_runs_one_inference_at_a_time(self, summing):
        """§4.5, §4.6: two queues, and no update of the state is lost."""
        first = Client(summing)
        first.run({"x": X * 0, "total": X * 0})
        clients = [Client(summing, program=first.program) for _ in range(2)]

        def add(client: Client) -> None:
            for _ in range(40):
                client.run({"x": X})

        threads = [threading.Thread(target=add, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert np.array_equal(clients[0].run({"x": X * 0})["y"], X * 80)

    def test_each_activation_has_its_own(self, summing):
        """§4.5"""
        one, two = Client(summing), Client(summing)
        one.run({"x": X, "total": X * 0})
        two.run({"x": X * 5, "total": X * 0})
        for client, times in ((one, 1), (two, 5)):
            client.skip("total")
            assert np.array_equal(client.run({"x": X * 0})["y"], X * times)

    def test_it_is_lost_on_deactivation(self, summing):
        """§4.5"""
        client = Client(summing)
        client.run({"x": X, "total": X * 0})
        client.execobj = None
        assert [client.program.deactivate(), client.program.activate()] == [OK, OK]
        again = Client(summing, program=client.program)
        assert np.isnan(again.run({"x": X})["y"]).all()

    def test_a_failed_choice_leaves_it_alone(self, summing):
        """§4.2: the session can be used again."""
        client = Client(summing)
        client.run({"x": X, "total": X * 0})
        client.skip("total")
        client.set({"x": X[:1]})
        assert client.status() == INVAL
        assert np.array_equal(client.run({"x": X})["y"], X * 2)

    def test_state_in_float16_is_rounded_in_storage(self, compiled):
        """§6.3, §4.5: custom IO float16 on both of a pair."""
        client = Client(compiled(counter(), "-retained-state", custom_io=BOTH))
        third = np.full((2, 3), 1 / 3, np.float32)
        client.run({"x": third, "total": np.zeros((2, 3), np.float16)})
        client.skip("total")
        want = third.astype(np.float16).astype(np.float32) + third
        assert np.array_equal(client.run({"x": third})["y"], want)


class TestSparse:
    def arrays(self, client, **arrays):
        return [(client.index[name.replace("__", ".")], array) for name, array in arrays.items()]

    def test_arrays_are_used_in_place(self, summing):
        """§4.8: outputs are written into the caller's arrays, inputs are read when the inference runs."""
        client = Client(summing)
        x, total, y = X.copy(), X * 0, np.zeros((2, 3), np.float32)
        assert client.execobj.setData(self.arrays(client, x=x, total=total, y=y)) == OK
        x += 1
        assert client.queue.enqueue(client.execobj) == OK
        assert client.execobj.waitForCompletion() == OK
        assert np.array_equal(y, X + 1)
        status, buffers = client.execobj.getData()
        assert (status, [buffer.size for buffer in buffers]) == (OK, [0] * 4)

    def test_bindings_that_are_absent_are_skipped(self, decoder):
        """§4.8: the cache never, logits in the last chunk only."""
        client, want, logits = Client(decoder), Cache(), np.zeros((1, 4, 2), np.float32)
        for chunk, (ids, at) in enumerate([([[3, 1, 4, 1]], [[0, 1, 2, 3]]), ([[5, 9, 2, 6]], [[4, 5, 6, 7]])]):
            feeds = self.arrays(client, input_ids=np.array(ids), position_ids=np.array(at))
            assert client.execobj.setData(feeds + self.arrays(client, logits=logits) * chunk) == OK
            assert client.execobj.run() == OK
            result = want.step(np.array(ids), np.array(at))
            assert np.array_equal(logits, result * chunk)

    def test_calls_accumulate_until_enqueue(self, summing, capsys):
        """§4.8: and no further: what is set is what was given since the last enqueue."""
        client, y = Client(summing), np.zeros((2, 3), np.float32)
        for arrays in ({"x": X}, {"total": X}, {"y": y}):
            assert client.execobj.setData(self.arrays(client, **arrays)) == OK
        assert client.execobj.run() == client.execobj.run() == OK
        assert np.array_equal(y, X * 2)
        assert client.execobj.setData(self.arrays(client, y=y)) == OK
        assert client.execobj.run() == INVAL
        assert "Partial buffer not allowed for: x" in capsys.readouterr().err

    def test_shape_and_item_size_are_the_arrays(self, summing):
        """§4.8"""
        client = Client(summing)
        for wrong in (X[:1], X.astype(np.float64), X.reshape(3, 2)):
            assert client.execobj.setData(self.arrays(client, x=wrong, total=X)) == OK
            assert client.execobj.run() == INVAL

    def test_an_empty_array_means_skipped(self, summing):
        """§4.4, §4.8"""
        client, y = Client(summing), np.zeros((2, 3), np.float32)
        client.run({"x": X, "total": X * 0})
        nothing = np.array([])
        arrays = self.arrays(client, x=X, total=nothing, y=y, total_RetainedState=nothing)
        assert client.execobj.setData(arrays) == OK
        assert client.execobj.run() == OK
        assert np.array_equal(y, X * 2)

    def test_arrays_that_can_not_be_used_in_place_are_refused(self, summing):
        """§4.6: C-contiguous, and writable for outputs."""
        client = Client(summing)
        fixed = X.copy()
        fixed.flags.writeable = False
        for wrong in ({"x": X.reshape(3, 2).T}, {"y": fixed}):
            assert client.execobj.setData(self.arrays(client, **wrong)) == INVAL
        assert client.execobj.setData([(9, X)]) == INVAL
        with pytest.raises(TypeError):
            client.execobj.setData([(0, X.tobytes())])
        with pytest.raises(TypeError):
            client.execobj.setData([X])


class TestSlices:
    SPEC = json.dumps(
        {"BufferSpecs": [{"Name": "past_key.*", "ElemSize": 4,
                          "DimSpecs": [{"start": "batch_index"}, {"start": "ctx_start"}, {"start": 0}]}]}
    )  # fmt: skip

    @pytest.fixture
    def rows(self, compiled):
        specs = [{"b": "2", "s": "1", "ctx": str(CTX)}]
        return Client(compiled(cached(), "-retained-state", specs=specs, name="rows"))

    def test_a_block_of_the_state_travels(self, rows):
        """§4.8: what is not named by the spec travels whole; the start is given by parameters."""
        status, spec = rows.program.createSlicingSpecHandle(self.SPEC)
        assert status == OK
        block, out, logits = (
            np.full((1, 3, 2), 7, np.float32),
            np.zeros((1, 2, 2), np.float32),
            np.zeros((2, 1, 2), "f4"),
        )
        ids, at = np.array([[3], [5]]), np.array([[0], [3]])
        start = [("batch_index", 1), ("ctx_start", 0)]
        status, _ = rows.execobj.setDataWithSlices([(rows.index["past_key.0"], block)], spec, start)
        assert status == OK
        inside = [(rows.index["past_key.0_RetainedState"], out)]
        assert rows.execobj.setDataWithSlices(inside, spec, [("batch_index", 1), ("ctx_start", 2)])[0] == OK
        assert rows.execobj.setDataWithSlices([(0, ids), (1, at)], spec, [])[0] == OK
        assert rows.execobj.setData([(rows.index["logits"], logits)]) == OK
        assert rows.execobj.run() == OK
        want = Cache(2)
        want.slots[1, :3] = 7
        assert np.array_equal(logits, want.step(ids, at))
        assert np.array_equal(out, want.slots[1:2, 2:4])
        assert np.array_equal(out[0, 1], TABLE[5])

    def test_slices_go_with_classic_buffers_that_are_skipped(self, rows):
        """§4.8: getData has nothing for them."""
        spec, out = rows.program.createSlicingSpecHandle(self.SPEC)[1], np.zeros((1, CTX, 2), np.float32)
        inside = [(rows.index["past_key.0_RetainedState"], out)]
        assert rows.execobj.setDataWithSlices(inside, spec, [("batch_index", 1), ("ctx_start", 0)])[0] == OK
        got = rows.run({"input_ids": np.array([[3], [5]]), "position_ids": np.array([[0], [3]])})
        assert list(got) == ["logits"]
        assert np.array_equal(out[0, 3], TABLE[5])

    def test_slices_that_do_not_fit_are_refused(self, rows, summing):
        """§4.8"""
        assert rows.program.createSlicingSpecHandle("{}") == (INVAL, None)
        assert rows.program.createSlicingSpecHandle("[") == (INVAL, None)
        spec = rows.program.createSlicingSpecHandle(self.SPEC)[1]
        cache, block = rows.index["past_key.0"], np.zeros((1, 3, 2), np.float32)
        for array, start in [
            (block, [("batch_index", 0)]),
            (block, [("batch_index", -1), ("ctx_start", 0)]),
            (block.astype(np.float16), [("batch_index", 0), ("ctx_start", 0)]),
            (block[0], [("batch_index", 0), ("ctx_start", 0)]),
        ]:
            assert rows.execobj.setDataWithSlices([(cache, array)], spec, start) == (INVAL, None)
        beyond = [("batch_index", 0), ("ctx_start", CTX - 2)]
        assert rows.execobj.setDataWithSlices([(cache, block)], spec, beyond)[0] == OK
        assert rows.execobj.setData([(0, np.array([[3], [5]])), (1, np.array([[0], [3]]))]) == OK
        assert rows.execobj.run() == INVAL
        every = rows.program.createSlicingSpecHandle(self.SPEC.replace("past_key", ""))
        assert rows.execobj.setDataWithSlices([(0, np.zeros((2, 1, 1), "f4"))], every[1], beyond) == (INVAL, None)
        with pytest.raises(TypeError):
            rows.execobj.setDataWithSlices([(cache, block)], None, [])
