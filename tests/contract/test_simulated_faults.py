# SPDX-License-Identifier: Apache-2.0
"""Faults that the simulated SDK shows on request, with the statuses and texts of card-contract §8."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulated_client import OK, Client
from simulated_graphs import altered, counter, scaled

from qeff_validate.sdk.simulated import faults, tools
from qeff_validate.sdk.simulated.bindings import qaicrt as rt

pytestmark = pytest.mark.usefixtures("fresh_cards")
LOST, TIMED_OUT = rt.QStatus.QS_DEV_ERROR, rt.QStatus.QS_TIMEDOUT
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def fault(monkeypatch):
    return lambda text: monkeypatch.setenv("QAIC_SIM_FAULT", text)


@pytest.fixture
def doubling(compiled):
    return compiled(scaled())


def program(directory, qid=0):
    return rt.Program(rt.Context(), qid, rt.Qpc(directory), rt.QAicProgramProperties())


def queried(capsys):
    capsys.readouterr()
    assert tools.main(["qaic-util", "-q"]) == 0
    return capsys.readouterr().out


class TestRequests:
    @pytest.mark.parametrize(
        "text",
        ["timeuot", "timeout@0", "timeout@x", "timeout=a", "crc@1@2", "device-error@2", "no-devices=1", "Timeout",
         "missing-property", "crash, nonsense"],
    )  # fmt: skip
    def test_what_is_not_understood_is_an_error(self, text, fault, capsys):
        fault(text)
        with pytest.raises(RuntimeError, match="QAIC_SIM_FAULT"):
            rt.Context()
        assert tools.main(["qaic-util", "-q"]) == 1
        assert "QAIC_SIM_FAULT" in capsys.readouterr().err

    def test_an_unknown_name_gets_the_list(self, fault):
        fault("timeuot")
        with pytest.raises(RuntimeError) as error:
            rt.Context()
        assert all(name in str(error.value) for name in ["timeuot", *faults.NAMES])

    def test_several_at_once_and_from_a_file(self, fault, monkeypatch, tmp_path):
        fault("timeout@3,device-error=1  crc")
        monkeypatch.setenv("QAIC_SIM_FAULT_FILE", str(tmp_path / "faults"))
        three = [faults.Fault("timeout", "", 3), faults.Fault("device-error", "1"), faults.Fault("crc")]
        assert faults.current() == three
        (tmp_path / "faults").write_text("activate-nsp\nmissing-property=devMapping\n")
        assert faults.current() == [
            *three,
            faults.Fault("activate-nsp"),
            faults.Fault("missing-property", "devMapping"),
        ]

    def test_a_file_switches_faults_while_a_program_runs(self, doubling, monkeypatch, tmp_path):
        file = tmp_path / "faults"
        monkeypatch.setenv("QAIC_SIM_FAULT_FILE", str(file))
        client = Client(doubling)
        client.set({"x": X})
        assert client.status() == OK
        file.write_text("timeout")
        assert client.status() == TIMED_OUT
        file.unlink()
        assert np.array_equal(client.run({"x": X})["y"], X * 2)


class TestCards:
    def test_no_devices(self, fault, capsys):
        fault("no-devices")
        assert rt.Util().getDeviceIds() == (OK, [])
        with pytest.raises(RuntimeError, match="no devices"):
            rt.Context()
        assert "Number of devices queried: 0" in queried(capsys)

    @pytest.mark.parametrize(
        ("name", "shown", "number"), [("device-error", "Error", 2), ("device-initializing", "Initializing", 0)]
    )
    def test_a_device_that_is_not_ready(self, name, shown, number, doubling, fault, monkeypatch, capsys):
        """§1.4: its record ends with the device link. §8: load is refused."""
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        fault(f"{name}=1")
        bad, good = program(doubling, 1), program(doubling, 0)
        assert [bad.load(), good.load()] == [LOST, OK]
        assert "Failed to initialize program, device no in Ready state" in capsys.readouterr().err
        status, info = rt.Util().getDeviceInfo(1)
        assert (status, info.devStatus, info.devData) == (OK, number, None)
        assert rt.Util().getResourceInfo(1) == (LOST, None)
        first, second = queried(capsys).split("QID 1\n")
        assert "\tStatus:Ready" in first
        assert second.splitlines()[0] == f"\tStatus:{shown}"
        assert second.splitlines()[-1].startswith("\tDev Link:")
        fault("")
        assert bad.load() == OK

    def test_any_ready_device_will_do_if_none_is_chosen(self, doubling, fault, monkeypatch):
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        fault("device-error=0")
        client = Client(doubling, qid=None)
        assert np.array_equal(client.run({"x": X})["y"], X * 2)
        assert rt.Util().getResourceInfo(1)[1].nspFree == 15

    def test_a_device_that_fails_between_load_and_activation(self, doubling, fault, capsys):
        p = program(doubling)
        assert p.load() == OK
        fault("device-error")
        assert p.activate() == LOST
        assert "Dev 0 activate failed status 300" in capsys.readouterr().err

    @pytest.mark.parametrize(("name", "what"), [("activate-nsp", "1 NSPs are"), ("activate-dram", "1 MB are")])
    def test_activation_is_refused(self, name, what, doubling, fault, capsys):
        """§8, and it can be tried again."""
        p = program(doubling)
        assert p.load() == OK
        fault(name)
        assert p.activate() == LOST
        err = capsys.readouterr().err
        assert f"Device 0 activate failed: Memory resource exhausted: {what} needed, 0 of" in err
        assert "Failed to Activate program" in err
        fault("")
        assert p.activate() == OK

    def test_a_missing_property(self, doubling, fault):
        """§2.4: attributes come and go between SDK versions."""
        fault("missing-property=dataPathTimeoutMs missing-property=devMapping")
        props = rt.QAicProgramProperties()
        assert not hasattr(props, "dataPathTimeoutMs")
        with pytest.raises(AttributeError, match="dataPathTimeoutMs"):
            props.dataPathTimeoutMs = 1
        assert props.submitNumRetries == 5
        assert np.array_equal(Client(doubling, props=props).run({"x": X})["y"], X * 2)


class TestInferences:
    @pytest.mark.parametrize(
        ("name", "status", "text"),
        [
            ("timeout", TIMED_OUT, "failed to receive response from NW: Connection timed out"),
            ("crc", rt.QStatus.QS_DATA_CRC_ERROR, "CRC error"),
        ],
    )
    def test_the_third_inference_fails_and_the_state_is_as_before(self, name, status, text, compiled, fault, capsys):
        """§4.6, §8: the fault is reported by the wait, at once."""
        client = Client(compiled(counter(), "-retained-state"))
        fault(f"{name}@3")
        client.run({"x": X, "total": X * 0})
        client.skip("total")
        client.run({})
        client.set({"y": np.full((2, 3), 9, np.float32)})
        assert client.status() == status
        assert text in capsys.readouterr().err
        assert (np.frombuffer(client.buffers[2], np.float32) == 9).all()
        assert np.array_equal(client.run({})["y"], X * 3)
        assert client.execobj.run() == OK

    def test_inferences_are_counted_from_the_activation(self, doubling, fault):
        fault("timeout@1")
        for _ in range(2):
            client = Client(doubling)
            assert [client.status(), client.status()] == [TIMED_OUT, OK]

    def test_the_synchronous_path_fails_as_well(self, doubling, fault):
        client = Client(doubling)
        assert client.execobj.setData(client.buffers, client.dims) == OK
        fault("timeout")
        assert client.execobj.run() == TIMED_OUT

    def test_a_lost_device_stays_in_error_until_the_fault_is_gone(self, doubling, fault, capsys):
        """§4.6: QS_DEV_ERROR; the activation is lost for good, the card comes back."""
        client = Client(doubling)
        fault("device-lost@2")
        client.set({"x": X})
        assert [client.status(), client.status(), client.status()] == [OK, LOST, LOST]
        assert "\tStatus:Error" in queried(capsys)
        assert program(doubling).load() == LOST
        fault("")
        assert "\tStatus:Ready" in queried(capsys)
        assert client.status() == LOST
        client.execobj = None
        assert client.program.deactivate() == OK
        assert rt.Util().getResourceInfo(0)[1].nspFree == 16
        assert client.program.activate() == OK
        assert np.array_equal(Client(doubling, program=client.program).run({"x": X})["y"], X * 2)

    def test_one_of_two_devices_is_lost(self, doubling, fault, monkeypatch):
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        zero, one = Client(doubling, qid=0), Client(doubling, qid=1)
        fault("device-lost=1")
        assert [zero.status(), one.status()] == [OK, LOST]
        assert rt.Util().getDeviceInfo(0)[1].devStatus == rt.QDevStatus.QDS_READY

    def test_of_several_devices_the_named_one_is_in_error(self, doubling, fault, monkeypatch, tmp_path):
        monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
        client = Client(altered(doubling, tmp_path / "both", num_devices=2), qid=None)
        fault("device-lost=1")
        assert client.status() == LOST
        states = [rt.Util().getDeviceInfo(qid)[1].devStatus for qid in (0, 1)]
        assert states == [rt.QDevStatus.QDS_READY, rt.QDevStatus.QDS_ERROR]

    def test_a_crash_ends_the_process(self, doubling, tmp_path):
        """As a fault in native code does: no exception, no clean-up."""
        code = (
            "import sys; from simulated_client import Client; c = Client(sys.argv[1])\n"
            "print(c.status().name, flush=True)\n"
            "try: c.status()\n"
            "finally: print('survived')\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code, doubling], capture_output=True, text=True, check=False, timeout=60,
            env={"QAIC_SIM_FAULT": "crash@2", "PYTHONPATH": f"{root}:{root / 'tests'}"}, cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "QS_SUCCESS\n")
