# SPDX-License-Identifier: Apache-2.0
"""The bounds of tests themselves: what they refuse, what they record, and that no other kind is used."""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from itertools import product
from pathlib import Path

import kernels
import numpy as np
import pytest
import torch
from bounds import HEADROOM, close, within

from qeff_validate.comparison import bounds as table_bounds
from qeff_validate.comparison import logit_metrics

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(path for path in TESTS.rglob("test_*.py") if path.name != "test_bounds.py")


@pytest.mark.parametrize("bad", [1.1e-6, math.nan, math.inf, [0.0, math.nan], [math.nan, 0.0]])
def test_an_error_beyond_its_bound_or_not_a_number_fails(bad: object) -> None:
    within(1e-6, 1e-6)
    within([0.0, 1e-6], 1e-6)
    with pytest.raises(AssertionError, match=r"the name (inf|nan|1.1e-06), allowed 1e-06"):
        within(bad, 1e-6, "the name")


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [([1.0, 2.1], [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [1.0, math.nan]),
     ([1.0, math.inf], [1.0, 2.0]), ([1.0, 2.0], [1.0, math.inf]), ([1.0], [1.0, 2.0]), ([[1.0, 2.0]], [1.0, 2.0])],
)  # fmt: skip
def test_arrays_that_are_not_close_fail(actual: list[float], wanted: list[float]) -> None:
    with pytest.raises(AssertionError):
        close(np.array(actual), np.array(wanted), rtol=0.01, atol=0.01)


def test_arrays_that_are_close_pass_as_tensors_and_lists_too() -> None:
    close(torch.tensor([1.0, math.nan, math.inf]), [1.0001, math.nan, math.inf], rtol=1e-3)
    close(np.array([0.0, 1e-7]), 0.0, atol=2e-7)
    close([], [])


def test_each_comparison_is_recorded_also_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEFF_TEST_RATIOS", str(tmp_path / "ratios"))
    within(1.0, 4.0)
    close([1.1], [1.0], atol=1.0)
    with pytest.raises(AssertionError):
        within(8.0, 4.0)
    lines = [json.loads(line) for line in (tmp_path / "ratios").read_text().splitlines()]
    assert [ratio for _, ratio in lines] == pytest.approx([0.25, 0.1, 2.0])
    assert all(test.endswith("::test_each_comparison_is_recorded_also_one_that_fails") for test, _ in lines)


def uses(function: ast.FunctionDef) -> set[str]:
    """Names of functions that it calls, and of fixtures that it takes."""
    called = [call.func for call in ast.walk(function) if isinstance(call, ast.Call)]
    return {func.id for func in called if isinstance(func, ast.Name)} | {arg.arg for arg in function.args.args}


def test_arrays_are_compared_by_these_bounds_alone() -> None:
    """Others would be no part of `make test-kernels`."""
    others = {"allclose", "assert_allclose", "assert_close"}
    texts = {path.name: path.read_text(encoding="utf-8") for path in FILES}
    assert not [name for name, text in texts.items() if re.search(rf"\.({'|'.join(others)})\b", text)]


@functools.cache
def helpers(module: str) -> frozenset[str]:
    """Functions of a helper module of the tests that compare by these bounds, `bounds` itself included."""
    path = TESTS / f"{module}.py"
    if not path.is_file():
        return frozenset()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))
    return found if module == "bounds" else found & comparing(body)


def comparing(body: list[ast.stmt]) -> set[str]:
    """Names in a module that compare by these bounds: what it imports, and its functions that use that."""
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    numeric = {name.name for node in imports for name in node.names if name.name in helpers(node.module or "")}
    while more := {f.name for f in functions if uses(f) & numeric} - numeric:
        numeric |= more
    return numeric


def test_what_uses_them_is_marked_numeric() -> None:
    marked = 0
    for path in FILES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        numeric = comparing(body)
        for function in [node for node in body if isinstance(node, ast.FunctionDef)]:
            marks = {ast.unparse(decorator) for decorator in function.decorator_list}
            if function.name.startswith("test_"):
                assert ("pytest.mark.numeric" in marks) == (function.name in numeric), f"{path.name}: {function.name}"
                marked += function.name in numeric
    assert marked > 50


def test_the_run_under_other_kernels_counts_tests_and_finds_the_worst(tmp_path: Path) -> None:
    """As `make test-kernels` does it: a child for a variant, whose environment the tests see."""
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, pytest\nfrom bounds import within\n"
        "@pytest.mark.numeric\n@pytest.mark.parametrize('error', [1, 3, 9])\n"
        "def test_it(error):\n    assert os.environ['ATEN_CPU_CAPABILITY'] == 'default'\n    within(error, 4)\n"
        "def test_other():\n    raise AssertionError\n"
    )
    passed, report, ratios = kernels.run("oldest", ["-c", str(kernels.ROOT / "pyproject.toml"), str(file)])
    assert not passed
    assert "1 failed, 2 passed, 1 deselected" in report
    assert list(ratios.values()) == [2.25]


def test_the_products_table_has_room_above_what_was_measured() -> None:
    """docs/power.md holds what `make calibrate` has seen last."""
    _, _, text = (TESTS.parent / "docs" / "power.md").read_text(encoding="utf-8").partition("## The table of bounds")
    rows = re.findall(
        r"^\| (\w+) \| (fp32|fp16) \| ([0-9.e-]+) \| .* \| ([0-9.e-]+) \| [0-9.]+ \|$", text, re.MULTILINE
    )
    tables = {**logit_metrics.FALLBACK["fp32"], **table_bounds.FALLBACK["fp32"]}
    assert {(name, precision) for name, precision, *_ in rows} == set(product(tables, ("fp32", "fp16")))
    for name, precision, worst, bound in rows:
        today = {**logit_metrics.FALLBACK[precision], **table_bounds.FALLBACK[precision]}[name]
        assert float(bound) == today, f"{name} in {precision}: run make calibrate"
        room = HEADROOM if precision == "fp32" else 2
        assert today >= room * float(worst), (name, precision)
