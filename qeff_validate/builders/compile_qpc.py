# SPDX-License-Identifier: Apache-2.0
"""From an ONNX file to a QPC, with the compiler of an SDK as a child process (card-contract §1.2, §6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qeff_validate.artifact import digest_file
from qeff_validate.builders.compiler_inputs import (
    NODE_PRECISION,
    compiler_flags,
    flag_name,
    read_graph,
    renamed_dims,
    write_specializations,
)
from qeff_validate.builders.provenance import QPC_PROVENANCE
from qeff_validate.config.case import Compile, Precision
from qeff_validate.errors import BuildError
from qeff_validate.sdk.locate import Sdk
from qeff_validate.sdk.processes import run_process

TAIL = 30
"""Number of lines of the compiler's output in an error message."""


def compile_key(options: Compile, precision: Precision, buckets: Sequence[Mapping[str, int]], sdk: Sdk) -> Any:
    """Return plain data that changes with everything a QPC depends on beside the ONNX file.

    A node precision file counts by its content: an edited one makes another QPC, and a moved one the same.
    """
    plain = options.model_dump(mode="json", exclude={"timeout_s"})
    for key, value in options.flags.items():
        if flag_name(key) == NODE_PRECISION:
            with suppress(OSError):  # the compiler will say that it is missing
                plain["flags"][key] = f"sha256:{digest_file(Path(str(value)))}"
    return {
        "options": plain,
        "precision": precision.model_dump(mode="json"),
        "buckets": [dict(bucket) for bucket in buckets],
        "sdk": sdk.fingerprint(),
    }


def compile_qpc(
    onnx: Path,
    folder: Path,
    *,
    sdk: Sdk,
    options: Compile,
    precision: Precision,
    buckets: Sequence[Mapping[str, int]],
    inputs: Mapping[str, Sequence[int | str]] = {},
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Compile a QPC into ``<folder>/qpc``.

    The folder also receives the compiler's inputs, its output (``compile.log``) and the provenance (``about.json``).

    Args:
        onnx: the model; its external data is in the same directory.
        folder: an existing directory.
        sdk: the SDK with the compiler.
        options: cores, hardware version, time limit, further flags.
        precision: fp16 adds ``-convert-to-fp16``, mxfp6 ``-mxfp6-matmul``, mxint8 entries of the custom IO list.
        buckets: the values of the symbolic dims, one mapping per specialization.
        inputs: dims of inputs as ``buckets`` name them, by the input's name in the file, whose own names may differ.
        on_line: called with each line of the compiler's output as it is printed.

    Raises:
        Unavailable: the SDK has no compiler.
        ConfigError: a flag or precision of the case does not fit; see `compiler_flags`.
        BuildError: the compiler failed, exceeded the time limit, or wrote no ``programqpc.bin``.
    """
    compiler, old = sdk.compiler()
    facts = read_graph(onnx)
    provenance = {"model": facts.fingerprint, "buckets": [dict(bucket) for bucket in buckets]}
    (folder / QPC_PROVENANCE).write_text(json.dumps(provenance, indent=1), encoding="utf-8")
    specializations = write_specializations(renamed_dims(buckets, facts.inputs, inputs), folder)
    command = compiler + compiler_flags(
        onnx, folder, facts, old=old, options=options, precision=precision, specializations=specializations
    )
    lines = run_compiler(command, timeout_s=options.timeout_s, on_line=on_line)
    (folder / "compile.log").write_text("\n".join([" ".join(command), *lines, ""]), encoding="utf-8")
    if not (folder / "qpc" / "programqpc.bin").is_file():
        raise BuildError(f"the compiler said success but wrote no programqpc.bin\n{_excerpt(command, lines)}")


def run_compiler(
    command: Sequence[str], *, timeout_s: float, on_line: Callable[[str], None] | None = None
) -> list[str]:
    """Run the compiler and return the lines of its output.

    Raises:
        BuildError: it cannot be started, ran longer than ``timeout_s`` and was killed, or failed.
    """
    try:
        code, lines = run_process(command, timeout_s=timeout_s, on_line=on_line)
    except OSError as exc:
        raise BuildError(f"cannot start the compiler {command[0]}: {exc.strerror}") from exc
    if code is None:
        raise BuildError(
            f"the compiler did not finish within {timeout_s:g} s and was killed; raise compile.timeout_s if it"
            f" needs longer\n{_excerpt(command, lines)}"
        )
    if code != 0:
        raise BuildError(
            f"the compiler failed with exit code {code}: {failure_reason(lines)}\n{_excerpt(command, lines)}"
        )
    return lines


def failure_reason(lines: Sequence[str]) -> str:
    """Return the lines of a compiler's output that explain its failure.

    The last line names no cause; the cause is the last line with ``Error message:``, or, from the simulated compiler,
    the one after it (card-contract §8).
    """
    output = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
    if output[-1].startswith("simulator: "):
        return " ".join(output[-2:])
    causes = [line for line in output[:-1] if "Error message:" in line]
    return " ".join([*causes[-1:], output[-1]])


def _excerpt(command: Sequence[str], lines: Sequence[str]) -> str:
    tail = "\n".join(f"  | {line}" for line in lines[-TAIL:])
    return f"  command: {' '.join(command)}\n{tail}".rstrip()
