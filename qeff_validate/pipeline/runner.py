# SPDX-License-Identifier: Apache-2.0
"""Runs cases on runtimes in this process, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.pipeline.case_check import check
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.explanation import LIMITS_S, ExplainMode, explained, with_explanation
from qeff_validate.pipeline.performance import TimingBaseline, build_costs, measure_case
from qeff_validate.pipeline.stages import Progress, Silent
from qeff_validate.pipeline.tuning import Tuning, audit, tune
from qeff_validate.protocols import Runtime, Settings, runtime
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime

if TYPE_CHECKING:
    from qeff_validate.explain.range_audit import RangeAudit


class Runner:
    """Runs one (case, runtime) at a time; what a case's runtimes share is made once while the case stays the same."""

    def __init__(
        self,
        *,
        store: Path | str | None = None,
        settings: Settings | None = None,
        progress: Progress | None = None,
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.settings = settings or Settings()
        self.store, self._progress = Store(store), progress or Silent()
        self._model, self._tokenizer = model, tokenizer
        self._runtimes: dict[str, Runtime] = {}
        self._pipeline: Pipeline | None = None

    def use_cards(self, device_ids: Sequence[int]) -> None:
        """Use other cards than the settings named, from the next result on."""
        self.settings = replace(self.settings, device_ids=tuple(device_ids))
        self._runtimes.clear()

    def runtime(self, name: str) -> Runtime:
        """Return the runtime of this name, created once; what opens files may do so in a child process."""
        if name not in self._runtimes:
            direct = runtime(name, self.settings)
            self._runtimes[name] = IsolatedRuntime(direct, name, self.settings) if direct.kind != "module" else direct
        return self._runtimes[name]

    def result(self, case: Case, name: str, explain: ExplainMode = "off") -> Result:
        """Run and judge a case on a runtime; whatever goes wrong in it becomes a result."""
        pipeline, on = self.pipeline(case), self.runtime(name)
        return with_explanation(pipeline, on, pipeline.result(on), self.settings, explain)

    def explained(self, case: Case, name: str, *, repro: Path | None = None) -> Result:
        """Run and judge a case on a runtime, and explain the result, even if it passes.

        Args:
            case: the case.
            name: of the runtime.
            repro: folder for a bundle that shows the error by itself.
        """
        pipeline, on = self.pipeline(case), self.runtime(name)
        result = pipeline.result(on)
        return explained(pipeline, on, result, self.settings, LIMITS_S["full"], repro) if result.metrics else result

    def audited(self, case: Case) -> RangeAudit:
        """Return what fp16 does to the values of each node of a case's graph; errors are those of `tuning.audit`."""
        return audit(self.pipeline(case), self.settings)

    def tuned(self, case: Case, name: str) -> Tuning:
        """Look for the nodes in float32 with which a case passes on a runtime; errors are those of `tuning.tune`."""
        return tune(case, self.runtime(name), self.settings, self.pipeline)

    def relation(self, case: Case, name: str, relation: str) -> Result:
        """Judge a metamorphic relation of a case on a runtime; what held before is taken from the store."""
        return self.pipeline(case).relation(self.runtime(name), relation, settings=self.settings)

    def timed(self, case: Case, name: str, baseline: TimingBaseline | None = None) -> Result:
        """Time a case on a runtime and judge it; whatever goes wrong becomes a result."""
        timed_runtime = self.runtime(name)

        def prepare() -> None:
            if baseline is not None and baseline.case is not None:
                build_costs(self.pipeline(baseline.case), timed_runtime)

        pipeline = Pipeline(case, check(case), self.store, self._progress)
        return measure_case(pipeline, timed_runtime, self.settings, baseline=baseline, prepare=prepare)

    def pipeline(self, case: Case) -> Pipeline:
        """Return the case's pipeline, the same one as long as the case stays the same."""
        if self._pipeline is None or self._pipeline.case != case:
            self._pipeline = None  # let go of the last case's module before the next is loaded
            self._pipeline = Pipeline(
                case, check(case), self.store, self._progress, model=self._model, tokenizer=self._tokenizer
            )
        return self._pipeline
