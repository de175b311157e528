# SPDX-License-Identifier: Apache-2.0
"""The simulated compiler with a defect: `python defective_compiler.py KIND MUTANT FLAGS…` damages each graph first."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx

from qeff_validate.mutation.mutant import GraphMutant, Inapplicable, mutants
from qeff_validate.sdk.simulated.compiler.qaic_compile import main as compile_graph


def main(kind: str, name: str, flags: list[str]) -> int:
    """Damage the graph as a mutant of a model kind does, and compile it; return the compiler's exit code."""
    mutant = next(item for item in mutants(kind) if item.name == name)
    assert isinstance(mutant, GraphMutant)
    path = next(flag.removeprefix("-m=") for flag in flags if flag.startswith("-m="))
    model = onnx.load(path)
    try:
        mutant.change(model)
    except Inapplicable:  # as a part of the graph may have nothing to change
        return compile_graph(flags)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, str(Path(folder) / "model.onnx"))
        return compile_graph([f"-m={folder}/model.onnx" if flag.startswith("-m=") else flag for flag in flags])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
