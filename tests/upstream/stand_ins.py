# SPDX-License-Identifier: Apache-2.0
"""Defects of QEfficient, each as a small stand-in that has it, with our verdict on the stand-in.

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

from qeff_validate.config.case import Case
from qeff_validate.mutation.mutant import FaultySession, Patch, session_of
from qeff_validate.report.result import Result
from qeff_validate.selftest.faulty_runtime import (
    BUCKETS,
    LORA,
    Bench,
    Deaf,
    ExportCache,
    Judging,
    OpenedOnce,
    PaddingRead,
    adapters,
    embedding,
    mixed,
)
from qeff_validate.tensors import RETAINED, Array

HERE = "upstream.stand_ins"
SAID = 160


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect and what our suites are to say of it.

    Attributes:
        name: what is wrong.
        section: of ``docs/specs/upstream.md``.
        stand_in: builds something with the defect and has it judged.
        expected: the status of the verdict.
        remark: why a verdict without a reason is right.
    """

    name: str
    section: str
    stand_in: Callable[[Bench], Result]
    expected: str = "fail"
    remark: str = ""


# --- exports that are kept by too little --------------------------------------------------------------


def another_pooling(bench: Bench) -> Result:
    """Ask for ``cls`` where ``mean`` was exported before."""
    cache = ExportCache(bench)
    cache.onnx(embedding("mean"))
    return bench.judged(embedding("cls", cache.onnx(embedding("cls"))))


def other_weights(bench: Bench) -> Result:
    """Export a second checkpoint of the same config."""
    cache = ExportCache(bench)
    cache.onnx(embedding(seed=0))
    return bench.judged(embedding(onnx=cache.onnx(embedding(seed=1)), seed=1))


def another_base(bench: Bench) -> Result:
    """Export an adapter's model on a second base of the same config."""
    cache = ExportCache(bench)
    cache.onnx(adapters(seed=0))
    return bench.judged(adapters(cache.onnx(adapters(seed=1)), seed=1))


