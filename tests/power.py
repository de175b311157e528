# SPDX-License-Identifier: Apache-2.0
"""Write docs/power.md: what our verdicts find, measured by selftests, and upstream's defects (``make power``, long)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calibration import HEADING
from foreign_files import section_of
from hit_rate import HEADING as EXPLANATIONS
from hit_rate import HitRate, healthy_explanations, section
from upstream.stand_ins import rows

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, check, environment, load, selftest
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Settings
from qeff_validate.report.result import finite
from qeff_validate.selftest.score import Score, markdown

ROOT = Path(__file__).resolve().parent.parent
TESTED = {
    "configs/embedding.yaml": ("bert-mean", "llama-last"),
    "configs/peft.yaml": ("llama-lora", "gpt-2-dora"),
}

HEAD = """# What the verdicts find

Written by `make power` from one run; nothing here is edited by hand.

A **mutant** is a deliberate fault of fixed size (`qeff_validate/mutation`): of the model's modules, an embedding's
pooling, an adapter's tensors, an ONNX graph, or of what a session is fed and gives. Each goes through the whole
pipeline: in float32 on PyTorch or ONNX Runtime, and in fp16 as a compiled program on the **simulated** card; none has
met a real one. It is *equivalent*, and not counted, only if its effect in float64 is below twice the noise floor of the
precision on every row. *Caught* is `fail` or `error`; an inconclusive verdict is not.

The columns of other checks are what they say of the very same outputs, with their own defaults for the precision. They
get our 32 rows and all adapters, which is more than most of them are used with. A check is worth something only if it
lets legitimate runs pass, so the second table counts those that it would have called faulty: other exporters, batch
sizes, threads, orders, paddings and optimisation levels, with {seeds} seeds, none of them in the ensemble that a floor
is measured with.

"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--parts", type=Path, default=ROOT / "build" / "power", help="where sections that are done are")
    parser.add_argument("--only", help="measure this config alone, and write no page")
    parser.add_argument("--explanations", action="store_true", help="measure how often explanations are right, alone")
    given = parser.parse_args()
    if given.explanations:
        write_explanations(explanations(given))
        return
    sections = [part(path, names, given) for path, names in TESTED.items() if given.only in (None, path)]
    if given.only is None:
        file = ROOT / "docs" / "power.md"
        page_before = file.read_text(encoding="utf-8")
        _, heading, table = page_before.partition(HEADING)  # `make calibrate` writes that, and `make foreign` its part
        rest = [section_of(page_before) + explanations(given), heading + table]
        page = [HEAD.format(seeds=given.seeds), *sections, upstream(), "", *rest]
        file.write_text("\n".join(page), encoding="utf-8")


def part(path: str, names: Sequence[str], given: argparse.Namespace) -> str:
    """Return the section of a config, measured unless it is there."""
    file: Path = given.parts / f"{Path(path).stem}.md"
    if not file.is_file():
        cases = [case for case in load([ROOT / path]) if case.name in names]
        score = tested(path, cases, given.seeds)
        versions = ", ".join(f"{name} {version}" for name, version in environment(Settings())["versions"].items())
        text = f"{markdown(score)}\nMeasured on {time.strftime('%Y-%m-%d')} with {versions}.\n"
        given.parts.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps(finite(score.plain())), encoding="utf-8")
        file.write_text(text, encoding="utf-8")
    return file.read_text(encoding="utf-8")


EXPLAINED = {
    "configs/embedding.yaml": ("bert-mean", "llama-last"),
    "configs/peft.yaml": ("llama-lora",),
}


def explanations(given: argparse.Namespace) -> str:
    """Return the section about explanations, measured unless it is there."""
    file: Path = given.parts / "explanations.md"
    if not file.is_file():
        store = Store(given.parts / "explanations-store")

        def pipeline(case: Case) -> Pipeline:
            return Pipeline(case, check(case), store, Silent())

        cases = [case for path, names in EXPLAINED.items() for case in load([ROOT / path]) if case.name in names]
        graphs = given.parts / "explanations-graphs"
        hits = [hit for case in cases for hit in HitRate(case, pipeline, graphs).hits(("ort", "sim"))]
        bare = [hit for case in cases for hit in HitRate(case, pipeline, graphs, anonymous=True).hits(("ort",))]
        programs = [hit for case in cases for hit in HitRate(case, pipeline, graphs).program_hits()]
        healthy = [
            (case.name, name, found)
            for case in cases
            for name, found, _ in healthy_explanations(case, pipeline, graphs, 1001)
        ]
        made = f"Measured on {time.strftime('%Y-%m-%d')}; {len(cases)} cases with small random bodies.\n"
        file.write_text(f"{section(hits, bare, programs, healthy)}\n{made}", encoding="utf-8")
    return file.read_text(encoding="utf-8")


def write_explanations(text: str) -> None:
    """Replace the section about explanations in docs/power.md, or add it before the calibration."""
    file = ROOT / "docs" / "power.md"
    page = file.read_text(encoding="utf-8")
    before, _, after = page.partition(EXPLANATIONS) if EXPLANATIONS in page else page.partition(HEADING)
    _, heading, table = (EXPLANATIONS + after if EXPLANATIONS in page else HEADING + after).partition(HEADING)
    file.write_text(f"{before}{text}\n{heading}{table}", encoding="utf-8")


def upstream() -> str:
    """Return the section of upstream's defects."""
    head = [
        "## Upstream's defects, as stand-ins",
        "",
        "| defect | where | verdict | what it says |",
        "|---|---|---|---|",
    ]
    found = rows(Runner().pipeline)
    cells = [" | ".join(" ".join(cell.replace("|", "/").split()) for cell in row) for row in found]
    return "\n".join([*head, *(f"| {row} |" for row in cells)])


def tested(title: str, cases: list[Case], seeds: int) -> Score:
    """Run a selftest, and say how far it is."""
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - start:6.0f} s  {text}\n")

    return selftest(cases, title=title, seeds=seeds, progress=say)


if __name__ == "__main__":
    main()
