# SPDX-License-Identifier: Apache-2.0
"""Options of the model kind ``sparse-embedding``. Loads no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qeff_validate.models.row_options import HeadOptions


class SparseEmbeddingOptions(HeadOptions):
    """Options of the model kind ``sparse-embedding``."""

    pooling: Literal["max", "sum"] | None = Field(
        None, description="over the tokens of a text; null: what the files of sentence-transformers say, else max"
    )
    activation: Literal["relu", "log1p_relu"] | None = Field(
        None,
        description="relu: log(1 + relu(x)) of each logit; log1p_relu: its logarithm once more; null: what the files"
        " say, else relu",
    )
    route: str | None = Field(None, description="route of a Router in modules.json, e.g. document; null: its default")
