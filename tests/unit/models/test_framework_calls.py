# SPDX-License-Identifier: Apache-2.0
"""The names under which older and newer transformers take and return a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qeff_validate.models.framework_calls import cache_argument, returned_cache


class Older:
    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...


class Newer:
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...


@pytest.mark.parametrize(("model", "name"), [(Older(), "past_key_values"), (Newer(), "cache")])
def test_cache_is_given_under_the_name_that_forward_has(model: Any, name: str) -> None:
    assert cache_argument(model) == name
    assert cache_argument(SimpleNamespace(get_base_model=lambda: model)) == name


def test_cache_is_read_under_either_name() -> None:
    kept = object()
    assert returned_cache(SimpleNamespace(cache=kept)) is kept
    assert returned_cache(SimpleNamespace(past_key_values=kept)) is kept
    assert returned_cache(SimpleNamespace(logits=None)) is None
