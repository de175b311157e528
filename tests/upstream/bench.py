# SPDX-License-Identifier: Apache-2.0
"""Parts of the stand-ins for upstream's defects: small cases, an export cache, faulty runtimes and sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.config.case import Artifacts, Case
from qeff_validate.mutation.mutant import FaultySession
from qeff_validate.protocols import Runtime, Session, runtime
from qeff_validate.report.result import Result
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import RETAINED, Array, TensorSpec

BERT: Mapping[str, Any] = {"hidden_act": "gelu", "initializer_range": 0.2}
BUCKETS = (32, 64)

LLAMA: Mapping[str, Any] = {"eos_token_id": list(range(0, 1000, 8))}
"""One token in eight ends a text, so that generated texts end at different steps."""

LORA: Mapping[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
CHUNK = 8
PROMPTS = (
    "a river",
    "one two three four five six seven eight nine ten eleven twelve thirteen",
    "the nuts are kept in the hubcap",
    "under the jack a board is put so that it does not sink",
)
"""Of 2 to 13 words: uneven within a batch, and some longer than a chunk."""


class CasePipeline(Protocol):
    """The methods of `pipeline.case_pipeline.Pipeline` that stand-ins use."""

    def onnx(self) -> Artifact:
        """Return the exported file."""

    def inputs(self) -> Any:
        """Return the model's inputs."""

    def result(self, runtime: Runtime) -> Result:
        """Run and judge the case on a runtime."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Runs stand-ins.

    Attributes:
        pipeline: returns the pipeline of a case, such as ``Runner().pipeline``.
        folder: for edited graphs.
    """

    pipeline: Callable[[Case], CasePipeline]
    folder: Path

    def result(self, case: Case, fault: Callable[[Session], Session] | None = None, name: str = "ort") -> Result:
        """Run a case on a runtime, with a fault in its sessions."""
        return self.pipeline(case).result(runtime(name) if fault is None else FaultyRuntime(fault, name))

    def exported(self, case: Case) -> str:
        """Return the path of a case's own ONNX file."""
        return str(self.pipeline(case).onnx().path)


def embedding(pooling: str = "mean", onnx: str | None = None, **more: Any) -> Case:
    """Return a case of a small BERT, exported by TorchScript, which is faster."""
    options = {"pooling": pooling, "seq_len": list(BUCKETS)}
    return Case(
        name="upstream", source="random:bert", config=dict(BERT), options=options, artifacts=Artifacts(onnx=onnx),
        exporter="torchscript", **more,
    )  # fmt: skip


def adapters(
    onnx: str | None = None, *, method: str = "lora", peft: Mapping[str, Any] = LORA, seed: int = 0, **more: Any
) -> Case:
    """Return a case of a small Llama, by default with two seeded adapters; ``more`` are options."""
    sizes = {"max_new_tokens": 3, "prefill_seq_len": CHUNK, "ctx_len": 32, "batch_size": 4}
    options = {"prompts": list(PROMPTS), "peft_method": method, "peft": dict(peft), **sizes, **more}
    return Case(
        name="upstream", model="peft-causal-lm", source="random:llama", config=dict(LLAMA), options=options,
        artifacts=Artifacts(onnx=onnx), seed=seed,
    )  # fmt: skip


def mixed() -> Case:
    """Return a case of two adapters in one batch."""
    return adapters(mixed_batch=True)


class ExportCache:
    """Caches exports by the key that upstream hashes: the config, but neither weights, pooling nor adapters."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._files = bench, dict[str, str]()

    def onnx(self, case: Case) -> str:
        """Return the file of the first case of this config."""
        key = f"{case.model} {case.source} {sorted(case.config.items())}"
        if key not in self._files:
            self._files[key] = self._bench.exported(case)
        return self._files[key]


class FirstArtifactRuntime(FaultyRuntime):
    """A runtime that opens the first artifact again, whatever is built afterwards."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda session: session, name)
        self._first: Artifact | None = None

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open the first artifact."""
        self._first = self._first or artifact
        with super().open(self._first) as session:
            yield session


class UnknownInputsDropped(FaultySession):
    """A session that accepts inputs which its graph does not have, and drops them.

    Args:
        session: the healthy one.
        retained: arrays of all retained inputs that it claims to have.
    """

    def __init__(self, session: Session, retained: Mapping[str, Array]) -> None:
        known = {spec.name for spec in session.inputs}
        super().__init__(session, lambda _, feeds: {name: array for name, array in feeds.items() if name in known})
        unknown = {name: array for name, array in retained.items() if name not in known}
        dropped = [TensorSpec(name, array.dtype.name, array.shape) for name, array in unknown.items()]
        self.inputs = (*session.inputs, *dropped)
        self.outputs = (*session.outputs, *(TensorSpec(f"{s.name}{RETAINED}", s.dtype, s.shape) for s in dropped))


class LeftPaddingAsText(FaultySession):
    """A session that counts positions from the first column, so that padding on the left is read as text."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, type(self)._counted)
        self._columns, self._shift = 0, np.zeros(1, np.int64)

    def _counted(self, feeds: dict[str, Array]) -> dict[str, Array]:
        positions: Any = feeds["position_ids"]
        if positions.shape[1] == 1:
            self._columns = 0
            return {**feeds, "position_ids": np.where(positions >= 0, positions + self._shift[:, None], -1)}
        columns = np.arange(positions.shape[1]) + self._columns
        self._columns += positions.shape[1]
        self._shift = columns[-1] - positions[:, -1]
        return {**feeds, "position_ids": np.broadcast_to(columns, positions.shape).copy()}
