# SPDX-License-Identifier: Apache-2.0
"""Metamorphic relations of embeddings: those of any rows of tokens, and padding on the other side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.models import row_relations
from qeff_validate.models.row_relations import Pair, Relation, joined, run_at, shapes
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.protocols import Session
from qeff_validate.tensors import Array

MAX_LEFT_PADDING_SHIFT = 1e-4
"""Accepted relative L2 of a float32 body with left padding: rounding gives 1e-6, shifted positions 1e-2 or more."""


def padding_sides(model: Any, session: Session, rows: TokenRows) -> Pair:
    """Left padding gives the same vectors as right padding, in each bucket.

    Raises:
        IncomparableError: left padding changes the result of the Hugging Face body too (learned absolute positions).
    """
    from qeff_validate.models.embedding.reference import padding_shift

    sizes = [ids.size for ids in rows.ids]
    extremes = [rows.ids[int(np.argmin(sizes))], rows.ids[int(np.argmax(sizes))]]
    shift = padding_shift(model.source.body(), extremes, rows.pad, "left")
    if not shift <= MAX_LEFT_PADDING_SHIFT:
        raise IncomparableError(
            f"padding before a row changes what the Hugging Face body itself returns (relative L2 {shift:.1e}):"
            " its positions count from the first column"
        )
    sides: dict[str, dict[str, list[Array]]] = {"right": {}, "left": {}}
    labels: list[str] = []
    for length in sorted({length for _, length in shapes(model, session)}):
        indices = [row for row, ids in enumerate(rows.ids) if ids.size <= length]
        for side, parts in sides.items():
            for name, array in run_at(model, session, rows.subset(indices), length, side=side).items():
                parts.setdefault(name, []).append(array)
        labels += [f"{rows.texts[row]} [in {length}]" for row in indices]
    return joined(sides["right"]), joined(sides["left"]), labels


RELATIONS: Mapping[str, Relation] = {**row_relations.RELATIONS, "padding_sides": padding_sides}
