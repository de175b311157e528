# SPDX-License-Identifier: Apache-2.0
"""What of the product's suites this project's own tests leave out: cards that are not there, and repetitions."""

from __future__ import annotations

import re

import pytest

REPEATED = re.compile(r"test_embed_model_relation\[minilm-(max|cls)-(torch|sim)-")
"""Relations of one body with another pooling: on ``ort`` for each pooling, on every runtime for the mean."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave them out; the contract's test of registered runtimes says once why the card is not used."""
    from qeff_validate.protocols import runtime

    no_card = runtime("ai100").probe() is not None
    left_out = [
        item for item in items if REPEATED.search(item.nodeid) or (no_card and item.get_closest_marker("ai100"))
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
