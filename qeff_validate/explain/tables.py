# SPDX-License-Identifier: Apache-2.0
"""What befell an embedding: other rows are read, or rows have another content, also where several are added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qeff_validate.explain.tried_module import TriedModule
from qeff_validate.explain.vectors import factor_text

DIFFERS = 0.05
"""Relative L2 from which a row is another one."""

SHOWN = 4
"""Rows that are told by number."""


def table_hypotheses(tried: TriedModule, observed: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an embedding gives with one change each, with a name of the change; of other modules nothing.

    Args:
        tried: an embedding, or a module that adds what several of its own give.
        observed: what the block gives.
    """
    if isinstance(tried.module, nn.Embedding):
        ids, given = tried.call[0][0], torch.from_numpy(observed)
        if given.shape == (*ids.shape, tried.module.weight.shape[1]):
            for text, rows in _rows(tried.module.weight.detach(), ids, given):
                yield text, rows.numpy()
        return
    children = {name: child for name, child in tried.module.named_children() if isinstance(child, nn.Embedding)}
    if not children:
        return
    expected, calls = _calls(tried, children)
    if expected.shape != observed.shape or expected.ndim != 3:
        return
    difference = torch.from_numpy(observed - expected)
    for name, (ids, output) in calls.items():
        if output.ndim != 3 or output.shape[-1] != difference.shape[-1]:
            continue
        own = output.expand_as(difference)
        yield f"what {name} gives is left out of the sum", expected - own.numpy()
        for text, rows in _rows(children[name].weight.detach(), ids.expand(own.shape[:2]), own + difference):
            yield f"{name} {text}", expected + (rows - own).numpy()


def _calls(tried: TriedModule, children: Mapping[str, nn.Module]) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """Return what a module gives, and the indices and the output of each of its embeddings."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _, args, output: calls.update({name: (args[0], output.detach())})

    handles = [child.register_forward_hook(hook(name)) for name, child in children.items()]
    try:
        return tried.run(), calls
    finally:
        for handle in handles:
            handle.remove()


def _rows(table: Tensor, ids: Tensor, given: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what may be read from a table of rows in place of those at some indices.

    Args:
        table: ``[rows, width]``.
        ids: the indices, of any shape.
        given: what is read, ``[*ids.shape, width]``.
    """
    shape, ids, given = given.shape, ids.flatten(), given.reshape(-1, given.shape[-1])
    right = table[ids]
    wrong = (given - right).norm(dim=1) > DIFFERS * right.norm(dim=1).clamp(min=1e-30)
    places = wrong.nonzero().flatten()
    if not len(places):
        return
    changed = _distinct(ids[places])
    expected, actual = right[places], given[places]
    factor = float((expected * actual).sum() / expected.square().sum().clamp(min=1e-30))
    shown = ", ".join(str(int(row)) for row in changed[:SHOWN]) + (", …" if len(changed) > SHOWN else "")
    single = len(changed) == 1
    name, verb = (f"weight row {int(changed[0])}", "is") if single else (f"weight {len(changed)} rows ({shown})", "are")
    rows = right.clone()
    rows[places] *= factor
    told = factor_text(factor)
    if 1 < len(changed) == len(_distinct(ids)):
        name, verb = "weight", "is" if told == "zero" else ""
    yield " ".join(filter(None, (name, verb, told))), rows.reshape(shape)
    nearest = ids.clone()
    nearest[places] = torch.cdist(actual, table).argmin(dim=1)
    steps = _distinct((nearest - ids)[places] % len(table))
    if len(changed) == len(steps) == 1:
        text = f"weight row {int(changed[0])} is that of row {int(nearest[places[0]])}"
    elif len(steps) == 1:
        step = int(steps[0])
        text = f"reads rows that are shifted by {step if 2 * step < len(table) else step - len(table):+d}"
    else:
        first = places[0]
        read = f"reads row {int(nearest[first])} for index {int(ids[first])}"
        text = f"{read}, another row for {len(places)} of {len(ids)}"
    yield text, table[nearest].reshape(shape)


def _distinct(numbers: Tensor) -> Any:
    return np.unique(numbers.numpy())
