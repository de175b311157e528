# SPDX-License-Identifier: Apache-2.0
"""A copy of a module that is run again with one change, on the inputs of its recorded call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qeff_validate.explain.reference_values import Place


class TriedModule:
    """A module to try changes on.

    Args:
        module: a copy, in float64.
        call: arguments of its recorded call.
        path: of the module.
        place: where the block's output is: its own output, or what enters or leaves a module below it.
    """

    def __init__(self, module: Any, call: tuple[Any, Any], path: str, place: Place) -> None:
        self.module, self.call, self.path, self.place = module, call, path, place

    def run(self) -> Any:
        """Return the value at the place, float64."""
        path, side, index, _ = self.place
        if path == self.path:
            output = self.module(*self.call[0], **self.call[1])
            found = output[index] if isinstance(output, (tuple, list)) else output
        else:
            child, seen = self.module.get_submodule(path.removeprefix(f"{self.path}.")), list[Any]()

            def keep(_: Any, args: Any, out: Any = None) -> None:
                values = args if side == "in" else out
                seen.append(values[index] if isinstance(values, (tuple, list)) else values)

            hook = child.register_forward_pre_hook(keep) if side == "in" else child.register_forward_hook(keep)
            try:
                self.module(*self.call[0], **self.call[1])
            finally:
                hook.remove()
            found = seen[0]
        return found.double().numpy()


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute until the context ends."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
