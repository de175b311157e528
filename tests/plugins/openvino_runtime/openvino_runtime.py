# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU, as a runtime of qeff_validate. See docs/how-to/runtime.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.protocols import Capabilities, Settings
from qeff_validate.runtimes.retained_state import RetainedState
from qeff_validate.tensors import Tensors, TensorSpec, check_feeds, undefined, wanted_outputs


def in_float32(settings: Settings) -> OpenVinoRuntime:
    """Return the runtime that computes in float32."""
    return OpenVinoRuntime("openvino", Capabilities(compute="fp32"))


def in_float16(settings: Settings) -> OpenVinoRuntime:
    """Return the runtime that reads weights in float16; the bounds are those of fp16."""
    return OpenVinoRuntime("openvino_fp16", Capabilities(compute="fp16"))


class OpenVinoRuntime:
    """Opens ``onnx`` artifacts."""

    kind = "onnx"

    def __init__(self, name: str, capabilities: Capabilities) -> None:
        self.name, self.capabilities = name, capabilities

    def probe(self) -> str | None:
        """Return None if openvino is installed."""
        return None if importlib.util.find_spec("openvino") else "openvino is missing: pip install openvino"

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[OpenVinoSession]:
        """Compile an ONNX file for the CPU.

        Raises:
            Unavailable: OpenVINO cannot read or compile the file.
        """
        import openvino
        from openvino.passes import ConvertFP32ToFP16, Manager

        core = openvino.Core()
        try:
            model = core.read_model(str(artifact.path))
            if self.capabilities.compute == "fp16":
                passes = Manager()
                passes.register_pass(ConvertFP32ToFP16())
                passes.run_passes(model)
            compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as exc:
            raise Unavailable(f"OpenVINO cannot compile {artifact.path}: {exc}") from exc
        graph = onnx.load(str(artifact.path), load_external_data=False).graph
        yield OpenVinoSession(compiled, _specs(graph.input), _specs(graph.output), artifact.buckets)


class OpenVinoSession:
    """A compiled model behind exact names, dtypes and shapes."""

    shapes: tuple[Mapping[str, tuple[int, ...]], ...] = ()

    def __init__(
        self,
        compiled: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        buckets: Sequence[Mapping[str, int]],
    ) -> None:
        self._request = compiled.create_infer_request()
        self.inputs, self.outputs = inputs, outputs
        self._state: RetainedState[np.ndarray] = RetainedState(
            self.inputs, self.outputs, buckets, make=undefined, shape=lambda array: array.shape
        )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run once."""
        symbols = check_feeds(feeds, self.inputs, optional=tuple(self._state.twins))
        wanted = wanted_outputs(self.outputs, fetch)
        try:
            self._request.infer({**feeds, **self._state.values(feeds, symbols)})
        except RuntimeError as exc:
            raise RunError(f"OpenVINO failed: {exc}") from exc
        found = {
            spec.name: np.array(self._request.get_output_tensor(place).data, dtype=spec.dtype)
            for place, spec in enumerate(self.outputs)
        }
        self._state.keep(found)
        return {name: found[name] for name in wanted}

    def reset(self) -> None:
        """Forget retained state."""
        self._state.reset()


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    """Return the interface as the ONNX file states it: OpenVINO forgets the names of dims."""
    return tuple(
        TensorSpec(
            value.name,
            str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
