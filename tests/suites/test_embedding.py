# SPDX-License-Identifier: Apache-2.0
"""The product's embedding suite over this project's own configs (ini option qv_config)."""

from __future__ import annotations

from qeff_validate.suites.test_embedding import test_embed_model_pytorch_vs_onnx_vs_ai100

__all__ = ["test_embed_model_pytorch_vs_onnx_vs_ai100"]
