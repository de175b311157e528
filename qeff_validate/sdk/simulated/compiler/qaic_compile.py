# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaic-compile`: from an ONNX file to a QPC for the simulated card (card-contract §6, §8).

Run as `python -m qeff_validate.sdk.simulated.compiler <flags>`. It ends with exit code 0 and `<dir>/programqpc.bin`, or
with 255, the reason on stderr, and no file. An existing binary directory is accepted unless it contains a
programqpc.bin: a program is never overwritten, and clients (QEfficient, SDK samples) delete or reuse it themselves.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import qpc
from ..device import NSP_TOTAL
from ..errors import CompileError, rejected
from ..graph import BFLOAT16, FLOAT, FLOAT16, value_types
from ..numerics import fp16_rounding, mxfp6_weights, node_precision
from ..numerics.mxint8_state import quantize_writes
from ..release import at_least, base_version
from ..state_updates import in_place_states
from ..weights import Weight
from . import custom_io, index_guard, io_bindings, partitions
from .model_import import float64_warning, load, supported_operators
from .options import USAGE, Options, parse
from .specializations import Symbols, concrete_shapes, read_specializations, symbols_of

_NAMED_HARDWARE = (1, 21)
"""The first SDK with qaic-compile and with names of card generations (card-contract §1.2)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the compiler and return its exit code: 0, or 255 for every failure.

    Args:
        argv: command line without the program's name; None: ``sys.argv``.
    """
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.show == "operators":
            Path("OnnxSupportedOperators.txt").write_text("\n".join(supported_operators()) + "\n", encoding="utf-8")
        elif options.show:
            print(base_version() if options.show == "version" else USAGE)
        elif options.io_template is not None:
            _dump_template(options, options.io_template)
        else:
            _compile(options)
    except (CompileError, OSError) as error:
        print(error, file=sys.stderr)
        return 255
    except Exception:  # clients expect 255, so a bug of the simulator ends with it too
        traceback.print_exc()
        return 255
    return 0


def _compile(options: Options) -> None:
    path, directory = _checked(options)
    print(f"Reading ONNX Model from {path}")
    model, weights = load(path, sub_functions=options.sub_functions)
    devices, cores = _devices(options, model.graph)
    assignments = _assignments(options, model.graph)
    custom = _custom_io(options.custom_io)
    _check_types(options, model.graph, custom)
    ports = io_bindings.ports(model.graph, custom)
    shapes = concrete_shapes(model, assignments, options.batch)
    retained = io_bindings.retained_pairs(ports, shapes) if options.retained_state else {}
    if options.retained_state and not retained:
        _warn("-retained-state: no output X_RetainedState has an input X")
    partial = {*retained, *retained.values()}
    desc = io_bindings.io_desc(ports, shapes, specialized=options.specializations is not None, partial=partial)
    plan = node_precision.plan(options.fp16, options.node_precision, options.fp16_ops, options.fp32_ops)
    _warn(float64_warning(model.graph), *node_precision.unknown_names(plan, model.graph))
    compressed = _compressed_state(ports, retained)
    print("Compile started ...............")
    if options.fp16:
        print("Compiling model with FP16 precision.")
    if options.mxfp6:
        mxfp6_weights.compress(model.graph, weights, plan)
    widths = {port.name: dims[-1] if dims else 1 for port, dims in zip(ports, shapes[0], strict=True)}
    _rewrite(model, weights, plan, ports, {name: (retained[name], widths[name]) for name in compressed})
    facts = {
        "num_cores": cores,
        "num_devices": devices,
        "hw_version": "ai100" if options.hw_version == "2.0" else options.hw_version,
        "precision": "fp16" if options.fp16 else "fp32",
        "sdk_version": base_version(),
        "retained": retained,
        "mxint8": compressed,
        "in_place": in_place_states(model.graph, retained),
    }

    if os.environ.get("QAIC_SIM_COMPILER_FAULT") == "no-file":
        directory.mkdir(parents=True, exist_ok=True)
        return
    verify = functools.partial(_verify, model)
    qpc.write(directory, model=model, weights=weights, io_desc=desc, facts=facts, verify=verify)
    print(f"Generated binary is present at {directory}")


def _verify(model: Any, program: qpc.Program) -> None:
    try:
        qpc.open_session(program, check_only=True)
    except Exception as error:  # ONNX Runtime has no public base class for its errors
        raise rejected(model, str(error)) from error


