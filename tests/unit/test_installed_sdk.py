# SPDX-License-Identifier: Apache-2.0
"""The runtime ``ai100`` on an installed SDK, which is a test double.

No card and no real SDK takes part: the prefix has the files of an installation, its compiler starts the simulated
one, and its bindings re-export the simulated ones with ``SIMULATED = False``. That drives every line that drives a
card (discovery, compiler command, import of the bindings, call sequence, release) and says nothing of a card's numbers.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import sdk_prefix
from processes import case, cli, config, copied_store, first_run, report_in, said, unfinished

from qeff_validate.errors import Unavailable
from qeff_validate.sdk import locate
from qeff_validate.sdk.locate import Sdk, installed, parse_cards

pytestmark = pytest.mark.integration

RECORDED = """\
import pathlib

from qeff_validate.sdk.simulated.bindings import qaicrt as base
from qeff_validate.sdk.simulated.bindings.qaicrt import *

SIMULATED = False


def note(text):
    with open(pathlib.Path(__file__).parents[3] / "calls", "a") as file:
        file.write(f"{text}\\n")


class Queue(base.Queue):
    def __init__(self, context, qid):
        note(f"queue on {qid}")
        super().__init__(context, qid)


class Program(base.Program):
    def deactivate(self):
        status = super().deactivate()
        note(f"deactivate {status.name}")
        return status

    def unload(self):
        status = super().unload()
        note(f"unload {status.name}")
        return status
"""
"""Bindings that note in the file ``calls`` of their prefix which card is used and how the program is released."""

REFUSES = (
    RECORDED
    + """
    def activate(self):
        return QStatus.QS_DEV_ERROR
"""
)

UNREADABLE = (
    RECORDED
    + """

class Qpc(base.Qpc):
    def getIoDescriptor(self):
        from qeff_validate.sdk.simulated.bindings import QAicApi_pb2

        status, buffer = super().getIoDescriptor()
        description = QAicApi_pb2.IoDesc.FromString(bytes(buffer))
        description.selected_set.bindings[0].type = 0xFF
        return status, QBuffer(description.SerializeToString())
"""
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    return first_run(tmp_path_factory.getbasetemp() / "first-run")


@pytest.fixture
def store(first, tmp_path: Path) -> Path:
    """A store of the test's own that holds all but the QPC."""
    return copied_store(tmp_path)


@pytest.fixture
def no_bindings() -> Iterator[None]:
    """Let a test import bindings as if it were the first to do so."""
    names = ("qaicrt", "QAicApi_pb2")
    before: dict[str, ModuleType] = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def run_on(prefix: Path, store: Path, folder: Path, *options: str):
    """Run the small case on the prefix's card; returns the process and the one result."""
    places = ("--sdk", prefix, "--store", store, "--report", folder / "report")
    chosen = ("--runtimes", "ai100", "--require", "ai100")
    done = cli("run", config(folder), *chosen, *places, *options, cwd=folder)
    (result,) = report_in(folder / "report")["results"]
    return done, result


def calls(prefix: Path) -> list[str]:
    return (prefix / "calls").read_text().splitlines()


# --- the whole way ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_case_passes_on_an_installed_sdk_and_is_not_called_simulated(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=RECORDED)
    done, result = run_on(prefix, store, tmp_path)
    assert done.returncode == 0, said(done)
    assert (result["runtime"], result["status"], result["precision"]) == ("ai100", "pass", "fp16")
    assert result["simulated"] is False
    assert result["coverage"] == {"planned": 4, "compared": 4}
    assert "Proved: ai100 agrees with Hugging Face within fp16 bounds on 4 rows: tiny." in done.stdout
    assert "imulat" not in done.stdout
    assert calls(prefix) == ["queue on 0", "deactivate QS_SUCCESS", "unload QS_SUCCESS"]
    environment = report_in(tmp_path / "report")["environment"]
    assert environment["sdk"] == {"prefix": str(prefix), "apps": "1.22.0.119", "platform": "1.22.0.119"}
    assert [(card["qid"], card["Status"]) for card in environment["cards"]] == [(0, "Ready")]