def earlier_adapters(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Serve stacks with weights of other adapters, behind the base, which has none."""
    return {
        name: np.concatenate([array[:1], array[1:, ::-1]]) if "lora_" in name else array
        for name, array in feeds.items()
    }


def old_session(bench: Bench) -> Result:
    """Compile again with another pooling, and run."""
    kept = OpenedOnce("sim")
    bench.pipeline(embedding("mean")).result(kept)
    return bench.pipeline(embedding("cls")).result(kept)


# --- embeddings --------------------------------------------------------------------------------------


def avg_of_row_0(hidden: Any, mask: Any) -> Any:
    """Average the first row's hidden states with every row's mask."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden[0] * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def max_in_place(hidden: Any, mask: Any) -> Any:
    """Write into the caller's hidden states, and take the greatest.

    Upstream's own reference pools the same tensor afterwards; ours has its own, so what is written reaches nobody.
    """
    hidden.masked_fill_(mask.unsqueeze(-1) == 0, -1e9)
    return hidden.amax(dim=1)


def mean_by_tiny_count(hidden: Any, mask: Any) -> Any:
    """Divide by a count that is held above 1e-9, which fp16 makes zero."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def pooled_by(function: str, pooling: str, name: str = "ort") -> Callable[[Bench], Result]:
    """Return a stand-in whose graph pools by a function of this module."""
    return lambda bench: bench.judged(embedding(pooling, bench.exported(embedding(f"{HERE}:{function}"))), name=name)


def cropped(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Cut every row to a bucket of 32 tokens, the greatest that was compiled."""
    return {name: array[:, : BUCKETS[0]] for name, array in feeds.items()}


def first_fit(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Pad to the first bucket that is long enough, where the greater one comes first."""
    length = next(size for size in reversed(BUCKETS) if size >= feeds["input_ids"].shape[1])
    return {name: np.pad(array, ((0, 0), (0, length - array.shape[1]))) for name, array in feeds.items()}


# --- adapters ----------------------------------------------------------------------------------------


def plain_scale(**asked: Any) -> Callable[[Bench], Result]:
    """Return a stand-in whose graph scales by alpha / r, whatever the adapter's config asks for."""

    def judged(bench: Bench) -> Result:
        case = adapters(bench.exported(adapters()), **asked)
        promised = bench.pipeline(case).inputs().adapters["base"]
        return bench.judged(case, lambda session: Deaf(session, promised))

    return judged


def merged_inputs(bench: Bench) -> str:
    """Write a graph in which one input drives the factor B of both layers: equal ones had been made one."""
    import onnx

    model = onnx.load(bench.exported(adapters()))
    names = [value.name for value in model.graph.input]
    twins = {
        name: name.replace(".layers.1.", ".layers.0.") for name in names if ".layers.1." in name and "lora_B" in name
    }
    for node in model.graph.node:
        node.input[:] = [twins.get(name, name) for name in node.input]
    for values, gone in ((model.graph.input, set(twins)), (model.graph.output, {f"{n}{RETAINED}" for n in twins})):
        kept = [value for value in values if value.name not in gone]
        del values[:]
        values.extend(kept)
    path = bench.folder / "merged_inputs.onnx"
    onnx.save(model, str(path))
    return str(path)


def missing_inputs(bench: Bench) -> Result:
    """Judge the graph as it is."""
    return bench.judged(adapters(merged_inputs(bench)))


def unheard_inputs(bench: Bench) -> Result:
    """Judge the graph behind a session that drops names which it does not know."""
    case = adapters(merged_inputs(bench))
    promised = bench.pipeline(case).inputs().adapters["base"]
    return bench.judged(case, lambda session: Deaf(session, promised))


def of_the_last_chunk(self: Any, state: Any) -> list[Array]:
    """Take every row's first token from the last chunk of the prefill, wherever its prompt ended."""
    for ids, places in self._chunks():
        out, state = self._step(ids, places, state), {}
    return [out[row] for row in range(len(self._rows))]


def uneven_batch(bench: Bench) -> Result:
    """Run prompts of different lengths in chunks."""
    from qeff_validate.models.causal_lm.decode_loop import _Batch

    with Patch() as patch:
        patch.attribute(_Batch, "_prefill", of_the_last_chunk)
        return bench.judged(adapters())


def adapter_of_prompt_0(_: FaultySession, feeds: dict[str, Array]) -> dict[str, Array]:
    """Let the first row of a batch choose for all."""
    return {**feeds, "adapter_ids": np.full_like(feeds["adapter_ids"], feeds["adapter_ids"][0])}


DEFECTS = (
    Defect("the export for another pooling is served", "2.5", another_pooling),
    Defect("the export of other weights is served", "2.5", other_weights),
    Defect("PEFT: the export of another base model is served", "2.5", another_base),
    Defect(
        "finite LoRA: the export with other adapters is served", "2.4",
        lambda bench: bench.judged(mixed(), session_of(earlier_adapters), "torch"),
    ),
    Defect("after another compilation the old session answers", "2.1", old_session),
    Defect("`avg` pools every row from row 0", "2.2", pooled_by("avg_of_row_0", "avg")),
    Defect("`max` writes -1e9 into its input, and returns it", "2.2", pooled_by("max_in_place", "max")),
    Defect("`mean` divides by max(count, 1e-9): 0 in fp16", "2.2", pooled_by("mean_by_tiny_count", "mean", "sim")),
    Defect("longer than every bucket: cut without a word", "2.1", lambda b: b.judged(embedding(), session_of(cropped))),
    Defect(
        "the first bucket that fits is taken, not the smallest", "2.1",
        lambda bench: bench.judged(embedding(), session_of(first_fit)), "pass",
        "a cost, no error: the vectors are the same in every bucket, so a verdict on outputs must pass",
    ),
    Defect("equal adapter inputs are made one: 6 of 8 are left", "2.3", missing_inputs, "error"),
    Defect("the same, and unknown names are dropped: two layers, one buffer", "2.3", unheard_inputs),
    Defect("uneven batch, chunked prefill: first tokens from the last chunk", "2.3", uneven_batch),
    Defect(
        "left padding is read as text", "2.3",
        lambda bench: bench.judged(adapters(padding_side="left"), PaddingRead),
    ),
    Defect("rsLoRA scaled by alpha / r", "2.4", plain_scale(method="rslora")),
    Defect("alpha_pattern ignored", "2.4", plain_scale(peft={**LORA, "alpha_pattern": {"v_proj": 24}})),
    Defect("DoRA's magnitudes ignored", "2.4", plain_scale(method="dora")),
    Defect(
        "the adapter of prompt 0 serves the whole batch", "2.4",
        lambda bench: bench.judged(mixed(), session_of(adapter_of_prompt_0), "torch"),
    ),
)  # fmt: skip


def rows(pipeline: Callable[[Case], Judging]) -> list[tuple[str, str, str, str]]:
    """Judge all stand-ins.

    Args:
        pipeline: makes the pipeline of a case, such as ``Runner().pipeline``.

    Returns:
        For each defect its name, its section, our status, and what was said: the first 160 characters of the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pipeline, Path(folder))
        judged = [(defect, defect.stand_in(bench)) for defect in DEFECTS]
    return [
        (defect.name, defect.section, result.status, " ".join((result.reason or defect.remark).split())[:SAID])
        for defect, result in judged
    ]
