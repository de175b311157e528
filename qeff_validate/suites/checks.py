# SPDX-License-Identifier: Apache-2.0
"""The suites' checks as functions, for notebooks and other people's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qeff_validate.config.case import Case
from qeff_validate.engine import options_of_model, validate
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import Settings
from qeff_validate.report.report import Report


def check_embed_model_pytorch_vs_onnx_vs_ai100(
    model: Any,
    tokenizer: Any = None,
    *,
    runtimes: Sequence[str] = ("torch", "ort", "ai100"),
    options: dict[str, Any] | None = None,
    store: Path | str | None = None,
    settings: Settings | None = None,
) -> Report:
    """Compare an embedding model's vectors on each runtime with the original Hugging Face model.

    Args:
        model: a body such as ``AutoModel.from_pretrained(…)``, a `PooledModel`, or a source such as ``path:DIR``.
            An in-memory model is left unchanged.
        tokenizer: its transformers tokenizer; without one, words are hashed into its vocabulary.
        runtimes: what to compare; name ``sim`` for the simulated card, which never stands in for ``ai100`` by itself.
        options: pooling, normalize, seq_len, batch_size (see `EmbeddingOptions`).
        store: directory of the artifact store.
        settings: SDK prefix, cards, threads.

    Returns:
        The report. A runtime that is not usable here is in it as ``not_run``, with the reason.

    Raises:
        AssertionError: an output differs, something failed, or nothing was compared; the text says what and where.
        ConfigError: an option or an input is wrong.

    Examples:
        >>> report = check_embed_model_pytorch_vs_onnx_vs_ai100("random:bert", runtimes=["torch"])
        >>> [(result.runtime, result.status) for result in report.results]
        [('torch', 'pass')]
    """
    given = None if isinstance(model, str) else model
    options = {**options_of_model(given), **(options or {})}
    case = Case(name="model", source=model if given is None else "memory", options=options, runtimes=list(runtimes))
    report = validate(case, model=given, tokenizer=tokenizer, store=store, settings=settings)
    if report.exit_code() == 2:
        raise ConfigError("\n".join(report.problems()))
    if not report.passed:
        raise AssertionError("\n".join(["the model does not validate:", *report.problems()]))
    return report
