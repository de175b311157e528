# SPDX-License-Identifier: Apache-2.0
"""What stand-ins of upstream's defects are made of: small cases, an export cache, faulty runtimes and sessions."""

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
from qeff_validate.protocols import Runtime, Session, capabilities, runtime
from qeff_validate.report.result import Result
from qeff_validate.tensors import RETAINED, Array, TensorSpec

BERT: Mapping[str, Any] = {"hidden_act": "gelu", "initializer_range": 0.2}
BUCKETS = (32, 64)

LLAMA: Mapping[str, Any] = {"eos_token_id": list(range(0, 1000, 8))}
"""One token in eight ends a text, so that continuations end at different steps."""

LORA: Mapping[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
CHUNK = 8
PROMPTS = (
    "a river",
    "one two three four five six seven eight nine ten eleven twelve thirteen",
    "the nuts are kept in the hubcap",
    "under the jack a board is put so that it does not sink",
)
"""Of 2 to 13 words: uneven within a batch, and some longer than a chunk."""


class Judging(Protocol):
    """A case's way from inputs to results: `pipeline.Pipeline`, which this layer is handed."""

    def onnx(self) -> Artifact:
        """Return the exported file."""

    def inputs(self) -> Any:
        """Return the model's inputs."""

    def result(self, adapter: Runtime) -> Result:
        """Run and judge the case on a runtime."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where stand-ins are judged.

    Attributes:
        pipeline: makes the pipeline of a case, such as ``Runner().pipeline``.
        folder: for graphs that are edited.
    """

    pipeline: Callable[[Case], Judging]
    folder: Path

    def judged(self, case: Case, damage: Callable[[Session], Session] | None = None, name: str = "ort") -> Result:
        """Judge a case on a runtime, with a fault in its sessions."""
        return self.pipeline(case).result(runtime(name) if damage is None else FaultyRuntime(damage, name))

    def exported(self, case: Case) -> str:
        """Return the path of a case's own ONNX file."""
        return str(self.pipeline(case).onnx().path)


def embedding(pooling: str = "mean", onnx: str | None = None, **more: Any) -> Case:
    """Return a case of a small BERT; the quick exporter does for it."""
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
    """Keeps an export by what upstream's hash holds of it: the config, and neither weights, pooling nor adapters."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._made = bench, dict[str, str]()

    def onnx(self, case: Case) -> str:
        """Return the file of the first case of this config."""
        key = f"{case.model} {case.source} {sorted(case.config.items())}"
        if key not in self._made:
            self._made[key] = self._bench.exported(case)
        return self._made[key]


class FaultyRuntime:
    """A runtime whose sessions have a fault; name and kind are those of the real one."""

    def __init__(self, damage: Callable[[Session], Session], name: str = "ort") -> None:
        self._inner, self._damage = runtime(name), damage
        self.name, self.kind = self._inner.name, self._inner.kind
        self.capabilities = capabilities(self._inner)

    def probe(self) -> str | None:
        """Return what the real one says."""
        return self._inner.probe()

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open an artifact, and hand out a session with the fault."""
        with self._inner.open(artifact) as session:
            yield self._damage(session)


class OpenedOnce(FaultyRuntime):
    """A runtime that makes its session once, and keeps it whatever is built afterwards."""

    def __init__(self, name: str) -> None:
        super().__init__(lambda session: session, name)
        self._first: Artifact | None = None

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open what was opened first."""
        self._first = self._first or artifact
        with super().open(self._first) as session:
            yield session


class Deaf(FaultySession):
    """A session that takes names which its graph does not have, and drops them.

    Args:
        session: the healthy one.
        promised: arrays of all retained inputs that it is to have.
    """

    def __init__(self, session: Session, promised: Mapping[str, Array]) -> None:
        own = {spec.name for spec in session.inputs}
        super().__init__(session, lambda _, feeds: {name: array for name, array in feeds.items() if name in own})
        more = [TensorSpec(name, array.dtype.name, array.shape) for name, array in promised.items() if name not in own]
        self.inputs = (*session.inputs, *more)
        self.outputs = (*session.outputs, *(TensorSpec(f"{s.name}{RETAINED}", s.dtype, s.shape) for s in more))


class PaddingRead(FaultySession):
    """A session that counts positions from the first column, so that padding on the left is a part of the text."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, type(self)._counted)
        self._columns, self._shift = 0, np.zeros(1, np.int64)

    def _counted(self, feeds: dict[str, Array]) -> dict[str, Array]:
        places: Any = feeds["position_ids"]
        if places.shape[1] == 1:
            self._columns = 0
            return {**feeds, "position_ids": np.where(places >= 0, places + self._shift[:, None], -1)}
        columns = np.arange(places.shape[1]) + self._columns
        self._columns += places.shape[1]
        self._shift = columns[-1] - places[:, -1]
        return {**feeds, "position_ids": np.broadcast_to(columns, places.shape).copy()}
