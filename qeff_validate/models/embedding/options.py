# SPDX-License-Identifier: Apache-2.0
"""Options of the model kind ``embedding``. Loads no framework."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from qeff_validate.errors import suggest
from qeff_validate.models.row_options import RowOptions

POOLINGS = ("avg", "cls", "last", "max", "mean", "mean_sqrt_len", "none", "weighted_mean")
"""Names that `models.embedding.pooling` and `models.embedding.pooling_oracle` implement; a test compares the three."""


class EmbeddingOptions(RowOptions):
    """Options of the model kind ``embedding``."""

    pooling: Any = Field(
        None,
        description=f"{', '.join(POOLINGS)}; auto: what the directory's modules.json makes sentence-transformers"
        " compute; null: auto where there is such a file, else mean; or package.module:function, or a callable, that"
        " takes (hidden_states, attention_mask)",
        json_schema_extra={"anyOf": [{"enum": [*POOLINGS, "auto", None]}, {"type": "string", "pattern": ":"}]},
    )
    normalize: bool | None = Field(
        None, description="scale each vector to length 1; null: no, or as pooling: auto finds"
    )
    truncate_dim: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="keep the first so many elements (Matryoshka), before normalize; null: all, or as auto finds",
    )
    prompt: str | None = Field(
        None,
        description="put before every text, e.g. 'query: ', or the name of a prompt in the directory's files; null: the"
        " directory's default prompt, if it has one",
    )
    route: str | None = Field(None, description="route of a Router in modules.json, e.g. query; null: its default")
    leave_out: list[str] = Field(
        [], description="kinds of modules in modules.json that are deliberately not validated, e.g. [Dense]"
    )
    token_type_ids: bool = Field(False, description="make token_type_ids an input of the graph (fed with zeros)")

    @field_validator("pooling")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value is None or callable(value):
            return value
        if isinstance(value, str) and (value in (*POOLINGS, "auto") or ":" in value):
            return value
        hint = suggest(str(value), (*POOLINGS, "auto"))
        raise ValueError(f"no pooling is called {value!r}.{hint} Or name your own: package.module:function")
