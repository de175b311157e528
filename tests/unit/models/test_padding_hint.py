# SPDX-License-Identifier: Apache-2.0
"""What a failed verdict says of padding: only if every wrong row has some, and rows of full length are right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.models.padding_hint import padding_hint
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.prechecks.feed_monitor import FeedMonitor

N = 6
OUTPUTS = {"output": np.ones((N, 4), np.float32)}
SETS = st.sets(st.integers(0, N - 1))


@given(SETS, SETS)
def test_it_is_said_exactly_if_it_is_so(bad: set[int], padded: set[int]) -> None:
    said = padding_hint(bad, padded, range(N), OUTPUTS, "fp16")
    assert bool(said) == (bool(bad) and bad <= padded and len(padded) < N)


def test_rows_that_overflow_are_told_from_rows_that_are_wrong() -> None:
    said = padding_hint({1, 2}, {1, 2, 3}, range(N), OUTPUTS, "fp32")
    assert said == (
        "2 of 3 rows with padding are beyond their bounds, and all 3 rows of full length are right: padding reaches"
        " what a row gives"
    )
    broken = {"output": OUTPUTS["output"].copy()}
    broken["output"][2, 1] = np.nan
    said = padding_hint({1, 2}, {1, 2, 3}, range(N), broken, "fp16")
    assert said.startswith("2 of 3 rows with padding are wrong, 1 of them not finite, and all 3 rows of full length")
    assert "padding overflows (half precision ends at 65504; a mask of -inf or -3.4e38" in said


def test_a_session_knows_which_rows_it_was_fed_with_padding() -> None:
    class Session:
        inputs = outputs = shapes = ()

        def run(self, feeds: Any, *, fetch: Any = None) -> Any:
            return {}

    rows = TokenRows(tuple(np.array(ids, np.int64) for ids in ([5, 6, 7], [8], [], [9, 9, 9])), 0, tuple("abcd"))
    watched = FeedMonitor(Session(), rows)  # type: ignore[arg-type]
    ids = np.array([[5, 6, 7], [0, 0, 8], [0, 0, 0], [9, 9, 9]])
    watched.run({"input_ids": ids, "attention_mask": np.array([[1, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]])})
    assert watched.padded() == {1, 2}


def test_a_mask_that_overflows_in_half_precision_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}

    class Pooled(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body = Random("bert", config, 0).body()
            self.body.set_attn_implementation("eager")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)[0]
            kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
            hidden = hidden + (1 - kept) * -1e38 * 3  # finite in float32; times 0 it is 0 there, and NaN here
            return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)

    ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    names, dims = ["input_ids", "attention_mask"], {0: "batch_size", 1: "seq_len"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pooled().eval(), (ids, mask), tmp_path / "mask.onnx", dynamo=False, opset_version=17, input_names=names,
            output_names=["output"], dynamic_axes={**dict.fromkeys(names, dims), "output": {0: "batch_size"}},
        )  # fmt: skip
    case = qv.Case(
        name="mask", source="random:bert", config=config, options={"pooling": "mean", "seq_len": [64]},
        artifacts={"onnx": str(tmp_path / "mask.onnx")}, tolerance="table",
    )  # fmt: skip
    runner = Runner()
    assert runner.result(case, "ort").status == "pass"
    result = runner.result(case, "sim")
    assert result.status == "fail"
    assert "rows with padding are wrong" in result.reason.partition("; ")[0]
    assert "1 rows of full length are right: padding overflows (half precision ends at 65504" in result.reason
