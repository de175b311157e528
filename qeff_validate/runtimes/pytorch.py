# SPDX-License-Identifier: Apache-2.0
"""PyTorch: runs the module that is exported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import RunError
from qeff_validate.protocols import Graph, Session, Settings
from qeff_validate.runtimes.retained_state import Retained
from qeff_validate.tensors import Shapes, Tensors, TensorSpec, check_feeds, undefined, wanted_outputs


class TorchRuntime:
    """Opens ``module`` artifacts, whose payload is ``(module, Graph)``."""

    name = "torch"
    kind: Kind = "module"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def probe(self) -> str | None:
        """Return None if torch is installed."""
        return None if importlib.util.find_spec("torch") else "torch is not installed: pip install torch"

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Open a module in eval mode; its mode is put back afterwards."""
        module, graph = artifact.payload
        training = module.training
        module.eval()
        try:
            yield TorchSession(module, graph)
        finally:
            module.train(training)


class TorchSession:
    """A module behind the names, dtypes and symbols of its graph interface."""

    shapes: tuple[Shapes, ...] = ()

    def __init__(self, module: Any, graph: Graph) -> None:
        self.inputs: tuple[TensorSpec, ...] = graph.inputs
        self.outputs: tuple[TensorSpec, ...] = graph.outputs
        self._module = module
        self._state: Retained[Any] = Retained(
            self.inputs, self.outputs, graph.buckets, make=_undefined_tensor, shape=lambda tensor: tensor.shape
        )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run the module once without gradients."""
        import torch

        symbols = check_feeds(feeds, self.inputs, optional=tuple(self._state.twins))
        wanted = wanted_outputs(self.outputs, fetch)
        tensors = self._state.values(feeds, symbols) | {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()
        }
        with torch.inference_mode():
            try:
                made = self._module(**tensors)
            except (RuntimeError, ValueError, TypeError, IndexError) as exc:
                raise RunError(f"the torch module failed: {type(exc).__name__}: {exc}") from exc
        outputs = made if isinstance(made, tuple) else (made,)
        if len(outputs) != len(self.outputs):
            raise RunError(f"the torch module returned {len(outputs)} outputs, wanted {len(self.outputs)}")
        found = {spec.name: out for spec, out in zip(self.outputs, outputs, strict=True)}
        # a twin may be its input itself, unchanged, and so the caller's array
        fed = {tensors[name].data_ptr() for name in self._state.twins if name in feeds}
        self._state.keep({name: out.clone() if out.data_ptr() in fed else out for name, out in found.items()})
        return {name: found[name].numpy().copy() for name in wanted}

    def reset(self) -> None:
        """Forget retained state."""
        self._state.reset()


def _undefined_tensor(shape: tuple[int, ...], dtype: str) -> Any:
    import torch

    return torch.from_numpy(undefined(shape, dtype))
