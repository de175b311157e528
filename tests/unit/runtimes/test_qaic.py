# SPDX-License-Identifier: Apache-2.0
"""Failures of cards and bindings: the message, what is released, and that the next run works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from simulated_graphs import altered

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ConfigError, RunError, Unavailable, ValidateError
from qeff_validate.protocols import Settings, runtime
from qeff_validate.runtimes import qaic_cards
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime
from qeff_validate.runtimes.qaic import QaicRuntime
from qeff_validate.sdk.locate import simulated
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2
from qeff_validate.sdk.simulated.bindings import qaicrt as base

X = np.arange(6, dtype=np.float32).reshape(2, 3)
FEEDS = {"x": X, "total": np.zeros_like(X)}


def on(rt: dict[str, Any], settings: Settings | None = None) -> QaicRuntime:
    """The runtime on bindings with some parts replaced."""
    bindings = SimpleNamespace(**{**vars(base), **rt}), QAicApi_pb2
    sdk: Any = SimpleNamespace(built_in=True, simulated=True, bindings=lambda: bindings, ready=simulated().ready)
    return QaicRuntime("sim", sdk, settings)


def free_cores(qid: int = 0) -> int:
    return int(base.Util().getResourceInfo(qid)[1].nspFree)


def recorded(calls: list[str], **changes: Callable[[Any], Any]) -> type[base.Program]:
    """A Program that records how it is released; ``changes`` replace a method's result."""

    class Program(base.Program):
        def deactivate(self) -> Any:
            return note("deactivate", changes.get("deactivate", super().deactivate))

        def unload(self) -> Any:
            return note("unload", changes.get("unload", super().unload))

    def note(name: str, method: Callable[..., Any]) -> Any:
        calls.append(name)
        status = method()
        calls[-1] += f" {status.name}"
        return status

    return Program


def refused() -> Any:
    return base.QStatus.QS_ERROR


def raises() -> Any:
    raise RuntimeError("native trouble")


# --- faults, and the next run ------------------------------------------------------------------------

FAULTS: dict[str, tuple[type[ValidateError], tuple[str, ...]]] = {
    "no-devices": (Unavailable, ("the simulated qaic-util lists no card", "is the driver loaded")),
    "device-error": (Unavailable, ("no card is Ready (QID 0 Error)", "reset it with qaic-util -s")),
    "device-initializing": (Unavailable, ("no card is Ready (QID 0 Initializing)", "wait for one")),
    "timeuot": (Unavailable, ("qaic-util -q failed with exit code 1", "unknown fault 'timeuot'")),
    "activate-nsp": (
        RunError,
        ("activate failed with QS_DEV_ERROR for", "the QPC needs 4 cores", "0 of 16 cores and 32768 of", "num_cores"),
    ),
    "activate-dram": (
        RunError,
        ("activate failed with QS_DEV_ERROR for", "1 MB for its file alone", "0 of 32768 MB free", "'Dram Free'"),
    ),
    "timeout@2": (RunError, ("waitForCompletion failed with QS_TIMEDOUT in run 2 for", "/sys/module/qaic/parameters")),
    "crc@2": (RunError, ("waitForCompletion failed with QS_DATA_CRC_ERROR in run 2 for", "run again", "PCIe")),
    "device-lost@2": (RunError, ("waitForCompletion failed with QS_DEV_ERROR in run 2 for", "the card was lost")),
}
SHOWN = {
    "timeuot": "unknown fault 'timeuot'",
    "activate-nsp": "  | Device 0 activate failed: Memory resource exhausted: 4 NSPs are needed, 0 of 16 are free",
    "timeout@2": "  | failed to receive response from NW: Connection timed out (device 0)",
}
"""Faults that are also tried in a child process, and their text in the runtime's own log, which is captured there."""


@pytest.mark.parametrize(
    ("name", "isolated"), [*((name, False) for name in FAULTS), *((name, True) for name in SHOWN)], ids=str
)
def test_fault_is_an_error_that_says_what_to_do_and_the_next_run_works(
    name: str, isolated: bool, counting: Artifact, fault: Callable[[str], object]
) -> None:
    plain = runtime("sim")
    adapter = IsolatedRuntime(plain, "sim", Settings()) if isolated else plain
    fault(name)
    kind, words = FAULTS[name]
    with pytest.raises(kind) as caught, adapter.open(counting) as session:  # noqa: PT012 (any of the three may fail)
        np.testing.assert_array_equal(session.run(FEEDS)["y"], X)
        session.run(FEEDS)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    if kind is RunError:
        assert f"{counting.path} on card 0" in text
    if name in SHOWN:
        assert (SHOWN[name] in text) is (isolated or name == "timeuot"), "in this process, the log goes to stderr"
    fault("")
    assert free_cores() == 16
    with adapter.open(counting) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["y"], X)
        np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)


def test_session_goes_on_after_a_run_that_failed(counting: Artifact, fault: Callable[[str], object]) -> None:
    with runtime("sim").open(counting) as session:
        session.run(FEEDS)
        fault("timeout")
        with pytest.raises(RunError, match="QS_TIMEDOUT in run 2"):
            session.run({"x": X})
        fault("")
        np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)


