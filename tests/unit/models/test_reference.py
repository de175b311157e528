# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from qeff_validate.models.reference import computing_in, hidden_states
from qeff_validate.models.sources import Random

IDS = (np.array([5, 6, 7, 8]), np.array([], dtype=np.int64), np.array([9]))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_float64_equals_a_model_that_was_widened_whole(kind: str) -> None:
    ours = list(hidden_states(Random(kind, {}, 0).body(), IDS, "float64"))
    whole = Random(kind, {}, 0).body().double()
    for row, got in zip(IDS, ours, strict=True):
        if row.size == 0:
            assert got is None
            continue
        with torch.inference_mode():
            wanted = whole(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0].numpy()
        assert wanted.dtype == np.float64
        np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-13)
    narrow = list(hidden_states(Random(kind, {}, 0).body(), IDS, "float32"))
    assert np.abs(narrow[0] - ours[0]).max() > 1e-9, "float64 was not used"


def test_the_body_is_float32_again_bit_for_bit_also_after_a_failure() -> None:
    body = Random("bert", {}, 0).body()
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with torch.inference_mode(), computing_in(body, "float64"):
        body(input_ids=torch.tensor([[5, 6]]))
        with pytest.raises(IndexError):
            body(input_ids=torch.tensor([[10**6]]))
    after = body.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in body.parameters()} == {torch.float32}
