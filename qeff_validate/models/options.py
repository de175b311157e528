# SPDX-License-Identifier: Apache-2.0
"""Options of each model kind, and the kinds that are built in. Loads no framework."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from qeff_validate.case import Case, Strict
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import Model, ModelKind

Bucket = Annotated[int, Field(ge=1, le=1 << 20)]


class EmbeddingOptions(Strict):
    """Options of the model kind ``embedding``."""

    pooling: Literal["mean", "max", "cls"] = Field("mean", description="how hidden states become one vector")
    normalize: bool = Field(False, description="scale each vector to length 1")
    prompt: str = Field("", description="put before every text")
    seq_len: list[Bucket] = Field([32, 64], min_length=1, description="lengths to compile for, in tokens")
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


def _embedding(case: Case, options: EmbeddingOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.embedding import PooledEmbedding

    if given is not None:
        from qeff_validate.models.pooling import PooledModel

        if isinstance(given, PooledModel):
            if (given.pooling, given.normalize) != (options.pooling, options.normalize):
                raise ConfigError(
                    f"the model pools with {given.pooling!r}, normalize={given.normalize}, but the case says"
                    f" {options.pooling!r}, normalize={options.normalize}: make them agree"
                )
            given = given.base_model
    return PooledEmbedding(case, options, given=given, tokenizer=tokenizer)


EMBEDDING = ModelKind(options=EmbeddingOptions, create=_embedding, suite="embedding")
