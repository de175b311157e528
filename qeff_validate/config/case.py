# SPDX-License-Identifier: Apache-2.0
"""Cases: what to validate, as data. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from qeff_validate.comparison.bounds import check_bounds
from qeff_validate.config.performance import Performance
from qeff_validate.config.strict import Strict, or_one_item
from qeff_validate.errors import ConfigError

LONGEST_S = 10_000_000
"""A time limit of four months; the system's clocks take no infinite one."""


LARGEST_SEED = 2**63 - 1
"""What every random generator takes."""


DECISIVE_MARKS = frozenset({
    "filterwarnings", "flaky", "parameterize", "parameterise", "parametrise", "parametrize", "skip", "skipif",
    "timeout", "tryfirst", "trylast", "usefixtures", "xfail",
})  # fmt: skip
"""Marks by which pytest or a common plugin decides whether, how often or in which order a test counts."""


Positive = Annotated[int, Field(ge=1)]


def _without_control_characters(value: str) -> str:
    wrong = next((char for char in value if not char.isprintable() and ord(char) < 128), None)
    if wrong is not None:
        raise ValueError(f"the character U+{ord(wrong):04X} has no place in a name or path")
    return value


Name = Annotated[str, AfterValidator(_without_control_characters)]
"""A path or an identifier, of which the system takes no NUL."""


Length = Annotated[int, Field(ge=1, le=1 << 20)]
"""A number of tokens that a program is compiled for."""


class Inputs(Strict):
    """The texts of a case, its pairs, or its task data; the built-in texts or pairs if none are given."""

    texts: list[str] | None = Field(None, description="texts to embed, at least three distinct ones")
    texts_file: Name | None = Field(
        None,
        description="UTF-8 file with one text per line, or .tsv, .csv or .jsonl with a column text; relative to the"
        " config",
    )

    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="[query, document] each; documents of one query are ranked against each other"
    )
    pairs_file: Name | None = Field(
        None, description=".tsv, .csv or .jsonl with columns query and document, relative to the config"
    )
    dataset: Name | None = Field(
        None,
        description="task data: sts or retrieval, or a .tsv, .csv or .jsonl relative to the config, with columns"
        " sentence1, sentence2 and score, or query, document and score",
    )
    columns: dict[str, str] = Field({}, description="what columns of the file are called: {text: body}")

    @model_validator(mode="after")
    def _one(self) -> Inputs:
        given = self.given()
        if len(given) > 1:
            raise ValueError(f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}")
        if self.columns and (not given or given[0] in ("texts", "pairs")):
            raise ValueError("columns are of a file: give texts_file, pairs_file or dataset")
        return self

    def given(self) -> list[str]:
        """Return the names of the keys that are given; none: the built-in inputs."""
        names = ("texts", "texts_file", "pairs", "pairs_file", "dataset")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def file(self) -> str | None:
        """The name of the key that names a file; None if there is none."""
        files = [name for name in self.given() if name.endswith("_file")]
        named = self.dataset is not None and "." in self.dataset  # sets that come with the library have no suffix
        return "dataset" if named else files[0] if files else None


class Compile(Strict):
    """Options of the AI 100 compiler (card-contract §6.1)."""

    num_cores: Positive = Field(16, description="NSPs per activation")
    aic_hw_version: Literal["ai100", "ai200"] = Field("ai100", description="target hardware")
    num_devices: int = Field(1, ge=1, le=16, description="cards that share the model by tensor slicing")
    mos: int | None = Field(None, description="on-chip memory effort; the compiler's own choice if null")
    timeout_s: float = Field(1800, gt=0, le=LONGEST_S, description="the compiler is stopped after so many seconds")
    flags: dict[str, str | int | bool] = Field({}, description="further flags: {multicast-weights: true}")


class Precision(Strict):
    """What the device computes with."""

    compute: Literal["fp16", "fp32"] = Field("fp16", description="fp16: compiled with -convert-to-fp16")
    weights: Literal["mxfp6"] | None = Field(None, description="mxfp6: compiled with -mxfp6-matmul")
    kv: Literal["mxint8"] | None = Field(None, description="mxint8: keys and values are kept in it")
    beyond_range: Literal["float32"] | None = Field(
        None,
        description="float32: noise is measured with what fp16 cannot hold in float32, as a list of nodes keeps it",
    )

    @property
    def profile(self) -> str:
        """Return what computes, and behind + what it reads is kept in, such as ``fp16+mxfp6``."""
        return "+".join(filter(None, (self.compute, self.weights, self.kv)))


