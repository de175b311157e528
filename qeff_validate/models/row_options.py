# SPDX-License-Identifier: Apache-2.0
"""Options of all model kinds that read rows of tokens. Loads no framework."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qeff_validate.config.case import Length
from qeff_validate.config.strict import Strict, or_one_item


class RowOptions(Strict):
    """How rows of tokens are padded, batched and cut."""

    padding_side: Literal["right", "left"] = Field("right", description="where padding stands")
    seq_len: list[Length] = Field(
        [32, 64], min_length=1, description="lengths to compile for, in tokens", json_schema_extra=or_one_item
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    truncate: bool = Field(False, description="cut texts that are longer than every bucket; else they are an error")

    @field_validator("seq_len", mode="before")
    @classmethod
    def _one_bucket(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("seq_len")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError(f"a length is named twice in {value}")
        return sorted(value)


class HeadOptions(RowOptions):
    """Options of the kinds whose model has a head."""

    prompt: str | None = Field(
        None,
        description="put before every text (of a pair: before the query), or the name of a prompt in the directory's"
        " files; null: the directory's default prompt, if it has one",
    )
