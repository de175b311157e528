# SPDX-License-Identifier: Apache-2.0
"""A layer of the cache against one written token by token in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qeff_validate.models.causal_lm.kv_cache import StateLayer, cache_indices

HEADS, SLOTS, SIZE = 2, 6, 3


@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1, 2], [0, 1, 2]],
        [[0, 1, -1], [0, -1, -1]],  # padding on the right
        [[-1, 0, 1], [-1, -1, 0]],  # on the left
        [[3, 4, 5], [-1, -1, -1]],  # a row that waits
        [[-1, 4, -1], [5, -1, -1]],
    ],
    ids=str,
)
def test_tokens_go_to_their_positions_and_the_rest_stays(positions: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    state = [rng.normal(size=(2, HEADS, SLOTS, SIZE)).astype(np.float32) for _ in range(2)]
    new = [rng.normal(size=(2, HEADS, 3, SIZE)).astype(np.float32) for _ in range(2)]
    ids = torch.tensor(positions)
    layer = StateLayer(*map(torch.from_numpy, state), cache_indices(ids, SLOTS))
    seen = layer.update(*map(torch.from_numpy, new))
    for which, kept in enumerate((layer.keys, layer.values)):
        wanted, read = state[which].copy(), np.empty_like(state[which])
        for row, places in enumerate(positions):
            for token, place in enumerate(places):
                if place >= 0:
                    wanted[row, :, place] = new[which][row, :, token]
        longest = int(np.max(positions, axis=1).argmax())
        for row, places in enumerate(positions):
            end = max(places) + 1
            last = max(positions[row if end else longest])
            read[row] = wanted[row if end else longest, :, [last]].swapaxes(0, 1)
            read[row, :, :end] = wanted[row, :, :end]
        np.testing.assert_array_equal(kept.numpy(), wanted)
        np.testing.assert_array_equal(seen[which].numpy(), read)


def test_slots_that_were_never_written_are_not_read() -> None:
    empty = torch.full((1, HEADS, SLOTS, SIZE), torch.nan)
    layer = StateLayer(empty, empty, cache_indices(torch.tensor([[0, 1]]), SLOTS))
    keys, values = layer.update(torch.ones(1, HEADS, 2, SIZE), torch.ones(1, HEADS, 2, SIZE))
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()
    assert torch.isnan(layer.keys[:, :, 2:]).all()
