# SPDX-License-Identifier: Apache-2.0
"""Write docs/power.md: what our verdicts find, measured by selftests, and upstream's defects (``make power``, long)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from qeff_validate.case import Case
from qeff_validate.diagnose.score import Score, markdown
from qeff_validate.diagnose.upstream import rows
from qeff_validate.engine import Runner, environment, load, selftest
from qeff_validate.protocols import Settings

ROOT = Path(__file__).resolve().parent.parent
TESTED = {
    "configs/embedding.yaml": ("bert-mean", "llama-last"),
    "configs/peft.yaml": ("llama-lora", "gpt-2-dora"),
}

HEAD = """# What the verdicts find

Written by `make power` from one run; nothing here is edited by hand.

A **mutant** is a deliberate fault of fixed size (`qeff_validate/diagnose`): of the model's modules, an embedding's
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
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "power.md")
    given = parser.parse_args()
    parts = [HEAD.format(seeds=given.seeds)]
    for path, names in TESTED.items():
        cases = [case for case in load([ROOT / path]) if case.name in names]
        parts += [markdown(tested(path, cases, given.seeds)), ""]
    parts += [
        "## Upstream's defects, as stand-ins",
        "",
        "| defect | where | verdict | what it says |",
        "|---|---|---|---|",
    ]
    runner = Runner()
    found = rows(runner.pipeline)
    parts += [f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in row)} |" for row in found]
    versions = environment(Settings())["versions"]
    parts += [
        "",
        f"Measured on {time.strftime('%Y-%m-%d')} with {', '.join(f'{k} {v}' for k, v in versions.items())}.",
        "",
    ]
    given.out.write_text("\n".join(parts), encoding="utf-8")


def tested(title: str, cases: list[Case], seeds: int) -> Score:
    """Run a selftest, and say how far it is."""
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - start:6.0f} s  {text}\n")

    return selftest(cases, title=title, seeds=seeds, progress=say)


if __name__ == "__main__":
    main()
