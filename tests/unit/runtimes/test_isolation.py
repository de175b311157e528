# SPDX-License-Identifier: Apache-2.0
"""A runtime in a child process: equal outputs, equal errors, and an error for every crash and hang."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdk_prefix
from processes import alive, kill_leftovers, until
from simulated_graphs import CTX, TABLE, WIDTH, Cache

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ConfigError, RunError, Unavailable, ValidateError
from qeff_validate.protocols import Session, Settings, capabilities, runtime
from qeff_validate.runtimes.isolation import parent, worker
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime

X = np.arange(6, dtype=np.float32).reshape(2, 3)
FEEDS = {"x": X, "total": np.zeros_like(X)}

LOUD = (
    sdk_prefix.QAICRT
    + """
import logging, os, pathlib, signal, threading
from qeff_validate.sdk.simulated.bindings import qaicrt as base

HERE = pathlib.Path(__file__).parent


class Program(base.Program):
    def activate(self):
        logging.getLogger("qeff_validate.double").warning("waiting for something")
        os.write(2, b"activating\\n")
        return super().activate()

    def deactivate(self):
        if (HERE / "hang-at-exit").exists():
            threading.Thread(target=signal.pause).start()
        return super().deactivate()


class ExecObj(base.ExecObj):
    def setData(self, *args):
        os.write(2, b"x" * 79 + b"\\n" if not (HERE / "loud").exists() else (b"x" * 79 + b"\\n") * 8000)
        return super().setData(*args)

    def waitForCompletion(self):
        if (HERE / "hang").exists():
            os.write(2, b"still waiting\\n")
            signal.pause()
        status = super().waitForCompletion()
        if (HERE / "refuse").exists():
            os.write(2, b"firmware says no\\n")
            return base.QStatus.QS_ERROR
        return status
"""
)
"""Bindings that write to the file descriptor of stderr, as native code does; files beside them control them."""


def sim(settings: Settings | None = None) -> IsolatedRuntime:
    settings = settings or Settings()
    return IsolatedRuntime(runtime("sim", settings), "sim", settings)


class Double:
    """The runtime ai100 in a child, on `LOUD`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = next(sdk_prefix.prefix(folder / "sdk", qaicrt=LOUD).glob("dev/lib/*"))
        made = Settings(sdk=str(folder / "sdk"), **settings)
        self.runtime = IsolatedRuntime(runtime("ai100", made), "ai100", made)

    def does(self, *what: str) -> None:
        for name in what:
            (self.folder / name).touch()

    def stops(self, what: str) -> None:
        (self.folder / what).unlink()


@pytest.fixture
def double(tmp_path: Path) -> Double:
    return Double(tmp_path)


def process(session: Session) -> Any:
    assert isinstance(session, parent.IsolatedSession)
    return session._child.process


# --- the same answers ------------------------------------------------------------------------------------


def test_retained_state_lives_in_the_child_as_it_does_here(decoder: Artifact) -> None:
    """Prefill with padding, two decode steps, state read back, state replaced, reset: numpy is the oracle."""
    mine, state = Cache(), np.ones((1, CTX, WIDTH), np.float32)
    prompt = {"input_ids": np.array([[3, 1, 4, 9]]), "position_ids": np.array([[0, 1, 2, -1]])}
    with sim().open(decoder) as there, runtime("sim").open(decoder) as here:
        assert (there.inputs, there.outputs, there.shapes) == (here.inputs, here.outputs, here.shapes)

        def both(feeds: dict[str, np.ndarray], *fetch: str) -> dict[str, np.ndarray]:
            found = [dict(session.run(feeds, fetch=list(fetch))) for session in (there, here)]
            assert list(found[0]) == list(found[1]) == list(fetch)
            for name in fetch:
                np.testing.assert_array_equal(*[one[name] for one in found], strict=True)
            return found[0]

        for _ in range(2):
            mine.slots[:] = np.nan
            wanted = mine.step(prompt["input_ids"], prompt["position_ids"])
            np.testing.assert_array_equal(both(prompt, "logits")["logits"][:, :3], wanted[:, :3])
            for slot, token in ((3, 7), (4, 2)):
                step = {"input_ids": np.array([[token]]), "position_ids": np.array([[slot]])}
                wanted = mine.step(step["input_ids"], step["position_ids"])
                found = both(step, "past_key.0_RetainedState", "logits")
                np.testing.assert_array_equal(found["logits"], wanted)
                np.testing.assert_array_equal(found["past_key.0_RetainedState"], mine.slots)
            there.reset()
            here.reset()
        step = {"input_ids": np.array([[5]]), "position_ids": np.array([[1]])}
        np.testing.assert_array_equal(both({**step, "past_key.0": state}, "logits")["logits"], [[2 * TABLE[5] + 1]])


