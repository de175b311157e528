# SPDX-License-Identifier: Apache-2.0
"""The plan of a run and the order of its units; nothing is run."""

from __future__ import annotations

import heapq
from types import SimpleNamespace
from typing import Any

import pytest

from qeff_validate.config.case import Case
from qeff_validate.pipeline.executors.schedule import MOST_TRIES, Schedule
from qeff_validate.pipeline.executors.units import Unit, plan
from qeff_validate.protocols import Capabilities

KINDS = {"torch": "module", "ort": "onnx", "sim": "qpc", "ai100": "qpc"}


def runtime(name: str) -> Any:
    able = Capabilities(compute=None, simulated=name == "sim")
    reason = "no card" if name == "ai100" else None
    return SimpleNamespace(name=name, kind=KINDS[name], capabilities=able, probe=lambda: reason)


def case(name: str, **more: Any) -> Case:
    return Case(name=name, source="random:bert", **more)


def units(*cases: Case, runtimes: tuple[str, ...] = ("torch", "ort", "sim")) -> list[Unit]:
    return plan([(one, name) for one in cases for name in runtimes], runtime)


def test_each_stage_waits_for_what_it_takes_from_the_store() -> None:
    needs = {unit.id: [need.removeprefix("a: ") for need in unit.needs] for unit in units(case("a"))}
    assert needs == {
        "a: reference": [],
        "a: measure": ["reference"],
        "a: export": [],
        "a: run on torch": ["reference", "measure"],
        "a: run on ort": ["reference", "measure", "export"],
        "a: compile on sim": ["export"],
        "a: run on sim": ["reference", "measure", "compile on sim"],
    }


@pytest.mark.parametrize(
    ("given", "absent"),
    [
        ({"tolerance": "table"}, {"measure"}),
        ({"artifacts": {"reference": "r.safetensors"}}, {"measure"}),
        ({"artifacts": {"onnx": "m.onnx"}}, {"export"}),
        ({"artifacts": {"onnx": "m.onnx", "qpc": "q"}}, {"export", "compile"}),
    ],
)
def test_stages_that_a_case_does_not_have_are_not_planned(given: dict[str, Any], absent: set[str]) -> None:
    stages = {unit.stage for unit in units(case("a", **given))}
    assert {"reference", "measure", "export", "compile", "run"} - stages == absent


def test_runtime_that_cannot_be_used_only_tells_why() -> None:
    assert [unit.id for unit in units(case("a"), runtimes=("ai100",))] == ["a: run on ai100"]
    assert not any("ai100" in unit.id and unit.stage == "compile" for unit in units(case("a"), runtimes=tuple(KINDS)))


def test_worker_stays_with_its_case_then_begins_another_then_helps() -> None:
    schedule = Schedule(units(case("a"), case("b", seed=1), case("c", seed=2), runtimes=("torch",)))
    assert [schedule.take(worker).id for worker in (1, 2)] == ["a: reference", "b: reference"]
    order = []
    for _ in range(6):
        schedule.end(2)
        following = schedule.take(2)
        order.append(following.id if following else None)
        if following is None:
            break
    assert order == ["b: measure", "b: run on torch", "c: reference", "c: measure", "c: run on torch", None]
    schedule.end(1)
    assert schedule.take(2).id == "a: measure", "there is no other case, so it helps"


def test_cases_that_share_a_body_do_not_wait_for_each_others_lock() -> None:
    schedule = Schedule(units(case("a"), case("b", options={"pooling": "max"}), runtimes=("ort",)))
    assert schedule.take(1).id == "a: reference"
    assert schedule.take(2).id == "b: export", "the reference of b reads what that of a writes"
    schedule.end(2)
    assert schedule.take(2).id == "a: export"


