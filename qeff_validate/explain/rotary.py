# SPDX-License-Identifier: Apache-2.0
"""What an attention may compute with its rotary positions: other rotations, another base, other distances."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qeff_validate.explain.least_error import least
from qeff_validate.explain.tried_module import TriedModule, changed

EXPONENTS = np.geomspace(0.25, 4, 49)
"""Powers of the frequencies that are tried first: a base of 10,000 becomes one between 10 and 1e16."""

FACTORS = np.geomspace(0.1, 10, 49)
"""Factors of the positions that are tried first."""

FINE_EXPONENTS, FINE_FACTORS = np.geomspace(0.25, 4, 401), np.geomspace(0.1, 10, 401)
"""The same of angles themselves, which cost little and have many local minima."""

CLEAR = 1e-3
"""Distance from 1 from which a power or a factor is another one."""


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


ROTATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "rotary positions pair neighbours, not halves": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(
        -2
    ),
    "rotary positions turn the other way": lambda x: torch.cat((_halves(x)[1], -_halves(x)[0]), dim=-1),
    "rotary positions have no sign in one of their two terms": lambda x: torch.cat(_halves(x)[::-1], dim=-1),
    "rotary positions are left out in one of their two terms": torch.zeros_like,
}


def rotary_hypotheses(
    tried: TriedModule, observed: Any, size: Callable[[Any, Any], float]
) -> Iterator[tuple[str, Any]]:
    """Yield what an attention gives with other rotary positions, with a name of the change.

    Args:
        tried: the attention; of one without rotary positions nothing is tried.
        observed: what the graph gives.
        size: of an error, from the expected and the actual value.
    """
    family = sys.modules[type(tried.module).__module__]
    args, kwargs = tried.call
    angles = kwargs.get("position_embeddings")
    if isinstance(angles, tuple) and len(angles) == 2:

        def run(cosine: Tensor, sine: Tensor) -> Any:
            call = args, {**kwargs, "position_embeddings": (cosine, sine)}
            return tried.run(call)

        yield "rotary positions are left out", run(torch.ones_like(angles[0]), torch.zeros_like(angles[1]))
        yield from _other_frequencies(*angles, run, lambda output: size(output, observed))
    if hasattr(family, "rotate_half"):
        for text, rotate in ROTATIONS.items():
            with changed(family, "rotate_half", rotate):
                yield text, tried.run()


def _other_frequencies(
    cosine: Tensor, sine: Tensor, run: Callable[[Tensor, Tensor], Any], error: Callable[[Any], float]
) -> Iterator[tuple[str, Any]]:
    """Yield attention with another base, and with other positions, each by a search for the least error.

    Args:
        cosine: ``[1 or batch, seq_len, size of a head]``; its second half repeats the first, else nothing is tried.
        sine: of the same shape.
        run: gives the attention's output with others.
        error: of an output.
    """
    half = cosine.shape[-1] // 2
    if cosine.ndim != 3 or cosine.shape[1] < 2 or not torch.equal(*_halves(cosine)):
        return
    turns = torch.atan2(sine[..., :half], cosine[..., :half])
    strength = torch.hypot(sine[..., :half], cosine[..., :half])
    steps = turns[0, 1] - turns[0, 0]  # positions begin one by one
    if not (steps > 0).all():
        return
    places = turns[..., -1:] / steps[-1]

    def turned(frequencies: Tensor) -> Any:
        parts = places * frequencies
        return run(*(torch.cat([part * strength] * 2, dim=-1) for part in (parts.cos(), parts.sin())))

    power = least(lambda value: error(turned(steps**value)), EXPONENTS)
    if abs(power - 1) > CLEAR:
        yield f"rotary positions have another base{_told(steps, power)}", turned(steps**power)
    factor = least(lambda value: error(turned(steps * value)), FACTORS)
    if abs(factor - 1) > CLEAR:
        yield f"rotary positions are scaled by {factor:.4g}", turned(steps * factor)


def frequency_hypotheses(
    tried: TriedModule, observed: Any, size: Callable[[Any, Any], float]
) -> Iterator[tuple[str, Any]]:
    """Yield what a module with rotary frequencies gives with another base, and with other positions; else nothing."""
    frequencies = getattr(tried.module, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or not (frequencies > 0).all():
        return

    def run(others: Tensor) -> Any:
        with changed(tried.module, "inv_freq", others):
            return tried.run()

    power = least(lambda value: size(run(frequencies**value), observed), FINE_EXPONENTS)
    yield f"rotary positions have another base{_told(frequencies, power)}", run(frequencies**power)
    factor = least(lambda value: size(run(frequencies * value), observed), FINE_FACTORS)
    yield f"rotary positions are scaled by {factor:.4g}", run(frequencies * factor)


def _told(frequencies: Tensor, power: float) -> str:
    """Return which base some frequencies have to a power instead of their own, if they tell it."""
    half = len(frequencies)
    base = math.exp(-half * math.log(float(frequencies[1] / frequencies[0]))) if half > 1 else 0.0
    return f": {base**power:.3g} instead of {base:.3g}" if base > 1 else ""
