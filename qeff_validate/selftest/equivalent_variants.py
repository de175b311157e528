# SPDX-License-Identifier: Apache-2.0
"""Legitimate variants: ways to compute the same that must pass, so that false alarms are counted and not believed in.

None of them is a run of the ensembles that floors are measured with: those are of the original model, these are of our
module, our graphs and our compiled programs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact
from qeff_validate.config.case import Artifacts, Case
from qeff_validate.mutation.mutant import FaultySession
from qeff_validate.protocols import Runtime, Session, Settings, runtime
from qeff_validate.report.result import Result
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Array

Way = Callable[[Any, Case, Path], tuple[Any, Result]]
"""What judges a variant: given how to make a pipeline, the case, and a folder for graphs; returns the pipeline too."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute the same.

    Attributes:
        name: what differs.
        precision: ``fp32`` or ``device``.
        kinds: model kinds that it is for.
        judged: runs it.
    """

    name: str
    precision: str
    kinds: tuple[str, ...]
    judged: Way


EMBEDDING, DECODING = ("embedding",), ("peft-causal-lm",)
BOTH = (*EMBEDDING, *DECODING)


def on(name: str, settings: Settings | None = None, **changes: Any) -> Way:
    """Run the case on a runtime, with other options of the case: of the model kind, or its exporter."""

    def judged(pipeline: Any, case: Case, _: Path) -> tuple[Any, Result]:
        update: dict[str, Any] = {"options": {**case.options, **{k: v for k, v in changes.items() if k != "exporter"}}}
        if "exporter" in changes:
            update["exporter"] = changes["exporter"]
        return _run(pipeline(case.model_copy(update=update)), runtime(name, settings))

    return judged


def _run(made: Any, adapter: Runtime) -> tuple[Any, Result]:
    return made, made.result(adapter)


def in_module(change: Callable[[Any], Any]) -> Way:
    """Run the module on PyTorch after a change of it."""

    def judged(pipeline: Any, case: Case, _: Path) -> tuple[Any, Result]:
        return _run(pipeline(case), Other(change))

    return judged


class Other(FaultyRuntime):
    """The torch runtime, which opens a changed copy of the module."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__(lambda session: session, "torch")
        self._change = change

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open the copy."""
        module, graph = artifact.payload
        copied = self._change(copy.deepcopy(module))
        with super().open(Artifact("module", None, artifact.digest, artifact.provenance, (copied, graph))) as session:
            yield session


def in_session(damage: Callable[[Session], Session], name: str) -> Way:
    """Run behind a session that changes what must not matter."""
    return lambda pipeline, case, _: _run(pipeline(case), FaultyRuntime(damage, name))


def optimized(level: str, name: str = "ort") -> Way:
    """Run the graph that ONNX Runtime's optimizer makes of ours, with nodes folded or fused."""

    def judged(pipeline: Any, case: Case, folder: Path) -> tuple[Any, Result]:
        import onnxruntime as ort

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{case.name}-{case.seed}-{level}.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(str(pipeline(case).onnx().path), options, providers=["CPUExecutionProvider"])
        brought = case.model_copy(update={"artifacts": Artifacts(onnx=str(path))})
        try:
            return _run(pipeline(brought), runtime(name))
        finally:
            path.unlink(missing_ok=True)

    return judged


def sdpa(module: Any) -> Any:
    """Let the wrapper's body use another attention kernel."""
    if hasattr(module.base_model, "set_attn_implementation"):
        module.base_model.set_attn_implementation("sdpa")
    return module


def double(module: Any) -> Any:
    """Let the wrapper compute in float64."""
    import torch

    class Double(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module.double()

        def forward(self, **tensors: Any) -> Any:
            wide = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
            found = self.inner(**wide)
            return tuple(value.float() for value in found) if isinstance(found, tuple) else found.float()

    return Double()


def reversed_rows(session: Session) -> FaultySession:
    """Give each batch in the opposite order."""
    batched = {spec.name for spec in session.inputs if spec.shape and spec.shape[0] == "batch_size"} | {
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "adapter_ids"
    }  # fmt: skip

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        return {name: array[::-1] if name in batched else array for name, array in feeds.items()}

    def out(_: FaultySession, found: dict[str, Array]) -> Mapping[str, Array]:
        return {name: array[::-1].copy() for name, array in found.items()}

    return FaultySession(session, feed, out)


def other_padding(session: Session) -> FaultySession:
    """Put other tokens behind the mask."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        seen: Any = feeds.get("attention_mask", feeds.get("position_ids"))
        ids: Any = feeds["input_ids"]
        hidden = seen == 0 if "attention_mask" in feeds else seen < 0
        return {**feeds, "input_ids": np.where(hidden, int(ids.max()), ids)}

    return FaultySession(session, feed)


def longer(session: Session) -> FaultySession:
    """Pad each batch by seven more columns; for vectors of texts, not of tokens."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        return {name: np.pad(array, ((0, 0), (0, 7))) for name, array in feeds.items()}

    return FaultySession(session, feed)


VARIANTS: Sequence[Variant] = (
    Variant("the module", "fp32", BOTH, on("torch")),
    Variant("the module with sdpa", "fp32", EMBEDDING, in_module(sdpa)),
    Variant("the module in float64", "fp32", BOTH, in_module(double)),
    Variant("the module, batch of 1", "fp32", BOTH, on("torch", batch_size=1)),
    Variant("exported by dynamo", "fp32", BOTH, on("ort", exporter="dynamo")),
    Variant("exported by TorchScript", "fp32", EMBEDDING, on("ort", exporter="torchscript")),
    Variant("constants folded", "fp32", BOTH, optimized("ORT_ENABLE_BASIC")),
    Variant("nodes fused", "fp32", BOTH, optimized("ORT_ENABLE_EXTENDED")),
    Variant("one thread", "fp32", BOTH, on("ort", Settings(threads=1))),
    Variant("two threads", "fp32", BOTH, on("ort", Settings(threads=2))),
    Variant("batch of 1", "fp32", BOTH, on("ort", batch_size=1)),
    Variant("batch of 7", "fp32", BOTH, on("ort", batch_size=7)),
    Variant("rows in the opposite order", "fp32", BOTH, in_session(reversed_rows, "ort")),
    Variant("other tokens behind the mask", "fp32", BOTH, in_session(other_padding, "ort")),
    Variant("seven more columns of padding", "fp32", EMBEDDING, in_session(longer, "ort")),
    Variant("chunks of 5", "fp32", DECODING, on("ort", prefill_seq_len=5)),
    Variant("a longer context", "fp32", DECODING, on("ort", ctx_len=64)),
    Variant("compiled", "device", BOTH, on("sim")),
    Variant("compiled from TorchScript", "device", EMBEDDING, on("sim", exporter="torchscript")),
    Variant("compiled from folded constants", "device", BOTH, optimized("ORT_ENABLE_BASIC", "sim")),
    Variant("compiled, batch of 1", "device", BOTH, on("sim", batch_size=1)),
    Variant("compiled, rows in the opposite order", "device", BOTH, in_session(reversed_rows, "sim")),
    Variant("compiled, other tokens behind the mask", "device", BOTH, in_session(other_padding, "sim")),
    Variant("compiled, chunks of 5", "device", DECODING, on("sim", prefill_seq_len=5)),
)
"""The variants. Those of ``device`` compute in the case's precision on the simulated card."""


def seeded(case: Case, seed: int) -> Case:
    """Return the case with other random weights."""
    return case.model_copy(update={"seed": seed, "name": f"{case.name}-seed{seed}"})
