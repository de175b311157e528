# SPDX-License-Identifier: Apache-2.0
"""Causal language models with adapters: every case of the config on every runtime, against Hugging Face and PEFT."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qeff_validate.protocols import Session
from qeff_validate.registry import load_entry
from qeff_validate.report.result import Result
from qeff_validate.suites.outcome import require_pass

RELATIONS = load_entry("models", "peft-causal-lm").relations


OF_A_RUN = frozenset({"input_ids", "position_ids", "adapter_ids", "adapter_start"})
"""Inputs that each run is fed anew; all others are retained."""


@pytest.mark.peft
def test_auto_peft_model_for_causal_lm_export(qv_session: Session, qv_adapters: frozenset[str]) -> None:
    """Every adapter tensor is an input of what the runtime opens, with a retained twin: none is folded or merged."""
    inputs, outputs = {spec.name for spec in qv_session.inputs}, {spec.name for spec in qv_session.outputs}
    assert {"input_ids", "position_ids"} <= inputs
    assert any(name.startswith("past_") for name in inputs), "the graph retains no state"
    assert "logits" in outputs
    assert qv_adapters <= inputs, f"no inputs: {sorted(qv_adapters - inputs)}"
    lost = {name for name in inputs - OF_A_RUN if f"{name}_RetainedState" not in outputs}
    assert not lost, f"not retained: {sorted(lost)}"


@pytest.mark.peft
def test_peft_model_pytorch_vs_onnx_vs_ai100(qv_result: Result) -> None:
    """Logits and choices agree with PEFT for the base and each adapter, and adapters can be swapped back."""
    require_pass(qv_result)


@pytest.mark.peft
@pytest.mark.parametrize("relation", RELATIONS)
def test_causal_lm_relation(relation: str, qv_relation: Callable[[str], Result]) -> None:
    """The same continuations, run in another way, have the same logits within the bounds of the runtime's precision."""
    require_pass(qv_relation(relation))
