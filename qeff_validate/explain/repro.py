# SPDX-License-Identifier: Apache-2.0
"""A folder that shows an error without this library: a part of a graph, its inputs and outputs, and a script."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qeff_validate.errors import ConfigError, ValidateError
from qeff_validate.explain.block_program import MODEL, compiler_inputs
from qeff_validate.explain.context import ExplainContext
from qeff_validate.explain.smallest_block import ShownError
from qeff_validate.files import temporary_beside, temporary_folder
from qeff_validate.folders import check_writable
from qeff_validate.models.framework_calls import versions
from qeff_validate.runtimes.ort import LEVELS, optimization_level
from qeff_validate.sdk.install import install_tree
from qeff_validate.sdk.locate import Sdk
from qeff_validate.sdk.processes import run_process

SCRIPT = Path(__file__).with_name("repro_script.py")

TIME_LIMIT_S = 600
"""Time limit of the script when it is tried."""

SHOWS = 1
"""Exit code of the script if the error shows."""

VERSIONS = ("numpy", "onnxruntime", "onnx", "torch", "transformers", "peft", "qeff-validate")


@dataclass(frozen=True, slots=True)
class Repro:
    """A bundle that was asked for.

    Attributes:
        folder: where it is; None if none was written.
        text: size and error, or why there is none.
    """

    folder: Path | None
    text: str


def check_folder(folder: Path) -> None:
    """Check that a bundle can be written to a folder.

    Raises:
        ConfigError: something is there already, or it cannot be written to.
    """
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if os.path.lexists(folder) and not empty:
        raise ConfigError(f"--repro: {folder} exists already; name a directory that is new or empty")
    check_writable(folder, "--repro")


def write_repro(
    context: ExplainContext, shown: ShownError, folder: Path, summary: str, stage: str | None, sdk: Sdk | None = None
) -> Repro:
    """Write a bundle, once its script has shown the error in a fresh process.

    Args:
        context: the explanation.
        shown: the part of the graph, and the error that it shows here.
        folder: new or empty.
        summary: of the explanation.
        stage: the guilty one.
        sdk: whose compiler and bindings show the error; None: ONNX Runtime does.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    block = shown.block
    level = context.settings if stage == "optimizer" else context.unoptimized
    about: dict[str, Any] = {
        "schema": 1,
        "case": context.result.case,
        "runtime": context.result.runtime,
        "summary": summary,
        "stage": stage,
        "inputs": list(block.inputs),
        "output": block.output,
        "error": shown.error,
        "bound": shown.bound,
        "rows": block.rows,
        "length": block.length,
        "nodes": block.nodes,
        "optimization": LEVELS[optimization_level(level)],
        "compiler": None,
        "sdk": None if sdk is None else {**sdk.versions(), "simulated": sdk.simulated},
        "versions": {"python": platform.python_version(), **versions(*VERSIONS)},
        "host": {"system": platform.platform(), "machine": platform.machine()},
    }
    temporary = temporary_beside(folder.absolute())
    try:
        temporary.mkdir(parents=True)
        onnx.save(block.model, str(temporary / MODEL))
        if sdk is not None:
            inputs = compiler_inputs(context, temporary / MODEL, sdk)
            about["compiler"] = list(inputs.flags)
            for name, text in inputs.files.items():
                (temporary / name).write_text(text, encoding="utf-8")
        _write_files(temporary, shown, about)
        with _installed(sdk) as prefix:
            options = [] if prefix is None else ["--sdk", str(prefix)]
            command = [sys.executable, "-I", str(temporary / "repro.py"), *options]
            code, lines = run_process(command, timeout_s=TIME_LIMIT_S)
        if code != SHOWS:
            said = lines[-1] if lines else "it printed nothing"
            return Repro(None, f"in a fresh process the error does not show (exit code {code}: {said})")
        (temporary / "ISSUE.md").write_text(issue(about, lines, sizes(temporary)), encoding="utf-8")
        size = sum(path.stat().st_size for path in temporary.iterdir())
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except ValueError as exc:  # protobuf refuses more than 2 GiB
        raise ValidateError(f"the part of the graph that shows the error is too large for one file: {exc}") from exc
    except OSError as exc:
        raise ConfigError(f"--repro: cannot write {folder}: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    text = f"{size / 1e6:.2g} MB, {block.nodes} nodes, {block.rows} x {block.length} tokens"
    return Repro(folder, f"{text}: relative L2 error {shown.error:.3g}, at most {shown.bound:.3g} is rounding")


@contextmanager
def _installed(sdk: Sdk | None) -> Iterator[Path | None]:
    """Yield the prefix of an SDK; the simulated one is laid out as an installation for as long as it is needed."""
    if sdk is None or not sdk.built_in:
        yield None if sdk is None else sdk.prefix
        return
    with temporary_folder() as folder:
        install_tree(folder / "sdk", Path(sys.executable))
        yield folder / "sdk"


def _write_files(folder: Path, shown: ShownError, about: Mapping[str, Any]) -> None:
    block = shown.block
    data = {f"input{place}": array for place, array in enumerate(block.inputs.values())}
    data["expected"] = np.asarray(block.expected, np.float64)
    if block.tokens is not None:
        data["tokens"] = block.tokens
    np.savez_compressed(folder / "data.npz", **data)  # type: ignore[arg-type]  # any keyword is a name
    plain = {**about, "error": str(about["error"]) if not np.isfinite(about["error"]) else about["error"]}
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "repro.json").write_text(f"{text}\n", encoding="utf-8")
    shutil.copyfile(SCRIPT, folder / "repro.py")


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