class Artifacts(Strict):
    """Files that exist already and are judged as they are; paths are relative to the config."""

    onnx: Name | None = Field(None, description="an ONNX file, instead of an export")
    qpc: Name | None = Field(None, description="a directory with programqpc.bin, instead of a compilation")
    reference: Name | None = Field(None, description="recorded inputs and outputs (run --record), instead of a model")
    inputs: dict[str, str] = Field({}, description="{our name: name in the file}, e.g. {input_ids: ids}")
    outputs: dict[str, str] = Field({}, description="{output: name in the file}; other outputs are then left alone")


class Expect(Strict):
    """A known failure: it is reported and does not fail the run; an unexpected pass and an expired one do."""

    runtime: str = Field(description="where it happens")
    status: Literal["fail", "inconclusive", "error"] = Field("fail", description="what happens")
    reason: Annotated[str, Field(min_length=1)] = Field(description="why this is accepted for now")
    until: date = Field(description="the last day on which it is, YYYY-MM-DD")

    @field_validator("until", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        if not isinstance(value, str):  # JSON has dates in quotes, YAML may
            return value
        try:
            return date.fromisoformat(value)
        except ValueError as exc:
            raise ValueError(f"is no date: wanted YYYY-MM-DD, got {value!r}") from exc


class Case(Strict):
    """One row of a config: what to validate, on which runtimes, within which bounds.

    Examples:
        >>> case = Case(name="small", source="random:bert", options={"pooling": "cls"}, runtimes=["ort"])
        >>> case.model, case.precision.compute, case.tolerance
        ('embedding', 'fp16', 'auto')
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=200, description="unique; appears in test ids"
    )
    model: str = Field("embedding", description="model kind")
    source: Name = Field(description="package:MODULE/SUBPATH, path:DIR, random:MODEL_TYPE, tiny:DIR_OR_ID or a hub id")
    revision: Name | None = Field(None, description="commit, tag or branch of a hub id")
    config: dict[str, Any] = Field({}, description="overrides of the Hugging Face config of a random: source")
    options: dict[str, Any] = Field({}, description="options of the model kind")
    inputs: Inputs = Inputs()
    exporter: Literal["dynamo", "torchscript"] = Field("dynamo", description="how torch exports to ONNX")
    artifacts: Artifacts = Artifacts()
    compile: Compile = Compile()
    precision: Precision = Precision()
    tolerance: Literal["auto", "table"] | dict[str, dict[str, Any]] = Field(
        "auto",
        description="auto: bounds from the measured noise of the original model; table: fixed bounds by precision,"
        " nothing is measured; {runtime: {metric: bound, why: reason}}: these, the rest as with auto;"
        " accept_low_power: reason beside them accepts bounds that a gross fault would pass",
    )
    performance: Performance | None = Field(None, description="budgets for qeff-validate perf; null: none")
    runtimes: list[str] = Field(["torch", "ort", "sim"], min_length=1, description="runtimes under test")
    expect: list[Expect] = Field(
        [], description="known failures; one mapping or a list of them", json_schema_extra=or_one_item
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    marks: list[str] = Field([], description="pytest marks of the case's tests")

    @field_validator("expect", mode="before")
    @classmethod
    def _one_expected(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("expect")
    @classmethod
    def _one_a_runtime(cls, value: list[Expect]) -> list[Expect]:
        names = [expect.runtime for expect in value]
        if len(set(names)) != len(names):
            raise ValueError(f"a runtime is named twice in {names}")
        return value

    @field_validator("tolerance")
    @classmethod
    def _bounds(cls, value: str | dict[str, dict[str, Any]]) -> str | dict[str, dict[str, Any]]:
        for runtime, bounds in value.items() if isinstance(value, dict) else ():
            try:
                check_bounds(runtime, bounds)  # which metrics there are, the model kind says
            except ConfigError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @field_validator("marks")
    @classmethod
    def _only_selecting(cls, value: list[str]) -> list[str]:
        for mark in value:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", mark):
                raise ValueError(f"{mark!r} is no name of a mark: use letters, digits and underscores")
            if mark.lower() in DECISIVE_MARKS:
                raise ValueError(
                    f"{mark!r} would decide whether a test counts, and marks only select tests (-m): state a known"
                    " failure with expect: {runtime, status, reason, until}"
                )
        return value

    @field_validator("runtimes")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError(f"a runtime is named twice in {value}")
        return value

    def bounds(self, runtime: str) -> Mapping[str, Any]:
        """Return the case's own bounds for a runtime, with ``why``."""
        return {} if isinstance(self.tolerance, str) else self.tolerance.get(runtime, {})

    def plain(self) -> dict[str, Any]:
        """Return the case as plain data, for fingerprints and reports."""
        return self.model_dump(mode="json")


class Config(Strict):
    """A config file: cases, and defaults for any key of them but the name."""

    defaults: dict[str, Any] = Field({})
    cases: list[Case] = Field(min_length=1)
