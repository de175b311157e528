# SPDX-License-Identifier: Apache-2.0
"""Methods of PEFT on architectures (configs/peft.yaml), and what docs/support.md says of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ARCHITECTURES, BODIES_HEADING, METHODS, OTHERS, PAGE, RUNTIMES, page
from support_decoders import SOURCE
from support_results import FILE, Outcome, Results

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, load
from qeff_validate.models.adapters.config import REFUSED

EVERY = [case for case in load([Path(__file__).parents[2] / "configs" / "peft.yaml"]) if "random:" in case.source]
MEASURED = frozenset({"phi-3-loha", "mistral-lora-mixed"})
"""Cases with measured bounds here; the others have the table's: measuring them all takes minutes of CI."""
NOT_EXPORTED = frozenset({"llama-randlora", "mistral-rslora", "qwen2-oft", "qwen3-adalora"})
"""Cases whose method and whose architecture other cases export; these run as PyTorch modules here."""
CASES = [case for case in EVERY if not case.options.get("mixed_batch")]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_adapted_body_agrees_with_peft(case: Case, runner: Runner) -> None:
    if case.name not in MEASURED:
        case = case.model_copy(update={"tolerance": "table"})
    results = [runner.result(case, name) for name in (["torch"] if case.name in NOT_EXPORTED else RUNTIMES)]
    assert {result.status for result in results} == {"pass"}, [result.reason for result in results]
    assert all(result.compared >= 60 for result in results)  # base, two adapters, and base and one again


def test_config_has_each_method_twice_and_each_architecture() -> None:
    sources = {f"random:{architecture.source}" for architecture in ARCHITECTURES.values()}
    assert {case.source for case in CASES} == sources
    methods = [case.options["peft_method"] for case in CASES]
    assert {method: methods.count(method) for method in methods} == dict.fromkeys(METHODS, 2)
    exported = [case for case in CASES if case.name not in NOT_EXPORTED]
    assert {case.source for case in exported} == sources
    assert {case.options["peft_method"] for case in exported} == set(METHODS)


# --- docs/support.md -------------------------------------------------------------------------------


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """First cell and others of each row of the table under a heading, without its head."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip("|").split("|") for line in section[1].splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines[:1] + lines[2:]}


def test_support_names_every_pair_and_at_least_120_pass() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = [rows(text, runtime) for runtime in RUNTIMES]
    notes = set(re.findall(r"^(\d+)\. \S", text, flags=re.MULTILINE))
    passed = 0
    for table in tables:
        assert table.pop("") == list(METHODS)
        assert list(table) == list(ARCHITECTURES)
    for name in ARCHITECTURES:
        for cells in zip(*(table[name] for table in tables), strict=True):
            numbers = [cell for cell in cells if re.fullmatch(r"\d\.\d\d", cell)]
            assert all(float(cell) <= 1 for cell in numbers)
            assert {cell.strip("[]") for cell in cells if cell not in numbers} <= notes
            passed += len(numbers) == len(RUNTIMES)
    assert passed >= 120
    assert f"**{passed} of {len(METHODS) * len(ARCHITECTURES)} pairs pass**" in text


def test_support_says_of_every_other_method_whether_it_works() -> None:
    others = rows(PAGE.read_text(encoding="utf-8"), "Other methods, on Llama")
    assert others.keys() - {"method"} == OTHERS.keys() | REFUSED.keys()
    assert all(cells[0] for cells in others.values())
    assert {"boft", "hra", "prefix_tuning", "prompt_tuning"} <= others.keys()


def test_support_is_written_from_what_runs_have_kept() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(BODIES_HEADING)[0] == f"{page(Results())}\n"


def test_outcomes_are_kept_with_their_run_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "support.json"
    path.write_text(FILE.read_text(encoding="utf-8"), encoding="utf-8")
    results = Results(path)
    pair = ("lora", f"{SOURCE}llama")
    results.put(pair, Outcome({"torch": 0.5, "ort": 0.234996}, {"sim": "fail: a reason"}), "2030-01-01 00:00, peft 9")
    again = Results(path)
    assert (again.runs[pair], again.outcomes[pair].passed) == ("2030-01-01 00:00, peft 9", False)
    others = {key: run for key, run in results.runs.items() if key != pair}
    assert {key: run for key, run in again.runs.items() if key != pair} == others
    text = page(again)
    assert text == page(results), "what is written during a run is what its file gives"
    assert again.outcomes == results.outcomes
    assert "| `llama` | pass | pass | fail | a reason |" in text
    assert f"Of {max(others.values())}:" in text
