# SPDX-License-Identifier: Apache-2.0
"""The reporter ``mlflow``: one run of MLflow for a report, with a metric for each number and the report as artifacts.

MLflow's own variables say where it goes: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``.
"""

from __future__ import annotations

import math
import re

import mlflow

from qeff_validate.report.report import Report, json_report, markdown_report
from qeff_validate.report.result import Result

_REFUSED = re.compile(r"[^\w.:/ -]")
"""Characters that MLflow takes in no name of a metric or tag."""


def report_to_mlflow(report: Report) -> None:
    """Log a report as a run, within the active run if there is one.

    Metrics are called ``CASE/RUNTIME/METRIC`` (``CASE/RUNTIME/RELATION/METRIC`` of a relation), tags
    ``status.CASE-RUNTIME``; ``report.json`` and ``report.md`` are artifacts. A number that is not finite is no metric.
    """
    versions = report.environment.get("versions", {})
    with mlflow.start_run(run_name="qeff-validate", nested=mlflow.active_run() is not None):
        mlflow.set_tags({f"version.{name}": version for name, version in versions.items() if version})
        mlflow.set_tag("passed", str(report.passed))
        mlflow.set_tags({_name(f"status.{_place(result, '-')}"): result.status for result in report.results})
        mlflow.log_metrics(
            {
                _name(f"{_place(result, '/')}/{item.metric.name}"): item.metric.value
                for result in report.results
                for item in result.metrics
                if math.isfinite(item.metric.value)
            }
        )
        mlflow.log_text("".join(json_report(report)), "report.json")
        mlflow.log_text("".join(markdown_report(report)), "report.md")


def _place(result: Result, between: str) -> str:
    relation = [result.stage] if result.reference == "itself" and result.stage else []
    return between.join([result.case, result.runtime, *relation])


def _name(text: str) -> str:
    return _REFUSED.sub("_", text)