def test_missing_property_is_left_unset_and_the_run_works(counting: Artifact, fault: Callable[[str], object]) -> None:
    fault("missing-property=dataPathTimeoutMs")
    with runtime("sim").open(counting) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["y"], X)


# --- QPCs ----------------------------------------------------------------------------------------------


def test_qpc_that_is_cut_short_foreign_or_not_there_is_named_and_must_be_compiled_again(
    counting: Artifact, tmp_path: Path
) -> None:
    assert counting.path is not None
    whole = (counting.path / "programqpc.bin").read_bytes()
    contents = {"cut": whole[:-9], "real": (0x00A1CD7C).to_bytes(4, "little") + whole, "gone": None}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "programqpc.bin").write_bytes(content)
        with (
            pytest.raises(RunError, match=r"qaicrt\.Qpc failed for .* must be compiled again") as caught,
            runtime("sim").open(replace(counting, path=tmp_path / name)),
        ):
            pass
        assert f"{tmp_path / name} on card 0" in str(caught.value)


def test_descriptor_that_is_no_message_is_an_error_of_the_qpc(counting: Artifact) -> None:
    class Qpc(base.Qpc):
        def getIoDescriptor(self) -> Any:  # noqa: N802
            return base.QStatus.QS_SUCCESS, base.QBuffer(b"\xff\xff\xff")

    with pytest.raises(RunError, match=r"qaicrt\.Qpc failed for .*programqpc\.bin"), on({"Qpc": Qpc}).open(counting):
        pass


def test_qpc_for_another_generation_of_cards_is_refused_at_load(counting: Artifact, tmp_path: Path) -> None:
    other = altered(str(counting.path), tmp_path / "other", hw_version="ai200")
    words = r"load failed with QS_UNSUPPORTED for .*card 0 is Ready with 16 of 16 cores.*aic_hw_version"
    with pytest.raises(RunError, match=words), runtime("sim").open(replace(counting, path=Path(other))):
        pass


# --- several cards ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(counting: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A QPC for two cards without provenance; there are three cards."""
    monkeypatch.setenv("QAIC_SIM_DEVICES", "3")
    return Artifact("qpc", Path(altered(str(counting.path), tmp_path / "pair", num_devices=2)), "0" * 64)


def noted(artifact: Artifact, devices: int, **flags: str) -> Artifact:
    options = {"num_cores": 4, "num_devices": devices, "flags": flags}
    return replace(artifact, provenance={"key": {"compile": {"options": options}}})


@pytest.mark.parametrize(
    ("ids", "mapping", "taken"), [((2, 1), "2:1", (2, 1)), ((), "0:1", (0, 1))], ids=["named", "chosen"]
)
def test_qpc_for_two_cards_runs_on_both(
    ids: tuple[int, ...], mapping: str, taken: tuple[int, ...], pair: Artifact
) -> None:
    made = []

    class Program(base.Program):
        def __init__(self, context: Any, qid: Any, qpc: Any, props: Any) -> None:
            made.append((list(context.qids), qid, props.devMapping))
            super().__init__(context, qid, qpc, props)

    with on({"Program": Program}, Settings(device_ids=ids)).open(noted(pair, 2)) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["y"], X)
        assert [free_cores(qid) for qid in range(3)] == [12 if qid in taken else 16 for qid in range(3)]
    assert made == [(list(taken), None, mapping)]
    assert [free_cores(qid) for qid in range(3)] == [16] * 3


@pytest.mark.parametrize(
    ("devices", "ids", "words"),
    [
        (2, (0,), "is compiled for 2 cards, and --device-ids names 1 (0): name as many"),
        (1, (0, 1), "is compiled for 1 card, and --device-ids names 2 (0, 1): name as many"),
        (2, (1, 1), "--device-ids 1,1: a card is named twice"),
    ],
)
def test_wrong_number_of_ids_is_known_before_the_bindings_are_asked(
    devices: int, ids: tuple[int, ...], words: str, pair: Artifact
) -> None:
    adapter = on({"Context": lambda qids: pytest.fail("asked")}, Settings(device_ids=ids))
    with pytest.raises(ConfigError) as caught, adapter.open(noted(pair, devices)):
        pass
    assert words in str(caught.value)


def test_where_nothing_tells_the_number_load_does(pair: Artifact) -> None:
    given = noted(pair, 1, mdp_load_partition_config="two.json")
    words = r"load failed with QS_INVAL for .* on card 0.*--device-ids"
    with pytest.raises(RunError, match=words), runtime("sim", Settings(device_ids=(0,))).open(given):
        pass


def test_too_few_ready_cards(pair: Artifact, fault: Callable[[str], object]) -> None:
    fault("device-error=0 device-error=2")
    with (
        pytest.raises(Unavailable, match="is compiled for 2 cards, and 1 are Ready"),
        runtime("sim").open(noted(pair, 2)),
    ):
        pass


def test_bindings_without_a_mapping_run_on_one_card_only(pair: Artifact, fault: Callable[[str], object]) -> None:
    fault("missing-property=devMapping")
    with pytest.raises(RunError, match="no attribute devMapping"), runtime("sim").open(noted(pair, 2)):
        pass


