# SPDX-License-Identifier: Apache-2.0
"""The product's suite of language models over this project's own configs (ini option qv_config)."""

from __future__ import annotations

from qeff_validate.models.causal_lm.relations import RELATIONS
from qeff_validate.suites import test_peft
from qeff_validate.suites.test_peft import (
    test_auto_peft_model_for_causal_lm_export,
    test_causal_lm_relation,
    test_peft_model_pytorch_vs_onnx_vs_ai100,
)

__all__ = [
    "test_auto_peft_model_for_causal_lm_export",
    "test_causal_lm_relation",
    "test_peft_model_pytorch_vs_onnx_vs_ai100",
]


def test_the_suite_names_every_relation() -> None:
    assert sorted(test_peft.RELATIONS) == sorted(RELATIONS)
