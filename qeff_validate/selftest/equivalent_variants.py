# SPDX-License-Identifier: Apache-2.0
"""Legitimate variants of a computation, which must pass, so that false alarms are counted.

None of them is part of the ensembles that floors are measured with: those run the original model, these run our module,
our graphs and our compiled programs.
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

VariantRunner = Callable[[Any, Case, Path], tuple[Any, Result]]
"""Takes a function that makes the pipeline of a case, the case, and a folder for graphs; returns pipeline, result."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant.

    Attributes:
        name: the difference.
        precision: ``fp32`` or ``device``.
        kinds: the model kinds that it applies to.
        run: runs it.
    """

    name: str
    precision: str
    kinds: tuple[str, ...]
    run: VariantRunner


EMBEDDING, DECODING = ("embedding",), ("peft-causal-lm",)
BOTH = (*EMBEDDING, *DECODING)


def on_runtime(name: str, settings: Settings | None = None, **changes: Any) -> VariantRunner:
    """Run the case on a runtime, with other options of the model kind or another exporter."""

    def run(pipeline: Any, case: Case, _: Path) -> tuple[Any, Result]:
        update: dict[str, Any] = {"options": {**case.options, **{k: v for k, v in changes.items() if k != "exporter"}}}
        if "exporter" in changes:
            update["exporter"] = changes["exporter"]
        return _run(pipeline(case.model_copy(update=update)), runtime(name, settings))

    return run


def _run(pipeline: Any, on: Runtime) -> tuple[Any, Result]:
    return pipeline, pipeline.result(on)


def with_module(change: Callable[[Any], Any]) -> VariantRunner:
    """Run a changed copy of the module on PyTorch."""

    def run(pipeline: Any, case: Case, _: Path) -> tuple[Any, Result]:
        return _run(pipeline(case), ChangedModuleRuntime(change))

    return run


class ChangedModuleRuntime(FaultyRuntime):
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


def with_session(wrap: Callable[[Session], Session], name: str) -> VariantRunner:
    """Run on sessions of a runtime, each wrapped by a session that changes what must not matter."""
    return lambda pipeline, case, _: _run(pipeline(case), FaultyRuntime(wrap, name))


def optimized(level: str, name: str = "ort") -> VariantRunner:
    """Run our graph after ONNX Runtime's optimizer, with nodes folded or fused."""

    def run(pipeline: Any, case: Case, folder: Path) -> tuple[Any, Result]:
        import onnxruntime as ort

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{case.name}-{case.seed}-{level}.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(str(pipeline(case).onnx().path), options, providers=["CPUExecutionProvider"])
        optimized_case = case.model_copy(update={"artifacts": Artifacts(onnx=str(path))})
        try:
            return _run(pipeline(optimized_case), runtime(name))
        finally:
            path.unlink(missing_ok=True)

    return run


def with_sdpa(module: Any) -> Any:
    """Make the body use the SDPA attention kernel."""
    if hasattr(module.base_model, "set_attn_implementation"):
        module.base_model.set_attn_implementation("sdpa")
    return module


def in_float64(module: Any) -> Any:
    """Wrap a module so that it computes in float64 and returns float32."""
    import torch

    class Double(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module.double()

        def forward(self, **tensors: Any) -> Any:
            wide = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
            outputs = self.inner(**wide)
            return tuple(value.float() for value in outputs) if isinstance(outputs, tuple) else outputs.float()

    return Double()


def reversed_rows(session: Session) -> FaultySession:
    """Run each batch in reverse order, and restore the order of the outputs."""
    batched = {spec.name for spec in session.inputs if spec.shape and spec.shape[0] == "batch_size"} | {
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "adapter_ids", "adapter_start", "batch_index"
    }  # fmt: skip

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        return {name: array[::-1] if name in batched else array for name, array in feeds.items()}

    def out(_: FaultySession, outputs: dict[str, Array]) -> Mapping[str, Array]:
        return {name: array[::-1].copy() for name, array in outputs.items()}

    return FaultySession(session, feed, out)


def other_padding(session: Session) -> FaultySession:
    """Replace the padding tokens, which the mask hides, by another token."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        mask: Any = feeds.get("attention_mask", feeds.get("position_ids"))
        ids: Any = feeds["input_ids"]
        is_padding = mask == 0 if "attention_mask" in feeds else mask < 0
        return {**feeds, "input_ids": np.where(is_padding, int(ids.max()), ids)}

    return FaultySession(session, feed)


def more_padding(session: Session) -> FaultySession:
    """Pad each batch by seven more columns; for outputs by text, not by token."""

    def feed(_: FaultySession, feeds: dict[str, Array]) -> Mapping[str, Array]:
        return {name: np.pad(array, ((0, 0), (0, 7))) for name, array in feeds.items()}

    return FaultySession(session, feed)


VARIANTS: Sequence[Variant] = (
    Variant("the module", "fp32", BOTH, on_runtime("torch")),
    Variant("the module with sdpa", "fp32", EMBEDDING, with_module(with_sdpa)),
    Variant("the module in float64", "fp32", BOTH, with_module(in_float64)),
    Variant("the module, batch of 1", "fp32", BOTH, on_runtime("torch", batch_size=1)),
    Variant("exported by dynamo", "fp32", BOTH, on_runtime("ort", exporter="dynamo")),
    Variant("exported by TorchScript", "fp32", EMBEDDING, on_runtime("ort", exporter="torchscript")),
    Variant("constants folded", "fp32", BOTH, optimized("ORT_ENABLE_BASIC")),
    Variant("nodes fused", "fp32", BOTH, optimized("ORT_ENABLE_EXTENDED")),
    Variant("one thread", "fp32", BOTH, on_runtime("ort", Settings(threads=1))),
    Variant("two threads", "fp32", BOTH, on_runtime("ort", Settings(threads=2))),
    Variant("batch of 1", "fp32", BOTH, on_runtime("ort", batch_size=1)),
    Variant("batch of 7", "fp32", BOTH, on_runtime("ort", batch_size=7)),
    Variant("rows in the opposite order", "fp32", BOTH, with_session(reversed_rows, "ort")),
    Variant("other tokens behind the mask", "fp32", BOTH, with_session(other_padding, "ort")),
    Variant("seven more columns of padding", "fp32", EMBEDDING, with_session(more_padding, "ort")),
    Variant("chunks of 5", "fp32", DECODING, on_runtime("ort", prefill_seq_len=5)),
    Variant("a longer context", "fp32", DECODING, on_runtime("ort", ctx_len=64)),
    Variant("compiled", "device", BOTH, on_runtime("sim")),
    Variant("compiled from TorchScript", "device", EMBEDDING, on_runtime("sim", exporter="torchscript")),
    Variant("compiled from folded constants", "device", BOTH, optimized("ORT_ENABLE_BASIC", "sim")),
    Variant("compiled, batch of 1", "device", BOTH, on_runtime("sim", batch_size=1)),
    Variant("compiled, rows in the opposite order", "device", BOTH, with_session(reversed_rows, "sim")),
    Variant("compiled, other tokens behind the mask", "device", BOTH, with_session(other_padding, "sim")),
    Variant("compiled, chunks of 5", "device", DECODING, on_runtime("sim", prefill_seq_len=5)),
)
"""All variants. Those of ``device`` compute in the case's precision on the simulated card."""


def seeded(case: Case, seed: int) -> Case:
    """Return the case with other random weights."""
    return case.model_copy(update={"seed": seed, "name": f"{case.name}-seed{seed}"})
