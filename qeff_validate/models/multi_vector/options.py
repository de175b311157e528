# SPDX-License-Identifier: Apache-2.0
"""Options of the model kind ``multi-vector``. Loads no framework."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qeff_validate.models.row_options import HeadOptions


class MultiVectorOptions(HeadOptions):
    """Options of the model kind ``multi-vector``."""

    prompt: str | None = Field(
        None, description="put before every query, or the name of a prompt; null: the prompt 'query' of the files"
    )
    document_prompt: str | None = Field(
        None, description="put before every document, or the name of a prompt; null: the prompt 'document' of the files"
    )
    skiplist: list[str] | None = Field(
        None, description="tokens of documents whose vectors do not count; null: what the files say"
    )
    dim: Annotated[int, Field(ge=1)] = Field(32, description="width of the projection of a random: or tiny: source")