@pytest.mark.slow
def test_environment_variable_names_the_prefix_too(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "no-sdk")  # where `environ` points QEFF_VALIDATE_SDK at
    options = ("--store", store, "--report", tmp_path / "report", "--runtimes", "ai100")
    done = cli("run", config(tmp_path), *options, cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert report_in(tmp_path / "report")["environment"]["sdk"]["prefix"] == str(prefix)


@pytest.mark.slow
def test_compiler_gets_model_precision_cores_and_specializations_and_no_flag_of_the_old_one(
    store: Path, tmp_path: Path
) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk")
    sdk_prefix.set_compiler(prefix, "    sys.exit(1)", name="qaic-exec")
    done, _ = run_on(prefix, store, tmp_path)
    assert done.returncode == 0, said(done)
    argv = sdk_prefix.ran(prefix)["argv"]
    assert argv[0] == str(prefix / "exec" / "qaic-compile"), "qaic-compile comes before qaic-exec"
    assert {"-aic-hw", "-aic-hw-version=ai100", "-aic-num-cores=16", "-convert-to-fp16"} <= set(argv)
    starts = [item.partition("=")[0] for item in argv]
    assert {"-m", "-network-specialization-config", "-aic-binary-dir"} <= set(starts)
    assert "-compile-only" not in argv


@pytest.mark.slow
def test_old_compiler_is_told_to_compile_only_and_the_hardware_by_number(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", name="qaic-exec")
    done, _ = run_on(prefix, store, tmp_path)
    assert done.returncode == 0, said(done)
    argv = sdk_prefix.ran(prefix)["argv"]
    assert argv[0] == str(prefix / "exec" / "qaic-exec")
    assert {"-aic-hw", "-compile-only", "-aic-hw-version=2.0"} <= set(argv)
    assert "-aic-hw-version=ai100" not in argv


@pytest.mark.slow
@pytest.mark.parametrize(("options", "qid"), [((), 1), (("--device-ids", "0"), 0)])
def test_ready_card_with_most_free_cores_is_used_unless_another_is_named(
    options: tuple[str, ...], qid: int, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_SIM_DEVICES", "3")
    query = sdk_prefix.cards("Ready", "Ready", "Error", free=(4, 14, 16))
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=RECORDED, query=query)
    done, _ = run_on(prefix, store, tmp_path, *options)
    assert done.returncode == 0, said(done)
    assert calls(prefix)[0] == f"queue on {qid}"


@pytest.mark.slow
def test_cards_are_divided_among_the_processes_of_a_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=RECORDED, query=sdk_prefix.cards("Ready", "Ready"))
    extra = "exporter: torchscript\ntolerance: table\nseed: {}"
    path = config(tmp_path, *(case(name, extra.format(seed)) for seed, name in enumerate("ab", start=5)))
    fixed = ("--sdk", prefix, "--store", store, "--report", tmp_path / "report")
    done = cli("run", path, "--runtimes", "ai100", "--jobs", "2", *fixed, cwd=tmp_path)
    assert done.returncode == 0, said(done)
    assert {call for call in calls(prefix) if call.startswith("queue")} == {"queue on 0", "queue on 1"}


# --- simulated things are refused ------------------------------------------------------------------


@pytest.mark.slow
def test_bindings_that_say_they_are_simulated_are_refused(store: Path, tmp_path: Path) -> None:
    honest = "from qeff_validate.sdk.simulated.bindings.qaicrt import *\n"
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=honest)
    done, result = run_on(prefix, store, tmp_path)
    assert done.returncode == 3
    assert (result["status"], result["metrics"]) == ("error", [])
    assert f"{prefix}/dev/lib/{platform.machine()}/qaicrt.py says that it is simulated" in result["reason"]
    assert "use sim" in result["reason"]


