# SPDX-License-Identifier: Apache-2.0
"""PyTorch: runs the module that the other runtimes get as an export."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.errors import RunError, missing_package
from qeff_validate.protocols import Graph, Session, Settings
from qeff_validate.runtimes.retained_state import RetainedState
from qeff_validate.tensors import Shapes, Tensors, TensorSpec, check_feeds, undefined, wanted_outputs


class TorchRuntime:
    """PyTorch: opens ``module`` artifacts, whose payload is ``(torch.nn.Module, Graph)``.

    Args:
        settings: not used; PyTorch keeps its own number of threads.
    """

    name = "torch"
    kind: Kind = "module"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    def probe(self) -> str | None:
        """Return None if torch is installed, else how to install it."""
        return None if importlib.util.find_spec("torch") else str(missing_package("torch"))

    @contextmanager
    def open(self, artifact: Artifact) -> Iterator[Session]:
        """Put a module into eval mode for the duration of the session."""
        module, graph = artifact.payload
        training = module.training
        module.eval()
        try:
            yield TorchSession(module, graph)
        finally:
            module.train(training)


class TorchSession:
    """A torch module under its graph interface; retained state stays in the session as tensors.

    Args:
        module: in eval mode; takes its inputs as keyword arguments and returns a tensor or a tuple of tensors.
        graph: its inputs and outputs, in the order of the returned tuple.
    """

    shapes: tuple[Shapes, ...] = ()

    def __init__(self, module: Any, graph: Graph) -> None:
        self.inputs: tuple[TensorSpec, ...] = graph.inputs
        self.outputs: tuple[TensorSpec, ...] = graph.outputs
        self._module = module
        self._state: RetainedState[Any] = RetainedState(
            self.inputs, self.outputs, graph.buckets, make=_undefined_tensor, shape=lambda tensor: tensor.shape
        )

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        """Run the module once without gradients.

        Raises:
            RunError: names, dtypes or shapes do not fit, the module raises, or it returns another number of outputs.
        """
        import torch

        symbols = check_feeds(feeds, self.inputs, optional=tuple(self._state.twins))
        wanted = wanted_outputs(self.outputs, fetch)
        tensors = self._state.values(feeds, symbols) | {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()
        }
        with torch.inference_mode():
            try:
                result = self._module(**tensors)
            except (RuntimeError, ValueError, TypeError, IndexError) as exc:
                raise RunError(f"the torch module failed: {type(exc).__name__}: {exc}") from exc
        returned = result if isinstance(result, tuple) else (result,)
        if len(returned) != len(self.outputs):
            raise RunError(f"the torch module returned {len(returned)} outputs, wanted {len(self.outputs)}")
        outputs = {spec.name: tensor for spec, tensor in zip(self.outputs, returned, strict=True)}
        # a module may return an input unchanged as its twin: the caller's own array, which must be copied
        fed = {tensors[name].data_ptr() for name in self._state.twins if name in feeds}
        self._state.keep({name: t.clone() if t.data_ptr() in fed else t for name, t in outputs.items()})
        return {name: outputs[name].numpy().copy() for name in wanted}

    def reset(self) -> None:
        """Forget retained state."""
        self._state.reset()


def _undefined_tensor(shape: tuple[int, ...], dtype: str) -> Any:
    import torch

    return torch.from_numpy(undefined(shape, dtype))
