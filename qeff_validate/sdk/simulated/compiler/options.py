# SPDX-License-Identifier: Apache-2.0
"""The compiler's command line: single-dash flags, `-flag=value`, bare booleans (card-contract §6.1)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CompileError
from ..release import at_least
from .specializations import positive

USAGE = """\
usage: qaic-compile -aic-hw -aic-hw-version=ai100 -m=<model.onnx> -aic-binary-dir=<dir> [flags]

Simulated compiler: writes <dir>/programqpc.bin, which runs on the simulated card only.

  -m, -model=<onnx>                     the model
  -aic-hw                               compile for the card (required)
  -aic-hw-version=ai100                 card generation, ai100 or ai200 (2.0 before SDK 1.21)
  -aic-binary-dir=<dir>                 where programqpc.bin goes; must not hold one yet
  -aic-num-cores=<n>                    NSPs per activation, 1 to 16 (default 1)
  -convert-to-fp16                      round all float32 values to fp16
  -retained-state                       keep input X on the card, updated by output X_RetainedState
  -network-specialization-config=<json> values of the symbolic dims, one entry per allowed set of shapes
  -onnx-define-symbol=<symbol>,<value>  value of one symbolic dim; repeatable
  -batchsize=<n>                        value of leading dims that nothing else fixes
  -custom-IO-list-file=<yaml>           precision of inputs and outputs: float, float16, bfloat16, int8, mxint8
  -dump-custom-IO-config-template=<yaml> write such a list for the model, and stop
  -node-precision-info=<yaml>           FP16NodeInstanceNames, FP32NodeInstanceNames: first outputs of nodes
  -execute-nodes-in-fp16=<op>,...       op types that round to fp16 without -convert-to-fp16
  -keep-original-precision-for-nodes=<op>,...  op types that stay in float32 with it
  -mxfp6-matmul                         constant weights of MatMul and Gemm in MXFP6
  -mdp-load-partition-config=<json>     partitions over several devices; they are checked, and nothing is partitioned
  -mdp-dump-partition-config=<json>     write such a file, with one partition of all nodes
  -sub-functions                        keep functions as units (here: check that their shapes are constant)
  -operators-supported=onnx             write OnnxSupportedOperators.txt, and stop
  -version                              print the version
  -h, -usage                            print this

