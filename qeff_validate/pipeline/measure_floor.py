# SPDX-License-Identifier: Apache-2.0
"""Measures a noise floor: legitimate runs of the original model, on the rows that decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.decisive_rows import DecisiveRows, worst_of_all
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.config.case import Precision
from qeff_validate.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Sample:
    """What floor and faults are measured on.

    Attributes:
        inputs: of the measured texts.
        reference: their float32 reference.
        rows: the numbers of their rows of an output; None: all.
        choice: which texts, and why.
    """

    inputs: Any
    reference: Tensors
    rows: NDArray[np.int64] | None
    choice: DecisiveRows


def measure_floor(made: Any, exact: Tensors, sample: Sample, precision: Precision, of: str) -> Floor:
    """Run the ensemble of a model wrapper (`protocols.Measured`), and keep its errors and its mean.

    Args:
        made: the model wrapper.
        exact: the float64 reference of the sample.
        sample: what is run.
        precision: in which.
        of: digest of the whole reference.
    """
    inputs = sample.inputs
    runs = list(made.ensemble(inputs, sample.reference, precision))
    errors = by_metric([made.measure(exact, run, inputs) for run in runs])
    if sample.choice.left_out:
        places = [sample.choice.rows.index(text) for text in sample.choice.drawn]
        drawn = [by_metric(list(alone(made, exact, run, inputs, places))) for run in runs]
        errors = {
            name: worst_of_all(values, np.stack([run[name] for run in drawn]), sample.choice.left_out)
            for name, values in errors.items()
        }
    total = {name: sum(run[name].astype(np.float64) for run in runs) for name in runs[0]}
    systematic = []
    for run in runs:  # against the others alone: a mean that a run has part in is nearer to it
        others = {name: (total[name] - run[name]) / (len(runs) - 1) for name in run}
        systematic.append(made.systematic_errors(others, run, inputs))
    center = {name: (array / len(runs)).astype(np.float32) for name, array in total.items()}
    return Floor(precision.profile, of, errors, by_metric(systematic), center, sample.rows, sample.choice.left_out)


def alone(
    made: Any, exact: Tensors, outputs: Tensors, inputs: Any, texts: Sequence[int]
) -> Iterator[Mapping[str, float]]:
    """Yield the errors of each of some texts."""
    for text in texts:
        one, wanted, rows = made.subset(inputs, exact, [text])
        yield made.measure(wanted, {name: array[rows] for name, array in outputs.items()}, one)


def by_metric(found: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    """Turn the metrics of each run into the runs of each metric."""
    return {name: np.array([each[name] for each in found], dtype=np.float64) for name in found[0]}
