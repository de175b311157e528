# SPDX-License-Identifier: Apache-2.0
"""The line that says how far a run is."""

from __future__ import annotations

from qeff_validate.pipeline.executors.overview import Overview
from qeff_validate.pipeline.executors.units import Unit

UNITS = [Unit("a", "export"), Unit("a", "run", "ort"), Unit("b", "export"), Unit("b", "run", "ort")]


def test_what_is_left_is_estimated_from_earlier_runs_and_from_units_of_the_same_stage() -> None:
    known = {"b: run on ort": 100.0}
    overview = Overview(UNITS, lambda unit: known.get(unit.id), 2)
    assert overview.text(0, 1) == "0 of 2 results, 0 of 4 units, 1 worker, 0 from the store"
    overview.end(UNITS[0], 40.0, hits=2, host="x")
    assert overview.text(0, 2) == "0 of 2 results, 1 of 4 units, 2 workers, 2 from the store", "no run has ended"
    overview.end(UNITS[1], 20.0, hits=3, host="x")
    assert overview.text(1, 2) == "1 of 2 results, 2 of 4 units, 2 workers, 5 from the store, about 70 s left"
    assert overview.text(1, 1).endswith(", about 2 min left")
    overview.end(UNITS[2], 1.0, hits=0, host="y")
    overview.give_up(UNITS[3])
    assert overview.text(2, 3) == "2 of 2 results, 4 of 4 units, 3 workers on 2 hosts, 5 from the store, about 0 s left"
