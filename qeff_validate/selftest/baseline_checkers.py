# SPDX-License-Identifier: Apache-2.0
"""Other checkers, applied to the same tensors, so that their results come from the same run as ours.

Each implements its documented behaviour, including its handling of shapes and NaN; where the documentation leaves a
choice, the stricter one is taken. All of them get our inputs, which are more than most of them are used with. The
caller leaves out rows of zeros (texts without a token), for which a cosine is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from qeff_validate.tensors import Array

UPSTREAM_MAD: Mapping[str, float] = {"fp32": 1e-5, "fp16": 1e-2}
"""QEfficient's bounds for ONNX Runtime against Hugging Face, and for the card against ONNX Runtime."""

TORCH: Mapping[str, tuple[float, float]] = {"fp32": (1.3e-6, 1e-5), "fp16": (1e-3, 1e-5)}
"""``(rtol, atol)`` that `torch.testing.assert_close` takes for tensors of float32 and of float16."""

POLYGRAPHY = 1e-5
COSINE = 0.999


class Check(Protocol):
    """A checker: returns True if outputs pass."""

    def __call__(self, reference: Array, actual: Array, precision: str = "fp32") -> bool:
        """Judge float32 arrays ``[n, d]``; ``precision`` is the profile of what computed them."""


def upstream_mad(reference: Array, actual: Array, precision: str = "fp32") -> bool:
    """Gate the mean absolute difference of the whole tensor, shapes broadcast (QEfficient's embedding tests).

    ``check_embed_pytorch_vs_ort_vs_ai100`` in tests/transformers/models/embedding_models: no shape is compared first.
    """
    try:
        with np.errstate(invalid="ignore"):
            mean = np.mean(np.abs(np.subtract(reference, actual)))
    except ValueError:  # no common shape: an exception, so a failed test
        return False
    return bool(mean <= UPSTREAM_MAD[_compute(precision)])


def upstream_tokens(reference: Array, actual: Array, precision: str = "fp32") -> bool:  # noqa: ARG001
    """Require the same greedy tokens in all rows (QEfficient's check_causal_models.py: the first 24, exactly).

    Rows are teacher-forced, so two greedy texts differ first where the greatest logit of a row first does. QEfficient
    requires this of base models only, with one prompt.
    """
    return bool(np.array_equal(reference.argmax(axis=-1), actual.argmax(axis=-1)))


def upstream_peft(reference: Array, actual: Array, precision: str = "fp32") -> bool:  # noqa: ARG001
    """Pass: QEfficient's tests of adapters (tests/peft) assert names, exceptions and files, and no output."""
    return True


def torch_assert_close(reference: Array, actual: Array, precision: str = "fp32") -> bool:
    """Call `torch.testing.assert_close` with its defaults for the precision: shape, then |Δ| ≤ atol + rtol·|reference|.

    NaN equals nothing. docs.pytorch.org/docs/stable/testing.html.
    """
    import torch

    rtol, atol = TORCH[_compute(precision)]
    outputs, expected = (torch.from_numpy(np.ascontiguousarray(array)) for array in (actual, reference))
    try:
        torch.testing.assert_close(outputs, expected, rtol=rtol, atol=atol)
    except AssertionError:
        return False
    return True


def polygraphy(reference: Array, actual: Array, precision: str = "fp32") -> bool:  # noqa: ARG001
    """Fail if an element is beyond both tolerances at once (Polygraphy's ``SimpleCompareFunc`` by its defaults).

    Shapes must be equal; relative errors are of the second output, which is the reference; NaN is beyond any tolerance,
    and so are equal infinities; nothing to compare passes. Defaults do not depend on the precision.
    Polygraphy 0.53.6, docstrings of polygraphy/comparator/compare.py, ``check_error_stat="elemwise"``.
    """
    if reference.shape != actual.shape:
        return False
    with np.errstate(all="ignore"):
        absolute = np.abs(np.subtract(actual, reference))
        within = (absolute <= POLYGRAPHY) | (absolute / np.abs(reference) <= POLYGRAPHY)
    return bool(within.all())


def cosine(reference: Array, actual: Array, precision: str = "fp32") -> bool:  # noqa: ARG001
    """Require a cosine similarity of at least 0.999 in each row, in float32 (as vLLM's and TEI's tests of embeddings).

    ``tests/models/utils.py`` of vllm-project/vllm and its like; a row that is zero or not finite fails.
    """
    try:
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(reference, axis=-1) * np.linalg.norm(actual, axis=-1)
            similar = np.multiply(reference, actual).sum(axis=-1) / lengths
    except ValueError:
        return False
    return bool((similar >= COSINE).all())


EMBEDDING_CHECKERS: Mapping[str, Check] = {
    "upstream MAD": upstream_mad,
    "torch assert_close": torch_assert_close,
    "Polygraphy": polygraphy,
    "cosine 0.999": cosine,
}
"""Checkers of embeddings ``[n, hidden]``, by the heading of their column."""

LOGIT_CHECKERS: Mapping[str, Check] = {
    "upstream tokens": upstream_tokens,
    "upstream PEFT": upstream_peft,
    "torch assert_close": torch_assert_close,
    "Polygraphy": polygraphy,
    "cosine 0.999": cosine,
}
"""Checkers of logits ``[n, vocab]`` of base and adapters."""


def _compute(precision: str) -> str:
    return precision.partition("+")[0]
