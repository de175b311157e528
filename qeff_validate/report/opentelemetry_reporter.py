# SPDX-License-Identifier: Apache-2.0
"""The reporter ``opentelemetry``: gauges for each result and each of its numbers, sent by OTLP over HTTP.

OpenTelemetry's own variables say where they go: ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_EXPORTER_OTLP_HEADERS``, ….
"""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExportResult
from opentelemetry.sdk.resources import Resource

from qeff_validate.errors import Unavailable
from qeff_validate.report.report import Report
from qeff_validate.report.result import Result

STATUS, VALUE, BOUND = "qeff_validate.passed", "qeff_validate.metric", "qeff_validate.bound"


def report_to_opentelemetry(report: Report) -> None:
    """Send a report as gauges.

    `STATUS` is 1 for a result that passed and 0 for every other; `VALUE` and `BOUND` are the value and the bound of a
    metric. Attributes: ``case``, ``runtime``, ``reference``, ``simulated``, ``status``, ``metric``; of relations and of
    what did not pass ``stage`` too.

    Raises:
        Unavailable: the collector did not take it.
    """
    reader = InMemoryMetricReader()
    version = str(report.environment.get("versions", {}).get("qeff-validate", ""))
    resource = Resource.create({"service.name": "qeff-validate", "service.version": version})
    meter = MeterProvider([reader], resource=resource, shutdown_on_exit=False).get_meter("qeff_validate", version)
    status, value, bound = (meter.create_gauge(name) for name in (STATUS, VALUE, BOUND))
    for result in report.results:
        attributes = _attributes(result)
        status.set(int(result.status == "pass"), attributes)
        for item in result.metrics:
            named = {**attributes, "metric": item.metric.name}
            value.set(item.metric.value, named)
            if item.bound is not None:
                bound.set(item.bound.value, named)
    exporter = OTLPMetricExporter()
    data = reader.get_metrics_data()
    if data is not None and exporter.export(data) is not MetricExportResult.SUCCESS:
        raise Unavailable("the OTLP collector did not take the metrics; OTEL_EXPORTER_OTLP_ENDPOINT says where it is")


def _attributes(result: Result) -> dict[str, str | bool]:
    attributes: dict[str, str | bool] = {
        "case": result.case,
        "runtime": result.runtime,
        "reference": result.reference,
        "simulated": result.simulated,
        "status": result.status,
    }
    return {**attributes, "stage": result.stage} if result.stage else attributes
