# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import EXPLANATION, sample_result

from qeff_validate.cli.app import run_command
from qeff_validate.config.loader import case_places
from qeff_validate.report.annotations import github_annotations


def annotated(*results: Any, **more: Any) -> list[str]:
    return list(github_annotations(results, more.pop("places", {}), **more))


def test_failures_are_errors_and_known_ones_notices() -> None:
    failed = sample_result(status="fail", text="r")
    assert annotated(sample_result(), sample_result(status="not_run")) == []
    assert annotated(failed) == ["::error title=c on ort%3A Disproved::r"]
    assert annotated(replace(failed, expected="known")) == ["::notice title=c on ort%3A Disproved::r%0Aknown"]
    unsettled = sample_result(status="inconclusive", text="r")
    assert annotated(unsettled) == ["::error title=c on ort%3A Not settled::r"]
    assert annotated(unsettled, allow_inconclusive=True)[0].startswith("::notice ")
    missing = sample_result(runtime="ai100", status="not_run", text="no card")
    assert annotated(missing, require=["ai100"]) == ["::error title=c on ai100%3A Not run::no card"]


def test_simulated_runtime_and_explanation_are_named() -> None:
    failed = sample_result(runtime="sim", simulated=True, status="fail", text="r", explanation=EXPLANATION)
    (line,) = annotated(failed)
    assert "title=c on sim (simulated)%3A Disproved::layer.1, weight row 77 is zero (export)%0Ar" in line


def test_control_characters_of_commands_are_escaped() -> None:
    (line,) = annotated(sample_result("a,b:c%", status="fail", text="100% of\r\nall: rows, ::error::x"))
    assert "\n" not in line
    assert "\r" not in line
    assert line == ("::error title=a%2Cb%3Ac%25 on ort%3A Disproved::100%25 of%0D%0Aall: rows, ::error::x")


def test_place_is_the_line_of_the_case_from_the_root_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "configs" / "a,b.yaml"
    config.parent.mkdir()
    config.write_text(
        "# a comment\ndefaults: {seed: 0}\ncases:\n  - model: embedding\n    name: first\n\n  - {name: c}\n",
        encoding="utf-8",
    )
    places = case_places([config])
    assert places == {"first": (config, 4), "c": (config, 7)}
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    (line,) = annotated(sample_result(status="fail", text="r"), places=places)
    assert line.startswith("::error file=configs/a%2Cb.yaml,line=7,title=")


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_command_annotates_on_github_alone_and_apart_from_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    config = tmp_path / "cases.yaml"
    config.write_text("cases:\n  - {name: gone, source: 'path:missing', runtimes: [ort]}\n", encoding="utf-8")
    command = ["run", str(config), "--report", str(tmp_path / "out"), *arguments]
    code = run_command(command)
    assert "::error" not in "".join(capsys.readouterr())
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    assert run_command(command) == code != 0
    captured = capsys.readouterr()
    assert "::error file=cases.yaml,line=2,title=gone on ort%3A Not settled::" in captured.err
    assert "::error" not in captured.out
