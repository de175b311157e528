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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.files import read_json
from qeff_validate.report.lazy_results import LazyResults
from qeff_validate.report.report import MOST_BYTES, Report, report_file, report_of
from qeff_validate.report.result import Result, finite
from qeff_validate.report.writers import write_texts

SCHEMA = 1

FOLDER = "baselines"
"""Beside a config."""

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


def save_baseline(folder: Path, name: str, reports: Sequence[Report]) -> Path:
    """Write the results of reports under a name; accuracy and timings of a case are put together.

    Raises:
        ConfigError: nothing in the reports can be kept, or the name is none.
        ValidateError: the file cannot be written.
    """
    path, entries = baseline_path(folder, name), dict[tuple[str, str], Entry]()
    for report in reports:
        for result in report.results:
            entry = _entry(result)
            if not entry.metrics and entry.performance is None:
                continue
            before = entries.get(entry.place)
            entries[entry.place] = entry if before is None else _together(before, entry)
    if not entries:
        raise ConfigError(f"baseline {name!r}: the report has neither metrics nor timings")
    made = Baseline(name=name, environment=dict(reports[0].environment), results=list(entries.values()))
    plain = {"schema": SCHEMA, **made.model_dump(exclude_none=True)}
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
    return _baseline(read_json(path, most_bytes=MOST_BYTES), path)


def _baseline(data: Any, path: Path) -> Baseline:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no baseline of schema {SCHEMA}")
    try:
        return Baseline.model_validate(data)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path} is no baseline: {place}: {first['msg']}") from exc


def read_entries(path: Path) -> list[Entry]:
    """Return the entries of a report (``report.json``, or its folder) or of a baseline.

    Raises:
        ConfigError: it cannot be read, or is neither.
    """
    data = read_json(report_file(path), most_bytes=MOST_BYTES)
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        return _baseline(data, path).results
    return [_entry(result) for result in report_of(data, str(path)).results]


def with_drift(report: Report, baseline: Baseline) -> Report:
    """Return a report whose results tell, as findings, what drifted since a baseline; no status changes."""
    entries = {entry.place: entry for entry in baseline.results}

    def told(place: int) -> Result:
        result = report.results[place]
        if result.status == "not_run":
            return result
        entry = entries.get((result.case, result.runtime))
        findings = drifts(entry, _entry(result), bounds_of(result), baseline.name)
        return replace(result, findings=(*result.findings, *findings))

    return replace(report, results=LazyResults(len(report.results), told))


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
    for change in value_changes(entry.metrics, now.metrics, bounds):
        yield f"baseline {name}: {change.text}"


@dataclass(frozen=True, slots=True)
class ValueChange:
    """The value of a metric in two runs; None: it was not measured there."""

    metric: str
    before: float | None
    after: float | None
    bound: float | None = None
    """Of the run whose value is the greater one, if it has one."""

    @property
    def text(self) -> str:
        """What changed, in one sentence without an end."""
        before, after = self.before, self.after
        if before is None or after is None:
            when = "was measured then, and is not now" if after is None else "is measured now, and was not then"
            return f"{self.metric} {when}"
        if not (math.isfinite(before) and math.isfinite(after)) or after == 0:
            return f"{self.metric} was {before:.3g}, and is {after:.3g} now"
        if before == 0:
            return f"{self.metric} was 0, and is {after:.3g} now, of a bound of {self.bound:.3g}"
        if after < before:
            return f"{self.metric} fell {before / after:.3g} times, from {before:.3g} to {after:.3g}"
        within = f", within its bound {self.bound:.3g}" if self.bound is not None and after <= self.bound else ""
        return f"{self.metric} grew {after / before:.3g} times, from {before:.3g} to {after:.3g}{within}"

    @property
    def reversed(self) -> ValueChange:
        """The change from the later run to the earlier one."""
        return replace(self, before=self.after, after=self.before)


def value_changes(
    before: Mapping[str, float | str], after: Mapping[str, float | str], bounds: Mapping[str, float]
) -> Iterator[ValueChange]:
    """Yield the metrics whose values became worse: by more than `DRIFT`, not finite, or no longer measured.

    Args:
        before: values by metric; numbers that are not finite may be texts.
        after: of the later run.
        bounds: of the later run, for the metrics that have one.
    """
    for metric, value in before.items():
        bound = bounds.get(metric)
        if metric not in after:
            yield ValueChange(metric, float(value), None)
            continue
        then, now = float(value), float(after[metric])
        broken = math.isfinite(then) and not math.isfinite(now)
        appeared = then == 0 and bound is not None and now > OF_ZERO * bound
        if broken or appeared or (then > 0 and now > DRIFT * then):
            yield ValueChange(metric, then, now, bound)


def bounds_of(result: Result) -> dict[str, float]:
    """Return the bounds of a result's metrics."""
    return {item.metric.name: item.bound.value for item in result.gates if item.bound}


def values_of(result: Result) -> dict[str, float]:
    """Return the values of a result's metrics."""
    return {item.metric.name: item.metric.value for item in result.metrics}


def _entry(result: Result) -> Entry:
    return Entry(
        case=result.case,
        runtime=result.runtime,
        precision=result.precision,
        simulated=result.simulated,
        status=result.status,
        metrics=dict(values_of(result)),
        performance=None if result.performance is None else dict(result.performance),
    )


def _together(before: Entry, after: Entry) -> Entry:
    """Return accuracy of one entry with timings of the other; of two of a kind the later one."""
    accuracy = after if after.metrics else before
    return accuracy.model_copy(update={"performance": after.performance or before.performance})
