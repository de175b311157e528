# SPDX-License-Identifier: Apache-2.0
"""The section ``performance`` of a case: what may take how long, and how it is timed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qeff_validate.config.strict import Strict

Limit = Annotated[float, Field(gt=0, le=1e9)]

PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def _or_percent(schema: dict[str, Any]) -> None:
    share = {key: schema.pop(key) for key in ("type", "minimum", "maximum")}
    schema["anyOf"] = [share, {"type": "string", "pattern": f"^{PERCENT.pattern}$"}]


class Quantiles(Strict):
    """Budgets for quantiles of one duration; the slowest bucket decides."""

    p50_ms: Limit | None = Field(None, description="greatest accepted median, in milliseconds")
    p95_ms: Limit | None = Field(None, description="greatest accepted 95th percentile, in milliseconds")
    p99_ms: Limit | None = Field(None, description="greatest accepted 99th percentile; needs 300 shots")

    def quantiles(self) -> Iterator[tuple[float, float]]:
        """Yield each quantile that has a budget, and the budget in seconds."""
        for quantile, budget in ((0.5, self.p50_ms), (0.95, self.p95_ms), (0.99, self.p99_ms)):
            if budget is not None:
                yield quantile, budget / 1000


class Performance(Quantiles):
    """How fast a case must be: absolute budgets, and the accepted slowdown against a baseline.

    Examples:
        >>> Performance(p95_ms=30.0, max_slowdown="5 %").max_slowdown
        0.05
        >>> [name for name, _ in Performance(inter_token=Quantiles(p50_ms=20.0)).durations()]
        ['inter_token']
    """

    time_to_first_token: Quantiles | None = Field(None, description="of a language model: a whole prefill")
    inter_token: Quantiles | None = Field(None, description="of a language model: one decode step")
    adapter_swap: Quantiles | None = Field(None, description="of a language model: a step that sets adapter weights")
    rows_per_s: Limit | None = Field(None, description="least accepted rows per second, in the best bucket")
    tokens_per_s: Limit | None = Field(None, description="least accepted tokens per second of the decode loop")
    load_s: Limit | None = Field(None, description="seconds to open the artifact, median of launches")
    export_s: Limit | None = Field(None, description="seconds that the export took when it was made")
    compile_s: Limit | None = Field(None, description="seconds that the compilation took when it was made")
    artifact_mb: Limit | None = Field(None, description="size of the artifact, in 10^6 bytes")
    host_mb: Limit | None = Field(None, description="peak memory of the host that the session adds, in 10^6 bytes")
    device_mb: Limit | None = Field(None, description="memory of the card that the program takes, in 10^6 bytes")
    max_slowdown: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="accepted slowdown against a baseline: 5 % or 0.05", json_schema_extra=_or_percent
    )
    launches: Annotated[int, Field(ge=3, le=50)] = Field(5, description="processes that time each side, at least 3")
    seconds: Annotated[float, Field(gt=0, le=600)] = Field(
        1.0, description="how long each workload is timed in each launch"
    )
    simulated: Literal["refuse", "accept"] = Field(
        "refuse", description="accept: budgets also hold for simulated runtimes, whose times say nothing about a card"
    )
    runtimes: list[str] | None = Field(None, description="where budgets hold; default: the runtimes of the case")

    @field_validator("max_slowdown", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str):
            match = PERCENT.fullmatch(value)
            if match is None:
                raise ValueError(f"is no share: write 5 % or 0.05, got {value!r}")
            return float(match[1]) / 100
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value > 1:
                raise ValueError(f"{value:g} would be {value * 100:g} %: write {value:g} % or {value / 100:g}")
            return float(value)
        return value

    def durations(self) -> Iterator[tuple[str, Quantiles]]:
        """Yield each quantity with a budget for its duration; the keys of the section itself mean ``latency``."""
        if any(self.quantiles()):
            yield "latency", self
        for name in ("time_to_first_token", "inter_token", "adapter_swap"):
            budget: Quantiles | None = getattr(self, name)
            if budget is not None:
                yield name, budget

    def costs(self) -> dict[str, float]:
        """Return the budgets of what is measured once a launch or once a build, by name."""
        names = ("load_s", "export_s", "compile_s", "artifact_mb", "host_mb", "device_mb")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def rates(self) -> dict[str, float]:
        """Return the least accepted ``rows_per_s`` and ``tokens_per_s``, as far as they are set."""
        return {name: value for name in ("rows_per_s", "tokens_per_s") if (value := getattr(self, name)) is not None}

    @property
    def has_budgets(self) -> bool:
        """True if something is to be judged without a baseline."""
        return bool(list(self.durations()) or self.costs() or self.rates())