FILES = {
    "model.onnx": "the part of the graph that makes the error, with its weights",
    "data.npz": "its inputs, and what the original model gives for them (`expected`, float64)",
    "node_precision.yaml": "the nodes in float32",
    "custom_io.yaml": "precision of inputs and outputs",
    "partitions.json": "cards",
    "repro.json": "names, bound, versions, flags of the compiler",
    "repro.py": "runs it and compares",
}


def issue(about: Mapping[str, Any], lines: list[str], files: Mapping[str, int]) -> str:
    """Return a text for an issue tracker.

    Args:
        about: content of ``repro.json``.
        lines: what the script printed.
        files: bytes by name.
    """
    known = {name: version for name, version in about["versions"].items() if version}
    needed = [f"pip install numpy=={known['numpy']} onnxruntime=={known['onnxruntime']}", "python repro.py"]
    if about["compiler"] is not None:
        simulated = about["sdk"]["simulated"]
        needed = [f"pip install numpy=={known['numpy']}", "python repro.py --sdk /opt/qti-aic"]
        needed = ["qeff-validate sdk install PREFIX", "python repro.py --sdk PREFIX"] if simulated else needed
        known |= {f"AI 100 SDK {name}": text for name, text in about["sdk"].items() if text and name != "simulated"}
    return "\n".join([
        f"# {about['summary']}",
        "",
        f"Found by `qeff-validate explain` in the case `{about['case']}` on `{about['runtime']}`,"
        f" reduced to {about['nodes']} nodes and {about['rows']} x {about['length']} tokens.",
        "",
        "## To reproduce",
        "",
        "```console",
        *needed,
        "```",
        "",
        "Exit code 1: the error shows; 0: it is gone; 3: it could not be run. `--model FILE` runs another ONNX file.",
        "",
        "## Expected",
        "",
        f"A relative L2 error of `{about['output']}` of at most {about['bound']:.3g}, which is rounding.",
        "",
        "## What happens",
        "",
        "```text",
        *lines,
        "```",
        "",
        "## Versions",
        "",
        *(f"- {name} {version}" for name, version in known.items()),
        f"- {about['host']['system']}",
        "",
        "## Files",
        "",
        *(f"- `{name}` ({size:,} bytes): {FILES[name]}" for name, size in files.items() if name in FILES),
        "",
        "They hold weights of the model, and values that it computes from the case's inputs: see whether you may share"
        " them.",
        "",
    ])  # fmt: skip
