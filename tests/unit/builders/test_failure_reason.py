# SPDX-License-Identifier: Apache-2.0
"""The reason in the error of a failed compiler: the lines with the cause, not the last line alone."""

from __future__ import annotations

import pytest

from qeff_validate.builders.compile_qpc import failure_reason

ERROR = "QAIC_ERROR: Error message: [Operator-'Foo', opset_version-18, ir_version-9] : unsupported operator"
LAST = "QAICException:Unable to AddNodesToGraphFromModel"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["Reading ONNX Model", ERROR, LAST, ""], f"{ERROR} {LAST}"),
        ([ERROR, LAST, "simulator: node 'a' (::Foo): none"], f"{LAST} simulator: node 'a' (::Foo): none"),
        (["Compile started", "out of memory"], "out of memory"),
        ([ERROR], ERROR),
        (["", "  "], "it printed nothing"),
    ],
)
def test_reason_contains_the_cause(lines: list[str], reason: str) -> None:
    assert failure_reason(lines) == reason
