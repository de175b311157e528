# SPDX-License-Identifier: Apache-2.0
"""The notebooks of the examples run as they stand, cell by cell in a fresh process, without a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import environ

from qeff_validate.report.text import HEAD

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

RUN = """
import json, sys, warnings
warnings.filterwarnings("error", module=r"qeff_validate|__main__|cell")
names = {"__name__": "__main__"}
with open(sys.argv[1], encoding="utf-8") as file:
    cells = json.load(file)["cells"]
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
print("ran", sum(cell["cell_type"] == "code" for cell in cells))
"""


def run(notebook: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(notebook)]
    env = {**environ(folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_there_is_a_notebook_for_each_model_kind() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["embedding", "peft"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_its_first_cell_to_its_last(notebook: Path, tmp_path: Path) -> None:
    done = run(notebook, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("ran ")
    assert not list(tmp_path.iterdir()), "a notebook leaves files behind"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_the_outputs_of_one_run(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream"}, "no error, no warning"
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert not any(place in json.dumps(outputs) for place in ("/tmp/", "/home/", "/root/", "Warning"))
    (report,) = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    page = "".join(report["text/html"])
    assert page.count("<table") == 1, "the report shows once"
    assert re.findall(r"<th [^>]*>([^<]*)</th>", page) == [*HEAD], "run tools/run_notebooks.py"


def test_outputs_are_what_cells_print_and_their_last_value() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from run_notebooks import run_cell
    finally:
        sys.path.remove(str(ROOT / "tools"))
    names: dict[str, Any] = {}
    assert run_cell("x = 1", names, 1) == []
    assert run_cell("print(x)\nprint(2)", names, 2)[0]["text"] == ["1\n", "2\n"]
    (output,) = run_cell("from qeff_validate.report.report import Report\nReport(())", names, 3)
    assert set(output["data"]) == {"text/html", "text/plain"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import qeff_validate as qv\nqv.no_such_name", "no_such_name"),
        ("import warnings\nwarnings.warn('mind this')", "UserWarning: mind this"),
    ],
)
def test_cell_that_fails_or_warns_is_found(code: str, said: str, tmp_path: Path) -> None:
    notebook = tmp_path / "bad.ipynb"
    cells = [{"cell_type": "markdown", "source": ["not code"]}, {"cell_type": "code", "source": [code]}]
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    done = run(notebook, tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "cell 1" in done.stderr
