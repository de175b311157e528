# SPDX-License-Identifier: Apache-2.0
"""From an ONNX file to a QPC, with the compiler of an SDK as a child process (card-contract §1.2, §6)."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qeff_validate.builders.provenance import BESIDE, recorded_in
from qeff_validate.config.case import Compile, Precision
from qeff_validate.errors import BuildError, ConfigError
from qeff_validate.models.framework_calls import first_line
from qeff_validate.sdk.locate import Sdk
from qeff_validate.sdk.processes import die_with_parent, kill
from qeff_validate.tensors import RETAINED

OWN_FLAGS = frozenset({
    "m", "model", "aic-hw", "aic-hw-version", "aic-num-cores", "convert-to-fp16", "compile-only", "aic-binary-dir",
    "mos", "mxfp6-matmul", "network-specialization-config", "retained-state", "custom-IO-list-file",
})  # fmt: skip
"""Flags that come from the case's own keys and must not be given a second time."""

TAIL = 30
"""Lines of the compiler's output that an error shows."""


def compile_key(options: Compile, precision: Precision, buckets: Sequence[Mapping[str, int]], sdk: Sdk) -> Any:
    """Return what a QPC depends on besides the ONNX file."""
    return {
        "options": options.model_dump(mode="json", exclude={"timeout_s"}),
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
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the QPC to ``<folder>/qpc``, the compiler's output to ``compile.log``, and what it is of to ``about.json``.

    Args:
        onnx: the model; its external data lies beside it.
        folder: an existing directory.
        sdk: whose compiler is run.
        options: cores, hardware, time limit, further flags.
        precision: fp16 adds ``-convert-to-fp16``, mxfp6 ``-mxfp6-matmul``, mxint8 entries of the custom IO list.
        buckets: the symbols' values of each specialization.
        say: gets each line of output as it comes.

    Raises:
        Unavailable: the SDK has no compiler.
        BuildError: it failed, took too long, or wrote no ``programqpc.bin``.
    """
    command, old = sdk.compiler()
    config = folder / "specializations.json"
    # the flat form: every SDK reads it, the named one only the newest (card-contract §6.2)
    flat = [{name: str(value) for name, value in bucket.items()} for bucket in buckets]
    config.write_text(json.dumps({"specializations": flat}, indent=1), encoding="utf-8")
    found = intake(onnx)
    said = {"model": found.made_from, "buckets": [dict(bucket) for bucket in buckets]}
    (folder / BESIDE).write_text(json.dumps(said, indent=1), encoding="utf-8")
    command += [
        "-aic-hw",
        f"-aic-hw-version={'2.0' if old else options.aic_hw_version}",
        *(["-compile-only"] if old else []),
        f"-m={onnx}",
        f"-aic-num-cores={options.num_cores}",
        *(["-convert-to-fp16"] if precision.compute == "fp16" else []),
        *(["-mxfp6-matmul"] if precision.weights == "mxfp6" else []),
        *([f"-mos={options.mos}"] if options.mos is not None else []),
        f"-network-specialization-config={config}",
        *(["-retained-state"] if found.state else []),
        *_custom_io(found.state, precision, folder),
        *(
            []
            if "node-precision-info" in map(_flag_name, options.flags)
            else _node_precision(found.exact, precision, folder)
        ),
        f"-aic-binary-dir={folder / 'qpc'}",
        *_flags(options.flags),
    ]
    code, lines = run_child(command, timeout_s=options.timeout_s, say=say)
    (folder / "compile.log").write_text("\n".join([" ".join(command), *lines, ""]), encoding="utf-8")
    if code != 0:
        raise BuildError(f"the compiler failed with exit code {code}: {_reason(lines)}\n{_shown(command, lines)}")
    if not (folder / "qpc" / "programqpc.bin").is_file():
        raise BuildError(f"the compiler said success but wrote no programqpc.bin\n{_shown(command, lines)}")


@dataclass(frozen=True, slots=True)
class Intake:
    """What the compiler's options depend on in an ONNX file.

    Attributes:
        state: retained state, inputs with a twin, and whether they are float32.
        exact: first outputs of nodes that need float32: between positions and the sines and cosines of rotary
            embeddings, and inside root mean squares.
        made_from: what it says that it was exported from; None if it does not.
    """

    state: Mapping[str, bool]
    exact: Sequence[str]
    made_from: Any = None


def intake(onnx: Path) -> Intake:
    """Read the interface and the rotary nodes of an ONNX file, without its weights.

    Raises:
        BuildError: it is no ONNX file.
    """
    from onnx import TensorProto, load

    try:
        model = load(str(onnx), load_external_data=False)
        graph, made_from = model.graph, recorded_in(model)
    except Exception as exc:  # protobuf's errors depend on its implementation
        raise BuildError(f"cannot read {onnx} as ONNX: {first_line(exc)}") from exc
    twins = {value.name for value in graph.output}
    state = {
        value.name: value.type.tensor_type.elem_type == TensorProto.FLOAT
        for value in graph.input
        if f"{value.name}{RETAINED}" in twins
    }
    made_by = {name: node for node in graph.node for name in node.output}
    found: dict[str, None] = {}
    pending = [node for node in graph.node if node.op_type in ("Sin", "Cos") and node.output]
    while pending:
        node = pending.pop()
        if node.output[0] not in found and not (node.op_type == "Cast" and _to_integer(node)):
            found[node.output[0]] = None
            pending += [made_by[name] for name in node.input if name in made_by]
    return Intake(state, (*found, *_norms(graph, made_by)), made_from)


def _norms(graph: Any, made_by: Mapping[str, Any]) -> Iterator[str]:
    """Yield first outputs of the nodes inside root mean squares: from the square to its inverse root."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    seen: set[str] = set()
    for node in graph.node:
        square = made_by.get(node.input[0]) if node.op_type == "ReduceMean" and node.input else None
        if square is None or not (square.op_type == "Pow" or _is_square(square)):
            continue
        yield square.output[0]
        chain = [node]
        while chain:
            (inside,) = chain
            if not inside.output or inside.output[0] in seen:  # a graph that is none: it has a cycle
                break
            seen.add(inside.output[0])
            yield inside.output[0]
            chain = [user for user in users.get(inside.output[0], []) if user.op_type in ("Add", "Sqrt", "Reciprocal")]
            chain = chain if len(chain) == 1 else []


def _is_square(node: Any) -> bool:
    return bool(node.op_type == "Mul" and len(node.input) == 2 and node.input[0] == node.input[1])


def _to_integer(node: Any) -> bool:
    from onnx import TensorProto

    integers = (TensorProto.INT64, TensorProto.INT32)
    return any(attribute.name == "to" and attribute.i in integers for attribute in node.attribute)


def _node_precision(exact: Sequence[str], precision: Precision, folder: Path) -> list[str]:
    """Keep rotary angles and root mean squares in float32.

    Position 2049 is none in fp16, and a sine of a rounded angle is another sine. Trained models have activations above
    256 whose squares are infinite in fp16 (SmolLM2 fails for it); upstream gives norms an operator of their own. And
    frequencies of angles are no weights to compress, even where a product reads them.
    """
    if not exact or (precision.compute != "fp16" and precision.weights is None):
        return []
    path = folder / "node_precision.yaml"
    names = "".join(f"\n  - {json.dumps(name)}" for name in exact)
    path.write_text(f"FP32NodeInstanceNames:{names}\n", encoding="utf-8")
    return [f"-node-precision-info={path}"]


def _custom_io(state: Mapping[str, bool], precision: Precision, folder: Path) -> list[str]:
    """Keep float state on the card in the precision that it computes in, as upstream does (card-contract §6.3).

    Raises:
        ConfigError: keys and values are to be kept in another one, and there are none.
    """
    floats = [name for name, is_float in state.items() if is_float]
    kinds = dict.fromkeys(floats, "float16") if precision.compute == "fp16" else {}
    if precision.kv is not None:
        cache = [name for name in floats if name.startswith("past_")]
        if not cache:
            raise ConfigError(f"precision.kv: {precision.kv}: the graph retains no keys and values in float32")
        kinds |= dict.fromkeys(cache, precision.kv)
    if not kinds:
        return []
    path = folder / "custom_io.yaml"
    names = [(part, kind) for name, kind in kinds.items() for part in (name, f"{name}{RETAINED}")]
    text = "\n".join(f" - IOName: {name}\n   Precision: {kind}" for name, kind in names)
    path.write_text(f"{text}\n", encoding="utf-8")
    return [f"-custom-IO-list-file={path}"]


def _flags(flags: Mapping[str, str | int | bool]) -> list[str]:
    made = []
    for key, value in flags.items():
        name = _flag_name(key)
        if name in OWN_FLAGS:
            raise ConfigError(f"compile.flags.{key}: this flag is set from the case's own keys; leave it out")
        if value is True:
            made.append(f"-{name}")
        elif value is not False:
            made.append(f"-{name}={value}")
    return made


def _flag_name(key: str) -> str:
    return key.lstrip("-").replace("_", "-")


def _reason(lines: Sequence[str]) -> str:
    """Return the lines that say why: the last one, which names no cause, and what says more before or behind it."""
    said = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
    if said[-1].startswith("simulator: "):
        return " ".join(said[-2:])
    causes = [line for line in said[:-1] if "Error message:" in line]
    return " ".join([*causes[-1:], said[-1]])


def _shown(command: Sequence[str], lines: Sequence[str]) -> str:
    shown = "\n".join(f"  | {line}" for line in lines[-TAIL:])
    return f"  command: {' '.join(command)}\n{shown}".rstrip()


def run_child(
    command: Sequence[str], *, timeout_s: float, say: Callable[[str], None] | None = None
) -> tuple[int, list[str]]:
    """Run a command to its end in a process group of its own, which never outlives this process.

    Returns:
        Exit code and the lines of both output streams, in order.

    Raises:
        BuildError: it cannot be started, or it ran longer than ``timeout_s`` and was killed.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (one system call, no lock)
        )
    except OSError as exc:
        raise BuildError(f"cannot start the compiler {command[0]}: {exc.strerror}") from exc
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(child, lines, say), daemon=True)
    reader.start()
    try:
        code = child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired as exc:
        kill(child)
        raise BuildError(
            f"the compiler did not finish within {timeout_s:g} s and was killed; raise compile.timeout_s if it"
            f" needs longer\n{_shown(command, lines)}"
        ) from exc
    except BaseException:
        kill(child)
        raise
    finally:
        reader.join(timeout=5)
    return code, lines


def _read(child: subprocess.Popen[str], lines: list[str], say: Callable[[str], None] | None) -> None:
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if say is not None:
                say(lines[-1])
