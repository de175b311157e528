# SPDX-License-Identifier: Apache-2.0
"""Write docs/power.md: what our verdicts find, measured by selftests, and upstream's defects (``make power``, long)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from calibration import HEADING
from foreign_files import section_of
from hit_rate import HEADING as EXPLANATIONS
from hit_rate import LEGEND, PARTS, HitRate, found_text, healthy_explanations, healthy_text
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

Written by `make power`, in parts that say when they were measured; nothing here is edited by hand.

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
    text = "measure how often explanations are right, alone: all parts, or some; others stay as they are in the page"
    parser.add_argument("--explanations", nargs="*", choices=tuple(PARTS), help=text)
    given = parser.parse_args()
    if given.explanations is not None:
        for name in given.explanations or PARTS:
            write_explanations({name: explanation_part(name, given.parts)})
        return
    sections = [part(path, names, given) for path, names in TESTED.items() if given.only in (None, path)]
    if given.only is None:
        file = ROOT / "docs" / "power.md"
        page_before = file.read_text(encoding="utf-8")
        _, heading, table = page_before.partition(HEADING)  # `make calibrate` writes that, and `make foreign` its part
        own = explanations_section({name: explanation_part(name, given.parts) for name in PARTS})
        rest = [section_of(page_before) + own, heading + table]
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


def explanation_part(name: str, parts: Path) -> str:
    """Return a part of the section about explanations, without its heading; measured unless it is there."""
    file = parts / f"explanations-{name}.md"
    if not file.is_file():
        parts.mkdir(parents=True, exist_ok=True)
        store, graphs = Store(parts / "explanations-store"), parts / f"explanations-graphs-{name}"

        def pipeline(case: Case) -> Pipeline:
            return Pipeline(case, check(case), store, Silent())

        cases = [case for path, names in EXPLAINED.items() for case in load([ROOT / path]) if case.name in names]
        if name == "healthy":
            found = [
                (case.name, variant, explanation)
                for case in cases
                for variant, explanation, _ in healthy_explanations(case, pipeline, graphs, 1001)
            ]
            text = healthy_text(found)
        else:
            rates = [HitRate(case, pipeline, graphs, anonymous=name == "unnamed") for case in cases]
            on = {"named": ("ort", "sim"), "unnamed": ("ort",)}
            text = found_text(
                name, [hit for rate in rates for hit in (rate.hits(on[name]) if name in on else rate.program_hits())]
            )
        made = f"Measured on {time.strftime('%Y-%m-%d')}; {len(cases)} cases with small random bodies."
        file.write_text(f"{text}\n\n{made}\n", encoding="utf-8")
    return file.read_text(encoding="utf-8")


def explanations_section(parts: Mapping[str, str]) -> str:
    """Return the section about explanations from its parts."""
    text = "".join(f"{heading}\n\n{parts[name]}\n" for name, heading in PARTS.items())
    return f"{EXPLANATIONS}\n\n{LEGEND}\n\n{text}"


def write_explanations(parts: Mapping[str, str]) -> None:
    """Replace parts of the section about explanations in docs/power.md."""
    file = ROOT / "docs" / "power.md"
    page = file.read_text(encoding="utf-8")
    before, _, rest = page.partition(EXPLANATIONS)
    own, heading, table = rest.partition(HEADING)
    kept = {name: own.partition(f"{title}\n\n")[2].partition("\n### ")[0] for name, title in PARTS.items()}
    text = explanations_section({name: f"{part.rstrip()}\n" for name, part in {**kept, **parts}.items()})
    file.write_text(f"{before}{text}{heading}{table}", encoding="utf-8")


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
