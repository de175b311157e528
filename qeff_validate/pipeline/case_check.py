# SPDX-License-Identifier: Apache-2.0
"""Whether a case is one that can be run: its options, runtimes, tolerances and marks."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from qeff_validate.comparison.bounds import check_tolerance
from qeff_validate.comparison.metric import most_bounds
from qeff_validate.config.case import Case
from qeff_validate.config.explain import explain as explain_config
from qeff_validate.errors import ConfigError, suggest
from qeff_validate.protocols import model_kind
from qeff_validate.registry import registered


def check(case: Case) -> Any:
    """Return a case's validated options; its runtimes and model kind must be known.

    Raises:
        ConfigError: an option, a runtime or the model kind is wrong.
    """
    tolerances = case.tolerance if isinstance(case.tolerance, dict) else {}
    timed = () if case.performance is None else case.performance.runtimes or ()
    for name in (*case.runtimes, *tolerances, *(item.runtime for item in case.expect), *timed):
        if name not in registered("runtimes"):
            raise ConfigError(
                f"case {case.name!r}: no runtime is called {name!r}.{suggest(name, registered('runtimes'))}"
            )
    kind = model_kind(case)
    for mark in case.marks:
        if mark in registered("runtimes"):  # `-m ai100` would select tests of other runtimes
            raise ConfigError(
                f"case {case.name!r}: marks: {mark!r} is the mark of the tests on that runtime: choose another name"
            )
    for name, bounds in tolerances.items():
        check_tolerance(f"case {case.name!r}: tolerance.{name}", bounds, most_bounds(kind.metrics))
    if case.exporter not in kind.exporters:
        raise ConfigError(
            f"case {case.name!r}: exporter {case.exporter} cannot export the model kind {case.model!r}: leave exporter"
            f" out, or say {' or '.join(kind.exporters)}"
        )
    try:
        return kind.options.model_validate(case.options)
    except ValidationError as exc:
        raise ConfigError(explain_config(exc, f"case {case.name!r}: options")) from exc
