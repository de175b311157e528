# SPDX-License-Identifier: Apache-2.0
"""How a mixture of experts computes its experts: as published in the reference, by an implementation that exports else.

transformers' default, ``grouped_mm``, neither exports nor takes float64, nor does ``eager`` export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXPORTABLE = "batched_mm"
"""An implementation of transformers that exports, and computes in every dtype."""


def choose_exportable_experts(model: Any) -> None:
    """Let a transformers model compute its experts by `EXPORTABLE`; a model without experts is left as it is.

    Args:
        model: changed in place. The reference is another instance, which runs as its authors publish it.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(EXPORTABLE)


@contextmanager
def exportable_experts(model: Any) -> Iterator[None]:
    """Do the same until the context ends: for float64 and emulated precisions.

    Args:
        model: a transformers model, or a `peft.PeftModel` round one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_experts_implementation"):
        yield
        return
    before = base.get_experts_implementation()
    choose_exportable_experts(base)
    try:
        yield
    finally:
        base.set_experts_implementation(before)
