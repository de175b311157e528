# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from bounds import close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qeff_validate.comparison import bounds, vector_metrics
from qeff_validate.comparison.vector_metrics import neighbour_metrics, row_errors, worst_row
from qeff_validate.errors import IncomparableError


def rows(n: int = 12, d: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def by_definition(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """The formulas of validation-methods §14.1, written as they stand there."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    na, nb = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    unit_a, unit_b = a / na[:, None], b / nb[:, None]
    return {
        "rel_l2": np.linalg.norm(b - a, axis=1) / na,
        "cosine": 0.5 * np.linalg.norm(unit_a - unit_b, axis=1) ** 2,
        "norm_ratio": np.abs(nb / na - 1),
        "max_abs_rms": np.abs(b - a).max(axis=1) / np.sqrt((a**2).mean(axis=1)),
        "mean_abs": np.abs(b - a).mean(axis=1),
    }


@pytest.mark.numeric
@pytest.mark.parametrize("block", [1, 7, 48, 100, 1 << 17])
def test_blocks_of_any_size_give_the_formulas(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(vector_metrics, "BLOCK", block)
    a = rows()
    b = (a + 1e-4 * rows(seed=1)).astype(np.float32)
    got = row_errors(a, b)
    for name, wanted in by_definition(a, b).items():
        close(getattr(got, name), wanted, rtol=1e-9, atol=1e-18, what=name)


@pytest.mark.numeric
@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e3, 1e3, width=32)),
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e3, 1e3, width=32)),
)
def test_any_finite_rows_give_the_formulas(a: np.ndarray, b: np.ndarray) -> None:
    a = a + np.float32(2e3)  # away from zero rows, where nothing is defined
    got = row_errors(a, b + np.float32(2e3))
    for name, wanted in by_definition(a, b + np.float32(2e3)).items():
        close(getattr(got, name), wanted, rtol=1e-6, atol=1e-15, what=name)


def test_tiny_cosine_deficits_are_not_lost_to_cancellation() -> None:
    a = np.zeros((1, 384))
    a[0, 0] = 1.0
    b = a.copy()
    b[0, 1] = 1e-7  # deficit 5e-15; 1 - cos in float64 would give about 1e-16 of noise, in float32 zero
    assert row_errors(a, b).cosine[0] == pytest.approx(5e-15, rel=1e-6)


@pytest.mark.numeric
def test_a_pure_scale_has_no_cosine_deficit_and_its_norm_ratio() -> None:
    a = rows().astype(np.float64)
    got = row_errors(a, a * 1.02)
    assert got.cosine.max() < 1e-15
    close(got.norm_ratio, 0.02, rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "actual"])
@pytest.mark.parametrize("place", [(0, 0), (5, 17), (11, 47)])
def test_non_finite_values_never_come_out_as_a_good_value(bad: float, side: str, place: tuple[int, int]) -> None:
    a, b = rows(), rows()
    (a if side == "reference" else b)[place] = bad
    errors = row_errors(a, b)
    for name in ("rel_l2", "norm_ratio", "max_abs_rms"):
        worst = worst_row(name, getattr(errors, name))
        assert not (worst.value < bounds.MOST[name]), name
        assert worst.worst["row"] == place[0], name


def test_a_zero_row_on_either_side_is_never_good() -> None:
    a, b = rows(), rows()
    b[4] = 0
    assert row_errors(a, b).rel_l2[4] == 1.0
    assert not (worst_row("cosine", row_errors(a, b).cosine).value <= 0.4)
    assert not (worst_row("rel_l2", row_errors(b, a).rel_l2).value <= 1.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((3, 4)), np.zeros((4, 3))),
        (np.zeros((0, 4)), np.zeros((0, 4))),
        (np.zeros((3, 0)), np.zeros((3, 0))),
        (np.zeros(4), np.zeros(4)),
    ],
)
def test_what_cannot_be_compared_is_an_error(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(IncomparableError):
        row_errors(a, b)


def brute_force(a: np.ndarray, b: np.ndarray, gap: float) -> int:
    """Count neighbours that do not rank behind every clearly better one, by looking at every pair."""
    a = a / np.linalg.norm(a, axis=1, keepdims=True)
    b = b / np.linalg.norm(b, axis=1, keepdims=True)
    count = 0
    for i in range(len(a)):
        others = [j for j in range(len(a)) if j != i]
        for k in others:
            better = [j for j in others if a[i] @ a[j] > a[i] @ a[k] + gap]
            count += any(not (b[i] @ b[j] > b[i] @ b[k]) for j in better)
    return count


@pytest.mark.parametrize("noise", [1e-4, 3e-2, 0.2])
def test_the_order_of_neighbours_equals_a_look_at_every_pair(noise: float) -> None:
    a = rows(20, 6).astype(np.float64)
    b = a + 0.3 * rows(20, 6, seed=3)
    order, _, _ = neighbour_metrics(a, b, noise=noise)
    wanted = brute_force(a, b, 2 * (2 * noise + noise**2))
    assert wanted > 0, "a test without violations cannot fail"
    assert order.value == wanted


def test_random_noise_of_the_stated_size_never_moves_a_neighbour() -> None:
    generator = np.random.default_rng(0)
    for seed in range(20):
        a = rows(40, 16, seed).astype(np.float64)
        error = generator.standard_normal(a.shape)
        error *= 1e-2 * np.linalg.norm(a, axis=1, keepdims=True) / np.linalg.norm(error, axis=1, keepdims=True)
        order, overlap, drift = neighbour_metrics(a, a + error, noise=1.1e-2)
        assert order.value == 0
        assert 0 < overlap.value <= 1
        assert 0 < drift.value <= 2 * 1.1e-2 + 1.1e-2**2


def test_many_rows_are_sampled_with_a_seed_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_metrics, "PAIR_ROWS", 10)
    a = rows(30, 8)
    first = neighbour_metrics(a, rows(30, 8, 5), noise=1e-3, seed=1)
    again = neighbour_metrics(a, rows(30, 8, 5), noise=1e-3, seed=1)
    assert first == again
    assert first[0].worst["rows_used"] == 10
    assert first[0].worst["rows"] == 30


def test_nan_counts_as_a_violation() -> None:
    a = rows(6, 8).astype(np.float64)
    b = a.copy()
    b[2] = np.nan
    assert neighbour_metrics(a, b, noise=1e-6)[0].value > 0


def test_two_rows_have_no_order() -> None:
    with pytest.raises(IncomparableError, match="at least 3"):
        neighbour_metrics(rows(2), rows(2), noise=1e-6)
