# SPDX-License-Identifier: Apache-2.0
"""Contexts of an export: eval mode, silence, no garbage collection, and errors with the reason."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

from qeff_validate.builders.store import NO_ROOM
from qeff_validate.errors import BuildError

VERBOSE_LOGGERS = ("torch.onnx", "torch.fx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


KNOWN_REASONS = (
    (r"complex-valued input", "the model computes with complex numbers, which have no form in ONNX"),
    (r"linalg_solve", "the model solves a system of linear equations in each run, for which ONNX has no operator"),
    (r"data-dependent expression", "the model decides by the values of its inputs which operations to run"),
    (r"_fft_|fft_", "the model computes Fourier transforms in a way that has no form in ONNX"),
)
"""Texts of exporters' errors, and what they mean in a sentence; the exporter's own words follow it."""


@contextlib.contextmanager
def eval_mode(module: Any) -> Iterator[None]:
    """Put every submodule into eval mode, and afterwards back into its previous mode.

    The TorchScript exporter restores the mode of the outermost module on all submodules: training, if that one alone
    was in training mode.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress warnings, logs and prints of the exporters; failures are exceptions."""
    loggers = [logging.getLogger(name) for name in VERBOSE_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def no_jit_log() -> Iterator[None]:
    """Prevent C++ from printing the whole graph to stdout, past `sys.stdout`, when an op has no ONNX equivalent.

    The exporter means to print only if logging is enabled, but tests the function that tells so without calling it.
    """
    from torch import _C

    jit_log = getattr(_C, "_jit_onnx_log", None)
    _C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        if jit_log is not None:
            _C._jit_onnx_log = jit_log


@contextlib.contextmanager
def export_errors(remedy: str = "") -> Iterator[None]:
    """Raise a BuildError with the reason for any exception of an exporter; errors of a full store pass.

    Args:
        remedy: ends the message.
    """
    try:
        yield
    except Exception as exc:  # an exporter raises any exception of its tracer
        if isinstance(exc, OSError) and exc.errno in NO_ROOM:
            raise
        raise BuildError(f"torch.onnx.export failed: {known_reason(exc)}{_place(exc)}{reason(exc)}{remedy}") from exc


def known_reason(exc: BaseException) -> str:
    """Return what an exporter's error means, with a semicolon; empty if it is not known."""
    text = "\n".join(str(cause) for cause in _causes(exc))
    return next((f"{meaning}; " for pattern, meaning in KNOWN_REASONS if re.search(pattern, text)), "")


def reason(exc: BaseException) -> str:
    """Return the type and the first three lines of the innermost cause; the exporter wraps it in pages."""
    *_, innermost = _causes(exc)
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return f"{type(innermost).__name__}: {' '.join(lines[:3])[:500]}"


def _place(exc: BaseException) -> str:
    """Return "op x: " or "at LINE (FILE:NUMBER): " if the exporter names it, else an empty text."""
    text = "\n".join(str(cause) for cause in _causes(exc))
    op = re.search(r"OpOverload\(op='([\w.]+)'|operator '([\w:]+)'", text)
    if op:
        return f"op {(op[1] or op[2]).replace('::', '.')}: "
    lines = re.findall(r'File "[^"]*?([^"/]+)", line (\d+), in \w+\n[ \t]+(\S.*)', text)
    return "at {2} ({0}:{1}): ".format(*lines[-1]) if lines else ""


def _causes(exc: BaseException) -> Iterator[BaseException]:
    yield exc
    while exc.__cause__ is not None:
        exc = exc.__cause__
        yield exc
