# SPDX-License-Identifier: Apache-2.0
"""A part of a graph as a compiled program of its own: the compiler's flags and inputs, and a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import yaml

from qeff_validate.artifact import Artifact
from qeff_validate.builders.compile_qpc import run_compiler
from qeff_validate.builders.compiler_inputs import NODE_PRECISION, compiler_flags, flag_name, read_graph
from qeff_validate.explain.block import Block
from qeff_validate.explain.context import ExplainContext
from qeff_validate.explain.smallest_block import block_error
from qeff_validate.files import temporary_folder
from qeff_validate.sdk.locate import Sdk

MODEL = "model.onnx"
LISTS = "node_precision.yaml"

SET_ELSEWHERE = ("-m=", "-aic-binary-dir=", "-network-specialization-config=")
"""Flags that name a place, or values of symbols, which a block does not have."""


@dataclass(frozen=True, slots=True)
class CompilerInputs:
    """What a block is compiled with.

    Attributes:
        flags: of the compiler, without the model and the binary directory; paths are relative.
        files: content by name.
    """

    flags: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def compiler_inputs(context: ExplainContext, model: Path, sdk: Sdk) -> CompilerInputs:
    """Return the flags and files with which the case's compiler is asked for a block.

    Args:
        context: of the case.
        model: the block, in a folder that may be written to.
        sdk: whose compiler it is.

    Raises:
        ConfigError: a flag of the case does not fit.
        Unavailable: the SDK has no compiler.
    """
    case, folder = context.pipeline.case, model.parent
    facts, names = read_graph(model), {name for node in onnx.load(str(model)).graph.node for name in node.output}
    flags = dict(case.compile.flags)
    own = next((key for key in flags if flag_name(key) == NODE_PRECISION), None)
    files: dict[str, str] = {}
    if own is not None:
        listed = yaml.safe_load(Path(str(flags[own])).read_text(encoding="utf-8")) or {}
        kept = {key: [str(name) for name in values or () if str(name) in names] for key, values in listed.items()}
        files[LISTS] = yaml.safe_dump(kept)
        flags[own] = LISTS
    arguments = compiler_flags(
        model,
        folder,
        facts,
        old=sdk.compiler()[1],
        options=case.compile.model_copy(update={"flags": flags}),
        precision=case.precision,
        specializations=folder / "none",
    )
    arguments = [flag.replace(f"{folder}/", "") for flag in arguments if not flag.startswith(SET_ELSEWHERE)]
    for path in sorted(folder.iterdir()):
        if path.suffix in (".yaml", ".json") and any(flag.endswith(f"={path.name}") for flag in arguments):
            files.setdefault(path.name, path.read_text(encoding="utf-8"))
    return CompilerInputs(tuple(arguments), files)


def program_error(context: ExplainContext, block: Block, *, sdk: Sdk) -> float:
    """Compile a block, run it on the runtime of the result, and return the relative L2 error of its output.

    Raises:
        ValidateError: the compiler or the runtime refuses it.
    """
    with temporary_folder() as folder:
        model = folder / MODEL
        onnx.save(block.model, str(model))
        inputs = compiler_inputs(context, model, sdk)
        for name, text in inputs.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = {f"={name}": f"={folder / name}" for name in inputs.files}
        flags = [
            next((flag.replace(end, path) for end, path in files.items() if flag.endswith(end)), flag)
            for flag in inputs.flags
        ]
        command = [*sdk.compiler()[0], *flags, f"-m={model}", f"-aic-binary-dir={folder / 'qpc'}"]
        run_compiler(command, timeout_s=context.pipeline.case.compile.timeout_s)
        artifact = Artifact("qpc", folder / "qpc", str(folder))
        with context.isolated(context.on.name).open(artifact) as session:
            dtypes = {spec.name: spec.dtype for spec in session.inputs}
            feeds = {name: block.inputs[name].astype(dtype) for name, dtype in dtypes.items()}
            return block_error(block, session.run(feeds, fetch=[block.output])[block.output])
