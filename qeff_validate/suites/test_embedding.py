# SPDX-License-Identifier: Apache-2.0
"""Embedding models: every case of the config on every runtime, against the Hugging Face reference."""

from __future__ import annotations

import pytest

from qeff_validate.report.result import Result
from qeff_validate.suites.outcome import require_pass


@pytest.mark.embedding
def test_embed_model_pytorch_vs_onnx_vs_ai100(qv_result: Result) -> None:
    """Each row's vector agrees with Hugging Face within the bounds of the runtime's precision."""
    require_pass(qv_result)
