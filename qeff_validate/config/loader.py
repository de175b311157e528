# SPDX-License-Identifier: Apache-2.0
"""Reads config files: YAML with cases, and defaults for any key of them but the name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qeff_validate.config.case import Case, Config
from qeff_validate.config.explain import explain
from qeff_validate.config.yaml_reader import MOST_VALUES, expanded_size, lines_by_name, parse_yaml
from qeff_validate.errors import ConfigError, suggest
from qeff_validate.files import expand_user, read_bytes

MOST_BYTES = 4 << 20
"""Of a config: 100,000 short texts. More belong into a texts_file."""


def load_cases(paths: Sequence[Path]) -> list[Case]:
    """Read config files.

    Returns:
        The cases in order; paths in them are absolute.

    Raises:
        ConfigError: a file is missing or no YAML, a key or value is wrong, or a name occurs twice.
    """
    cases: list[Case] = []
    seen: dict[str, Path] = {}
    for path in paths:
        for case in _read(path):
            if case.name in seen:
                raise ConfigError(f"{path}: case name {case.name!r} is taken already, in {seen[case.name]}")
            seen[case.name] = path
            cases.append(case)
    return cases


def case_places(paths: Sequence[Path]) -> dict[str, tuple[Path, int]]:
    """Return file and line of each case, by its name, of config files that `load_cases` has read."""
    places: dict[str, tuple[Path, int]] = {}
    for path in paths:
        lines = lines_by_name(_text(path), "cases")
        places |= {name: (path, line) for name, line in lines.items()}
    return places


def _read(path: Path) -> list[Case]:
    data = parse_yaml(_text(path), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping with 'cases:', this is {type(data).__name__}")
    data = _with_defaults(data, path)
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        raise ConfigError(explain(exc, str(path), data)) from exc
    return [_absolute(case, path) for case in config.cases]


def _text(path: Path) -> str:
    try:
        return read_bytes(path, most_bytes=MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read config {path}: {exc}") from exc


def _with_defaults(data: dict[str, Any], path: Path) -> dict[str, Any]:
    defaults, cases = data.get("defaults") or {}, data.get("cases")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: defaults: is a mapping of case keys, this is {type(defaults).__name__}")
    allowed = set(Case.model_fields) - {"name"}
    for key in defaults:
        if key not in allowed:
            raise ConfigError(f"{path}: defaults.{key}: unknown key.{suggest(str(key), allowed)}")
    if not isinstance(cases, list):
        return data
    if len(cases) * expanded_size(defaults) > MOST_VALUES:
        raise ConfigError(f"{path}: defaults of {len(cases):,} cases make more than {MOST_VALUES:,} values")
    return {**data, "cases": [_merge(defaults, case) if isinstance(case, dict) else case for case in cases]}


def _merge(defaults: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **case}
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(case.get(key), dict):
            merged[key] = {**value, **case[key]}
    return merged


def _absolute(case: Case, config: Path) -> Case:
    folder = config.resolve().parent

    def place(path: str) -> str:
        try:
            return str(folder / expand_user(path))
        except ConfigError as exc:
            raise ConfigError(f"{config}: case {case.name!r}: {exc}") from exc

    update: dict[str, Any] = {}
    if case.source.startswith("path:"):
        update["source"] = f"path:{place(case.source[5:])}"
    file = case.inputs.file
    if file is not None:
        update["inputs"] = case.inputs.model_copy(update={file: place(getattr(case.inputs, file))})
    files = {name: getattr(case.artifacts, name) for name in ("onnx", "qpc", "reference")}
    given = {name: place(path) for name, path in files.items() if path is not None}
    if given:
        update["artifacts"] = case.artifacts.model_copy(update=given)
    precision = case.compile.flags.get("node-precision-info")
    if isinstance(precision, str):
        flags = {**case.compile.flags, "node-precision-info": place(precision)}
        update["compile"] = case.compile.model_copy(update={"flags": flags})
    adapters = case.options.get("adapters")
    if isinstance(adapters, dict):
        found = {name: place(made) if isinstance(made, str) else made for name, made in adapters.items()}
        update["options"] = {**case.options, "adapters": found}
    return case.model_copy(update=update)
