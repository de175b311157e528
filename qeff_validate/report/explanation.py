# SPDX-License-Identifier: Apache-2.0
"""What a failing result says of its cause: the stage, the module, and what differs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StageShare:
    """One stage between the reference and the runtime.

    Attributes:
        name: ``float32``, ``wrapper``, ``export``, ``optimizer``, ``precision``, ``runtime`` or ``compiler and
            runtime``.
        share: its part of the error's direction, ⟨e_i, e⟩ / ⟨e, e⟩; shares add up to 1, and parts that cancel each
            other are outside [0, 1].
        error: relative L2 size of what the stage adds.
    """

    name: str
    share: float
    error: float


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of one value of the graph that a module of the original model computes too; sizes are relative L2.

    Attributes:
        module: path in the original model.
        node: the graph's node that computes the value.
        operator: of the node.
        inherited: error of the value as the graph computes it from its own inputs.
        local: error of the value where everything before it is the reference's.
        floor: the local error of the original model itself in the precision.
    """

    module: str
    node: str
    operator: str
    inherited: float
    local: float
    floor: float


@dataclass(frozen=True, slots=True)
class BoundaryError:
    """The error of a value of a compiled program, in relative L2.

    Attributes:
        module: path in the original model, or the name of keys or values.
        error: against the original model.
        expected: what the original model itself has there in the precision.
    """

    module: str
    error: float
    expected: float


@dataclass(frozen=True, slots=True)
class ProgramSearch:
    """The search inside a compiled program.

    Attributes:
        compilations: of the graph with inner values as outputs or inputs.
        observer: relative L2 between the program's outputs with inner values as outputs and without.
        boundaries: in the order in which they were looked at.
    """

    compilations: int
    observer: float
    boundaries: tuple[BoundaryError, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a failing result goes wrong, and what differs there.

    Attributes:
        summary: one sentence.
        stages: from the reference to the runtime; they add up to the whole error.
        stage: the name of the guilty stage; None: none stands out, or it could not be measured.
        layers: in the order of the graph; of many, those with the greatest local error over floor.
        module: path of the first module that diverges; None: none does.
        finding: what differs there; empty: not known.
        rows: indices of the rows that were looked at.
        row: the one whose values were compared layer by layer, with its text and step; empty: none was.
        seconds: duration.
        program: the search inside the compiled program; None: there was none.
        repro: folder of a bundle that shows the error by itself; None: none was asked for, or none was written.
        repro_note: its size and error, or why none was written; empty: none was asked for.
    """

    summary: str
    stages: tuple[StageShare, ...] = ()
    stage: str | None = None
    layers: tuple[LayerError, ...] = ()
    module: str | None = None
    finding: str = ""
    rows: tuple[int, ...] = ()
    seconds: float = 0.0
    row: str = ""
    program: ProgramSearch | None = None
    repro: str | None = None
    repro_note: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Return the explanation as report.json holds it, but for numbers that are not finite."""
        plain = asdict(self)
        if self.program is not None:
            plain["program"]["boundaries"] = list(plain["program"]["boundaries"])
        return {**plain, **{name: list(plain[name]) for name in ("stages", "layers", "rows")}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Explanation:
        """Return the explanation that `to_plain` describes.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of another type.
        """
        numbers = ("share", "error", "inherited", "local", "floor", "expected")

        def read(item: Mapping[str, Any]) -> dict[str, Any]:
            return {name: float(value) if name in numbers else value for name, value in item.items()}

        program = plain.get("program")
        return cls(
            summary=plain["summary"],
            stages=tuple(StageShare(**read(item)) for item in plain["stages"]),
            stage=plain["stage"],
            layers=tuple(LayerError(**read(item)) for item in plain["layers"]),
            module=plain["module"],
            finding=plain["finding"],
            rows=tuple(plain["rows"]),
            seconds=float(plain["seconds"]),
            row=plain.get("row", ""),
            program=None
            if program is None
            else ProgramSearch(
                program["compilations"],
                float(program["observer"]),
                tuple(BoundaryError(**read(item)) for item in program["boundaries"]),
            ),
            repro=plain.get("repro"),
            repro_note=plain.get("repro_note", ""),
        )
