# SPDX-License-Identifier: Apache-2.0
"""Defects of QEfficient, each reproduced by a small stand-in, and the verdict that we expect on it.

The defects were verified at commit ebf55e815 of github.com/quic/efficient-transformers (2026-08-20) and are numbered as
in ``docs/specs/upstream.md``; its own tests do not look where they show (section 5 there).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from upstream.bench import (
    BUCKETS,
    LORA,
    Bench,
    CasePipeline,
    ExportCache,
    FirstArtifactRuntime,
    LeftPaddingAsText,
    UnknownInputsDropped,
    adapters,
    embedding,
    mixed,
)

from qeff_validate.config.case import Case
from qeff_validate.mutation.mutant import FaultySession, Patch, session_of
from qeff_validate.report.result import Result
from qeff_validate.tensors import RETAINED, Array

HERE = "upstream.stand_ins"
REASON_LENGTH = 160


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect and the verdict that we expect on it.

    Attributes:
        name: what is wrong.
        section: of ``docs/specs/upstream.md``.
        stand_in: builds something with the defect and runs it.
        expected: the status of the verdict.
        remark: why a verdict without a reason is correct.
    """

    name: str
    section: str
    stand_in: Callable[[Bench], Result]
    expected: str = "fail"
    remark: str = ""


# --- export caches with too coarse a key --------------------------------------------------------------


def another_pooling(bench: Bench) -> Result:
    """Ask for ``cls`` after ``mean`` was exported."""
    cache = ExportCache(bench)
    cache.onnx(embedding("mean"))
    return bench.result(embedding("cls", cache.onnx(embedding("cls"))))


def other_weights(bench: Bench) -> Result:
    """Export a second checkpoint of the same config."""
    cache = ExportCache(bench)
    cache.onnx(embedding(seed=0))
    return bench.result(embedding(onnx=cache.onnx(embedding(seed=1)), seed=1))


def another_base(bench: Bench) -> Result:
    """Export an adapter's model on a second base of the same config."""
    cache = ExportCache(bench)
    cache.onnx(adapters(seed=0))
    return bench.result(adapters(cache.onnx(adapters(seed=1)), seed=1))


