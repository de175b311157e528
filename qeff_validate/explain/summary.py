# SPDX-License-Identifier: Apache-2.0
"""What an explanation found, in one sentence and in a report's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qeff_validate.explain.attribution import OUTSIDE
from qeff_validate.explain.locate import Location
from qeff_validate.report.explanation import LayerError

MOST_LAYERS = 40
"""Layers that a report holds: those with the greatest local error over floor."""

PEFT_PREFIX = "base_model.model."


def summary(stage: str | None, location: Location, *, in_graph: bool, unfinished: str = "") -> str:
    """Return the sentence.

    Args:
        stage: the guilty one.
        location: module and finding.
        in_graph: whether values of a graph were looked at.
        unfinished: why the search ended early.
    """
    module, finding = location.module, short_text(location.finding)
    if module is not None and not in_graph:
        text = f"adapter of {short(module)}, {finding}"
    elif module is not None:
        where = module if module == "pooling" else f"layer {short(module)}"
        text = f"{where}, {finding}" if finding else f"{where} differs from the original model"
    elif finding:
        text = f"outside of the graph: {finding}"
    elif stage in OUTSIDE:
        text = "outside of the graph: its file gives the right values when it is run again"
    elif stage is not None:
        text = f"made at the stage {stage}; no layer stands out"
    else:
        text = "no stage and no layer stands out"
    return f"{text}{f' ({stage})' if stage else ''}{f'; {unfinished}' if unfinished else ''}"


def worst_layers(errors: Sequence[LayerError]) -> tuple[LayerError, ...]:
    """Return the layers with the greatest local error over floor, in the order of the graph, with short paths."""
    kept = list(errors)
    if len(kept) > MOST_LAYERS:
        ratios = sorted((error.local / error.floor for error in kept), reverse=True)
        kept = [error for error in kept if error.local / error.floor >= ratios[MOST_LAYERS - 1]][:MOST_LAYERS]
    return tuple(replace(error, module=short(error.module)) for error in kept)


def short(path: str) -> str:
    """Return a path without the two levels that PEFT puts around a model."""
    return path.removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def short_text(text: str) -> str:
    """Return a finding whose paths are without PEFT's levels."""
    return text.replace(PEFT_PREFIX, "").replace(".base_layer", "")
