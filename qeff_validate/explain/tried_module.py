# SPDX-License-Identifier: Apache-2.0
"""A copy of a module that is run again with one change, on the inputs of its recorded call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qeff_validate.explain.reference_values import Call, Place


class TriedModule:
    """A module to try changes on.

    Args:
        module: a copy, in float64.
        call: arguments of its recorded call.
        path: of the module.
        place: where the block's output is: its own output, or what enters or leaves a module below it.
        parent: a module above it, if the place is beside the module, not in it; ``module`` is a part of its copy.
    """

    def __init__(self, module: Any, call: Call, path: str, place: Place, parent: TriedModule | None = None) -> None:
        self.module, self.call, self.path, self.place, self.parent = module, call, path, place, parent

    def run(self, call: Call | None = None) -> Any:
        """Return the value at the place, float64.

        Args:
            call: arguments of the module in place of the recorded ones.
        """
        if self.parent is None:
            return self._value(self.call if call is None else call)
        if call is None:
            return self.parent.run()
        hook = self.module.register_forward_pre_hook(lambda *_: call, with_kwargs=True)
        try:
            return self.parent.run()
        finally:
            hook.remove()

    def _value(self, call: Call) -> Any:
        path, side, index, _ = self.place
        if path == self.path:
            output = self.module(*call[0], **call[1])
            found = output[index] if isinstance(output, (tuple, list)) else output
        else:
            child, seen = self.module.get_submodule(path.removeprefix(f"{self.path}.")), list[Any]()

            def keep(_: Any, args: Any, out: Any = None) -> None:
                values = args if side == "in" else out
                seen.append(values[index] if isinstance(values, (tuple, list)) else values)

            hook = child.register_forward_pre_hook(keep) if side == "in" else child.register_forward_hook(keep)
            try:
                self.module(*call[0], **call[1])
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
