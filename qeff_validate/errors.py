# SPDX-License-Identifier: Apache-2.0
"""What this library raises: always something a person can act on.

    ValidateError
    ├── ConfigError         the question is wrong: a config, an option, an input
    ├── Unavailable         something needed is not here: an SDK, a card, a file
    │   └── MissingPackage  a package of an extra is not installed; the message names the extra
    ├── BuildError          an artifact could not be made: export, compile
    ├── RunError            a runtime refused or failed a run
    └── IncomparableError   nothing valid could be compared
        └── UnstableReferenceError   the original model gives a row other values from run to run

A mismatch is not an exception: it is a `Verdict`. An exception means "could not tell".
Foreign exceptions are translated once, where they enter, with ``raise … from exc``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ValidateError(Exception):
    """The base of every error that this library raises on purpose.

    Attributes:
        stage: where in a run it happened, once the engine knows.

    Examples:
        >>> import qeff_validate as qv
        >>> try:
        ...     qv.runtime("otr")
        ... except qv.ValidateError as exc:
        ...     print(f"{type(exc).__name__}: {exc}")
        ConfigError: no runtime is called 'otr'. Did you mean 'ort'?
    """

    stage: str | None = None


class ConfigError(ValidateError):
    """The question is wrong: a config file, an option or an input.

    Examples:
        >>> import qeff_validate as qv
        >>> qv.build("random:bert", "onxn")
        Traceback (most recent call last):
        qeff_validate.errors.ConfigError: no kind of artifact is called 'onxn'. Did you mean 'onnx'?
    """


class Unavailable(ValidateError):
    """Something that is needed is not here.

    Examples:
        >>> import qeff_validate as qv
        >>> qv.model(qv.Case(name="x", source="package:no_such_package/model")).fingerprint()
        Traceback (most recent call last):
        qeff_validate.errors.Unavailable: package:no_such_package/model: Python package 'no_such_package' is not ...
    """


class MissingPackage(Unavailable):
    """A package of an extra, such as PyTorch of ``qeff-validate[torch]``, is not installed.

    Examples:
        >>> raise missing_package("peft")
        Traceback (most recent call last):
        qeff_validate.errors.MissingPackage: this needs PEFT, which is not installed: pip install 'qeff-validate[peft]'
    """


class BuildError(ValidateError):
    """An artifact could not be built.

    Examples:
        >>> import qeff_validate as qv
        >>> case = qv.Case(name="x", source="random:bert", artifacts={"onnx": __file__})
        >>> qv.build(case)
        Traceback (most recent call last):
        qeff_validate.errors.BuildError: cannot read ...errors.py as ONNX: ...
    """


class RunError(ValidateError):
    """A runtime refused a run or failed in it.

    Examples:
        >>> import qeff_validate as qv
        >>> with qv.runtime("torch").open(qv.build("random:bert", "module")) as session:
        ...     session.run({})
        Traceback (most recent call last):
        qeff_validate.errors.RunError: input names do not match: given [], wanted ['attention_mask', 'input_ids']; ...
    """


class IncomparableError(ValidateError):
    """There is nothing valid to compare.

    Examples:
        >>> import qeff_validate as qv
        >>> qv.Report.from_plain({"schema": 7})
        Traceback (most recent call last):
        qeff_validate.errors.IncomparableError: a report has schema 1, this has 7: make it anew
    """


class UnstableReferenceError(IncomparableError):
    """What the original model gives for a row depends on the rows before or beside it, so it is no reference.

    Examples:
        >>> import numpy as np
        >>> from qeff_validate.models.row_order import refuse_change
        >>> refuse_change({0: np.ones(3)}, lambda row: np.arange(3.0), ["a text"])
        Traceback (most recent call last):
        qeff_validate.errors.UnstableReferenceError: the original model gives row 0 ('a text') other values when it ...
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


EXTRAS = {
    "torch": ("PyTorch", "torch"),
    "transformers": ("transformers", "torch"),
    "huggingface_hub": ("huggingface-hub", "torch"),
    "tokenizers": ("tokenizers", "torch"),
    "onnxscript": ("onnxscript", "torch"),
    "onnx_ir": ("onnx-ir", "torch"),
    "peft": ("PEFT", "peft"),
    "gguf": ("gguf", "gguf"),
    "mlflow": ("MLflow", "mlflow"),
    "ray": ("Ray", "ray"),
    "fsspec": ("fsspec", "fsspec"),
    "opentelemetry": ("OpenTelemetry", "opentelemetry"),
}
"""Name and extra of each optional package, by the name of its module."""


def missing_package(module: str) -> MissingPackage:
    """Return the error for an optional package that is not installed.

    Args:
        module: the name by which the package is imported; a key of `EXTRAS`.

    Examples:
        >>> print(missing_package("torch"))
        this needs PyTorch, which is not installed: pip install 'qeff-validate[torch]'
    """
    name, extra = EXTRAS[module]
    return MissingPackage(f"this needs {name}, which is not installed: pip install 'qeff-validate[{extra}]'")


def as_missing_package(exc: BaseException) -> MissingPackage | None:
    """Return the error for the optional package whose import failed in an exception or its causes; None if none did."""
    error: BaseException | None = exc
    while error is not None:
        module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if module in EXTRAS:
            return missing_package(module)
        error = error.__cause__
    return None


@contextmanager
def naming_extras() -> Iterator[None]:
    """Translate the failed import of an optional package into `MissingPackage`; other exceptions pass.

    Raises:
        MissingPackage: a package of an extra is not installed.
    """
    try:
        yield
    except ImportError as exc:
        missing = as_missing_package(exc)
        if missing is None:
            raise
        raise missing from exc
