# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from bounds import close

from qeff_validate.models import token_rows
from qeff_validate.models.embedding.reference import hidden_states
from qeff_validate.models.emulation import float64
from qeff_validate.models.emulation.float64 import compute_in_dtype, one_thread_if_small
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.models.token_rows import together

IDS = (np.array([5, 6, 7, 8]), np.array([], dtype=np.int64), np.array([9]), np.array([7, 9, 6, 5]))


KINDS = ("bert", "distilbert", "albert", "deberta-v2", "modernbert", "nomic_bert", "gpt2", "qwen3")


@pytest.mark.numeric
@pytest.mark.parametrize("large", [True, False], ids=["by layer", "at once"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_a_model_that_was_widened_whole(kind: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "LARGE", 0 if large else 1 << 60)
    ours = dict(hidden_states(Random(kind, {}, 0).body(), IDS, "float64"))
    assert sorted(ours) == [0, 2, 3], "rows that have a token"
    whole = Random(kind, {}, 0).body().double()
    for row, got in ours.items():
        with torch.inference_mode():
            wanted = whole(input_ids=torch.from_numpy(IDS[row])[None]).last_hidden_state[0].numpy()
        assert wanted.dtype == np.float64
        close(got, wanted, rtol=1e-13, atol=1e-13)
    narrow = dict(hidden_states(Random(kind, {}, 0).body(), IDS, "float32"))
    assert np.abs(narrow[0] - ours[0]).max() > 1e-9, "float64 was not used"


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_layers_are_wide_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "LARGE", 0)
    body = Random(kind, {}, 0).body()
    layers = float64._layers(body)
    assert layers
    most = []
    for layer in layers:
        layer.register_forward_hook(
            lambda *_: most.append(sum(next(one.parameters()).dtype == torch.float64 for one in {*layers}))
        )
    list(hidden_states(body, IDS, "float64"))
    assert max(most) <= 1


def test_a_body_that_reads_the_weights_of_its_layers_is_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float64, "LARGE", 0)
    body = Random("bert", {}, 0).body()
    body.encoder.layer[0].forward = lambda hidden, *_, **__: (
        hidden @ body.encoder.layer[1].attention.output.dense.weight
    )
    found = dict(hidden_states(body, IDS, "float64"))
    assert found[0].dtype == np.float64


@pytest.mark.parametrize("large", [True, False], ids=["by layer", "at once"])
def test_the_body_is_float32_again_bit_for_bit_also_after_a_failure(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float64, "LARGE", 0 if large else 1 << 60)
    body = Random("bert", {}, 0).body()
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    with torch.inference_mode(), compute_in_dtype(body, "float64", probe=list):
        body(input_ids=torch.tensor([[5, 6]]))
        with pytest.raises(IndexError):
            body(input_ids=torch.tensor([[10**6]]))
    after = body.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in body.parameters()} == {torch.float32}


def test_rows_of_equal_length_run_together_and_no_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [np.arange(length) for length in (3, 5, 0, 3, 1, 3, 5)]
    assert list(together(ids)) == [[4], [0, 3, 5], [1, 6]]
    monkeypatch.setattr(token_rows, "TOGETHER", 6)
    assert list(together(ids)) == [[4], [0, 3], [5], [1], [6]], "a batch has a limit in tokens"
    assert list(together(ids, 4)) == [[4, 0, 3, 5], [1, 6]], "batches of a way mix lengths"


def test_small_bodies_compute_on_one_thread_and_threads_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    body, threads = Random("bert", {}, 0).body(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread_if_small(body):
            assert torch.get_num_threads() == 1
        monkeypatch.setattr(float64, "LARGE", 0)
        with one_thread_if_small(body):
            assert torch.get_num_threads() == 2, "a large one uses all"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
