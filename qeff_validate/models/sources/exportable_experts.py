# SPDX-License-Identifier: Apache-2.0
"""Selects an implementation of experts that can be exported; the reference uses the published one.

The default of transformers, ``grouped_mm``, supports neither export nor float64, and ``eager`` does not export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import base_of, translated_errors

EXPORTABLE = "batched_mm"
"""An implementation of transformers that can be exported and supports every dtype."""


def choose_exportable_experts(model: Any) -> None:
    """Set the experts implementation of a transformers model to `EXPORTABLE`; no effect without experts.

    Args:
        model: changed in place; the reference is another instance.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(EXPORTABLE)


def make_exportable(model: Any) -> None:
    """Set eager attention and exportable experts of a transformers model, which is changed in place.

    Raises:
        ConfigError: its attention is split into windows (Longformer, LED): the graph of one length is wrong at others.
    """
    if any(hasattr(module, "one_sided_attn_window_size") for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} splits a text into windows while it runs (attention_window), and torch's exporters"
            " keep the number of windows of their example: its graph would be wrong at other lengths, so it is not"
            " supported"
        )
    with translated_errors("choose eager attention"):
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        choose_exportable_experts(model)


@contextmanager
def exportable_experts(model: Any) -> Iterator[None]:
    """Use `EXPORTABLE` until the context ends, for float64 and emulated precisions.

    Args:
        model: a transformers model, or a `peft.PeftModel` around one.
    """
    base = base_of(model)
    if not hasattr(base, "get_experts_implementation"):
        yield
        return
    before = base.get_experts_implementation()
    choose_exportable_experts(base)
    try:
        yield
    finally:
        base.set_experts_implementation(before)
