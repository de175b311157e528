# SPDX-License-Identifier: Apache-2.0
"""Proves that a Hugging Face model says the same on PyTorch, ONNX Runtime and Qualcomm Cloud AI 100.

Public names are loaded on first use; importing this package imports no framework.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing itself would be a tenth of the time in which the command line heeds no signal yet

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is loaded; child processes inherit it

if TYPE_CHECKING:
    from typing import Any

    from qeff_validate.artifact import Artifact
    from qeff_validate.config.case import Case
    from qeff_validate.engine import build, model, validate
    from qeff_validate.errors import (
        BuildError,
        ConfigError,
        IncomparableError,
        MissingPackage,
        RunError,
        Unavailable,
        UnstableReferenceError,
        ValidateError,
    )
    from qeff_validate.models.adapters.apply import apply_peft, load_model_and_tokenizer
    from qeff_validate.models.adapters.config import generate_peft_config
    from qeff_validate.models.embedding.pooling import PooledModel
    from qeff_validate.protocols import Settings, runtime
    from qeff_validate.report.report import Report
    from qeff_validate.report.result import Result
    from qeff_validate.suites.checks import check_embed_model_pytorch_vs_onnx_vs_ai100
    from qeff_validate.tensors import TensorSpec

_HOMES = {
    "Artifact": "artifact",
    "BuildError": "errors",
    "Case": "config.case",
    "ConfigError": "errors",
    "IncomparableError": "errors",
    "MissingPackage": "errors",
    "PooledModel": "models.embedding.pooling",
    "Report": "report.report",
    "Result": "report.result",
    "RunError": "errors",
    "Settings": "protocols",
    "TensorSpec": "tensors",
    "Unavailable": "errors",
    "UnstableReferenceError": "errors",
    "ValidateError": "errors",
    "apply_peft": "models.adapters.apply",
    "build": "engine",
    "check_embed_model_pytorch_vs_onnx_vs_ai100": "suites.checks",
    "generate_peft_config": "models.adapters.config",
    "load_model_and_tokenizer": "models.adapters.apply",
    "model": "engine",
    "runtime": "protocols",
    "validate": "engine",
}

__all__ = [
    "Artifact",
    "BuildError",
    "Case",
    "ConfigError",
    "IncomparableError",
    "MissingPackage",
    "PooledModel",
    "Report",
    "Result",
    "RunError",
    "Settings",
    "TensorSpec",
    "Unavailable",
    "UnstableReferenceError",
    "ValidateError",
    "apply_peft",
    "build",
    "check_embed_model_pytorch_vs_onnx_vs_ai100",
    "generate_peft_config",
    "load_model_and_tokenizer",
    "model",
    "runtime",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qeff-validate")
    if name in _HOMES:
        import importlib

        from qeff_validate.errors import naming_extras

        with naming_extras():
            return getattr(importlib.import_module(f"qeff_validate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qeff_validate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
