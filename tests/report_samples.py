# SPDX-License-Identifier: Apache-2.0
"""Results and reports for tests of what shows them: every part is filled, nothing was run."""

from __future__ import annotations

import math
from typing import Any

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.metric import ErrorsByRow, Metric
from qeff_validate.comparison.verdict import GateResult, Power, RowText
from qeff_validate.report.explanation import Explanation
from qeff_validate.report.report import Report
from qeff_validate.report.result import Precheck, Result

HOSTILE = (
    "<script>window.hurt = 1</script>",
    "</script><img src=x onerror='window.hurt = 1'>",
    '"\' onmouseover="window.hurt = 1" x=\'',
    "--></style></details></textarea><!-- {{ 7 * 7 }} {% raw %}",
    "\u202eright to left\u202c שלום עליכם 👩‍👩‍👧‍👦 \x00\x1b[31m\ud800",
    "x" * 5000,
)
"""Texts that break a page if they are not escaped, or do not wrap."""

PLAIN_EXPLANATION: dict[str, Any] = {
    "stages": [
        {"name": "wrapper", "share": -0.05, "error": 1e-6},
        {"name": "export", "share": 1.05, "error": 4e-3},
        {"name": "precision", "share": "nan", "error": "inf"},
    ],
    "stage": "export",
    "layers": [
        {"module": "layer.0", "node": "n0", "operator": "MatMul", "inherited": 0.0, "local": 2e-7, "floor": 2e-7},
        {"module": "layer.1", "node": "n1", "operator": "Gelu", "inherited": 2e-7, "local": 4e-3, "floor": 2e-7},
        {"module": "layer.2", "node": "n2", "operator": "Add", "inherited": "nan", "local": "nan", "floor": 0.0},
    ],
    "module": "layer.1",
    "finding": "row 77 of the weight is zero",
    "summary": "layer.1, weight row 77 is zero (export)",
    "rows": [1],
    "seconds": 1.5,
    "program": {
        "compilations": 3,
        "observer": 0.0,
        "boundaries": [
            {"module": "layer.0", "error": 9e-4, "expected": 1e-3},
            {"module": "layer.1", "error": "inf", "expected": 1e-3},
        ],
    },
    "repro": "bundle",
    "repro_note": "2.4 MB, 2 nodes",
}
"""Where a failure comes from, as report.json holds it."""

EXPLANATION = Explanation.from_plain(PLAIN_EXPLANATION)


def sample_result(
    case: str = "c", runtime: str = "ort", status: Any = "pass", text: str = "a text", **more: Any
) -> Result:
    """Return a result in which each part of a page has something to show; ``text`` stands wherever texts stand."""
    failed = status == "fail"
    errors = (1.23456e-6, 4e-3 if failed else 3e-6, 0.0, math.nan)
    worst = {"row": 1, "text": text}
    metrics = (
        GateResult(Metric("output.rel_l2", errors[1], worst, ErrorsByRow(errors)), Bound(5e-6, "floor", text, 1.2e-6)),
        GateResult(Metric("output.neighbour_order", 0.0, worst), Bound(0.0, "exact", "no neighbour moves")),
        GateResult(Metric("output.mean_abs", 1e-7, worst), None),
    )
    values: dict[str, Any] = {
        "precision": "fp32",
        "metrics": metrics,
        "planned": 4,
        "compared": 4,
        "texts": (RowText(text), RowText(text), RowText("tokens", 2)),
        "power": Power(4, (text,)),
        "prechecks": (Precheck("weights", "differs" if failed else "same", text),),
        "timings_s": {"load": 0.5, "rows_per_s": 10.0},
        "artifact": {"kind": "onnx", "path": text, "digest": "0" * 64},
        "findings": (text,),
        "notes": (text,),
        "reason": text if status != "pass" else "",
    }
    if status in ("not_run", "error"):
        values |= {"metrics": (), "planned": 0, "compared": 0, "texts": (), "power": None, "prechecks": ()}
    return Result(case, runtime, status, **{**values, **more})


def sample_report(count: int = 5, text: str = "a text") -> Report:
    """Return a report with some results of all kinds."""
    kinds: list[dict[str, Any]] = [
        {},
        {"runtime": "sim", "simulated": True, "precision": "fp16"},
        {"runtime": "torch", "status": "fail", "stage": "compare", "explanation": EXPLANATION},
        {"runtime": "ai100", "status": "not_run"},
        {"runtime": "openvino", "status": "error", "stage": "export"},
    ]
    results = [sample_result(f"case-{at // 5}", text=text, **kinds[at % 5]) for at in range(count)]
    return Report(tuple(results), {"versions": {"torch": "2", text: text}, "cards": []}, ())
