# SPDX-License-Identifier: Apache-2.0
"""Shows one error of a compiled or exported model: runs a part of its graph and compares with the original model.

Needs numpy and onnxruntime; where repro.json has compiler flags, the AI 100 SDK instead of onnxruntime (`--sdk PREFIX`,
default $QEFF_VALIDATE_SDK, else /opt/qti-aic). Exit code 1: the error shows. 0: it is gone. 3: it could not be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    """Run and compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER / "model.onnx", help="another ONNX file in its place")
    given = parser.parse_args()
    try:
        about = json.loads((FOLDER / "repro.json").read_text(encoding="utf-8"))
        with np.load(FOLDER / "data.npz") as stored:
            data = {name: stored[name] for name in stored.files}
        inputs = {name: data[f"input{place}"] for place, name in enumerate(about["inputs"])}
        actual = run_onnxruntime(given.model, inputs, about)
    except Exception:  # a traceback alone would end with 1, which means that the error shows
        traceback.print_exc()
        return 3
    return compare(about, data["expected"], np.asarray(actual, np.float64), data.get("tokens"))


def run_onnxruntime(model: Path, inputs: dict[str, Any], about: dict[str, Any]) -> Any:
    """Return the output of the model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, about["optimization"])
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    print(f"onnxruntime {onnxruntime.__version__}, {about['optimization']}, {model.name}")
    return session.run([about["output"]], inputs)[0]


def compare(about: dict[str, Any], expected: Any, actual: Any, tokens: Any) -> int:
    """Print the error of an output; return 1 if it is beyond the bound, else 0."""
    print(about["summary"])
    name, bound = about["output"], about["bound"]
    if actual.size != expected.size:
        print(f"output {name!r} has shape {list(actual.shape)} instead of {list(expected.shape)}: the error shows")
        return 1
    actual = actual.reshape(expected.shape)
    shape = list(expected.shape)
    if tokens is not None:
        expected, actual = expected[tokens], actual[tokens]
    wrong = ~np.isfinite(actual)
    difference = np.where(wrong, np.inf, np.abs(np.where(wrong, 0, actual) - expected))
    norm = float(np.linalg.norm(expected)) or 1.0
    error = float("inf") if wrong.any() else float(np.linalg.norm(difference)) / norm
    at = np.unravel_index(int(difference.argmax()), difference.shape)
    print(f"output {name!r} {shape}: relative L2 error {error:.3g}, at most {bound:.3g} is rounding")
    print(f"worst element {[int(place) for place in at]}: {actual[at]:.6g} instead of {expected[at]:.6g}")
    shows = not error <= bound
    print("the error shows" if shows else "the error is gone")
    return int(shows)


if __name__ == "__main__":
    sys.exit(main())
