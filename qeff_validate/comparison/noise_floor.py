# SPDX-License-Identifier: Apache-2.0
"""The noise floor: errors of legitimate runs of the original model, and the limit that follows from them.

Runs that differ in rounding alone have errors that are close to log-normal. The limit exp(mean + k·s) of the logarithms
of n errors, with the one-sided factor k for 95 % of the population at 95 % confidence, is what nearly all further runs
of the same kind stay below (validation-methods §12.1). An artifact differs from the measured runs: other kernels, fused
nodes, rounding in other places. So the limit is multiplied by a factor that was determined on held-out runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.metric import METRICS, names
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import IncomparableError
from qeff_validate.json_tensor import text_of
from qeff_validate.tensors import Array, Tensors

K95: Mapping[int, float] = MappingProxyType({
    3: 7.656, 4: 5.144, 5: 4.203, 6: 3.708, 7: 3.399, 8: 3.187, 9: 3.031, 10: 2.911, 12: 2.736, 16: 2.524, 20: 2.396,
    32: 2.197,
})  # fmt: skip
"""One-sided 95/95 factors of the normal distribution by sample size (ISO 16269-6, table D.4)."""

FACTORS: Mapping[str, float] = MappingProxyType({"fp32": 3.0, "fp16": 2.0, "bf16": 2.0})
"""Factor on the limit, by compute precision.

Held out were the graphs of configs/embedding.yaml and configs/peft.yaml, by both exporters, on PyTorch, ONNX Runtime
and the simulated device: of 81 runs in float32 the worst was at 1.1 times its limit, of 51 in fp16 at 1.2 times
(``over_bound`` in the report.json of `qeff-validate run` on these configs, times the factor).
"""

COMPRESSED_FACTOR = 2.0
"""Factor on the limit where weights or state are compressed; the compute precision adds little noise to theirs.

How a card lays out blocks is not documented. Runs with blocks along the other axis, with scales that do not saturate,
with ties away from zero, and from fp16 weights were off by 0.64 to 1.55 times as much as the emulated one, over three
embeddings and three language models with 33 to 60 rows; truncation, which is not to the nearest, by up to 7.8 times.
"""

SQUARES = names(spec for spec in METRICS if spec.squared)
"""Suffixes of metrics that grow as the square of an error: the factor is squared."""

ROUND_ZERO = names(spec for spec in METRICS if spec.centred)
"""Suffixes of metrics that are the magnitude of a value centred at zero."""

HALF_NORMAL = 3.36
"""The 95/95 limit of eight such errors, in multiples of their root mean square: 1.96 · sqrt(8 / 2.733), from normal and
χ² quantiles.

