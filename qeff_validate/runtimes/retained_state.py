# SPDX-License-Identifier: Apache-2.0
"""Retained state on the host, for runtimes that keep none: the same behaviour as a card's (card-contract §4.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from qeff_validate.errors import RunError
from qeff_validate.tensors import Tensors, TensorSpec, fits, retained

V = TypeVar("V")


class RetainedState(Generic[V]):
    """The inputs of a session that stay in it between runs; their initial content is undefined.

    Args:
        inputs: of the graph.
        outputs: of the graph; an input with a ``_RetainedState`` twin among them is state.
        buckets: values of symbols that the shapes of the feeds may not determine, such as ``ctx_len``.
        make: returns an undefined value for a shape and a dtype name.
        shape: returns the shape of a value.

    Attributes:
        twins: the output that replaces each state, by the name of the state.
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
        self._values: dict[str, V] = {}

    def values(self, feeds: Tensors, symbols: dict[str, int]) -> dict[str, V]:
        """Return the value of each state that is not in the feeds.

        Args:
            feeds: the arrays of this run.
            symbols: the sizes of the symbols in the shapes of the feeds; sizes from the buckets are added.

        Raises:
            RunError: the state has another shape in the session, or its shape cannot be determined.
        """
        values: dict[str, V] = {}
        for name, spec in self._specs.items():
            if name in feeds:
                continue
            if name not in self._values:
                self._values[name] = self._make(self._dims(spec, symbols), spec.dtype)
            shape = tuple(self._shape(self._values[name]))
            if not fits(shape, spec.shape, symbols):
                raise RunError(
                    f"retained state {name!r} has shape {list(shape)} in this session, and this run wants"
                    f" {list(spec.shape)} with {symbols}: reset() the session before sizes change"
                )
            values[name] = self._values[name]
        return values

    def keep(self, outputs: Mapping[str, V]) -> None:
        """Store the outputs of a run as the next state.

        Args:
            outputs: at least every twin, by the twin's name.
        """
        self._values = {name: outputs[twin] for name, twin in self.twins.items()}

    def reset(self) -> None:
        """Forget all content."""
        self._values = {}

    def _dims(self, spec: TensorSpec, symbols: dict[str, int]) -> tuple[int, ...]:
        """Return the shape of a state, with symbols from the feeds or from the buckets that agree with them."""
        dims = []
        for dim in spec.shape:
            if isinstance(dim, str) and dim not in symbols:
                agreeing = [b for b in self._buckets if all(b.get(k, v) == v for k, v in symbols.items())]
                sizes = {bucket[dim] for bucket in agreeing or self._buckets if dim in bucket}
                if len(sizes) != 1:
                    options = f"the buckets allow {sorted(sizes)}" if sizes else "nothing tells its size"
                    raise RunError(
                        f"retained state {spec.name!r} {list(spec.shape)} was left out of a first run, and no fed input"
                        f" has the symbol {dim!r}; {options}: feed the state once, or open an artifact with buckets"
                    )
                symbols[dim] = sizes.pop()
            dims.append(symbols[dim] if isinstance(dim, str) else dim)
        return tuple(dims)