def test_card_that_does_not_exist_is_named(counting: Artifact) -> None:
    words = r"qaicrt\.Context failed for .* on card 7: .*no device \[7\].*qaic-util -q lists the cards"
    with pytest.raises(RunError, match=words), runtime("sim", Settings(device_ids=(7,))).open(counting):
        pass


# --- release ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [refused, raises])
def test_failure_to_deactivate_is_an_error_after_a_good_run(way: Callable[[], Any], counting: Artifact) -> None:
    calls: list[str] = []
    with (
        pytest.raises(RunError, match=r"deactivate failed .*'Nsp Free' in qaic-util -q"),
        on({"Program": recorded(calls, deactivate=way)}).open(counting) as session,
    ):
        session.run(FEEDS)
    assert calls[0].startswith("deactivate")
    assert calls[1].startswith("unload"), "the rest is tried all the same"


@pytest.mark.parametrize("way", [refused, raises])
def test_failure_to_deactivate_does_not_hide_the_first_error(way: Callable[[], Any], counting: Artifact) -> None:
    calls: list[str] = []
    with (
        pytest.raises(RunError, match="input names do not match"),
        on({"Program": recorded(calls, deactivate=way)}).open(counting) as session,
    ):
        session.run({})
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["setData", "waitForCompletion", "getData"])
def test_method_that_raises_is_translated_and_its_traceback_keeps_no_card(method: str, counting: Artifact) -> None:
    class ExecObj(base.ExecObj):
        pass

    setattr(ExecObj, method, lambda self, *args: raises())
    calls: list[str] = []
    adapter = on({"ExecObj": ExecObj, "Program": recorded(calls)})
    with pytest.raises(RunError, match=f"{method} failed in run 1 for .*native trouble") as caught:  # noqa: SIM117
        with adapter.open(counting) as session:
            session.run(FEEDS)
    assert caught.value.__traceback__ is not None
    assert calls == ["deactivate QS_SUCCESS", "unload QS_SUCCESS"]
    assert free_cores() == 16


def test_what_was_taken_is_given_back_when_there_is_no_execution_object(counting: Artifact) -> None:
    calls: list[str] = []
    adapter = on({"ExecObj": lambda context, program: raises(), "Program": recorded(calls)})
    with pytest.raises(RunError, match=r"qaicrt\.ExecObj failed for .*native trouble"), adapter.open(counting):
        pass
    assert calls == ["deactivate QS_SUCCESS", "unload QS_SUCCESS"]


def test_what_was_not_activated_is_only_unloaded(counting: Artifact, fault: Callable[[str], object]) -> None:
    calls: list[str] = []
    fault("activate-nsp")
    with pytest.raises(RunError, match="activate failed"), on({"Program": recorded(calls)}).open(counting):
        pass
    assert calls == ["unload QS_SUCCESS"]


def test_query_that_fails_too_does_not_hide_the_error(counting: Artifact, fault: Callable[[str], object]) -> None:
    fault("activate-nsp")
    with (
        pytest.raises(RunError, match=r"activate failed with QS_DEV_ERROR .*card 0 gives no information"),
        on({"Util": raises}).open(counting),
    ):
        pass


def test_input_in_the_other_byte_order_is_the_same_input(counting: Artifact) -> None:
    with runtime("sim").open(counting) as session:
        swapped = {name: array.astype(">f4") for name, array in FEEDS.items()}
        np.testing.assert_array_equal(session.run(swapped)["y"], X)


# --- the lock on a card ------------------------------------------------------------------------------------


def free(folder: Path) -> list[int]:
    """Return which of the cards 1 and 3 are not locked."""
    qids = []
    for qid in (1, 3):
        try:
            with FileLock(folder / f"qeff-validate-card-{qid}.lock").acquire(timeout=0):
                qids.append(qid)
        except Timeout:
            pass
    return qids


def test_who_waits_for_a_card_says_so_and_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(qaic_cards.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(qaic_cards, "NOTICE_SECONDS", 0.01)
    other = qaic_cards.exclusive_cards([3, 1])
    other.__enter__()
    assert free(tmp_path) == []

    class Release(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            qaic_cards.LOG.removeHandler(self)
            other.__exit__(None, None, None)

    qaic_cards.LOG.addHandler(Release())
    with qaic_cards.exclusive_cards([3]):
        assert caplog.messages == ["waiting for card 3, which another process holds"]
        assert free(tmp_path) == [1]
    assert free(tmp_path) == [1, 3]


def test_two_programs_that_are_timed_in_turns_share_a_card_which_others_do_not_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qaic_cards.tempfile, "gettempdir", lambda: str(tmp_path))
    with qaic_cards.shared_cards(), qaic_cards.exclusive_cards([3]):
        with qaic_cards.exclusive_cards([1, 3]):
            assert free(tmp_path) == []
        assert free(tmp_path) == [1]
        with qaic_cards.exclusive_cards([1]):
            assert free(tmp_path) == []
    assert free(tmp_path) == [1, 3]