def earlier_adapters(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Serve stacked weights with the adapters in reverse order; the base, which has none, stays first."""
    return {
        name: np.concatenate([array[:1], array[1:, ::-1]]) if "lora_" in name else array
        for name, array in feeds.items()
    }


def old_session(bench: Bench) -> Result:
    """Compile again with another pooling, and run."""
    stale = FirstArtifactRuntime("sim")
    bench.pipeline(embedding("mean")).result(stale)
    return bench.pipeline(embedding("cls")).result(stale)


# --- embeddings --------------------------------------------------------------------------------------


def avg_of_row_0(hidden: Any, mask: Any) -> Any:
    """Average the hidden states of the first row with the mask of every row."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden[0] * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def max_in_place(hidden: Any, mask: Any) -> Any:
    """Write into the caller's hidden states, and return the maximum.

    Upstream's reference pools the same tensor afterwards; ours has its own tensor, so it is not affected.
    """
    hidden.masked_fill_(mask.unsqueeze(-1) == 0, -1e9)
    return hidden.amax(dim=1)


def mean_by_tiny_count(hidden: Any, mask: Any) -> Any:
    """Divide by a count that is clamped to at least 1e-9, which is zero in fp16."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def pooled_by(function: str, pooling: str, name: str = "ort") -> Callable[[Bench], Result]:
    """Return a stand-in whose graph pools by a function of this module."""
    return lambda bench: bench.result(embedding(pooling, bench.exported(embedding(f"{HERE}:{function}"))), name=name)


def cropped(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Cut every row to 32 tokens, as if that were the greatest bucket."""
    return {name: array[:, : BUCKETS[0]] for name, array in feeds.items()}


def first_fit(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Pad to the first bucket that is long enough, when the greater one comes first."""
    length = next(size for size in reversed(BUCKETS) if size >= feeds["input_ids"].shape[1])
    return {name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in feeds.items()}


# --- adapters ----------------------------------------------------------------------------------------


def plain_scale(**asked: Any) -> Callable[[Bench], Result]:
    """Return a stand-in whose graph scales by alpha / r, whatever the adapter's config asks for."""

    def stand_in(bench: Bench) -> Result:
        case = adapters(bench.exported(adapters()), **asked)
        retained = bench.pipeline(case).inputs().adapters["base"]
        return bench.result(case, lambda session: UnknownInputsDropped(session, retained))

    return stand_in


def merged_inputs(bench: Bench) -> str:
    """Write a graph in which one input is the factor B of both layers, because equal initializers were merged."""
    import onnx

    model = onnx.load(bench.exported(adapters()))
    names = [value.name for value in model.graph.input]
    twins = {
        name: name.replace(".layers.1.", ".layers.0.") for name in names if ".layers.1." in name and "lora_B" in name
    }
    for node in model.graph.node:
        node.input[:] = [twins.get(name, name) for name in node.input]
    for values, removed in ((model.graph.input, set(twins)), (model.graph.output, {f"{n}{RETAINED}" for n in twins})):
        remaining = [value for value in values if value.name not in removed]
        del values[:]
        values.extend(remaining)
    path = bench.folder / "merged_inputs.onnx"
    onnx.save(model, str(path))
    return str(path)


def missing_inputs(bench: Bench) -> Result:
    """Run the graph as it is."""
    return bench.result(adapters(merged_inputs(bench)))


def unheard_inputs(bench: Bench) -> Result:
    """Run the graph behind a session that drops unknown inputs."""
    case = adapters(merged_inputs(bench))
    retained = bench.pipeline(case).inputs().adapters["base"]
    return bench.result(case, lambda session: UnknownInputsDropped(session, retained))


def of_the_last_chunk(self: Any, state: Any) -> list[Array]:
    """Take the first token of every row from the last chunk of the prefill, even if its prompt ended before."""
    from qeff_validate.models.causal_lm.decoder_feeds import prefill_chunks

    rows, kept = dict(enumerate(self._rows)), dict(enumerate(self._kept))
    for ids, positions in prefill_chunks(rows, kept, self._sizes, self._plan):
        out, state = self._step(ids, positions, state), {}
    return [out[row] for row in range(len(self._rows))]


def uneven_batch(bench: Bench) -> Result:
    """Run prompts of different lengths in chunks."""
    from qeff_validate.models.causal_lm.decode_loop import _Batch

    with Patch() as patch:
        patch.attribute(_Batch, "_prefill", of_the_last_chunk)
        return bench.result(adapters())


def adapter_of_prompt_0(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Serve all rows with the adapter of the first row."""
    return {**feeds, "adapter_ids": np.full_like(feeds["adapter_ids"], feeds["adapter_ids"][0])}


DEFECTS = (
    Defect("the export for another pooling is served", "2.5", another_pooling),
    Defect("the export of other weights is served", "2.5", other_weights),
    Defect("PEFT: the export of another base model is served", "2.5", another_base),
    Defect(
        "finite LoRA: the export with other adapters is served", "2.4",
        lambda bench: bench.result(mixed(), session_of(earlier_adapters), "torch"),
    ),
    Defect("after another compilation the old session answers", "2.1", old_session),
    Defect("`avg` pools every row from row 0", "2.2", pooled_by("avg_of_row_0", "avg")),
    Defect("`max` writes -1e9 into its input, and returns it", "2.2", pooled_by("max_in_place", "max")),
    Defect("`mean` divides by max(count, 1e-9): 0 in fp16", "2.2", pooled_by("mean_by_tiny_count", "mean", "sim")),
    Defect("longer than every bucket: cut without a word", "2.1", lambda b: b.result(embedding(), session_of(cropped))),
    Defect(
        "the first bucket that fits is taken, not the smallest", "2.1",
        lambda bench: bench.result(embedding(), session_of(first_fit)), "pass",
        "a cost, no error: the vectors are the same in every bucket, so a verdict on outputs must pass",
    ),
    Defect("equal adapter inputs are made one: 6 of 8 are left", "2.3", missing_inputs, "error"),
    Defect("the same, and unknown names are dropped: two layers, one buffer", "2.3", unheard_inputs),
    Defect("uneven batch, chunked prefill: first tokens from the last chunk", "2.3", uneven_batch),
    Defect(
        "left padding is read as text", "2.3",
        lambda bench: bench.result(adapters(padding_side="left"), LeftPaddingAsText),
    ),
    Defect("rsLoRA scaled by alpha / r", "2.4", plain_scale(method="rslora")),
    Defect("alpha_pattern ignored", "2.4", plain_scale(peft={**LORA, "alpha_pattern": {"v_proj": 24}})),
    Defect("DoRA's magnitudes ignored", "2.4", plain_scale(method="dora")),
    Defect(
        "the adapter of prompt 0 serves the whole batch", "2.4",
        lambda bench: bench.result(mixed(), session_of(adapter_of_prompt_0), "torch"),
    ),
)  # fmt: skip


def rows(pipeline: Callable[[Case], CasePipeline]) -> list[tuple[str, str, str, str]]:
    """Run all stand-ins.

    Args:
        pipeline: returns the pipeline of a case, such as ``Runner().pipeline``.

    Returns:
        For each defect its name, its section, our status, and the first 160 characters of the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pipeline, Path(folder))
        results = [(defect, defect.stand_in(bench)) for defect in DEFECTS]
    return [
        (defect.name, defect.section, result.status, " ".join((result.reason or defect.remark).split())[:REASON_LENGTH])
        for defect, result in results
    ]
