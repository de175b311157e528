# SPDX-License-Identifier: Apache-2.0
"""The product's metamorphic suite over this project's own configs (ini option qv_config)."""

from __future__ import annotations

from qeff_validate.models.embedding.relations import RELATIONS
from qeff_validate.suites import test_metamorphic
from qeff_validate.suites.test_metamorphic import test_embed_model_relation

__all__ = ["test_embed_model_relation"]


def test_the_suite_names_every_relation() -> None:
    assert sorted(test_metamorphic.RELATIONS) == sorted(RELATIONS)
