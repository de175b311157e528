# SPDX-License-Identifier: Apache-2.0
"""What ``make support`` has found, with the time and the versions of each run: docs/support.md is written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

FILE = Path(__file__).with_name("support.json")
VERSIONS = ("peft", "transformers", "torch", "onnxruntime")

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a pair: the worst value over its bound on each runtime, or why there is none."""

    worst: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if it passed on every runtime."""
        return not self.reasons


def run_of_now(versions: Mapping[str, str]) -> str:
    """Return the name of a run that begins now."""
    tested = ", ".join(f"{name} {versions[name]}" for name in VERSIONS)
    return f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}, {tested}"


class Results:
    """Outcomes by (method, architecture or ``random:`` type), in a file that is written after each.

    Args:
        path: JSON ``{run: {"METHOD NAME": [worst, reasons]}}``; a run is its beginning (UTC) with versions.
    """

    def __init__(self, path: Path = FILE) -> None:
        self._path = path
        self.outcomes: dict[Pair, Outcome] = {}
        self.runs: dict[Pair, str] = {}
        if path.exists():
            for run, found in json.loads(path.read_text(encoding="utf-8")).items():
                for key, (worst, reasons) in found.items():
                    method, name = key.split(" ", 1)
                    self.outcomes[method, name], self.runs[method, name] = Outcome(worst, reasons), run

    def put(self, pair: Pair, outcome: Outcome, run: str) -> None:
        """Keep an outcome of a run, in the digits that are written: the page is the same from the file."""
        rounded = {runtime: round(value, 4) for runtime, value in outcome.worst.items()}
        self.outcomes[pair], self.runs[pair] = replace(outcome, worst=rounded), run
        self._write()

    def _write(self) -> None:
        lines: dict[str, list[str]] = {}
        for (method, name), outcome in sorted(self.outcomes.items()):
            value = json.dumps([dict(outcome.worst), dict(outcome.reasons)], ensure_ascii=False)
            lines.setdefault(self.runs[method, name], []).append(f"  {json.dumps(f'{method} {name}')}: {value}")
        parts = [f" {json.dumps(run)}: {{\n" + ",\n".join(found) + "\n }" for run, found in sorted(lines.items())]
        self._path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
