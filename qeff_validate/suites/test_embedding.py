# SPDX-License-Identifier: Apache-2.0
"""Embedding models: every case of the config on every runtime, against the Hugging Face reference."""

from __future__ import annotations

import pytest

from qeff_validate.report.result import Result


@pytest.mark.embedding
def test_embed_model_pytorch_vs_onnx_vs_ai100(qv_result: Result) -> None:
    """Each row's vector agrees with Hugging Face within the bounds of the runtime's precision."""
    assert qv_result.status == "pass", f"{qv_result.status}: {qv_result.reason}"
