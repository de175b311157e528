# SPDX-License-Identifier: Apache-2.0
"""A part of `make reliability`: some inputs of each kind are clear errors or right verdicts; others would be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import hostile_inputs
import pytest
from hostile_inputs import KINDS, GoodFiles, Input
from reliability import BAD, COLUMNS, outcome, rows, sample, try_inputs
from warm_cli import Run, WarmCli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCli]:
    with WarmCli(tmp_path_factory.mktemp("warm")) as started:
        yield started


@pytest.fixture(scope="module")
def good(cli: WarmCli) -> GoodFiles:
    return hostile_inputs.prepare(cli, cli.folder / "good")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_are_clear_errors_or_right_verdicts(
    kind: str, cli: WarmCli, good: GoodFiles, tmp_path: Path
) -> None:
    maker, count = KINDS[kind]
    every = sum(1 for _ in maker(good, count))
    chosen = islice(sample(maker, good, count, every // 4), 4)
    tried = [(item.name, column, problem) for item, _, column, problem in try_inputs(cli, good, chosen, tmp_path / "x")]
    assert len(tried) >= 4
    assert [row for row in tried if row[1] in BAD] == []


@pytest.mark.parametrize(
    ("code", "text", "column"),
    [
        (2, "qeff-validate: cannot read config c.yaml", "clear error"),
        (3, "tiny-ort: error at export: no room", "clear error"),
        (3, "", "traceback"),
        (3, "tiny-ort: error at export: unexpected KeyError: 'x'", "traceback"),
        (1, "Traceback (most recent call last):", "traceback"),
        (-11, "", "traceback"),
        (None, "", "hang"),
        (0, "", "right verdict"),
        (1, "fail", "wrong verdict"),
        (7, "", "wrong verdict"),
    ],
)
def test_what_came_of_a_run_has_a_column(code: int | None, text: str, column: str, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    status = "fail" if text == "fail" else "pass"
    (tmp_path / "report" / "report.json").write_text(f'{{"results": [{{"status": "{status}"}}]}}', encoding="utf-8")
    item = Input("x", lambda _: [], hostile_inputs.healthy)
    assert outcome(Run(code, text, 1.0, 1.0), item, tmp_path)[0] == column


def test_damage_that_passes_is_a_wrong_verdict(tmp_path: Path) -> None:
    assert hostile_inputs.refused(["pass"], tmp_path)
    assert not hostile_inputs.refused(["fail", "error"], tmp_path)


def test_a_program_that_differs_and_passes_is_seen(good: GoodFiles, tmp_path: Path) -> None:
    judge = next(item.judge for item in hostile_inputs.programs(good, 4) if item.name.endswith(" 0"))
    (tmp_path / "q").mkdir()
    data = bytearray((good.qpc / "programqpc.bin").read_bytes())
    (tmp_path / "q" / "programqpc.bin").write_bytes(data)
    assert not judge(["pass"], tmp_path), "the same program"
    data[5000] ^= 1
    (tmp_path / "q" / "programqpc.bin").write_bytes(data)
    assert judge(["pass"], tmp_path)


def test_sum_of_the_table_is_that_of_its_rows() -> None:
    table = rows({"a": Counter({COLUMNS[0]: 2}), "b": Counter({COLUMNS[0]: 1, COLUMNS[4]: 3})})
    assert table.splitlines()[-1] == "| **all** | 6 | 3 | 0 | 0 | 0 | 3 |"
