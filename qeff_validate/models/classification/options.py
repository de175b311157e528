# SPDX-License-Identifier: Apache-2.0
"""Options of the model kinds ``sequence-classification`` and ``reranker``. Loads no framework."""

from __future__ import annotations

from pydantic import Field

from qeff_validate.models.row_options import HeadOptions


class ClassificationOptions(HeadOptions):
    """Options of the model kind ``sequence-classification``."""


class RerankerOptions(HeadOptions):
    """Options of the model kind ``reranker``."""

    activation: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9]+$",
        description="a class of torch.nn that is applied to the logits, such as Sigmoid or Identity; null: what the"
        " files of sentence-transformers say, else Sigmoid for one label and Identity for several",
    )
