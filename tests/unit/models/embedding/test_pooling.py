# SPDX-License-Identifier: Apache-2.0
"""Pooling against numpy over the real tokens only: any mask, any padding side, fp16, garbage, empty rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from hypothesis import given, settings
from hypothesis import strategies as st

from qeff_validate.errors import ConfigError
from qeff_validate.models.embedding import pooling_oracle
from qeff_validate.models.embedding.pooling import POOLINGS, PooledModel, normalized

NAMES = sorted(set(POOLINGS) - {"none"})


def by_numpy(name: str, tokens: np.ndarray) -> np.ndarray:
    """Written here once more, so that neither the wrapper nor the product's oracle is its own witness."""
    if name in ("mean", "avg"):
        return tokens.astype(np.float64).sum(axis=0) / len(tokens)
    if name == "weighted_mean":
        return sum((place + 1) * token for place, token in enumerate(tokens.astype(np.float64))) / sum(
            range(1, len(tokens) + 1)
        )
    if name == "last":
        return tokens[-1]
    if name == "max":
        return np.array([column.max() for column in tokens.T])
    if name == "mean_sqrt_len":
        return np.array([column.sum() / len(column) ** 0.5 for column in tokens.T])
    return tokens[0]


@pytest.mark.numeric
def test_the_oracle_has_every_pooling_and_agrees_with_numpy() -> None:
    assert sorted(pooling_oracle.POOLINGS) == sorted(POOLINGS) == sorted([*NAMES, "none"])
    tokens = np.random.default_rng(0).standard_normal((5, 7))
    for name in NAMES:
        close(pooling_oracle.pool(tokens, name, normalize=False), by_numpy(name, tokens), rtol=1e-14)
        assert np.linalg.norm(pooling_oracle.pool(tokens, name, normalize=True)) == pytest.approx(1, abs=1e-12)


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    left=st.booleans(),
    garbage=st.sampled_from([0.0, 1e30, float("nan"), float("inf"), float("-inf")]),
    seed=st.integers(0, 2**31),
)
def test_real_tokens_alone_decide(name: str, lengths: list[int], left: bool, garbage: float, seed: int) -> None:
    width, hidden = 9, 6
    states = np.random.default_rng(seed).standard_normal((len(lengths), width, hidden)).astype(np.float32)
    mask = np.zeros((len(lengths), width), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length if left else 0 : width if left else length] = 1
    dirty = np.where(mask[..., None] > 0, states, np.float32(garbage))
    got = POOLINGS[name](torch.from_numpy(dirty), torch.from_numpy(mask)).numpy()
    for row, length in enumerate(lengths):
        real = states[row][mask[row] > 0]
        wanted = by_numpy(name, real) if length else np.zeros(hidden)
        close(got[row], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_input_is_never_changed_and_the_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    states = torch.randn(3, 5, 4, dtype=torch.float32).to(dtype)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    before, mask_before = states.clone(), mask.clone()
    out = POOLINGS[name](states, mask)
    assert torch.equal(states, before)
    assert torch.equal(mask, mask_before)
    assert out.dtype == dtype
    assert torch.equal(out[2], torch.zeros(4, dtype=dtype))


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_long_rows_of_large_values_do_not_overflow_fp16(name: str) -> None:
    states = torch.full((1, 8192, 4), 10.0, dtype=torch.float16)  # their plain sum is beyond 65504
    out = POOLINGS[name](states, torch.ones(1, 8192, dtype=torch.int64))
    wanted = 10.0 * 8192**0.5 if name == "mean_sqrt_len" else 10.0
    close(out, torch.full((1, 4), wanted, dtype=torch.float16), rtol=2e-3, atol=0)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_normalizing_survives_any_magnitude(dtype: torch.dtype, size: float) -> None:
    vectors = (torch.tensor([[3.0, -4.0, 0.0], [0.5, 0.5, 0.5]]) * size / 4).to(dtype)
    wanted = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    close(normalized(vectors).double(), wanted, rtol=0, atol=2e-3 if dtype.itemsize == 2 else 1e-6)


def test_normalizing_zeros_gives_zeros() -> None:
    assert torch.equal(normalized(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_an_unknown_pooling_names_the_value_and_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'meen'.*Did you mean 'mean'"):
        PooledModel(torch.nn.Identity(), "meen")


@pytest.mark.parametrize("garbage", [0.0, float("nan"), 1e30])
def test_no_pooling_keeps_real_tokens_and_zeros_the_rest(garbage: float) -> None:
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    dirty = torch.where(mask[..., None] > 0, states, torch.tensor(garbage))
    out = POOLINGS["none"](dirty, mask)
    assert torch.equal(out, torch.where(mask[..., None] > 0, states, torch.tensor(0.0)))


@pytest.mark.numeric
def test_matryoshka_cuts_before_normalizing() -> None:
    model = PooledModel(TupleBody(), "max", normalize=True, truncate_dim=3)
    out = model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 1]]))
    close(out, [[0, 0.5**0.5, 0.5**0.5]], atol=1e-6)
    with pytest.raises(ConfigError, match="truncate_dim 6 exceeds the vectors' width 5"):
        PooledModel(TupleBody(), "max", truncate_dim=6)(torch.tensor([[1]]), torch.tensor([[1]]))


def first_two(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0, :2] * mask[:, :1]


def three_arguments(hidden: torch.Tensor, mask: torch.Tensor, more: int) -> torch.Tensor:
    return hidden[:, 0] * more


@pytest.mark.parametrize("pooling", [first_two, "embedding.test_pooling:first_two"], ids=["callable", "dotted path"])
def test_a_custom_pooling_is_used(pooling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    out = PooledModel(TupleBody(), pooling)(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    assert out.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        ("qeff_validate.models.embedding.pooling:nothing", "cannot be imported"),
        (three_arguments, "must be callable with"),
        ("qeff_validate.models.embedding.pooling:SHARE", "must be callable with"),
    ],
)
def test_a_custom_pooling_that_is_none_is_refused(pooling: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PooledModel(TupleBody(), pooling)


@pytest.mark.parametrize(
    ("pooling", "got"),
    [
        (lambda hidden, mask: hidden, r"torch.float32 \[2, 3, 5\]"),
        (lambda hidden, mask: hidden[:1, 0], r"torch.float32 \[1, 5\]"),
        (lambda hidden, mask: hidden[:, 0].double(), r"torch.float64 \[2, 5\]"),
        (lambda hidden, mask: (hidden[:, 0],), "a tuple"),
    ],
    ids=["unpooled", "a row less", "another dtype", "a tuple"],
)
def test_what_a_custom_pooling_returns_is_checked(pooling: Any, got: str) -> None:
    with pytest.raises(ConfigError, match=f"returned {got}.*wanted torch.float32 \\[2, width\\]"):
        PooledModel(TupleBody(), pooling)(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))


class TupleBody(torch.nn.Module):
    """Returns a tuple, and takes its mask by keyword only: GPT-2's second positional argument is something else."""

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.one_hot(input_ids, 5).float() + 0 * attention_mask[..., None],)


def test_the_wrapper_calls_any_body_by_keyword_and_takes_tuples() -> None:
    model = PooledModel(TupleBody(), "max")
    out = model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]]))
    assert out.tolist() == [[0, 1, 1, 0, 0]]
