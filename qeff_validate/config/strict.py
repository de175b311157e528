# SPDX-License-Identifier: Apache-2.0
"""The base class of every section of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from qeff_validate.config.yaml_reader import SURROGATE


def _texts_in(data: Any) -> Iterator[str]:
    """Yield every text in plain data, keys of mappings too."""
    pending, seen = [data], set()
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += [*value, *value.values()] if isinstance(value, Mapping) else value


def or_one_item(schema: dict[str, Any]) -> None:
    """Change the JSON Schema of a list whose only item may stand by itself; for ``json_schema_extra``."""
    whole = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [whole, whole["items"]]


class Strict(BaseModel):
    """A config section: unknown keys are errors, values are not coerced across kinds, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _characters(cls, data: Any) -> Any:
        for text in _texts_in(data):
            wrong = SURROGATE.search(text)
            if wrong is not None:  # no encoding has it, so no file, fingerprint or report can hold it
                raise ValueError(
                    f"{text[:40]!r} holds half of a surrogate pair (U+{ord(wrong[0]):04X}), which is no character"
                )
        return data