def test_arrays_cross_in_any_memory_order_and_results_are_our_own(counting: Artifact) -> None:
    with sim().open(counting) as session:
        for array in (np.asfortranarray(X), X.astype(">f4"), np.stack([X, X], -1)[..., 0]):
            outputs = session.run({"x": array, "total": np.zeros_like(X)})["y"]
            np.testing.assert_array_equal(outputs, X)
            outputs[:] = 7
        np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)
        assert session.run({"x": X}, fetch=[]) == {}


def test_name_kind_probe_and_capabilities_are_those_of_the_runtime() -> None:
    adapter, made = runtime("sim"), sim()
    assert (made.name, made.kind, made.probe()) == (adapter.name, adapter.kind, adapter.probe())
    assert capabilities(made) == capabilities(adapter)
    assert capabilities(made).simulated


# --- the same errors -------------------------------------------------------------------------------------


def test_errors_keep_their_class_and_text_and_the_session_goes_on(counting: Artifact) -> None:
    wrong: list[tuple[dict[str, Any], list[str] | None]] = [
        ({}, None), ({"x": X.astype(np.float64)}, None), ({"x": X[:1]}, None), ({"x": [[1.0]]}, None),
        ({"x": X, "z": X}, None), ({"x": X}, ["yy"]),
    ]  # fmt: skip
    with sim().open(counting) as there, runtime("sim").open(counting) as here:
        for feeds, fetch in wrong:
            texts = []
            for session in (there, here):
                with pytest.raises(RunError) as caught:
                    session.run(feeds, fetch=fetch)
                texts.append(str(caught.value))
            assert texts[0] == texts[1]
        np.testing.assert_array_equal(there.run(FEEDS)["y"], X)
    with pytest.raises(ConfigError, match="--device-ids names 2"), sim(Settings(device_ids=(0, 1))).open(counting):
        pass
    missing = Settings(sdk="/nowhere")
    with (
        pytest.raises(Unavailable, match="cannot import qaicrt from /nowhere"),
        IsolatedRuntime(runtime("ai100", missing), "ai100", missing).open(counting),
    ):
        pass
    with pytest.raises(RunError, match="this session is closed"):
        there.run(FEEDS)


def test_error_of_a_plug_in_is_told_as_the_nearest_class_of_ours_and_any_other_with_its_place() -> None:
    class Mine(Unavailable):
        pass

    assert worker._error(Mine("no licence")) == {"error": "Unavailable", "text": "no licence"}
    try:
        raise KeyError("x")
    except KeyError as exc:
        reply = worker._error(exc)
    assert reply["error"] == "RunError"
    assert reply["text"].startswith("unexpected KeyError: 'x'\n")
    assert 'raise KeyError("x")' in reply["text"]


def test_what_native_code_wrote_is_part_of_the_error_and_only_for_that_request(
    double: Double, counting: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with double.runtime.open(counting) as session:
        assert caplog.messages == ["ai100: waiting for something"], "what the child's side logs is logged here"
        double.does("refuse")
        with pytest.raises(RunError, match="waitForCompletion failed with QS_ERROR in run 1") as caught:
            session.run(FEEDS)
        shown = str(caught.value).partition("\n  its process printed:\n")[2]
        assert shown.splitlines() == [f"  | {'x' * 79}", "  | firmware says no"]
        double.does("loud")
        for _ in range(4):
            with pytest.raises(RunError, match="firmware says no") as caught:
                session.run(FEEDS)
            assert len(str(caught.value).splitlines()) <= parent.TAIL_LINES + 2
        assert os.fstat(session._child._output.fileno()).st_size < 2 * parent.LOG_BYTES  # type: ignore[attr-defined]


# --- crashes ---------------------------------------------------------------------------------------------


def test_crash_is_an_error_that_names_signal_run_and_last_output_and_the_next_session_works(
    double: Double, counting: Artifact
) -> None:
    with pytest.raises(RunError) as caught, double.runtime.open(counting) as session:  # noqa: PT012 (killed between)
        session.run(FEEDS)
        os.kill(process(session).pid, signal.SIGSEGV)
        until(lambda: not alive(process(session).pid), "the child is dead")
        with pytest.raises(RunError):
            session.run(FEEDS)
        session.run(FEEDS)
    text = str(caught.value)
    assert f"the process of ai100 was killed by SIGSEGV in run 3 of {counting.path}" in text
    assert "qaic-util -q shows the card's state" in text
    assert text.endswith(f"  | activating\n  | {'x' * 79}")
    with double.runtime.open(counting) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["y"], X)


