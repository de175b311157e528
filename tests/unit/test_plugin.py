# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin from outside: suites, options, selection, skips, failures, and the report, under xdist too."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psutil
import pytest
from processes import case, config, first_run, forked_pytest

import qeff_validate.engine  # pytester would unload it after each run in this process, and numpy with it
import qeff_validate.plugin
from qeff_validate.pipeline.executors import local_processes

pytestmark = pytest.mark.integration

SUITES = ("--pyargs", "qeff_validate.suites.test_embedding")
ALL_SUITES = ("--pyargs", "qeff_validate.suites")
TEST = "qeff_validate.suites.test_embedding::test_embed_model_pytorch_vs_onnx_vs_ai100"
NAME = "random-bert-mean"
FRAMEWORKS = ("torch", "transformers", "peft", "onnx", "onnxruntime", "sentence_transformers", "qaicrt")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory):
    """The small case is in the store, so that the suites need not build it."""
    return first_run(tmp_path_factory.getbasetemp() / "first-run")


@pytest.fixture(autouse=True)
def no_sdk(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No SDK of this machine, whichever there may be."""
    prefix = pytester.path / "no-sdk"
    monkeypatch.setenv("QEFF_VALIDATE_SDK", str(prefix))
    monkeypatch.setenv("COLUMNS", "300")
    return prefix


def own(pytester: pytest.Pytester, extra: str = "", name: str = NAME) -> str:
    """Write a config with the small case and return its name."""
    return config(pytester.path, case(name, extra)).name


def suites(pytester: pytest.Pytester, *arguments: str, which: tuple[str, str] = SUITES) -> pytest.RunResult:
    """Run suites in a process of their own; workers of xdist import all themselves."""
    run = pytester.runpytest_subprocess if "-n" in arguments else functools.partial(forked_pytest, pytester)
    return run("-p", "no:cacheprovider", "-rs", *arguments, *which, timeout=240)


def quick(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run the suites in this process, where no case gets as far as a framework."""
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs", *arguments, *SUITES)


def report(pytester: pytest.Pytester, folder: str = "out") -> dict[str, Any]:
    assert sorted(path.name for path in (pytester.path / folder).iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    made: dict[str, Any] = json.loads((pytester.path / folder / "report.json").read_text(encoding="utf-8"))
    return made


def statuses(plain: dict[str, Any]) -> dict[str, str]:
    return {f"{result['case']}-{result['runtime']}": result["status"] for result in plain["results"]}


def collected(result: pytest.RunResult) -> list[str]:
    """The ids in brackets of what ``--collect-only -q`` lists."""
    return [found[1] for line in result.outlines if (found := re.search(r"\[(.+)\]$", line))]


# --- collection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ((), ["one-torch", "one-ort", "one-sim", "two-ort"]),
        (("--qv-runtimes", "sim, ort"), ["one-sim", "one-ort", "two-sim", "two-ort"]),
        (("--qv-require=ai100",), ["one-torch", "one-ort", "one-sim", "one-ai100", "two-ort", "two-ai100"]),
        (("-m", "ai100"), ["one-ai100", "two-ai100"]),
        (("-m", "ai100", "--qv-runtimes", "ort"), []),
        (("-m", "not ai100"), ["one-torch", "one-ort", "one-sim", "two-ort"]),
    ],
)
def test_ids_are_case_and_runtime_of_option_or_case_and_the_card_if_it_is_asked_for(
    arguments: tuple[str, ...], ids: list[str], pytester: pytest.Pytester
) -> None:
    path = config(pytester.path, case("one"), case("two", "runtimes: [ort]"))
    assert collected(quick(pytester, "--collect-only", "-q", *arguments, "--qv-config", path.name)) == ids


def test_id_of_a_test_can_be_pasted_back(pytester: pytest.Pytester) -> None:
    shown = quick(pytester, "--collect-only", "-q", "--qv-config", own(pytester), "--qv-runtimes", "ort")
    (pasted,) = [line for line in shown.outlines if "[" in line]
    assert pasted == f"{TEST}[{NAME}-ort]"
    pytester.makeini("[pytest]\nqv_config = cases.yaml\naddopts = --pyargs\ntestpaths = qeff_validate.suites\n")
    options = ("-p", "no:cacheprovider", "--collect-only", "-q", "-c", "tox.ini")
    assert [line for line in pytester.runpytest_inprocess(*options, pasted).outlines if "[" in line] == [pasted]
    assert len(collected(pytester.runpytest_inprocess(*options))) > 1, "without an argument the ini file's suites"