def test_prefix_whose_version_file_is_marked_simulated_is_refused(tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", mark="<simulated>true</simulated>")
    done, result = run_on(prefix, tmp_path / "store", tmp_path)
    assert done.returncode == 3
    assert result["status"] == "not_run"
    assert f"the SDK at {prefix} is simulated" in result["reason"]
    assert "ask for the runtime sim" in result["reason"]
    assert sdk_prefix.ran(prefix)["argv"] == [], "nothing may be compiled for it"


def test_unmarked_prefix_is_usable(tmp_path: Path) -> None:
    """The counterpart: what is refused above is refused for the mark alone."""
    assert installed(str(sdk_prefix.prefix(tmp_path))).why_not() is None


# --- what may be missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "folder"), [("qaicrt", f"dev/lib/{platform.machine()}"), ("QAicApi_pb2", "dev/python")]
)
def test_missing_bindings_are_named_with_their_folder_and_the_python_version(
    missing: str, folder: str, tmp_path: Path, no_bindings: None
) -> None:
    parts = {"qaicrt": "qaicrt", "QAicApi_pb2": "messages"}
    prefix = sdk_prefix.prefix(tmp_path, **{parts[missing]: None})
    with pytest.raises(Unavailable) as caught:
        installed(str(prefix)).bindings()
    text = str(caught.value)
    assert f"cannot import {missing} from {prefix / folder} with Python {platform.python_version()}" in text
    assert "LD_LIBRARY_PATH" in text


def test_missing_library_folder_is_known_before_anything_is_imported(tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path, qaicrt=None)
    folder = prefix / "dev" / "lib" / platform.machine()
    folder.rmdir()
    assert installed(str(prefix)).why_not() == (
        f"no qaicrt at {folder}: install the Platform SDK for {platform.machine()}"
    )


