# SPDX-License-Identifier: Apache-2.0
"""Whether a row without a token reaches its neighbours: on made-up sessions, and on graphs as others export them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import cli, report_in, said

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.models.embedding.filler_rows import rows_reached
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import runtime
from qeff_validate.tensors import Tensors

SIZE = 4


def rows(*lengths: int) -> TokenRows:
    ids = tuple(np.arange(1, length + 1, dtype=np.int64) + at for at, length in enumerate(lengths))
    return TokenRows(ids, 0, tuple(f"text {at}" for at in range(len(lengths))))


Compute = Callable[[TokenRows], np.ndarray]


def alone(batch: TokenRows) -> np.ndarray:
    """Each row by itself; one without a token is 0/0."""
    with np.errstate(invalid="ignore"):
        return np.array([[np.float64(row.sum()) / row.size, row.size] for row in batch.ids])


def leaking(batch: TokenRows) -> np.ndarray:
    """A token-less row spoils the row behind it."""
    found = alone(batch)
    for at, row in enumerate(batch.ids):
        if row.size == 0:
            found[(at + 1) % len(found), 1] += 1
    return found


def scaled_together(batch: TokenRows) -> np.ndarray:
    """All rows share a scale, as where activations are quantized over a whole batch."""
    found = np.nan_to_num(alone(batch))
    return found * (1 + found.mean())


def reached(compute: Compute, inputs: TokenRows) -> tuple[Any, Any]:
    runs: list[int] = []

    def infer(batch: TokenRows) -> Tensors:
        assert all(row.size for row in batch.ids)
        assert len(batch.ids) <= SIZE
        runs.append(len(batch.ids))
        return {"output": compute(batch)}

    def sliced(start: int) -> TokenRows:
        return TokenRows(inputs.ids[start : start + SIZE], 0, inputs.texts[start : start + SIZE])

    actual = np.concatenate([compute(sliced(start)) for start in range(0, len(inputs.ids), SIZE)])
    found = rows_reached(infer, inputs, SIZE, {"output": actual})
    return found, runs


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ((3, 2, 4, 1, 5, 0), [2]), ((3, 0, 4, 0, 5, 1, 2), [4]), ((0, 0, 0, 0, 3), []), ((3, 2, 1), []),
        ((3, 2, 4, 1, 0), []),
    ],
)  # fmt: skip
def test_rows_that_stand_alone_are_not_reached_and_only_batches_with_a_filler_run_again(
    lengths: tuple[int, ...], runs: list[int]
) -> None:
    assert reached(alone, rows(*lengths)) == (([], ()), runs)


def test_the_row_that_a_filler_spoils_is_named() -> None:
    (found, findings), runs = reached(leaking, rows(3, 2, 4, 1, 5, 0, 6, 7))
    assert (found, findings, runs) == ([6], (), [4, 4])


def test_rows_that_depend_on_every_neighbour_are_a_finding() -> None:
    (found, (finding,)), _ = reached(scaled_together, rows(3, 2, 4, 0))
    assert found == []
    assert finding.startswith("3 rows depend on the other rows of their batch, whichever these are (row 0: 'text 0')")


def test_a_nan_that_was_there_before_is_no_change() -> None:
    def broken(batch: TokenRows) -> np.ndarray:
        found = alone(batch)
        found[0] = np.nan
        return found

    assert reached(broken, rows(3, 2, 0))[0] == ([], ())


# --- graphs of others ---------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "vocab_size": 97,
}
TEXTS = ["a b c", "d e", "the man", "x y z a b c d e f g h i j"]


@pytest.fixture(scope="module")
def clamped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a mean pooling with the usual clamp, as the field writes it, and variants of it."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("graphs")

    class Pooled(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, variant: str) -> None:
            super().__init__()
            self.body, self.variant = Random("bert", CONFIG, 0).body(), variant
            self.body.set_attn_implementation("eager")

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)[0]
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            if self.variant == "leaking":  # a row takes a part of the one behind it
                empty = (attention_mask.sum(1, keepdim=True) == 0).to(hidden.dtype)
                pooled = pooled + 0.3 * torch.cat([empty[1:], empty[:1]])
            return pooled

    def export(variant: str) -> Path:
        path = folder / f"{variant}.onnx"
        if not path.exists():
            ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
            mask[1, 4:] = 0
            names = ["input_ids", "attention_mask"]
            dims = {0: "batch_size", 1: "seq_len"}
            axes = {**dict.fromkeys(names, dims), "output": {0: "batch_size"}}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    Pooled(variant).eval(), (ids, mask), path, dynamo=False, dynamic_axes=axes, opset_version=17,
                    input_names=names, output_names=["output"],
                )  # fmt: skip
        return path

    return export


def case(path: Path | None, **more: Any) -> qv.Case:
    return qv.Case(
        name="others", source="random:bert", config=CONFIG, inputs={"texts": TEXTS}, tolerance="table",
        options={"pooling": "mean", "normalize": False, "seq_len": [16], "batch_size": 8},
        artifacts={"onnx": None if path is None else str(path)}, exporter="torchscript", **more,
    )  # fmt: skip


def test_the_usual_clamp_passes_on_a_device_and_the_empty_row_is_told(
    clamped: Callable[[str], Path], tmp_path: Path
) -> None:
    text = f"""\
cases:
  - name: others
    source: random:bert
    config: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 37, vocab_size: 97}}
    inputs: {{texts: {TEXTS}}}
    options: {{pooling: mean, normalize: false, seq_len: [16], batch_size: 8}}
    artifacts: {{onnx: {clamped("clamped")}}}
    tolerance: table
    runtimes: [ort, sim]
"""
    (tmp_path / "others.yaml").write_text(text, encoding="utf-8")
    done = cli("run", tmp_path / "others.yaml", "--report", tmp_path / "report", cwd=tmp_path)
    assert done.returncode == 0, said(done)
    ort, sim = report_in(tmp_path / "report")["results"]
    assert (ort["status"], ort["findings"]) == ("pass", [])
    assert sim["status"] == "pass"
    (finding,) = sim["findings"]
    assert finding.startswith("output: 1 of 1 rows without a token are not finite (row 4 ('(a row without a token)'))")
    assert finding.endswith("other rows of their batch do not change with them")
    assert sim["coverage"] == {"planned": 4, "compared": 4}
    assert {"output.rel_l2", "output.cosine"} <= {item["name"] for item in sim["metrics"]}
    assert "others-sim: finding: output: 1 of 1 rows" in said(done)
    assert "others-sim: finding: output: 1 of 1 rows" in (tmp_path / "report" / "report.md").read_text()


def test_an_empty_row_that_reaches_its_neighbour_fails(clamped: Callable[[str], Path]) -> None:
    result = Runner().result(case(clamped("leaking")), "ort")
    assert result.status == "fail"
    assert "rows.changed_by_filler 1, allowed 0 (exact), worst row 3" in result.reason


def test_a_file_that_this_library_exported_is_judged_by_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    from qeff_validate.runtimes.ort import OrtSession

    runner = Runner()
    path = runner.pipeline(case(None)).onnx().path
    run = OrtSession.run

    def noisy(self: OrtSession, feeds: Any, **more: Any) -> Any:
        out = run(self, feeds, **more)["output"].copy()
        out[feeds["attention_mask"].sum(1) == 0] = np.nan
        return {"output": out}

    monkeypatch.setattr(OrtSession, "run", noisy)
    result = runner.pipeline(case(path)).result(runtime("ort"))  # in this process, where the session is patched
    assert result.status == "fail"
    assert "output.tokenless_rows 32, allowed 0" in result.reason