@pytest.mark.parametrize(
    ("mark", "selected"),
    [
        ("ai100", ["one-ai100", "two-ai100"]),
        ("sim", ["one-sim", "two-sim"]),
        ("embedding and slow", ["two-torch", "two-ort", "two-sim"]),
        ("peft", []),
    ],
)
def test_marks_of_runtime_suite_and_case_select(mark: str, selected: list[str], pytester: pytest.Pytester) -> None:
    path = config(pytester.path, case("one"), case("two", "marks: [slow]"))
    result = quick(pytester, "--collect-only", "-q", "--strict-markers", "-m", mark, "--qv-config", path.name)
    assert collected(result) == selected


def test_markers_are_registered_where_cases_are_named_and_nowhere_else(pytester: pytest.Pytester) -> None:
    marks = ("ai100", "sim", "ort", "torch", "embedding", "peft", "slow", "perf")
    lines = "\n".join(f"@pytest.mark.{mark}" for mark in marks)
    pytester.makepyfile(f"import pytest\n\n{lines}\ndef test_marked():\n    pass\n")
    result = pytester.runpytest_subprocess("--strict-markers", "-W", "error", "--qv-config", own(pytester))
    result.assert_outcomes(passed=1)
    unrelated = pytester.runpytest_subprocess("--strict-markers")
    unrelated.assert_outcomes(errors=1)
    assert "'ai100' not found in `markers` configuration option" in unrelated.stdout.str()


def test_unknown_marker_in_a_case_is_an_error_under_strict_markers(pytester: pytest.Pytester) -> None:
    result = quick(pytester, "--strict-markers", "--qv-config", own(pytester, "marks: [slwo]"))
    assert result.ret != pytest.ExitCode.OK
    assert "marks: 'slwo' is not registered, and --strict-markers is on. Did you mean 'slow'?" in result.stderr.str()


def test_collection_loads_no_framework(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        f"""
        import sys

        def pytest_collection_finish(session):
            loaded = [name for name in {FRAMEWORKS!r} if name in sys.modules]
            print(f"collected {{len(session.items)}}, loaded {{loaded}}")
        """
    )
    result = pytester.runpytest_subprocess("--collect-only", "-q", "--qv-config", own(pytester), ".", *SUITES)
    result.stdout.fnmatch_lines(["collected 3, loaded [[]]"])


def test_plugin_can_be_switched_off_for_unrelated_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_plugin_is_absent(request):
            assert not request.config.pluginmanager.has_plugin("qeff_validate")
            assert "qeff_validate.plugin" not in sys.modules
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:qeff_validate")
    result.assert_outcomes(passed=1)


def test_plugin_stays_silent_and_loads_no_engine_for_unrelated_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_unrelated():
            assert "qeff_validate.plugin" in sys.modules
            for name in ("qeff_validate.engine", "pydantic", "numpy", "yaml"):
                assert name not in sys.modules, name
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    assert "qeff_validate:" not in result.stdout.str()
    assert "rows compared" not in result.stdout.str()


