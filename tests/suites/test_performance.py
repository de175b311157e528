# SPDX-License-Identifier: Apache-2.0
"""configs/performance.yaml: a random encoder and a random language model, timed with budgets that any machine keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qeff_validate.engine import load, perf

CASES = {case.name: case for case in load([Path(__file__).parents[2] / "configs" / "performance.yaml"])}
QUANTITIES = {
    "timed-bert": {
        "latency": ["seq_len 16, batch 1", "seq_len 16, batch 4", "seq_len 32, batch 1", "seq_len 32, batch 4"]
    },
    "timed-llama": {
        "time_to_first_token": ["prefill 8, batch 2", "prefill 24, batch 2"],
        "inter_token": ["context 8, batch 2", "context 24, batch 2"],
        "adapter_swap": ["swap, batch 2"],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_case_is_timed_where_it_has_budgets_and_where_not(name: str) -> None:
    report = perf([CASES[name]])
    states = {result.runtime: (result.status, result.simulated) for result in report.results}
    assert states == {"ort": ("pass", False), "sim": ("not_run", True)}, report.plain()
    for result in report.results:
        assert result.performance is not None
        workloads = result.performance["workloads"]
        found = {item["quantity"]: [] for item in workloads}
        for item in workloads:
            found[item["quantity"]].append(item["name"])
        # compiled programs have the shapes of the case alone
        wanted = {
            quantity: [name for name in names if result.runtime == "ort" or "batch 1" not in name]
            for quantity, names in QUANTITIES[name].items()
        }
        assert found == wanted
        decode = [item["summary"] for item in workloads if item["quantity"] == "inter_token"]
        assert all("tokens_per_s" in summary and "rows_per_s" not in summary for summary in decode)
