# SPDX-License-Identifier: Apache-2.0
"""A NaN is never lost on its way to a bound, a verdict or a report, wherever it stands among good values."""

from __future__ import annotations

import ast
import math
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from floors import EVEN, made_floor
from hypothesis import given, settings
from hypothesis import strategies as st

from qeff_validate.comparison.bounds import SYSTEMATIC_ERRORS, Bound, bounds_for, nan_max, systematic_bounds
from qeff_validate.comparison.logit_metrics import LEAST, logit_bounds, logit_errors
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.noise_floor import limit, tolerance_limit
from qeff_validate.comparison.verdict import GateResult, Rows, rows_beyond, systematic_errors, worst_errors
from qeff_validate.mutation.power import FaultEffects
from qeff_validate.report.result import Result
from qeff_validate.report.text import nearness, row_cells
from qeff_validate.selftest.run import _nearest

N, D = 6, 16
GOOD = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
BAD = np.full_like(GOOD, np.nan)
ROWS = Rows([str(row) for row in range(N)])
NAMES = ("a", "b", "c")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=8))
def test_the_greatest_of_numbers_is_nan_if_one_is(values: list[float]) -> None:
    wanted = math.nan if any(map(math.isnan, values)) else max(values)
    np.testing.assert_equal(nan_max(values), wanted)


@pytest.mark.parametrize("order", list(permutations((GOOD, GOOD * 1.1, BAD))), ids=lambda _: "")
def test_one_output_of_several_that_is_nan_makes_errors_and_systematic_errors_nan(order: Any) -> None:
    reference = dict.fromkeys(NAMES, GOOD)
    outputs = dict(zip(NAMES, order, strict=True))
    assert all(math.isnan(value) for value in worst_errors(reference, outputs, ROWS).values())
    assert all(math.isnan(value) for value in systematic_errors(reference, outputs, ROWS).values())
    assert rows_beyond(reference, outputs, bounds_for("fp32", override={}), ROWS) == set(range(N))


@pytest.mark.parametrize("place", range(N))
def test_one_row_that_is_nan_makes_errors_nan(place: int) -> None:
    outputs = GOOD.copy()
    outputs[place, 3] = np.nan
    assert all(math.isnan(value) for value in worst_errors({"a": GOOD}, {"a": outputs}, ROWS).values())
    assert all(math.isnan(value) for value in logit_errors(GOOD, outputs).values())
    assert rows_beyond({"a": GOOD}, {"a": outputs}, bounds_for("fp16", override={}), ROWS) == {place}


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_run_of_a_floor_that_is_no_number_leaves_no_bound(place: int, bad: float) -> None:
    runs = [1e-3] * 8
    runs[place] = bad
    assert tolerance_limit(runs) == limit("mean_norm", np.array(runs)) == math.inf
    assert "rel_l2" not in bounds_for("fp16", override={}, floor=made_floor({**EVEN, "rel_l2": runs}))
    logit_floor = made_floor({**dict.fromkeys(LEAST, 1e-6), "kl_max": runs})
    assert "kl_max" not in logit_bounds("fp16", override={}, floor=logit_floor)
    for name in SYSTEMATIC_ERRORS:
        errors = {**dict.fromkeys(SYSTEMATIC_ERRORS, 1e-4), name: runs}
        assert set(systematic_bounds(made_floor(systematic_errors=errors))) == set(SYSTEMATIC_ERRORS) - {name}


def judged(value: float, bound: float, name: str = "output.rel_l2") -> GateResult:
    return GateResult(Metric(name, value, {"row": 0, "text": "x"}), Bound(bound, "exact", "y"))


@pytest.mark.parametrize("order", list(permutations((0, 1, 2))))
def test_a_fault_that_gives_nan_in_one_metric_is_found(order: tuple[int, ...]) -> None:
    names, errors = ("rel_l2", "cosine", "norm_ratio"), (1e-9, 1e-9, math.nan)
    ceiling = FaultEffects(("fault",), ("fault",), {names[at]: np.array([errors[at]]) for at in order})
    floor = made_floor({"rel_l2": 1e-12})
    power = ceiling.power(floor, [judged(0.0, 1e-3, f"output.{name}") for name in names])
    assert (power.tried, power.missed) == (1, ())


