# SPDX-License-Identifier: Apache-2.0
"""Choices of VB-LoRA that rounding cannot change. The oracle is PEFT's own layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bounds import close
from peft.tuners.vblora.layer import Linear

from qeff_validate.models.causal_lm.vector_choices import with_decisive_choices


@pytest.mark.numeric
@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_adapter_is_the_same_and_half_precision_chooses_the_same_vectors(chosen: int) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.permuted(np.tile(np.arange(6), (4, 5, 1)), axis=-1) * 1e-5 + 1).astype(np.float32)  # ties in fp16
    bank = torch.from_numpy(rng.standard_normal((6, 8)).astype(np.float32))
    name = "base_model.model.q_proj.vblora_logits_A"
    decisive = with_decisive_choices({name: logits, "other": logits}, chosen)
    assert decisive["other"] is logits

    def product(of: np.ndarray) -> np.ndarray:
        return Linear._get_low_rank_matrix(None, torch.from_numpy(of), bank, chosen).numpy()

    wanted = product(logits)
    close(product(decisive[name]), wanted, rtol=0, atol=0)
    half = decisive[name].astype(np.float16).astype(np.float32)
    close(product(half), wanted, rtol=0, atol=1e-3)
    assert np.abs(product(logits.astype(np.float16).astype(np.float32)) - wanted).max() > 0.1
