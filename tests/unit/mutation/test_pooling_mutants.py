# SPDX-License-Identifier: Apache-2.0
"""Mutants of pooling, on hidden states of rows with and without tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close

from qeff_validate.mutation.mutant import PoolingMutant
from qeff_validate.mutation.pooling_mutants import POOLING_MUTANTS

NAMED = {mutant.name: mutant for mutant in POOLING_MUTANTS}
LENGTHS = (48, 5, 0, 33)
"""Tokens of the rows; one has none."""


def tokens_of(row: int, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(hidden[row][mask[row] > 0])


POOLED_BY_HAND: dict[str, Callable[[np.ndarray], Any]] = {
    "pooled by cls": lambda tokens: tokens[0],
    "pooled by mean": lambda tokens: tokens.mean(0),
    "pooled by max": lambda tokens: tokens.max(0),
    "pooled by last": lambda tokens: tokens[-1],
    "pooled by weighted mean": lambda tokens: np.average(tokens, 0, weights=np.arange(1, len(tokens) + 1)),
    "mean over n + 1": lambda tokens: tokens.sum(0) / (len(tokens) + 1),
    "sum in place of mean": lambda tokens: tokens.sum(0),
    "mean without the first token": lambda tokens: tokens[1:].mean(0),
    "mean without the last token": lambda tokens: tokens[:-1].mean(0),
    "pooling cut at 30 tokens": lambda tokens: tokens[:30].mean(0),
}


def states(left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states ``[4, 48, 64]`` and their mask, with padding on the left or on the right."""
    hidden = np.random.default_rng(2).standard_normal((4, 48, 64))
    mask = (np.arange(48)[None] < np.array(LENGTHS)[:, None]).astype(np.int64)
    return hidden, mask[:, ::-1].copy() if left else mask


@pytest.mark.numeric
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", POOLED_BY_HAND)
def test_pooling_is_what_the_name_says_with_padding_on_either_side(name: str, left: bool) -> None:
    hidden, mask = states(left)
    pooled = NAMED[name].change(torch.from_numpy(hidden), torch.from_numpy(mask)).numpy()
    for row in (0, 1, 3):
        close(pooled[row], POOLED_BY_HAND[name](tokens_of(row, hidden, mask)), rtol=1e-10)
    assert not pooled[2].any()


@pytest.mark.numeric
def test_pooling_that_takes_other_rows_or_padding() -> None:
    hidden, mask = states(left=False)
    tensors = torch.from_numpy(hidden), torch.from_numpy(mask)
    pooled = NAMED["mask ignored in pooling"].change(*tensors).numpy()
    close(pooled, hidden.mean(axis=1), rtol=1e-10)
    pooled = NAMED["all rows pooled from row 0"].change(*tensors).numpy()
    close(pooled[:2], [hidden[0].mean(0), hidden[0, :5].mean(0)], rtol=1e-10)


@pytest.mark.parametrize("mutant", POOLING_MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_keeps_the_dtype_and_its_inputs(mutant: PoolingMutant, dtype: torch.dtype) -> None:
    hidden, mask = (torch.from_numpy(array) for array in states(left=False))
    hidden = hidden.to(dtype)
    copies = hidden.clone(), mask.clone()
    pooled = mutant.change(hidden, mask)
    assert (pooled.shape, pooled.dtype) == ((4, 64), dtype)
    assert torch.equal(hidden, copies[0])
    assert torch.equal(mask, copies[1])
