# SPDX-License-Identifier: Apache-2.0
"""Other checkers as we state them: against the originals where these are installed, and with the holes they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qeff_validate.selftest.baseline_checkers import (
    EMBEDDING_CHECKERS,
    LOGIT_CHECKERS,
    cosine,
    polygraphy,
    torch_assert_close,
    upstream_mad,
    upstream_peft,
    upstream_tokens,
)

N, D = 6, 384
NAN, INF = np.float32(np.nan), np.float32(np.inf)


def clean(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D)).astype(np.float32)


def with_element(value: float, row: int = 2, column: int = 7) -> np.ndarray:
    vectors = clean()
    vectors[row, column] = value
    return vectors


def with_dimension(step: float) -> np.ndarray:
    vectors = clean()
    vectors[:, 7] += np.float32(step)
    return vectors


def with_noise(size: float) -> np.ndarray:
    return (clean() * (1 + size * clean(1))).astype(np.float32)


def of_zeros(error: float) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((N, D), np.float32), np.full((N, D), error, np.float32)


def of_thousands(actual: float) -> tuple[np.ndarray, np.ndarray]:
    return np.full((N, D), 1000, np.float32), np.full((N, D), actual, np.float32)


# --- holes (validation-methods §11, upstream §5) what passes, and what does not

HOLES: dict[str, tuple[Callable[..., bool], np.ndarray, np.ndarray, str, bool]] = {
    "one dimension + 3 of 384 has a mean of 0.0078": (upstream_mad, clean(), with_dimension(3.0), "fp16", True),
    "which the bound for ONNX Runtime sees": (upstream_mad, clean(), with_dimension(3.0), "fp32", False),
    "zeros for unit vectors of width 8192": (
        upstream_mad,
        np.full((2, 8192), 8192**-0.5, np.float32),
        np.zeros((2, 8192), np.float32),
        "fp16+mxfp6",
        False,
    ),
    "zeros for unit vectors of width 16384": (
        upstream_mad,
        np.full((2, 16384), 16384**-0.5, np.float32),
        np.zeros((2, 16384), np.float32),
        "fp16",
        True,
    ),
    "one row for all, by broadcasting": (upstream_mad, np.tile(clean()[:1], (N, 1)), clean()[:1], "fp32", True),
    "shapes that do not broadcast": (upstream_mad, clean(), clean()[:-1], "fp16", False),
    "NaN in a mean": (upstream_mad, clean(), with_element(np.nan), "fp16", False),
    "infinity on both sides of a mean": (upstream_mad, with_element(np.inf), with_element(np.inf), "fp16", False),
    "no row at all, by elements": (polygraphy, clean()[:0], clean()[:0], "fp32", True),
    "no row at all, by cosines": (cosine, clean()[:0], clean()[:0], "fp32", True),
    "twice as long": (cosine, clean(), 2 * clean(), "fp32", True),
    "one element of 384 is zero": (cosine, clean(), with_element(0.0, column=3), "fp32", True),
    "one dimension + 3, by cosines": (cosine, clean(), with_dimension(3.0), "fp32", False),
    "one of many rows turned": (cosine, clean(), np.vstack([clean()[:-1], -clean()[-1:]]), "fp32", False),
    "a zero row": (cosine, clean(), clean() * (np.arange(N) > 0)[:, None].astype(np.float32), "fp32", False),
    "NaN in a row": (cosine, clean(), with_element(np.nan), "fp32", False),
    "other widths": (cosine, clean(), clean()[:, 1:], "fp32", False),
    "a transposed choice of tokens": (upstream_tokens, clean(), clean()[::-1], "fp32", False),
    "logits of half the size": (upstream_tokens, clean(), clean() / 2, "fp32", True),
    "text that ends early": (upstream_tokens, clean(), clean()[:-1], "fp32", False),
    "NaN in adapters": (upstream_peft, clean(), np.full_like(clean(), NAN), "fp32", True),
}


@pytest.mark.parametrize("name", HOLES)
def test_hole_is_as_reported(name: str) -> None:
    check, reference, actual, precision, passes = HOLES[name]
    assert check(reference, actual, precision) is passes


# --- against the originals ---------------------------------------------------------------------------

PAIRS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "equal": (clean(), clean()),
    "noise of 1e-7": (clean(), with_noise(1e-7)),
    "noise of 1e-6": (clean(), with_noise(1e-6)),
    "noise of 1e-5": (clean(), with_noise(1e-5)),
    "noise of 2e-4": (clean(), with_noise(2e-4)),
    "noise of 2e-3": (clean(), with_noise(2e-3)),
    "one element": (clean(), with_element(5.0)),
    "NaN": (clean(), with_element(np.nan)),
    "NaN in both": (with_element(np.nan), with_element(np.nan)),
    "infinity": (clean(), with_element(np.inf)),
    "infinity in both": (with_element(np.inf), with_element(np.inf)),
    "infinity in the reference": (with_element(np.inf), clean()),
    "zeros that are off by 9e-6": of_zeros(9e-6),
    "zeros that are off by 2e-5": of_zeros(2e-5),
    "thousands that are off by 9e-6 of themselves": of_thousands(1000.009),
    "thousands that are off by 2e-5 of themselves": of_thousands(1000.02),
    "a row less": (clean(), clean()[1:]),
    "one row for all": (clean(), clean()[:1]),
    "no row": (clean()[:0], clean()[:0]),
}


def original_polygraphy(reference: np.ndarray, actual: np.ndarray) -> bool:
    comparator = pytest.importorskip("polygraphy.comparator", reason="Polygraphy is no dependency of ours")
    logger = pytest.importorskip("polygraphy.logger").G_LOGGER
    ours, theirs = (
        comparator.IterationResult({"output": array}, runner_name=name)
        for name, array in (("actual", actual), ("reference", reference))
    )
    with np.errstate(all="ignore"), logger.verbosity(logger.CRITICAL):
        outputs_match = comparator.SimpleCompareFunc()(ours, theirs)
    assert list(outputs_match) == ["output"]
    return bool(outputs_match["output"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of Polygraphy, for means of nothing
@pytest.mark.parametrize("name", PAIRS)
def test_polygraphy_says_the_same(name: str) -> None:
    assert polygraphy(*PAIRS[name]) is original_polygraphy(*PAIRS[name])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_torch_says_the_same_by_the_defaults_of_the_type(name: str, precision: str, dtype: torch.dtype) -> None:
    """The original picks its tolerances by the dtype of tensors; the numbers stay float32's, which fp16 would round."""
    reference, actual = (torch.from_numpy(array) for array in PAIRS[name])
    rtol, atol = torch.testing._comparison.default_tolerances(dtype)
    same = reference.shape == actual.shape and torch.isclose(actual, reference, rtol=rtol, atol=atol).all()
    assert torch_assert_close(*PAIRS[name], precision) is bool(same)


def test_fp16_is_judged_by_wider_tolerances_of_torch_and_upstream_alone() -> None:
    pair: Any = (np.ones((N, D), np.float32), np.full((N, D), 1.0005, np.float32))
    precisions = ("fp32", "fp16+mxint8")
    passed = {name: [check(*pair, precision) for precision in precisions] for name, check in EMBEDDING_CHECKERS.items()}
    assert passed == {
        "upstream MAD": [False, True],
        "torch assert_close": [False, True],
        "Polygraphy": [False, False],
        "cosine 0.999": [True, True],
    }


def test_each_lets_equal_outputs_pass_and_all_but_one_see_others() -> None:
    for table in (EMBEDDING_CHECKERS, LOGIT_CHECKERS):
        assert all(check(clean(), clean()) for check in table.values())
        assert {name for name, check in table.items() if check(clean(), clean(1))} <= {"upstream PEFT"}