def _rewrite(
    model: Any,
    weights: list[Weight],
    plan: node_precision.Plan,
    ports: Sequence[io_bindings.Port],
    compressed: Mapping[str, tuple[str, int]],
) -> None:
    """Insert rounding, index guards and the conversions of the bindings into the graph, in place."""
    types = value_types(model.graph)
    if plan.rounds:
        unrounded = plan.unrounded_weights(model.graph)
        fp16_rounding.round_graph(model.graph, types, plan)
        weights[:] = [weight if weight.name in unrounded else fp16_rounding.round_weight(weight) for weight in weights]
    fp16_rounding.compute_halves_in_float(model.graph, types)
    quantize_writes(model.graph, compressed, types)
    index_guard.guard(model, types, weights)
    io_bindings.insert_conversions(model.graph, ports, fp16=plan.rounds)
    # ONNX Runtime infers them itself.
    del model.graph.value_info[:]


def _warn(*texts: str | None) -> None:
    for text in filter(None, texts):
        print(f"warning: {text}", file=sys.stderr)


def _dump_template(options: Options, path: Path) -> None:
    if options.model is None:
        raise CompileError("Option -m=<model.onnx> is needed. Use -h for the flags.")
    graph = load(options.model)[0].graph
    names = {FLOAT: "float", FLOAT16: "float16", BFLOAT16: "bfloat16"}
    ports = [port for port in io_bindings.ports(graph, {}) if port.graph_type in names]
    custom_io.write_template(path, {port.name: names[port.graph_type] for port in ports})


def _checked(options: Options) -> tuple[Path, Path]:
    if options.model is None or options.binary_dir is None:
        raise CompileError("Options -m=<model.onnx> and -aic-binary-dir=<dir> are needed. Use -h for the flags.")
    if not options.hw:
        raise CompileError("Option -aic-hw is needed: compiling for the host interpreter is not simulated")
    known = ("ai100", "ai200") if at_least(*_NAMED_HARDWARE) else ("2.0", "ai100")
    if options.hw_version not in known:
        use = " or ".join(known)
        raise CompileError(f"Option -aic-hw-version={options.hw_version} is not known to this compiler; use {use}")
    if (options.binary_dir / qpc.FILE_NAME).exists():
        raise CompileError(
            f"{options.binary_dir} already holds a {qpc.FILE_NAME}; delete it, or choose another directory"
        )
    return options.model, options.binary_dir


def _check_types(options: Options, graph: Any, custom: Mapping[str, custom_io.PortFormat]) -> None:
    requested = any(port_format.precision == "bfloat16" for port_format in custom.values())
    if (requested or BFLOAT16 in value_types(graph).values()) and options.hw_version != "ai200":
        raise CompileError("bfloat16 is of ai200 only: use -aic-hw-version=ai200, or export the model in float32")


def _compressed_state(ports: Sequence[io_bindings.Port], retained: Mapping[str, str]) -> list[str]:
    """Return the inputs whose retained state is compressed to MXINT8."""
    names = [port.name for port in ports if port.scaled and port.scaled.precision == "mxint8"]
    if stray := set(names) - {*retained, *retained.values()}:
        raise CompileError(
            f"Custom IO: mxint8 of '{min(stray)}' is simulated for retained state only: an input X and an output"
            " X_RetainedState, compiled with -retained-state"
        )
    return [name for name in names if name in retained]


def _devices(options: Options, graph: Any) -> tuple[int, int]:
    devices, cores = 1, options.num_cores
    if options.partitions is not None:
        devices, cores, warnings = partitions.read(options.partitions, graph)
        _warn(*warnings)
    if options.partition_dump is not None:
        partitions.dump(options.partition_dump, graph, cores=options.num_cores)
    if cores > NSP_TOTAL:
        raise CompileError(f"Option -aic-num-cores={cores}: a card has {NSP_TOTAL} NSPs")
    return devices, cores


def _assignments(options: Options, graph: Any) -> list[Symbols]:
    entries = read_specializations(options.specializations) if options.specializations else [{}]
    known = symbols_of(graph)
    if unused := sorted({symbol for entry in [*entries, options.symbols] for symbol in entry} - known):
        _warn(f"no input has the symbolic dim {', '.join(unused)}")
    return [{**options.symbols, **entry} for entry in entries]


def _custom_io(path: Path | None) -> dict[str, custom_io.PortFormat]:
    if path is None:
        return {}
    formats, warnings = custom_io.read(path)
    _warn(*warnings)
    return formats
