# SPDX-License-Identifier: Apache-2.0
"""Retained state of runtimes that have none of their own: what a card does by name, done on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from qeff_validate.errors import RunError
from qeff_validate.tensors import Tensors, TensorSpec, fits, retained

V = TypeVar("V")


class Retained(Generic[V]):
    """Inputs that live in a session between runs; their initial content is undefined.

    Args:
        inputs: of the graph.
        outputs: of the graph; an input with a ``_RetainedState`` twin among them is state.
        buckets: values of symbols that no fed input may tell, such as ``ctx_len``.
        make: gives an undefined value of a shape and dtype name.
        shape: tells the shape of a value.

    Attributes:
        twins: the name of each state with the output that replaces it.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        buckets: Sequence[Mapping[str, int]],
        *,
        make: Callable[[tuple[int, ...], str], V],
        shape: Callable[[V], Sequence[int]],
    ) -> None:
        self.twins = retained(inputs, outputs)
        self._specs = {spec.name: spec for spec in inputs if spec.name in self.twins}
        self._buckets, self._make, self._shape = tuple(buckets), make, shape
        self._held: dict[str, V] = {}

    def values(self, feeds: Tensors, symbols: dict[str, int]) -> dict[str, V]:
        """Return the value of each state that is not fed.

        Args:
            feeds: what is fed.
            symbols: the sizes that the fed inputs have.

        Raises:
            RunError: the session holds it in another shape, or no size can be told for it.
        """
        found: dict[str, V] = {}
        for name, spec in self._specs.items():
            if name in feeds:
                continue
            if name not in self._held:
                self._held[name] = self._make(self._dims(spec, symbols), spec.dtype)
            shape = tuple(self._shape(self._held[name]))
            if not fits(shape, spec.shape, symbols):
                raise RunError(
                    f"retained state {name!r} has shape {list(shape)} in this session, and this run wants"
                    f" {list(spec.shape)} with {symbols}: reset() the session before sizes change"
                )
            found[name] = self._held[name]
        return found

    def keep(self, made: Mapping[str, V]) -> None:
        """Take the values of twins, by the twins' names, as the next state."""
        self._held = {name: made[twin] for name, twin in self.twins.items()}

    def reset(self) -> None:
        """Forget all content."""
        self._held = {}

    def _dims(self, spec: TensorSpec, symbols: dict[str, int]) -> tuple[int, ...]:
        dims = []
        for dim in spec.shape:
            if isinstance(dim, str) and dim not in symbols:
                agreeing = [b for b in self._buckets if all(b.get(k, v) == v for k, v in symbols.items())]
                sizes = {bucket[dim] for bucket in agreeing or self._buckets if dim in bucket}
                if len(sizes) != 1:
                    told = f"the buckets allow {sorted(sizes)}" if sizes else "nothing tells its size"
                    raise RunError(
                        f"retained state {spec.name!r} {list(spec.shape)} was left out of a first run, and no fed input"
                        f" has the symbol {dim!r}; {told}: feed the state once, or open an artifact with buckets"
                    )
                symbols[dim] = sizes.pop()
            dims.append(symbols[dim] if isinstance(dim, str) else dim)
        return tuple(dims)
