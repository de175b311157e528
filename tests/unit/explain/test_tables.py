# SPDX-License-Identifier: Apache-2.0
"""What befell an embedding, alone or where several are added, is told from what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.operators import operator_finding

IDS = torch.tensor([[1, 2, 3, 5], [5, 6, 1, 0]])


class Embeddings(nn.Module):
    """Words and positions in a norm, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(12, 8), nn.Embedding(6, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the normalized sum."""
        added: Tensor = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])[None]))
        return added


def embeddings() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Embeddings()).requires_grad_(requires_grad=False)


def finding(name: str, edit: Callable[[Any], Any], *, alone: bool) -> str:
    """Return the finding for an embedding with another table, or for the sum that it is in."""
    root = embeddings()
    tables = {key: root[0].get_submodule(key).weight.double().numpy() for key in ("words", "places")}
    ids, places = IDS.numpy(), np.arange(IDS.shape[1])[None]
    tables[name] = edit(tables[name].copy())
    words = tables["words"][ids]
    output = (words if alone else words + tables["places"][places]).astype(np.float16).astype(np.float64)
    place = ("0.words", "out", 0, 0) if alone else ("0.norm", "in", 0, 0)
    path = "0.words" if alone else "0"
    return operator_finding(root, place, path, ((IDS,), {}), output, relative_error, 1.5e-3)


def rows(edit: Callable[[Any], None]) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        edit(table)
        return table

    return change


def zero(table: Any) -> None:
    table[3] = 0


def copied(table: Any) -> None:
    table[1] = table[4]


def shifted(table: Any) -> Any:
    return np.roll(table, 1, 0)


CASES: list[tuple[str, Callable[[Any], Any], bool, str]] = [
    ("words", rows(zero), True, "weight row 3 is zero"),
    ("words", rows(copied), True, "weight row 1 is that of row 4"),
    ("words", shifted, True, "reads rows that are shifted by -1"),
    ("words", lambda table: 2 * table, True, "weight scaled by 2"),
    ("words", np.zeros_like, True, "weight is zero"),
    ("words", rows(zero), False, "words weight row 3 is zero"),
    ("places", rows(zero), False, "places weight row 3 is zero"),
    ("places", rows(copied), False, "places weight row 1 is that of row 4"),
    ("places", shifted, False, "places reads rows that are shifted by -1"),
    ("places", np.zeros_like, False, "what places gives is left out of the sum"),
]


@pytest.mark.parametrize(("name", "edit", "alone", "text"), CASES, ids=[f"{c[0]} {c[3]}" for c in CASES])
def test_what_befell_an_embedding_is_told(name: str, edit: Callable[[Any], Any], alone: bool, text: str) -> None:
    assert finding(name, edit, alone=alone) == text


def test_healthy_table_has_no_name() -> None:
    assert finding("words", lambda table: table, alone=True) == ""
