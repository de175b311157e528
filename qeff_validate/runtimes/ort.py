# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import ConfigError, RunError, Unavailable, ValidateError, suggest
from qeff_validate.protocols import Session, Settings
from qeff_validate.runtimes.retained_state import RetainedState
from qeff_validate.tensors import Array, Shapes, Tensors, TensorSpec, check_feeds, retained, undefined, wanted_outputs

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

OPTIMIZATION = "QEFF_VALIDATE_ORT_OPTIMIZATION"
"""Environment variable: the optimization level if `Settings` has none. Reports record it."""

LEVELS: Mapping[str, str] = MappingProxyType(
    {
        "disabled": "ORT_DISABLE_ALL",
        "basic": "ORT_ENABLE_BASIC",
        "extended": "ORT_ENABLE_EXTENDED",
        "all": "ORT_ENABLE_ALL",
    }
)
"""ONNX Runtime's name of each graph optimization level, by the name in `Settings`."""


MOST_PACKED = 1 << 30
"""Bytes of external data above which weights are not copied into memory.

A BERT of 335 M parameters: 8 MB of memory instead of 1,216 MB, and 0.1 s of processor time for loading instead of 3.0;
a run of 16 tokens takes 0.86 s instead of 0.34.
"""


MOST_PARSED = 1 << 28
"""Bytes of the largest file that is parsed to see which states are written in place; more hold weights."""


def session_options(settings: Settings | None = None) -> Any:
    """Return ``onnxruntime.SessionOptions`` with the threads and the optimization level of settings.

    Raises:
        ConfigError: the optimization level is unknown.
    """
    import onnxruntime as ort

    settings = settings or Settings()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about optimizations that it skipped
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    # an arena grows in powers of two and is kept: of use to a session with many runs
    options.enable_cpu_mem_arena = settings.packed_weights is not False
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[optimization_level(settings)])
    return options


def optimization_level(settings: Settings) -> str:
    """Return the optimization level of settings: a key of `LEVELS`.

    Raises:
        ConfigError: the optimization level is unknown.
    """
    level = settings.ort_optimization or os.environ.get(OPTIMIZATION) or "all"
    if level not in LEVELS:
        raise ConfigError(
            f"no optimization level of ONNX Runtime is called {level!r} (Settings.ort_optimization or {OPTIMIZATION}):"
            f" use one of {', '.join(LEVELS)}.{suggest(level, LEVELS)}"
        )
    return level


class OrtRuntime:
    """ONNX Runtime on the CPU: opens ``onnx`` artifacts.

    Args:
        settings: threads and optimization level.
    """

    name = "ort"
    kind: Kind = "onnx"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def probe(self) -> str | None:
        """Return None if onnxruntime is installed, else how to install it."""
        return None if importlib.util.find_spec("onnxruntime") else "onnxruntime is missing: pip install onnxruntime"

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open an ONNX file.

        Raises:
            ConfigError: the optimization level is unknown.
            Unavailable: the file or its external data is missing, truncated or no ONNX.
        """
        import onnxruntime as ort

        options = session_options(self.settings)
        if not self._packs_weights(artifact.path):
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime's exceptions share no base class that it exports
            raise Unavailable(f"ONNX Runtime cannot load {artifact.path}: {exc}") from exc
        yield OrtSession(session, artifact.buckets, self._in_place(session, artifact))

    @staticmethod
    def _in_place(session: Any, artifact: Artifact) -> Sequence[str]:
        """Return the states whose memory the graph may write into."""
        twins = retained([_spec(value) for value in session.get_inputs()], [_spec(v) for v in session.get_outputs()])
        assert artifact.path is not None
        if not twins or artifact.path.stat().st_size > MOST_PARSED:
            return ()
        import onnx

        from qeff_validate.sdk.simulated.state_updates import in_place_states

        return in_place_states(onnx.load(str(artifact.path), load_external_data=False).graph, twins)

    def _packs_weights(self, path: Path | None) -> bool:
        if self.settings.packed_weights is not None or path is None:
            return self.settings.packed_weights is not False
        try:  # where external data lies is known to the graph; ours, and that of most exporters, lies beside the file
            sizes = [entry.stat().st_size for entry in path.parent.iterdir() if entry.name.startswith(path.name)]
        except OSError:  # the file cannot be opened either
            return True
        return sum(sizes) <= MOST_PACKED


class OrtSession:
    """An ONNX Runtime session that checks names, dtypes and shapes; retained state stays in it as OrtValues.

    Args:
        session: ``onnxruntime.InferenceSession``.
        buckets: values of symbols that the shapes of the feeds may not determine, such as ``ctx_len``.
        in_place: states that the graph writes into: they keep their memory, and nothing else of them is copied.
    """

    shapes: tuple[Shapes, ...] = ()

    def __init__(self, session: Any, buckets: Sequence[Mapping[str, int]] = (), in_place: Sequence[str] = ()) -> None:
        self._session = session
        self.inputs: tuple[TensorSpec, ...] = tuple(_spec(value) for value in session.get_inputs())
        self.outputs: tuple[TensorSpec, ...] = tuple(_spec(value) for value in session.get_outputs())
        self._state: RetainedState[Any] = RetainedState(
            self.inputs, self.outputs, buckets, make=_undefined_value, shape=lambda value: value.shape()
        )
        self._in_place = {self._state.twins[name]: name for name in in_place}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run the graph once.

        Raises:
            RunError: names, dtypes or shapes do not fit, or ONNX Runtime fails.
        """
        symbols = check_feeds(feeds, self.inputs, optional=tuple(self._state.twins))
        wanted = wanted_outputs(self.outputs, fetch)
        try:
            if self._state.twins:
                return self._with_state(feeds, self._state.values(feeds, symbols), wanted)
            # ONNX Runtime takes an empty list for all outputs
            arrays = self._session.run(wanted or [self.outputs[0].name], dict(feeds))
        except ValidateError:
            raise
        except Exception as exc:  # as in open
            raise RunError(f"ONNX Runtime failed: {exc}") from exc
        return dict(zip(wanted, arrays, strict=bool(wanted)))

    def _with_state(self, feeds: Tensors, state: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Array]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in state.items():
            binding.bind_ortvalue_input(name, value)
        names = list(dict.fromkeys([*wanted, *self._state.twins.values()]))
        kept = {twin: state[name] for twin, name in self._in_place.items() if name in state}
        for name in names:
            if name in kept:
                binding.bind_ortvalue_output(name, kept[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        # a value made of an array lives as long as its first handle
        outputs = {**dict(zip(names, binding.get_outputs(), strict=True)), **kept}
        self._state.keep(outputs)
        return {name: outputs[name].numpy().copy() for name in wanted}

    def reset(self) -> None:
        """Forget retained state."""
        self._state.reset()


def _undefined_value(shape: tuple[int, ...], dtype: str) -> Any:
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(undefined(shape, dtype))


def _spec(value: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, DTYPES.get(value.type, value.type), shape)
