# SPDX-License-Identifier: Apache-2.0
"""Reporters: chosen by name before anything runs, and a failure in one loses no verdict and no other reporter.

Those of MLflow and OpenTelemetry meet the real libraries in tests/install.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import config, environ

from qeff_validate.errors import ConfigError, Unavailable, ValidateError
from qeff_validate.registry import registered
from qeff_validate.report.report import Report
from qeff_validate.report.reporters import load_reporters, send_report


def test_ours_are_registered_and_an_unknown_one_is_an_error_with_a_suggestion() -> None:
    assert {"mlflow", "opentelemetry"} <= set(registered("reporters"))
    assert load_reporters([]) == {}
    with pytest.raises(ConfigError, match=r"no reporter is called 'mlfow'. Did you mean 'mlflow'\?"):
        load_reporters(["mlfow"])


def test_every_reporter_gets_the_report_and_failures_are_told_together() -> None:
    got = []

    def broken(report: Report) -> None:
        raise ConnectionError("refused")

    def refusing(report: Report) -> None:
        raise Unavailable("no collector")

    with pytest.raises(ValidateError) as caught:
        send_report(Report(()), {"a": broken, "b": got.append, "c": refusing})
    assert str(caught.value) == (
        "the reporter 'a' failed: ConnectionError: refused; the reporter 'c' failed: no collector"
    )
    assert got == [Report(())]
    send_report(Report(()), {"b": got.append})


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("mlfow", 2, "no reporter is called 'mlfow'. Did you mean 'mlflow'?"),
        ("mlflow", 3, "this needs MLflow, which is not installed: pip install 'qeff-validate[mlflow]'"),
    ],
)
def test_reporter_that_cannot_be_had_is_known_before_anything_runs(
    name: str, code: int, text: str, tmp_path: Path
) -> None:
    block = "import sys; sys.modules['mlflow'] = None\n"
    command = "from qeff_validate.cli import main; sys.exit(main(sys.argv[1:]))"
    suites = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    cases = str(config(tmp_path))
    for source, arguments, wanted in (
        (command, ["run", cases, "--reporter", name], code),
        (suites, ["--qv-config", cases, "--qv-reporters", name, "--pyargs", "qeff_validate.suites"], 4),
    ):
        done = subprocess.run(
            [sys.executable, "-c", block + source, *arguments],
            cwd=tmp_path,
            env=environ(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, text in done.stderr) == (wanted, True), done.stdout + done.stderr
    assert not (tmp_path / "qv-report").exists()
