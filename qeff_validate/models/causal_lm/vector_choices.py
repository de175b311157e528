# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA takes the vectors with the greatest logits; rounding must not take others. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.tensors import Array, Tensors

MARGIN = 8.0
"""How far the logits of vectors that are not chosen are put below the chosen ones': far beyond rounding in fp16."""


def with_decisive_choices(tensors: Tensors, chosen: int) -> dict[str, Array]:
    """Return tensors of VB-LoRA in which no rounding changes which vectors are chosen.

    The weights of the chosen vectors are a softmax over their logits alone (peft.tuners.vblora), so the others may have
    any lower logits: the adapter is the same. Two that are equal in fp16 would be chosen as a runtime likes.

    Args:
        tensors: by saved name; ``…vblora_logits_A`` and ``_B`` are ``[…, vectors]``.
        chosen: ``topk`` of the adapter's config.
    """
    return {
        name: _decisive(array, chosen) if "vblora_logits_" in name.rpartition(".")[2] else array
        for name, array in tensors.items()
    }


def _decisive(logits: NDArray[Any], chosen: int) -> NDArray[Any]:
    order = np.argsort(-logits, axis=-1, kind="stable")
    others = order[..., chosen:]
    least = np.take_along_axis(logits, order[..., chosen - 1 : chosen], axis=-1)
    result: NDArray[Any] = logits.copy()
    np.put_along_axis(result, others, np.broadcast_to(least - MARGIN, others.shape).astype(logits.dtype), axis=-1)
    return result


def decisive_adapters(tensors: Mapping[str, Tensors], chosen: int | None) -> dict[str, dict[str, Array]]:
    """Return the tensors of each adapter with decisive choices; ``chosen`` is None for other methods."""
    if chosen is None:
        return {name: dict(arrays) for name, arrays in tensors.items()}
    return {name: with_decisive_choices(arrays, chosen) for name, arrays in tensors.items()}
