# SPDX-License-Identifier: Apache-2.0
"""The limit of a sample of errors against scipy, and a floor that is only taken where it was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from floors import EVEN, made_floor
from scipy.stats import chi2, nct, norm

from qeff_validate.comparison.bounds import bounds_for, systematic_bounds
from qeff_validate.comparison.logit_metrics import LEAST as LOGIT_LEAST
from qeff_validate.comparison.noise_floor import (
    HALF_NORMAL,
    K95,
    SQUARES,
    Floor,
    check_floor,
    digest_of,
    factor,
    limit,
    tolerance_limit,
)
from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.verdict import DELTAS
from qeff_validate.tensors import load_tensors, save_tensors

REFERENCE = {"output": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)}


@pytest.mark.parametrize("size", sorted(K95))
def test_factors_are_those_of_the_noncentral_t(size: int) -> None:
    wanted = nct.ppf(0.95, size - 1, norm.ppf(0.95) * math.sqrt(size)) / math.sqrt(size)
    assert K95[size] == pytest.approx(wanted, abs=6e-4)


def test_the_limit_covers_95_of_100_runs_in_95_of_100_ensembles() -> None:
    draws = np.random.default_rng(1).standard_normal((4000, 8))
    limits = [tolerance_limit(row) for row in 1e-6 * np.exp(0.4 * draws)]
    covered = norm.cdf(np.log(np.array(limits) / 1e-6) / 0.4)
    assert np.mean(covered >= 0.95) == pytest.approx(0.95, abs=0.012)  # 3.5 standard deviations of the count


def test_a_sample_between_two_sizes_takes_the_factor_of_the_smaller_one() -> None:
    logs = np.linspace(-12, -10, 11)
    wanted = math.exp(logs.mean() + K95[10] * logs.std(ddof=1))
    assert tolerance_limit(np.exp(logs)) == pytest.approx(wanted)
    assert tolerance_limit([2e-6] * 100) == pytest.approx(2e-6)


@pytest.mark.parametrize(
    "errors", [[], [1e-6], [1e-6, 2e-6], [1e-6, 2e-6, math.nan], [math.inf, 1e-6, 1e-6], [1e-6, -math.inf, 1e-6]]
)
def test_too_few_errors_or_one_that_is_no_number_limit_nothing(errors: list[float]) -> None:
    assert tolerance_limit(errors) == math.inf


def test_errors_of_zero_are_the_least_and_no_crash() -> None:
    assert 0 < tolerance_limit([0.0] * 8) < 1e-200


def test_magnitudes_of_what_lies_round_zero_have_the_limit_of_a_normal_distribution() -> None:
    assert pytest.approx(norm.ppf(0.975) * math.sqrt(8 / chi2.ppf(0.05, 8)), abs=0.01) == HALF_NORMAL
    draws = np.abs(np.random.default_rng(2).standard_normal((2000, 8)))
    limits = np.array([limit("logits.mean_norm", row) for row in draws])
    assert np.mean(limits > norm.ppf(0.975)) > 0.92
    assert np.median(limits) < 4, "three times a root mean square"
    unlucky = np.array([*[1e-5] * 7, 1e-12])
    assert limit("mean_norm", unlucky) < 4e-5
    assert limit("rel_l2", unlucky) > 1
    even = np.full(8, 0.02)
    assert limit("a.delta_norm", even) == pytest.approx(0.02)
    assert limit("mean_norm", np.array([1e-5] * 7 + [math.nan])) == math.inf


def test_factors_are_squared_for_squares_and_two_for_what_is_compressed() -> None:
    linear = {"rel_l2", "norm_ratio", "max_abs_rms", "mean_norm", "top1_error", "all_error", "a.delta_norm"}
    squares = {"cosine", "kl_p99", "kl_max", "a.delta_cosine"}
    known = {*EVEN, *LOGIT_LEAST, *DELTAS}
    assert {name for name in known if name.endswith(SQUARES)} == {"cosine", "kl_p99", "kl_max", "delta_cosine"}
    for profile, times in (("fp32", 3), ("fp16", 2), ("bf16", 2)):
        assert {factor(profile, name) for name in linear} == {times}
        assert {factor(profile, name) for name in squares} == {times**2}
    for profile in ("fp16+mxfp6", "fp32+mxfp6+mxint8"):
        assert {factor(profile, name) for name in linear | squares} == {2}


def test_bounds_say_where_they_come_from() -> None:
    bounds = bounds_for("fp16", floor=made_floor(), override={})
    assert bounds["cosine"].value == pytest.approx(4 * EVEN["cosine"])
    assert bounds["cosine"].why == "4 x 1e-06, the 95/95 limit of 8 legitimate runs in fp16"
    bounds = systematic_bounds(made_floor(systematic_errors={"mean_signed": 1e-4, "mean_norm": 1e-9}))
    assert bounds["mean_signed"].value == pytest.approx(3e-4)
    assert bounds["mean_norm"].value == 1e-6, "units in the last place of float32"
    assert "against their mean" in bounds["mean_signed"].why


def test_a_floor_is_stored_and_read_as_it_was(tmp_path: Path) -> None:
    spread = np.random.default_rng(3).lognormal(-12, 1, 8)
    names = {"rel_l2": spread, "a.b.delta_cosine": spread / 3}
    floor = made_floor(
        names,
        profile="fp16+mxfp6",
        systematic_errors={"mean_signed": spread},
        center=REFERENCE,
        of=digest_of(REFERENCE),
    )
    path = tmp_path / "floor.safetensors"
    assert "strays.mean_signed" in floor.stored(), "the name in stored files stays"
    save_tensors(path, floor.stored())
    again = Floor.from_stored(load_tensors(path))
    assert (again.profile, again.of) == (floor.profile, floor.of)
    for part in ("errors", "systematic_errors", "center"):
        wanted, got = getattr(floor, part), getattr(again, part)
        assert {name: array.tobytes() for name, array in got.items()} == {n: a.tobytes() for n, a in wanted.items()}
        assert all(got[name].dtype == array.dtype for name, array in wanted.items())


def test_a_floor_belongs_to_the_reference_and_the_precision_that_it_was_measured_for() -> None:
    floor = made_floor(of=digest_of(REFERENCE))
    assert check_floor(floor, {"output": REFERENCE["output"].copy()}, "fp16") is floor
    with pytest.raises(IncomparableError, match=r"measured in fp16, and this run computes in fp16\+mxfp6"):
        check_floor(floor, REFERENCE, "fp16+mxfp6")
    array = REFERENCE["output"]
    nudged = array.copy()
    nudged[3, 7] = np.nextafter(nudged[3, 7], np.float32(9))
    for other in (
        {"output": nudged},
        {"output": array[::-1]},
        {"output": array.reshape(8, 4)},
        {"output": array.view(np.int32)},
        {"vectors": array},
        {**REFERENCE, "more": array},
        {},
    ):
        with pytest.raises(IncomparableError, match="measured for other reference outputs"):
            check_floor(floor, other, "fp16")
    with pytest.raises(IncomparableError):
        check_floor(replace(floor, of=""), REFERENCE, "fp16")


def test_what_is_usual_is_the_geometric_mean() -> None:
    floor = made_floor({"rel_l2": [1e-6, 1e-4] * 4})
    assert floor.level("rel_l2") == pytest.approx(1e-5)
