# SPDX-License-Identifier: Apache-2.0
"""The options ``--qv-…``: what they are called, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

if TYPE_CHECKING:
    from qeff_validate.pipeline.explanation import ExplainMode


MARKERS = {
    "ai100": "runs on a Cloud AI 100 card; skipped with the reason where there is none",
    "sim": "runs on the simulated AI 100 SDK",
    "ort": "runs on ONNX Runtime",
    "torch": "runs the exported module in PyTorch",
    "embedding": "validates an embedding model",
    "peft": "validates a causal language model with adapters",
    "multi_vector": "validates a multi-vector model",
    "reranker": "validates a reranker",
    "sequence_classification": "validates a model that classifies texts",
    "sparse_embedding": "validates a sparse embedding model",
    "plugin_kinds": "validates models of kinds without a suite of their own, those of plug-ins among them",
    "slow": "takes more than a few seconds",
    "perf": "times a case and judges its budgets; off under pytest-xdist, unless the runtime locks a device",
}

OPTIONS = {
    "config": "config file with cases; may be given more than once (default: a small random BERT)",
    "model": "a source instead of a config, e.g. random:bert or path:DIR",
    "runtimes": "comma-separated runtimes, instead of those that the cases name",
    "require": "comma-separated runtimes that must run: 'not run' is a failure",
    "report": "directory for report.json, report.md and report.html",
    "reporters": "comma-separated reporters that get the report too, such as mlflow",
    "store": "directory of the artifact store, or its URL",
    "sdk": "prefix of the AI 100 SDK",
    "device-ids": "comma-separated ids of the cards to use",
    "jobs": "processes that run stages of all cases side by side, or auto (not with -n, which runs whole tests)",
    "cluster": "address of a Ray cluster that runs the cases (relations and timings run here), or local",
    "explain": "say where failures come from: off; auto, within a minute each (default); full, within an hour each",
    "run-timeout": "seconds after which a run is ended that gives no answer (ai100, sim, a user's ONNX file)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--qv-*`` and the same names as ini options."""
    group = parser.getgroup("qeff_validate", "validation of models across runtimes")
    for name, text in OPTIONS.items():
        many = name == "config"
        action = "append" if many else "store"
        kind: Literal["linelist", "string"] = "linelist" if many else "string"
        group.addoption(f"--qv-{name}", action=action, default=None, metavar=name.upper(), help=text)
        parser.addini(f"qv_{name.replace('-', '_')}", text, type=kind)
    text = "do not count inconclusive results as failures"
    group.addoption("--qv-allow-inconclusive", action="store_true", default=False, help=text)


def option(config: pytest.Config, name: str) -> Any:
    """Return an option from the command line, else from the ini file, else None."""
    value = config.getoption(f"--qv-{name}")
    return value if value else config.getini(f"qv_{name.replace('-', '_')}") or None


def listed(config: pytest.Config, name: str) -> list[str]:
    """Return the items of a comma-separated option."""
    return [part.strip() for part in (option(config, name) or "").split(",") if part.strip()]


def place(config: pytest.Config, name: str) -> Path | None:
    """Return a directory: from the command line relative to where pytest was called, else to the ini file."""
    given: str | None = config.getoption(f"--qv-{name}")
    if given:
        return config.invocation_params.dir / given
    written: str = config.getini(f"qv_{name}")
    return ini_folder(config) / written if written else None


def ini_folder(config: pytest.Config) -> Path:
    """Return the directory of the ini file, else of the project."""
    return config.inipath.parent if config.inipath else config.rootpath


def configs(config: pytest.Config) -> list[Path]:
    """Return the config files, else the one of the package."""
    given = config.getoption("--qv-config")
    if given:
        return [config.invocation_params.dir / path for path in given]
    found = [ini_folder(config) / path for path in config.getini("qv_config")]
    return found or [Path(__file__).parents[1] / "suites" / "default.yaml"]


def run_timeout(config: pytest.Config) -> float:
    """Return ``--qv-run-timeout`` in seconds."""
    from qeff_validate.errors import ConfigError
    from qeff_validate.protocols import Settings

    limit = option(config, "run-timeout")
    try:
        return Settings().run_timeout_s if limit is None else Settings(run_timeout_s=float(limit)).run_timeout_s
    except (ValueError, ConfigError) as exc:
        raise pytest.UsageError(f"--qv-run-timeout: wanted seconds, got {limit!r}: {exc}") from exc


def job_count_of(config: pytest.Config) -> int:
    """Return how many processes ``--qv-jobs`` asks for; 1: it was not given."""
    from qeff_validate.errors import ConfigError
    from qeff_validate.pipeline.executors.job_count import job_count

    try:
        return job_count(option(config, "jobs") or "1", "--qv-jobs")
    except ConfigError as exc:
        raise pytest.UsageError(str(exc)) from exc


def check_jobs(config: pytest.Config) -> None:
    """Refuse a wrong number of processes, and workers of pytest-xdist beside them."""
    if not (option(config, "jobs") or option(config, "cluster")):
        return
    job_count_of(config)
    if is_worker(config) or config.getoption("numprocesses", None):
        raise pytest.UsageError("--qv-jobs and --qv-cluster run stages of cases side by side: leave out -n")


def explain_mode(config: pytest.Config) -> ExplainMode:
    """Return ``--qv-explain``."""
    from qeff_validate.pipeline.explanation import ExplainMode

    mode = option(config, "explain") or "auto"
    found: ExplainMode | None = next((known for known in get_args(ExplainMode) if known == mode), None)
    if found is None:
        raise pytest.UsageError(f"--qv-explain: wanted {', '.join(get_args(ExplainMode))}, got {mode!r}")
    return found


def check_reporters(config: pytest.Config) -> None:
    """Refuse an unknown reporter, and one whose package is not installed, before anything is run."""
    names = listed(config, "reporters")
    if names:
        from qeff_validate.errors import ValidateError
        from qeff_validate.report.reporters import load_reporters

        try:
            load_reporters(names)
        except ValidateError as exc:
            raise pytest.UsageError(f"--qv-reporters: {exc}") from exc


def is_worker(config: pytest.Config) -> bool:
    """Return whether this is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")


def only_shown(config: pytest.Config) -> bool:
    """Say whether tests are listed and not run."""
    return bool(config.option.collectonly or getattr(config.option, "setupplan", False))


def suites_asked(config: pytest.Config) -> bool:
    """Say whether the command line names the suites."""
    return any("qeff_validate.suites" in text.replace("/", ".") for text in map(str, config.args))