def test_memory_of_units_that_run_together_stays_below_the_limit_and_a_greater_one_runs_alone() -> None:
    planned = [Unit("a", "export"), Unit("b", "export"), Unit("c", "export")]
    schedule = Schedule(planned, {"a: export": 9.0, "b: export": 2.0, "c: export": 1.0}, limit=3.0)
    assert schedule.take(1).id == "a: export"
    assert schedule.take(2) is None
    schedule.end(1)
    assert [schedule.take(worker).id for worker in (1, 2)] == ["b: export", "c: export"]


def test_each_card_has_one_unit_and_a_unit_as_many_cards_as_it_was_compiled_for() -> None:
    planned = [Unit("a", "run", "ai100", cards=1), Unit("b", "run", "ai100", cards=2), Unit("c", "run", "ort")]
    schedule = Schedule(planned, cards=(4, 7))
    assert (schedule.take(1).case, schedule.cards_of(1)) == ("a", [4])
    assert (schedule.take(2).case, schedule.cards_of(2)) == ("c", []), "b waits for two cards"
    schedule.lose(1, "was killed by SIGKILL")
    assert (schedule.take(3).case, schedule.cards_of(3)) == ("a", [7]), "the cards take turns"
    schedule.end(3)
    assert (schedule.take(3).case, schedule.cards_of(3)) == ("b", [4, 7])


@pytest.mark.parametrize(("cards", "given"), [((), []), ((5,), [5])])
def test_unit_that_wants_more_cards_than_there_are_runs_alone_and_says_so_itself(
    cards: tuple[int, ...], given: list[int]
) -> None:
    schedule = Schedule([Unit(name, "run", "ai100", cards=3) for name in "ab"], cards=cards)
    assert (schedule.take(1).case, schedule.cards_of(1)) == ("a", given)
    assert schedule.take(2) is None


def test_withdrawn_card_is_given_to_no_unit_and_the_last_one_stays() -> None:
    schedule = Schedule([Unit(name, "run", "ai100", cards=1) for name in "ab"], cards=(4, 7))
    assert schedule.withdraw([4])
    assert (schedule.take(1).case, schedule.cards_of(1)) == ("a", [7])
    assert not schedule.withdraw([7])
    assert schedule.take(2) is None, "its card is taken"


def test_worker_takes_only_what_fits_it() -> None:
    schedule = Schedule([Unit("a", "run", "ai100", cards=1), Unit("b", "run", "ort")], cards=(4,))
    assert schedule.take(1, lambda unit: not unit.cards).case == "b"
    assert schedule.take(2, lambda unit: not unit.cards) is None
    assert schedule.take(2).case == "a"


def test_lost_unit_comes_first_again_and_is_given_up_after_three_times() -> None:
    schedule = Schedule(units(case("a"), runtimes=("torch",)))
    for attempt in range(1, MOST_TRIES + 1):
        assert schedule.take(attempt).id == "a: reference"
        given_up = schedule.lose(attempt, "was killed by SIGKILL")
        assert (given_up is not None) == (attempt == MOST_TRIES)
    assert schedule.losses == {"a: reference": ["was killed by SIGKILL"] * MOST_TRIES}
    assert schedule.take(9).id == "a: measure", "what needs it tries by itself"
    assert schedule.lose(7, "idle") is None, "a worker without a unit"


def test_sixty_four_workers_reach_nine_tenths_of_the_ideal() -> None:
    """Simulated time: each unit takes 1; 300 cases of 5 units, of which 3 in a row are the longest chain."""
    schedule = Schedule(units(*(case(f"c{number}", seed=number) for number in range(300)), runtimes=("ort",)))
    total, workers = len(schedule.units), 64
    clock, events = 0.0, list[tuple[float, int]]()
    while not schedule.done:
        for worker in range(workers):
            if not schedule.is_busy(worker) and schedule.take(worker) is not None:
                heapq.heappush(events, (clock + 1, worker))
        clock, worker = heapq.heappop(events)
        schedule.end(worker)
    assert total / workers / clock >= 0.9
