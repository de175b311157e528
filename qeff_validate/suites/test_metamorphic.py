# SPDX-License-Identifier: Apache-2.0
"""Relations between runs of one runtime, which need no reference: batch, order, padding, garbage, duplicates."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qeff_validate.registry import load_entry
from qeff_validate.report.result import Result
from qeff_validate.suites.outcome import require_pass

RELATIONS = load_entry("models", "embedding").relations


@pytest.mark.embedding
@pytest.mark.parametrize("relation", RELATIONS)
def test_embed_model_relation(relation: str, qv_relation: Callable[[str], Result]) -> None:
    """The same texts, run in another way, give the same vectors within the bounds of the runtime's precision."""
    require_pass(qv_relation(relation))