# --- wrong usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_config_with_a_typo_is_a_usage_error_with_a_suggestion(
    workers: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    result = suites(pytester, *workers, "--qv-config", own(pytester, "optoins: {pooling: max}"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    wanted = f"cases[0].optoins (case '{NAME}'): unknown key. Did you mean 'options'?"
    assert [line for line in result.errlines if wanted in line and line.startswith("ERROR: ")]
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize("option", ["--qv-runtimes", "--qv-require"])
def test_unknown_runtime_is_a_usage_error_with_a_suggestion(option: str, pytester: pytest.Pytester) -> None:
    result = quick(pytester, option, "ort,ai10")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: no runtime is called 'ai10'. Did you mean 'ai100'?"])


@pytest.mark.parametrize("value", ["inf", "soon"])
def test_time_limit_that_is_none_is_a_usage_error(value: str, pytester: pytest.Pytester) -> None:
    result = quick(pytester, f"--qv-run-timeout={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--qv-run-timeout: wanted seconds, got '{value}'*"])


def test_unknown_way_to_explain_is_a_usage_error(pytester: pytest.Pytester) -> None:
    result = quick(pytester, "--qv-explain=always")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--qv-explain: wanted off, auto, full, got 'always'"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--qv-jobs=many",), "*--qv-jobs: 'many' is no number of processes: give 1 to 1024, or auto"),
        (("--qv-jobs=2", "-n2"), "*--qv-jobs and --qv-cluster run stages of cases side by side: leave out -n"),
    ],
)
def test_wrong_number_of_processes_is_a_usage_error(
    options: tuple[str, ...], said: str, pytester: pytest.Pytester
) -> None:
    result = quick(pytester, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([said])


def test_missing_config_is_a_usage_error_that_names_it(pytester: pytest.Pytester) -> None:
    result = quick(pytester, "--qv-config", "nowhere.yaml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: cannot read config {pytester.path}/nowhere.yaml: *"])


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), ("-x",)])
def test_processes_make_the_results_that_tests_wait_for_and_end_with_the_session(
    stop: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_processes, "WORKER", "stub_worker")
    text = "".join(case(name) for name in ("SIGKILL", "good", "better"))
    path = config(pytester.path, text).name
    options = ("--qv-config", path, "--qv-runtimes", "torch,ort", "--qv-jobs", "2", "--qv-report", "out")
    result = quick(pytester, *options, *stop)
    result.assert_outcomes(failed=1 if stop else 2, passed=0 if stop else 4)
    reasons = {found["reason"] for found in report(pytester)["results"]}
    assert "its worker was killed by SIGKILL (the last words of a process) (3 times); given up" in reasons
    if not stop:
        assert report(pytester)["summary"]["rows_compared"] == 4 * 3, "the stand-in says that it compared 3 rows"
    assert not [child for child in psutil.Process().children() if "stub_worker" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_suites_pass_and_write_one_report_with_and_without_workers(
    workers: tuple[str, ...], first, pytester: pytest.Pytester
) -> None:
    """What each worker finds reaches the one report; results are in the same order either way."""
    options = ("--qv-config", own(pytester), "--qv-runtimes", "sim,ort", "--qv-report", "out")
    result = suites(pytester, *workers, *options)
    result.assert_outcomes(passed=2)
    plain = report(pytester)
    assert [f"{found['case']}-{found['runtime']}" for found in plain["results"]] == [
        f"{NAME}-{runtime}" for runtime in ("ort", "sim")
    ]
    assert statuses(plain) == {f"{NAME}-ort": "pass", f"{NAME}-sim": "pass"}
    assert [found["simulated"] for found in plain["results"]] == [False, True]
    assert plain["summary"]["rows_compared"] == 8
    result.stdout.fnmatch_lines(
        [
            "8 rows compared: 2 pass, 0 fail, 0 inconclusive, 0 error, 0 not_run",
            f"Proved: ort agrees with Hugging Face within fp32 bounds on 4 rows: {NAME}.",
            f"Proved: sim, a simulated AI 100, agrees with * on 4 rows: {NAME}.",
            "Not proved: anything on a real AI 100 card; *",
        ]
    )
    numbers = {found["runtime"]: [metric["value"] for metric in found["metrics"]] for found in plain["results"]}
    _, alone = first
    for found in alone["results"]:
        if found["runtime"] in ("ort", "sim"):
            assert numbers[found["runtime"]] == pytest.approx([metric["value"] for metric in found["metrics"]])


@pytest.mark.slow
def test_report_holds_the_environment_and_the_schema_number(first, pytester: pytest.Pytester) -> None:
    suites(pytester, "--qv-config", own(pytester), "--qv-runtimes", "ort", "--qv-report", "out/deep")
    plain = report(pytester, "out/deep")
    assert plain["schema"] == 1
    assert plain["environment"]["versions"]["qeff-validate"]


def test_selecting_the_card_without_one_skips_with_the_probes_reason_and_proves_nothing(
    pytester: pytest.Pytester, no_sdk: Path
) -> None:
    result = quick(pytester, "-m", "ai100", "--qv-config", own(pytester), "--qv-report", "out")
    result.assert_outcomes(skipped=1, deselected=3)
    assert f"no AI 100 SDK at {no_sdk}: install the Platform SDK" in result.stdout.str()
    result.stdout.fnmatch_lines(["0 rows compared: 0 pass, 0 fail, 0 inconclusive, 0 error, 1 not_run"])
    assert "Proved:" not in [line.split(" ")[0] for line in result.outlines]
    result.stdout.fnmatch_lines(["Not proved: anything on a real AI 100 card; none took part."])
    assert report(pytester)["summary"]["pass"] == 0


def test_required_card_that_is_missing_is_a_failure_with_the_reason(pytester: pytest.Pytester, no_sdk: Path) -> None:
    result = quick(pytester, "-m", "ai100", "--qv-config", own(pytester), "--qv-require=ai100")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*ai100 is required and did not run: no AI 100 SDK at {no_sdk}: *"])


@pytest.mark.slow
def test_mismatch_fails_the_test_and_names_metric_value_bound_and_worst_row(first, pytester: pytest.Pytester) -> None:
    strict = "tolerance: {ort: {rel_l2: 0, why: no rounding at all is allowed}}"
    options = ("--qv-config", own(pytester, strict), "--qv-runtimes", "ort", "--qv-report", "out")
    result = suites(pytester, *options)
    result.assert_outcomes(failed=1)
    plain = report(pytester)
    assert statuses(plain)[f"{NAME}-ort"] == "fail"
    metric = next(m for found in plain["results"] for m in found["metrics"] if m["name"] == "output.rel_l2")
    row, text = metric["worst"]["row"], metric["worst"]["text"]
    sentence = f"output.rel_l2 {metric['value']:.3g}, allowed 0 (case), worst row {row} ({text!r})"
    assert f"{NAME}-ort: fail at compare: {sentence}" in result.stdout.str()
    assert f"Disproved: {NAME}-ort (fail)." in result.outlines


def test_error_fails_the_test_with_its_stage_and_reason(pytester: pytest.Pytester) -> None:
    path = config(pytester.path, "  - {name: x, source: 'path:no/such/dir'}\n")
    result = quick(pytester, "--qv-config", path.name, "--qv-runtimes", "ort", "--qv-report", "out")
    result.assert_outcomes(failed=1)
    assert (
        f"x-ort: error at config: case 'x': directory {pytester.path}/no/such/dir does not exist" in result.stdout.str()
    )
    assert statuses(report(pytester)) == {"x-ort": "error"}
    assert "Result(" not in result.stdout.str()


def test_store_option_is_where_artifacts_go(pytester: pytest.Pytester) -> None:
    long = "  - {name: x, source: 'random:bert', inputs: {texts: [a, b, c d e f]}, options: {seq_len: [4]}}\n"
    path = config(pytester.path, long)
    result = suites(pytester, "--qv-config", path.name, "--qv-runtimes", "ort", "--qv-store", "kept")
    result.assert_outcomes(failed=1)
    assert "1 of 3 texts are longer than the greatest seq_len 4" in result.stdout.str()
    assert (pytester.path / "kept" / "locks").is_dir()


@pytest.mark.slow
def test_ini_options_do_what_the_command_line_does(first, pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nqv_config = {own(pytester)}\nqv_runtimes = ort\nqv_report = out\n")
    result = suites(pytester, "-c", "tox.ini")
    result.assert_outcomes(passed=1)
    assert statuses(report(pytester)) == {f"{NAME}-ort": "pass"}


def test_config_in_the_ini_file_is_relative_to_it(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeini(f"[pytest]\nqv_config = {own(pytester)}\n")
    monkeypatch.chdir(pytester.mkdir("inside"))
    assert len(collected(quick(pytester, "-c", "../tox.ini", "--collect-only", "-q"))) == 3


def test_command_line_comes_before_the_ini_file(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nqv_config = nowhere.yaml\nqv_runtimes = torch\n")
    options = ("--collect-only", "-q", "--qv-config", own(pytester), "--qv-runtimes", "sim")
    result = quick(pytester, "-c", "tox.ini", *options)
    assert collected(result) == [f"{NAME}-sim"]


def test_header_says_what_the_suites_are_set_up_with(pytester: pytest.Pytester) -> None:
    result = quick(pytester, "--collect-only", "--qv-config", own(pytester), "--qv-runtimes", "ort")
    result.stdout.fnmatch_lines(["qeff_validate: config=*cases.yaml*, runtimes=ort"])


@pytest.mark.slow
def test_suites_without_a_config_run_a_small_random_bert_on_everything_but_the_card(
    pytester: pytest.Pytester,
) -> None:
    result = suites(pytester, "-v", "--qv-report", "out", which=ALL_SUITES)
    bert, llama = 1 + 6, 2 + 10  # verdict and relations; export, verdict and relations
    # padding sides do not apply to BERT, several adapters in a batch not to this Llama, and fp16 is too coarse for a
    # share of its adapter
    result.assert_outcomes(passed=3 * (bert - 1 + llama - 1) - 1, skipped=3 + 3 + 1)
    for runtime in ("torch", "ort", "sim"):
        result.stdout.fnmatch_lines([f"*{TEST}[[]random-bert-mean-{runtime}[]] *PASSED*"])
    plain = report(pytester)
    compared = [found for found in plain["results"] if found["status"] == "pass" and found["reference"] == "hf"]
    assert min(found["coverage"]["compared"] for found in compared) >= 24


# --- CI --------------------------------------------------------------------------------------------


def test_failing_case_is_annotated_on_github_and_has_its_properties_in_junit(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(pytester.path, "  - {name: gone, source: 'path:missing', runtimes: [ort]}\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path))
    options = ("--qv-runtimes", "ort,ai100", "--qv-report", "out", "--junitxml", "junit.xml")
    result = quick(pytester, "--qv-config", path.name, *options)
    annotated = [line for line in result.outlines if line.startswith("::")]
    assert len(annotated) == 1
    assert annotated[0].startswith("::error file=cases.yaml,line=2,title=gone on ort%3A Not settled::")
    found = [(item.get("name"), item.get("value")) for item in ET.parse(pytester.path / "junit.xml").iter("property")]
    assert {("qv_status", "error"), ("qv_status", "not_run"), ("qv_simulated", "False")} <= {*found}


# --- other people's tests and reports --------------------------------------------------------------


@pytest.mark.slow
def test_examples_of_the_fixtures_in_the_documentation_run(first, pytester: pytest.Pytester) -> None:
    """Each fixture has an example; those of language models and timings are skipped by this case."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "your-own-suite.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    fixtures = {name for name in vars(qeff_validate.plugin) if name.startswith("qv_")} | {
        "qv_target",
        "qv_relation_name",
    }
    assert {name for name in fixtures if not re.search(rf"\b{name}\b", "".join(examples))} == set()
    pytester.makepyfile(**{f"test_example_{at}": text for at, text in enumerate(examples)})
    options = ("--strict-markers", "-W", "error", "--qv-config", own(pytester), "--qv-runtimes", "ort")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=240)
    result.assert_outcomes(passed=4 + 5, skipped=1 + 2)  # the side of padding does not apply to BERT


def test_numbers_reach_other_reports(pytester: pytest.Pytester) -> None:
    """What pytest-html reads is there without it; tests/install tries it and Allure themselves."""
    pytester.makepyfile(
        printer="""
        from qeff_validate.comparison.bounds import Bound
        from qeff_validate.comparison.metric import Metric
        from qeff_validate.comparison.verdict import GateResult
        from qeff_validate.engine import Runner
        from qeff_validate.report.result import Result

        metric = GateResult(Metric("output.rel_l2", 2e-07, {}), Bound(1e-06, "measured", "<floor>"))
        Runner.result = lambda self, case, name, explain: Result(case.name, name, "pass", metrics=(metric,), compared=1)

        def pytest_runtest_logreport(report):
            for extra in getattr(report, "extras", ()):
                print(report.when, extra["format_type"], extra["content"])
        """
    )
    options = ("-s", "-p", "printer", "--qv-config", own(pytester), "--qv-runtimes", "ort")
    result = forked_pytest(pytester, "-p", "no:cacheprovider", *options, *SUITES)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*html <pre>output.rel_l2 = 2e-07 (bound 1e-06, measured)</pre>*"])