The logarithm of an error near zero widens the log-normal limit: to 264 root mean squares among 14 models on the
simulated device, whose errors were 3 at most.
"""

LEAST = 1e-300
"""Smallest error that a logarithm is taken of."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Errors of legitimate runs of the original model in one precision.

    Attributes:
        profile: the precision.
        of: digest of the reference outputs that it was measured against.
        errors: by metric, the worst row of each run against the float64 reference, float64 ``[runs]``.
        systematic_errors: by metric, the systematic error of each run against the mean of the others, like ``errors``.
        center: by output, the mean of all runs over the measured rows.
        rows: indices of the measured rows of an output, int64; None: all.
        left_out: number of texts that were not measured; their contribution is estimated (`decisive_rows`).
    """

    profile: str
    of: str
    errors: Mapping[str, Floats]
    systematic_errors: Mapping[str, Floats]
    center: Tensors
    rows: NDArray[np.int64] | None = None
    left_out: int = 0

    def level(self, name: str) -> float:
        """Return the typical error of a metric: the geometric mean over the runs."""
        return float(np.exp(np.log(np.maximum(self.errors[name], LEAST)).mean()))

    def stored(self) -> dict[str, Any]:
        """Return the floor as tensors, for a file."""
        parts = {"errors": self.errors, "strays": self.systematic_errors, "center": self.center}
        header = np.frombuffer(f"{self.profile} {self.of} {self.left_out}".encode(), dtype=np.uint8)
        rows = {} if self.rows is None else {"rows": self.rows}
        tensors = {f"{part}.{name}": array for part, of in parts.items() for name, array in of.items()}
        return {"about": header, **rows, **tensors}

    @classmethod
    def from_stored(cls, tensors: Tensors) -> Floor:
        """Create a floor from the tensors of `stored`.

        Raises:
            IncomparableError: a tensor is missing, or of another dtype or shape.
        """
        words = text_of(tensors, "about").split(" ")
        if len(words) != 3 or not (words[2].isascii() and words[2].isdecimal() and len(words[2]) < 10):
            raise IncomparableError("tensor 'about' of the noise floor is no precision, digest and number of texts")
        profile, of, left_out = words
        rows = _row_numbers(tensors["rows"]) if "rows" in tensors else None
        errors, systematic_errors, center = (  # float64 as they were written
            {name.removeprefix(part): array for name, array in tensors.items() if name.startswith(part)}
            for part in ("errors.", "strays.", "center.")
        )
        for name, array in {**errors, **systematic_errors}.items():
            if array.dtype != np.float64 or array.ndim != 1 or np.any(np.asarray(array, np.float64) < 0):
                raise IncomparableError(f"the noise floor of {name!r} is no list of errors, float64 [runs]")
        named = cast("Mapping[str, Floats]", errors), cast("Mapping[str, Floats]", systematic_errors)
        return cls(profile, of, *named, center, rows, int(left_out))


def _row_numbers(rows: Array) -> NDArray[np.int64]:
    if rows.dtype != np.int64 or rows.ndim != 1 or np.any(np.asarray(rows, np.int64) < 0):
        raise IncomparableError("tensor 'rows' of the noise floor holds no row numbers, int64 [rows]")
    return rows.astype(np.int64)


def factor(profile: str, metric: str) -> float:
    """Return the factor on the limit of a metric in a precision."""
    compute, _, compressed = profile.partition("+")
    if compressed:
        return COMPRESSED_FACTOR  # 0.64 to 1.55 times were seen in every metric, squares too
    return FACTORS[compute] ** (2 if metric.endswith(SQUARES) else 1)


def tolerance_limit(errors: Sequence[float] | Floats) -> float:
    """Return the 95/95 limit of a sample of errors; infinity if one is not finite or there are fewer than 3."""
    values = np.asarray(errors, dtype=np.float64)
    if values.size < min(K95) or not np.isfinite(values).all():
        return float("inf")
    size = max(n for n in K95 if n <= values.size)
    logs = np.log(np.maximum(values, LEAST))
    return float(np.exp(logs.mean() + K95[size] * logs.std(ddof=1)))


def limit(metric: str, errors: Floats) -> float:
    """Return the 95/95 limit of a metric's errors under the distribution of that metric."""
    log_normal = tolerance_limit(errors)
    if metric.endswith(ROUND_ZERO) and len(errors) >= 8 and np.isfinite(log_normal):
        half_normal = HALF_NORMAL * float(np.sqrt(np.mean(np.square(errors))))
        # mean_norm is at least its standard error (`systematic_size`), so its logarithms spread too little
        return half_normal if metric.endswith("mean_norm") else min(log_normal, half_normal)
    return log_normal


def digest_of(reference: Tensors) -> str:
    """Return the hex SHA-256 of reference outputs, which identifies what a floor was measured against."""
    digest = hashlib.sha256()
    for name in sorted(reference):
        array = np.ascontiguousarray(reference[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_floor(floor: Floor, reference: Tensors, profile: str) -> Floor:
    """Return the floor if it was measured for this reference and precision.

    Raises:
        IncomparableError: it was measured for another reference, precision or shape.
    """
    if floor.profile != profile:
        raise IncomparableError(f"the noise floor was measured in {floor.profile}, and this run computes in {profile}")
    if floor.of != digest_of(reference):
        raise IncomparableError(
            "the noise floor was measured for other reference outputs than these:"
            " record it anew with them (run --record), or leave it out"
        )
    for name, array in floor.center.items():
        if name not in reference or array.dtype.kind != "f":
            raise IncomparableError(f"the noise floor has a mean of {name!r}, which is no output of the reference")
        rows, *columns = reference[name].shape
        if floor.rows is not None and np.any(floor.rows >= rows):
            raise IncomparableError(f"the noise floor was measured on rows beyond the {rows} of the reference")
        measured = rows if floor.rows is None else len(floor.rows)
        if array.shape != (measured, *columns):
            raise IncomparableError(f"the noise floor's mean of output {name!r} has not the shape of the reference")
    return floor