@pytest.mark.parametrize(
    ("worst", "wanted"),
    [
        ((math.nan, 1e-3), "nan of"), ((math.inf, 1e-3), "inf of"), ((-math.inf, 1e-3), "-inf of"),
        ((384.0, 0.0), "384 of 0"), ((2e-3, 1e-3), "2.00e-03 of"), ((9e-4, 1e-3), "9.00e-04 of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", list(permutations((0, 1, 2))), ids=str)
def test_the_gate_that_failed_is_the_one_that_a_report_shows(
    worst: tuple[float, float], wanted: str, order: tuple[int, ...]
) -> None:
    some = (judged(8e-4, 1e-3), judged(0.0, 0.0), judged(*worst))
    result = Result("c", "ort", "fail", metrics=tuple(some[at] for at in order), planned=1, compared=1)
    assert wanted in row_cells(result)[4]
    assert max(result.metrics, key=nearness) is result.metrics[order.index(2)]


@pytest.mark.parametrize("order", list(permutations((math.nan, 1e-4, 9e-4))))
def test_the_nearest_bound_of_a_survivor_is_the_one_that_is_nan(order: tuple[float, ...]) -> None:
    result: Any = SimpleNamespace(metrics=[judged(value, 1e-3) for value in order])
    assert "nan of 1.00e-03" in _nearest(result)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_body_that_left_padding_makes_nan_is_not_free_of_padding_sides(bad: int) -> None:
    torch = pytest.importorskip("torch")
    from qeff_validate.models.embedding.reference import padding_shift

    class Body(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = input_ids[..., None].float().repeat(1, 1, 4)
            lengths = attention_mask.sum(1)
            return (states * (math.nan if lengths[0] == (2, 5)[bad] and len(states[0]) > 5 else 1),)

    assert math.isnan(padding_shift(Body(), [np.arange(1, 3), np.arange(1, 6)], 0, "left"))


# --- the rule ----------------------------------------------------------------------------------------

PACKAGE = Path(__file__).resolve().parents[2] / "qeff_validate"
MEASURING = (
    "comparison/bounds", "comparison/verdict", "comparison/noise_floor", "comparison/logit_metrics",
    "comparison/similarity", "comparison/task_metrics",
    "comparison/vector_metrics", "pipeline/case_pipeline", "pipeline/measure_floor", "report/text",
    "report/result", "mutation/power", "selftest/score", "selftest/run", "models/causal_lm/verdict",
    "models/embedding/filler_rows", "models/causal_lm/relation_kv_cache", "models/causal_lm/relations",
    "models/embedding/relations", "models/row_relations", "models/embedding/pooling_oracle", "models/row_order",
    "models/embedding/reference", "models/causal_lm/relation_linearity", "models/causal_lm/failure_hints",
)  # fmt: skip
ORDERED = {"max", "min", "sorted"}
OVER_NO_MEASUREMENT = {
    # names, and numbers of rows, tokens, shapes
    "sorted(reference)", "sorted(actual)", "sorted(set(reference) - set(actual))",
    "sorted(set(actual) - set(reference))",
    "sorted(set(GATES) - gates)", "sorted(rows.tokenless)", "min(d, BLOCK)", "max(1, BLOCK // width)",
    "min(top + height, n)", "min(left + width, d)", "min(10, len(sample) - 1)",
    "sorted({result['precision'] for result in good})", "max(n for n in K95 if n <= values.size)", "min(K95)",
    "max(ids, key=len)", "max(1, TOGETHER // length)",
    "sorted((row for row, tokens in enumerate(ids) if tokens.size), key=lambda row: ids[row].size)",
    "max((ids[row].size for row in rows))", "sorted((row for row in ids if row.size), key=len)",
    "sorted(set(names) - set(twins))", "min(1, len(inputs.adapters) - 1)", "min(SINGLE_ROWS, len(by_length))",
    "min(start + size, len(inputs.ids))", "min(lengths)", "max(lengths)", "sorted(filled, key=lengths.__getitem__)",
    "sorted({length for _, length in shapes(model, session)})", "min(sizes)", "max(sizes)",
    "min(unaffected)", "max(unaffected)",
    "max((length for _, length in shapes(model, session)))", "sorted(set(prompt[bad].tolist()))",
    "max((size for size, at in shapes(model, session) if at == length))", "max((n for n in K95 if n <= values.size))",
    # finite by what is asked before, or by their key
    "min(most[name], fp32_limits.get(name, math.inf))", "max(result.gates, key=nearness, default=None)",
    "min(log_normal, half_normal)",
}  # fmt: skip


def ordered_calls(source: str) -> list[str]:
    """Calls of Python's own max, min and sorted, which lose a NaN by its place."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ORDERED
    ]


def test_measurements_are_reduced_by_numpy_alone() -> None:
    found = {f"{name}: {call}" for name in MEASURING for call in ordered_calls((PACKAGE / f"{name}.py").read_text())}
    assert [text for text in sorted(found) if text.partition(": ")[2] not in OVER_NO_MEASUREMENT] == []


@pytest.mark.parametrize("source", ["max(errors)", "def f():\n    return [min(a, b) for a in c]", "sorted(x)[0]"])
def test_a_reduction_by_python_is_found(source: str) -> None:
    assert ordered_calls(source)


def test_reductions_by_numpy_are_no_offence() -> None:
    assert ordered_calls("np.max(errors); np.minimum(a, b); values.max()") == []