Other flags of the real compiler are accepted without effect; unknown ones give a warning.
Environment: QAIC_SIM_COMPILER=<version> behaves as that SDK's compiler would (1.11, 1.21, ...);
QAIC_SIM_COMPILER_FAULT=no-file exits with 0 and without a program, as an interrupted build does.
"""

WITHOUT_EFFECT = frozenset(
    {
        "aic-enable-depth-first", "aic-perf-metrics", "aic-perf-warnings", "aic-pmu-events", "aic-pmu-recipe",
        "aic-preproc", "allow-mxint8-mdp-io", "always-expand-onnx-functions", "combine-inputs", "combine-outputs",
        "compile-only", "compile-threads", "ddr-stats", "dump-embedding-tables", "dump-profile", "dynamic-shape-input",
        "enable-channelwise", "enable-debug", "enable-rowwise", "host-preproc", "input-list-file", "io-crc",
        "io-crc-stride", "io-encrypt", "multicast-weights", "profiling-threads",
        "sdp-cluster-sizes", "split-model-io", "split-retained-state-io",
        "stats-batchsize", "time-passes", "use-producer-dma", "v",
    }
)  # fmt: skip
# Without effect here, where they would change what the real compiler reads or what the card computes.
MISSED = frozenset(
    {
        "convert-to-quantize", "external-quantization", "json-input-file", "load-embedding-tables", "load-profile",
        "register-custom-op",
    }
)  # fmt: skip
# Without effect, but the value must be one that the real compiler takes.
RANGES = {
    "aic-depth-first-mem": (8, 32), "allocator-dealloc-delay": (0, 10), "mdts-mos": (1, 16), "mos": (1, 16),
    "num-histogram-bins": (1, 2**31), "ols": (1, 16), "percentile-calibration-value": (90, 100),
    "size-split-granularity": (512, 2048), "vtcm-working-set-limit-ratio": (0, 1),
}  # fmt: skip
_SCHEMAS = ("asymmetric", "symmetric", "symmetric_with_uint8", "symmetric_with_power2_scale")
CHOICES = {
    "aic-profiling-type": ("stats", "trace", "latency"),
    "quantization-calibration": ("None", "KLMinimization", "KLMinimizationV2", "Percentile", "MSE", "SQNR"),
    "quantization-precision": ("Int8", "Int16"),
    "quantization-precision-bias": ("Int8", "Int32"),
    "quantization-schema-activations": _SCHEMAS,
    "quantization-schema-constants": _SCHEMAS,
}
_SWITCHES = {"aic-hw", "convert-to-fp16", "h", "mxfp6-matmul", "retained-state", "sub-functions", "usage", "version"}
_VALUES = {
    "m", "model", "aic-hw-version", "aic-binary-dir", "aic-num-cores", "network-specialization-config",
    "custom-IO-list-file", "onnx-define-symbol", "batchsize", "dump-custom-IO-config-template",
    "node-precision-info", "execute-nodes-in-fp16", "keep-original-precision-for-nodes",
    "mdp-load-partition-config", "mdp-dump-partition-config", "operators-supported",
}  # fmt: skip
_PATHS = {
    "m": "model", "model": "model", "aic-binary-dir": "binary_dir", "network-specialization-config": "specializations",
    "custom-IO-list-file": "custom_io", "dump-custom-IO-config-template": "io_template",
    "node-precision-info": "node_precision", "mdp-load-partition-config": "partitions",
    "mdp-dump-partition-config": "partition_dump",
}  # fmt: skip


@dataclass(slots=True)
class Options:
    """What a command line asks for."""

    model: Path | None = None
    binary_dir: Path | None = None
    hw: bool = False
    hw_version: str = "ai100"
    num_cores: int = 1
    fp16: bool = False
    retained_state: bool = False
    specializations: Path | None = None
    custom_io: Path | None = None
    io_template: Path | None = None
    node_precision: Path | None = None
    fp16_ops: tuple[str, ...] = ()
    fp32_ops: tuple[str, ...] = ()
    partitions: Path | None = None
    partition_dump: Path | None = None
    mxfp6: bool = False
    sub_functions: bool = False
    symbols: dict[str, int] = field(default_factory=dict)
    batch: int | None = None
    show: str = ""


def parse(argv: Sequence[str]) -> Options:
    """Parse a command line; unknown flags give a warning on stderr, as a newer compiler may support them.

    Raises:
        CompileError: a flag or value is invalid.
    """
    options = Options()
    for argument in argv:
        if not argument.startswith("-"):
            raise CompileError(f"Unexpected argument '{argument}': values are -flag=value. Use -h for the flags.")
        name, _, value = argument[1:].partition("=")
        _reject_by_release(name)
        if name in _SWITCHES:
            _switch(options, name, _boolean(name, argument))
        elif name in _VALUES:
            if not value:
                raise CompileError(f"Option -{name} needs a value: -{name}=<value>. Use -h for the flags.")
            _value(options, name, value)
        elif name in RANGES or name in CHOICES:
            _check_value(name, value)
        elif name in MISSED:
            sys.stderr.write(f"warning: option {argument} has no effect here; a real card would compute otherwise\n")
        elif name not in WITHOUT_EFFECT:
            sys.stderr.write(f"warning: unknown option {argument} is ignored\n")
    return options


def _reject_by_release(name: str) -> None:
    if name == "compile-only" and at_least(1, 21):
        raise CompileError("unknown option -compile-only: it always only compiles. Use -h for the flags.")
    if name == "retained-state" and not at_least(1, 12):
        raise CompileError("Invalid option -retained-state. Use -h for the flags; upgrade the Apps SDK.")


def _check_value(name: str, value: str) -> None:
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise CompileError(f"Option -{name} is one of {', '.join(CHOICES[name])}, not '{value}'")
        return
    low, high = RANGES[name]
    try:
        fits = low <= float(value) <= high
    except ValueError:
        fits = False
    if not fits:
        raise CompileError(f"Option -{name} is a number from {low} to {high}, not '{value}'")


def _boolean(name: str, argument: str) -> bool:
    _, equals, value = argument.partition("=")
    if equals and value not in ("true", "false"):
        raise CompileError(f"Option -{name} is true or false, not '{value}'")
    return value != "false"


def _switch(options: Options, name: str, on: bool) -> None:
    if name == "aic-hw":
        options.hw = on
    elif name == "convert-to-fp16":
        options.fp16 = on
    elif name == "mxfp6-matmul":
        options.mxfp6 = on
    elif name == "retained-state":
        options.retained_state = on
    elif name == "sub-functions":
        options.sub_functions = on
    elif on:
        options.show = "version" if name == "version" else "usage"


def _value(options: Options, name: str, value: str) -> None:
    if name in _PATHS:
        setattr(options, _PATHS[name], Path(value))
    elif name == "aic-hw-version":
        options.hw_version = value
    elif name == "aic-num-cores":
        options.num_cores = positive(value, "-aic-num-cores")
    elif name == "batchsize":
        options.batch = positive(value, "-batchsize")
    elif name == "execute-nodes-in-fp16":
        options.fp16_ops = tuple(value.split(","))
    elif name == "keep-original-precision-for-nodes":
        options.fp32_ops = tuple(value.split(","))
    elif name == "operators-supported":
        if value != "onnx":
            raise CompileError(f"Option -operators-supported={value} is not simulated; use onnx")
        options.show = "operators"
    else:
        _define_symbol(options.symbols, value)


def _define_symbol(symbols: dict[str, int], value: str) -> None:
    symbol, comma, text = value.partition(",")
    if not symbol or not comma:
        raise CompileError(f"Option -onnx-define-symbol is <symbol>,<value>, not '{value}'")
    number = positive(text, f"-onnx-define-symbol={symbol}")
    if symbols.setdefault(symbol, number) != number:
        raise CompileError(f"Option -onnx-define-symbol gives {symbol} two values, {symbols[symbol]} and {number}")