@pytest.mark.slow
def test_missing_compiler_is_an_error_that_names_both_and_the_apps_sdk(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk")
    (prefix / "exec" / "qaic-compile").chmod(0o644)
    done, result = run_on(prefix, store, tmp_path)
    assert done.returncode == 3
    assert (result["status"], result["stage"]) == ("error", "compile")
    assert f"{prefix}/exec holds neither qaic-compile nor qaic-exec" in result["reason"]
    assert "install the Apps SDK" in result["reason"]
    assert unfinished(store) == []


def test_versions_are_those_of_the_version_files_and_none_where_one_is_missing(tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path)
    (prefix / "versions" / "platform.xml").unlink()
    assert installed(str(prefix)).versions() == {"apps": "1.22.0.119", "platform": None}


# --- cards -----------------------------------------------------------------------------------------


def test_cards_are_read_from_the_sample_format() -> None:
    text = sdk_prefix.cards("Ready", "Initializing", "Error", free=(14, 0, 16))
    cards = parse_cards(text)
    assert [(card.qid, card.values["Status"], card.ready) for card in cards] == [
        (0, "Ready", True),
        (1, "Initializing", False),
        (2, "Error", False),
    ]
    assert [card.free_cores for card in cards] == [14, 0, 16]
    assert cards[0].values["PCI Address"] == "0000:36:00.0"
    assert cards[0].values["Dev Link"] == "/dev/accel/accel0"
    assert "LRT IMAGE_VARIANT" not in cards[0].values


@pytest.mark.parametrize("line", ["", "\tNsp Free:\n", "\tNsp Free:unknown\n"])
def test_card_that_prints_no_count_of_free_cores_has_none(line: str) -> None:
    (card,) = parse_cards(f"QID 3\n\tStatus:Error\n\tMHI ID:3\n{line}")
    assert (card.qid, card.ready, card.free_cores) == (3, False, 0)


@pytest.mark.parametrize("text", ["", "Number of devices queried: 0\n", "no permission\n", "QID x\n\tStatus:Ready\n"])
def test_output_without_a_record_lists_no_card(text: str) -> None:
    assert parse_cards(text) == []


def test_cards_that_are_not_ready_are_the_reason_not_to_run(tmp_path: Path) -> None:
    query = sdk_prefix.cards("Error", "Initializing")
    prefix = sdk_prefix.prefix(tmp_path / "sdk", query=query)
    done, result = run_on(prefix, tmp_path / "store", tmp_path)
    assert done.returncode == 3
    assert result["status"] == "not_run"
    assert "no card is Ready (QID 0 Error, QID 1 Initializing)" in result["reason"]
    assert "group qaic" in result["reason"]


QUERIES = {
    "fails": (f"cat <<'EOF'\n{sdk_prefix.cards('Ready')}EOF\necho no driver >&2\nexit 7\n", "exit code 7: no driver"),
    "fails silently": ("exit 1\n", "exit code 1: it printed nothing"),
    "prints nothing": ("exit 0\n", "lists no card: is one fitted"),
    "hangs": ("exec sleep 600\n", "did not answer within 0.2 s"),
}


@pytest.mark.parametrize("what", QUERIES)
def test_query_tool_that_misbehaves_means_no_card_and_says_why(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = sdk_prefix.prefix(tmp_path)
    assert len(Sdk(prefix).cards()) == 1
    monkeypatch.setattr(locate, "QUERY_SECONDS", 0.2 if what == "hangs" else 30)
    body, words = QUERIES[what]
    sdk_prefix.set_query(prefix, body)
    assert Sdk(prefix).cards() == []
    reason = str(Sdk(prefix).why_not())
    assert reason.startswith(f"{prefix}/tools/qaic-util ")
    assert words in reason


def test_missing_query_tool_means_no_card_and_is_named(tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path)
    (prefix / "tools" / "qaic-util").unlink()
    assert Sdk(prefix).cards() == []
    assert str(Sdk(prefix).why_not()) == (
        f"{prefix}/tools/qaic-util cannot be started (No such file or directory): install the Platform SDK"
    )


# --- import of the bindings ------------------------------------------------------------------------


def test_qaicrt_is_imported_before_the_folder_of_the_messages_is_on_the_path(tmp_path: Path, no_bindings: None) -> None:
    seen = "import sys\n\nPATH = list(sys.path)\n"
    prefix = sdk_prefix.prefix(tmp_path, qaicrt=sdk_prefix.QAICRT + seen, messages=sdk_prefix.MESSAGES + seen)
    (prefix / "dev" / "python" / "qaicrt.py").write_text("raise SystemError('the wrong one')\n")
    before = list(sys.path)
    qaicrt, messages = installed(str(prefix)).bindings()
    assert str(prefix / "dev" / "python") not in qaicrt.PATH
    assert messages.PATH[0] == str(prefix / "dev" / "python")
    assert Path(qaicrt.__file__).parent == prefix / "dev" / "lib" / platform.machine()
    assert sys.path == before


def test_bindings_of_another_prefix_in_the_same_process_are_refused(tmp_path: Path, no_bindings: None) -> None:
    one, two = (str(sdk_prefix.prefix(tmp_path / name)) for name in ("one", "two"))
    installed(one).bindings()
    with pytest.raises(Unavailable, match=r"qaicrt is already loaded from .*/one/.*: use another process"):
        installed(two).bindings()


# --- release ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_refused_activation_is_an_error_with_advice_and_the_program_is_released(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=REFUSES)
    done, result = run_on(prefix, store, tmp_path)
    assert done.returncode == 3
    assert (result["status"], result["stage"], result["metrics"]) == ("error", "load", [])
    assert "activate failed with QS_DEV_ERROR" in result["reason"]
    for advice in ("too few free cores", "'Nsp Free'", "qaic-util -q", "fewer num_cores"):
        assert advice in result["reason"]
    assert calls(prefix)[-1] == "unload QS_SUCCESS"


@pytest.mark.slow
def test_descriptor_that_cannot_be_read_is_an_error_and_nothing_stays_on_the_card(store: Path, tmp_path: Path) -> None:
    prefix = sdk_prefix.prefix(tmp_path / "sdk", qaicrt=UNREADABLE)
    done, result = run_on(prefix, store, tmp_path)
    assert done.returncode == 3
    assert "'input_ids' has data type number 255" in result["reason"]
    assert "deactivate QS_INVAL" not in calls(prefix), "it was still active, and an ExecObj held it"