def test_crash_while_opening_is_an_error(counting: Artifact, tmp_path: Path) -> None:
    made = Double(tmp_path)
    (made.folder / "qaicrt.py").write_text("import os\nos.write(2, b'bad firmware')\nos._exit(7)\n")
    words = r"the process of ai100 ended with exit code 7 while opening (?s:.*)\| bad firmware"
    with pytest.raises(RunError, match=words), made.runtime.open(counting):
        pass


# --- hangs -----------------------------------------------------------------------------------------------


def test_run_that_hangs_is_ended(counting: Artifact, tmp_path: Path) -> None:
    double = Double(tmp_path, run_timeout_s=0.3)
    with pytest.raises(RunError) as caught, double.runtime.open(counting) as session:  # noqa: PT012 (killed between)
        double.does("hang")
        try:
            session.run(FEEDS)
        finally:
            assert process(session).returncode == -signal.SIGKILL, "and not later, when the session is left"
    assert f"ai100 did not answer for 0.3 s in run 1 of {counting.path}, so its process was killed" in str(caught.value)
    assert str(caught.value).endswith("  | still waiting")
    double.stops("hang")
    with double.runtime.open(counting) as session:
        pass


def test_opening_that_takes_too_long_is_ended(counting: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "OPEN_SECONDS", 0.01)
    with pytest.raises(RunError, match=r"did not answer for 0\.01 s while opening"), sim().open(counting):
        pass


def test_process_that_does_not_end_is_killed(
    double: Double, counting: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.does("hang-at-exit")
    monkeypatch.setattr(parent, "GRACE_SECONDS", 0.2)
    with double.runtime.open(counting) as session:
        pid = process(session).pid
    assert process(session).returncode == -signal.SIGKILL
    assert not alive(pid)


def test_error_of_the_caller_ends_the_process_in_good_order_and_an_interruption_at_once(counting: Artifact) -> None:
    for what, code in ((ValueError, 0), (KeyboardInterrupt, -signal.SIGKILL)):
        with pytest.raises(what), sim().open(counting) as session:
            raise what
        assert process(session).returncode == code


def test_process_whose_parent_is_gone_releases_and_ends(counting: Artifact) -> None:
    with pytest.raises(RunError), sim().open(counting) as session:  # noqa: PT012 (what a dead parent's end does)
        pid = process(session).pid
        try:
            session._child._channel.close()  # type: ignore[attr-defined]
            process(session).wait(60)
            assert process(session).returncode == 0
        finally:
            kill_leftovers([pid])
        session.run(FEEDS)


# --- one process for several files -----------------------------------------------------------------------


def test_files_opened_one_after_another_share_a_process_until_one_fails(tmp_path: Path) -> None:
    import onnx

    text = '<ir_version: 8, opset_import: ["" : 18]> double (float[2, 3] x) => (float[2, 3] y) { y = Add(x, x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "double.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    double, broken = (
        Artifact("onnx", tmp_path / f"{name}.onnx", name, untrusted=True) for name in ("double", "broken")
    )

    def opened(artifact: Artifact, name: str = "ort") -> Any:
        return IsolatedRuntime(runtime(name, Settings()), name, Settings(), shared).open(artifact)

    with parent.SharedChild() as shared:
        with opened(double) as session:
            np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)
            first = process(session)
            with opened(double) as beside:
                assert process(beside).pid != first.pid
        with opened(double) as session:
            assert process(session) is first
            np.testing.assert_array_equal(session.run({"x": X + 1})["y"], 2 * X + 2)
        with pytest.raises(ValidateError), opened(broken):
            pass
        assert not alive(first.pid)
        with opened(double) as session:
            second = process(session)
            np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)
    assert not alive(second.pid)
