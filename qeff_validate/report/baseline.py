# SPDX-License-Identifier: Apache-2.0
"""Baselines: what a run gave, under a name, in one file that can be committed.

A baseline holds the value of each metric and, of timings, whole distributions with the machine that they are of. It is
read beside later runs: a value that grew within its bound is told, and decides nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.files import read_json
from qeff_validate.report.report import Report
from qeff_validate.report.result import finite
from qeff_validate.report.writers import write_texts

SCHEMA = 1

FOLDER = "baselines"
"""Beside a config."""

MOST_BYTES = 256 << 20
"""A greater report or baseline is not read."""

DRIFT = 3.0
"""Growth of a value, as a factor, from which it is told.

Legitimate implementations of one model differ by up to 1.45 times (design §5), so it is twice that and more.
"""

OF_ZERO = 0.1
"""Share of its bound from which a value is told that was zero before."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


class Entry(BaseModel):
    """One case on one runtime."""

    model_config = ConfigDict(strict=True, extra="ignore")

    case: str
    runtime: str
    precision: str | None = None
    simulated: bool = False
    status: str
    metrics: dict[str, float | str] = {}
    performance: dict[str, Any] | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Case and runtime."""
        return self.case, self.runtime


class Baseline(BaseModel):
    """Content of a baseline file; ``environment`` is that of the report."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    environment: dict[str, Any]
    results: list[Entry]


def baseline_path(folder: Path, name: str) -> Path:
    """Return the file of a baseline.

    Raises:
        ConfigError: the name is no file name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:60]!r} is no name of a baseline: use letters, digits and . _ + -")
    return folder / f"{name}.json"


def save_baseline(folder: Path, name: str, reports: Sequence[Mapping[str, Any]]) -> Path:
    """Write the results of plain reports under a name; accuracy and timings of a case are put together.

    Raises:
        ConfigError: nothing in the reports can be kept, or the name is none.
        ValidateError: the file cannot be written.
    """
    path, entries = baseline_path(folder, name), dict[tuple[str, str], Entry]()
    for report in reports:
        for result in report["results"]:
            entry = _entry(result)
            if not entry.metrics and entry.performance is None:
                continue
            before = entries.get(entry.place)
            entries[entry.place] = entry if before is None else _together(before, entry)
    if not entries:
        raise ConfigError(f"baseline {name!r}: the report has neither metrics nor timings")
    made = Baseline(name=name, environment=dict(reports[0]["environment"]), results=list(entries.values()))
    plain = {"schema": SCHEMA, **made.model_dump(mode="json", exclude_none=True)}
    # one result a line: a change shows in a diff as the line of its case
    lines = ",\n".join(json.dumps(finite(item), ensure_ascii=False, allow_nan=False) for item in plain.pop("results"))
    head = json.dumps(finite(plain), indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    write_texts(folder, {path.name: f'{head},\n "results": [\n{lines}\n]}}\n'})
    return path


def read_baseline(folder: Path, name: str) -> Baseline:
    """Read a baseline.

    Raises:
        ConfigError: there is none of this name, or it cannot be read.
    """
    path = baseline_path(folder, name)
    if not path.is_file():
        known = [item.stem for item in baseline_files(folder)]
        raise ConfigError(f"no baseline is called {name!r} in {folder}.{suggest(name, known) if known else ''}")
    return parse_baseline(path)


def baseline_files(folder: Path) -> list[Path]:
    """Return the files of all baselines in a folder, by name."""
    return sorted(path for path in folder.glob("*.json") if _NAME.fullmatch(path.stem))


def parse_baseline(path: Path) -> Baseline:
    """Read a baseline file.

    Raises:
        ConfigError: it cannot be read, is of another schema, or a key is missing.
    """
    data = read_json(path, most_bytes=MOST_BYTES)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no baseline of schema {SCHEMA}")
    try:
        return Baseline.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is no baseline: {place}: {first['msg']}") from exc


def read_results(path: Path) -> list[Mapping[str, Any]]:
    """Return the plain results of a report (``report.json``, or its folder) or of a baseline.

    Raises:
        ConfigError: it cannot be read or has no results.
    """
    results: list[Mapping[str, Any]] = read_report(path)["results"]
    return results


def read_report(path: Path) -> Mapping[str, Any]:
    """Return a plain report from ``report.json`` or its folder.

    Raises:
        ConfigError: it cannot be read or has no results.
    """
    file = path / "report.json" if path.is_dir() else path
    data = read_json(file, most_bytes=MOST_BYTES)
    results = data.get("results") if isinstance(data, dict) else None
    if not isinstance(results, list) or not all(isinstance(item, dict) for item in results):
        raise ConfigError(f"{file} is neither a report nor a baseline: it has no results")
    if not all({"case", "runtime"} <= item.keys() for item in results):
        raise ConfigError(f"{file}: a result names no case or no runtime")
    report: Mapping[str, Any] = {"environment": {}, **data}
    return report


def with_drift(report: Report, baseline: Baseline) -> Report:
    """Return a report whose results tell, as findings, what drifted since a baseline; no status changes."""
    entries = {entry.place: entry for entry in baseline.results}
    results = []
    for result in report.results:
        entry = entries.get((result.case, result.runtime))
        if result.status != "not_run":
            plain = _entry(result.plain())
            bounds = {item.metric.name: item.bound.value for item in result.metrics if item.bound}
            told = list(drifts(entry, plain, bounds, baseline.name))
            result = replace(result, findings=(*result.findings, *told))  # noqa: PLW2901
        results.append(result)
    return replace(report, results=tuple(results))


def drifts(entry: Entry | None, now: Entry, bounds: Mapping[str, float], name: str) -> Iterator[str]:
    """Yield what drifted from a baseline's entry to now, one sentence each.

    Args:
        entry: of the baseline; None: it has no such case and runtime.
        now: of this run.
        bounds: of the metrics of now, as far as they have one.
        name: of the baseline.
    """
    if entry is None:
        yield f"baseline {name} has no {now.case}-{now.runtime}"
        return
    if entry.precision != now.precision:
        yield f"baseline {name} is of precision {entry.precision}, this run of {now.precision}: values are not compared"
        return
    if entry.status != now.status:
        yield f"baseline {name}: it was {entry.status} then"
    for metric, then in entry.metrics.items():
        if metric not in now.metrics:
            yield f"baseline {name}: {metric} was measured then, and is not now"
            continue
        before, after, bound = float(then), float(now.metrics[metric]), bounds.get(metric)
        if math.isfinite(before) and not math.isfinite(after):
            yield f"baseline {name}: {metric} was {before:.3g}, and is {after} now"
        elif before > 0 and after > DRIFT * before:
            within = f", within its bound {bound:.3g}" if bound is not None and after <= bound else ""
            yield f"baseline {name}: {metric} grew {after / before:.3g} times, from {before:.3g} to {after:.3g}{within}"
        elif before == 0 and bound is not None and after > OF_ZERO * bound:
            yield f"baseline {name}: {metric} was 0, and is {after:.3g} now, of a bound of {bound:.3g}"


def _entry(result: Mapping[str, Any]) -> Entry:
    metrics = {item["name"]: item["value"] for item in result.get("metrics", ())}
    kept = ("case", "runtime", "precision", "simulated", "status")
    return Entry(**{name: result[name] for name in kept}, metrics=metrics, performance=result.get("performance"))


def _together(before: Entry, after: Entry) -> Entry:
    """Return accuracy of one entry with timings of the other; of two of a kind the later one."""
    accuracy = after if after.metrics else before
    return accuracy.model_copy(update={"performance": after.performance or before.performance})
