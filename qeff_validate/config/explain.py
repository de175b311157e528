# SPDX-License-Identifier: Apache-2.0
"""Validation errors of pydantic as sentences: where, what, and the nearest name."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qeff_validate.config.case import Artifacts, Case, Compile, Config, Expect, Inputs, Precision
from qeff_validate.config.performance import Performance, Quantiles
from qeff_validate.config.strict import Strict
from qeff_validate.errors import suggest

SECTIONS = (Config, Case, Inputs, Artifacts, Expect, Compile, Precision, Performance, Quantiles)


def explain(exc: ValidationError, where: str, data: Any = None) -> str:
    """Turn pydantic's errors into lines that name the key, the value and the remedy."""
    return "\n".join(_lines(exc, where, data))


def _lines(exc: ValidationError, where: str, data: Any) -> Iterator[str]:
    known = {cls.__name__: cls for cls in SECTIONS}.get(exc.title)
    for error in exc.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
        name = _case_name(data, error["loc"])
        head = f"{where}: {place}{f' (case {name!r})' if name else ''}" if place else where
        if error["type"] == "extra_forbidden":
            fields = _fields(known, error["loc"][:-1]) if known else exc_fields(exc)
            yield f"{head}: unknown key.{suggest(str(error['loc'][-1]), fields)}"
        elif error["type"] == "missing":
            yield f"{head}: is missing"
        else:
            message = error["msg"].removeprefix("Value error, ")
            # what has no place of its own is about several keys, and the message names them
            told = "got" in message or not place
            yield f"{head}: {message}" if told else f"{head}: {message} (got {reprlib.repr(error['input'])})"


def exc_fields(exc: ValidationError) -> list[str]:
    """Return the field names of the options class that an error came from."""
    pending = [Strict]
    while pending:
        cls = pending.pop()
        if cls.__name__ == exc.title:
            return list(cls.model_fields)
        pending += cls.__subclasses__()
    return []


def _fields(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        inner = getattr(annotation, "__args__", (annotation,))[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def _case_name(data: Any, loc: Sequence[int | str]) -> str | None:
    if len(loc) > 1 and loc[0] == "cases" and isinstance(loc[1], int):
        case = data["cases"][loc[1]]
        return case.get("name") if isinstance(case, dict) else None
    return None
