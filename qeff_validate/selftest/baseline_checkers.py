# SPDX-License-Identifier: Apache-2.0
"""What other checkers say of the same tensors, so that their columns stand beside ours and come from the same run.

Each is written after its documented behaviour, with its own handling of shapes and NaN; where several readings are
possible, the one that finds more is taken. All get our inputs, which are more than most of them are used with.
Rows that hold zeros on purpose (texts without a token) are left out by the caller: a cosine has no value there.
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
    """Says whether a checker lets outputs pass."""

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
    """Ask for the same greedy tokens, of all rows (QEfficient's check_causal_models.py: the first 24, exactly).

    Rows are teacher-forced, so two greedy texts differ first where the greatest logit of a row first does. QEfficient
    asks this of base models only, with one prompt.
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
    got, wanted = (torch.from_numpy(np.ascontiguousarray(array)) for array in (actual, reference))
    try:
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)
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
    """Ask for a cosine similarity of at least 0.999 in each row, in float32 (as vLLM's and TEI's tests of embeddings).

    ``tests/models/utils.py`` of vllm-project/vllm and its like; a row that is zero or not finite fails.
    """
    try:
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(reference, axis=-1) * np.linalg.norm(actual, axis=-1)
            similar = np.multiply(reference, actual).sum(axis=-1) / lengths
    except ValueError:
        return False
    return bool((similar >= COSINE).all())


OTHERS: Mapping[str, Check] = {
    "upstream MAD": upstream_mad,
    "torch assert_close": torch_assert_close,
    "Polygraphy": polygraphy,
    "cosine 0.999": cosine,
}
"""For embeddings ``[n, hidden]``, by the heading of their column."""

OTHERS_LM: Mapping[str, Check] = {
    "upstream tokens": upstream_tokens,
    "upstream PEFT": upstream_peft,
    "torch assert_close": torch_assert_close,
    "Polygraphy": polygraphy,
    "cosine 0.999": cosine,
}
"""For logits ``[n, vocab]`` of base and adapters."""


def _compute(precision: str) -> str:
    return precision.partition("+")[0]
