# SPDX-License-Identifier: Apache-2.0
"""The compiler's command line: single-dash flags, `-flag=value`, bare booleans (qaic-contract §6.1)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import CompileError
from .shapes import positive

USAGE = """\
usage: qaic-compile -aic-hw -aic-hw-version=ai100 -m=<model.onnx> -aic-binary-dir=<dir> [flags]

Simulated compiler: writes <dir>/programqpc.bin, which runs on the simulated card only.

  -m, -model=<onnx>                     the model
  -aic-hw                               compile for the card (required)
  -aic-hw-version=ai100                 card generation
  -aic-binary-dir=<dir>                 where programqpc.bin goes; must not hold one yet
  -aic-num-cores=<n>                    NSPs per activation, 1 to 16 (default 1)
  -convert-to-fp16                      round all float32 values to fp16
  -retained-state                       keep input X on the card, updated by output X_RetainedState
  -network-specialization-config=<json> values of the symbolic dims, one entry per allowed set of shapes
  -onnx-define-symbol=<symbol>,<value>  value of one symbolic dim; repeatable
  -batchsize=<n>                        value of leading dims that nothing else fixes
  -custom-IO-list-file=<yaml>           precision of inputs and outputs: float, float16
  -version                              print the version
  -h, -usage                            print this

Other flags of the real compiler are accepted without effect; unknown ones give a warning.
"""

WITHOUT_EFFECT = frozenset(
    {
        "aic-depth-first-mem", "aic-enable-depth-first", "aic-perf-metrics", "aic-perf-warnings",
        "aic-pmu-events", "aic-pmu-recipe", "aic-preproc", "aic-profiling-type",
        "allocator-dealloc-delay", "allow-mxint8-mdp-io", "always-expand-onnx-functions",
        "combine-inputs", "combine-outputs", "compile-threads", "convert-to-quantize", "ddr-stats",
        "dump-custom-IO-config-template", "dump-embedding-tables", "dump-profile", "dynamic-shape-input",
        "enable-channelwise", "enable-debug", "enable-rowwise", "execute-nodes-in-fp16",
        "external-quantization", "host-preproc", "input-list-file", "io-crc", "io-crc-stride",
        "io-encrypt", "json-input-file", "keep-original-precision-for-nodes", "load-embedding-tables",
        "load-profile", "mdp-dump-partition-config", "mdp-load-partition-config", "mdts-mos", "mos",
        "multicast-weights", "mxfp6-matmul", "node-precision-info", "num-histogram-bins", "ols",
        "operators-supported", "percentile-calibration-value", "profiling-threads",
        "quantization-calibration", "quantization-precision", "quantization-precision-bias",
        "quantization-schema-activations", "quantization-schema-constants", "register-custom-op",
        "sdp-cluster-sizes", "size-split-granularity", "split-model-io",
        "split-retained-state-io", "stats-batchsize", "sub-functions", "time-passes", "use-producer-dma",
        "v", "vtcm-working-set-limit-ratio",
    }
)  # fmt: skip
_SWITCHES = {"aic-hw", "convert-to-fp16", "h", "retained-state", "usage", "version"}
_VALUES = {
    "m", "model", "aic-hw-version", "aic-binary-dir", "aic-num-cores", "network-specialization-config",
    "custom-IO-list-file", "onnx-define-symbol", "batchsize",
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
    symbols: dict[str, int] = field(default_factory=dict)
    batch: int | None = None
    show: str = ""


def parse(argv: Sequence[str]) -> Options:
    """Reads a command line; unknown flags give a warning on stderr, as a newer compiler may know them."""
    options = Options()
    for argument in argv:
        if not argument.startswith("-"):
            raise CompileError(f"Unexpected argument '{argument}': values are -flag=value. Use -h for the flags.")
        name, _, value = argument[1:].partition("=")
        if name == "compile-only":
            raise CompileError("unknown option -compile-only: it always only compiles. Use -h for the flags.")
        if name in _SWITCHES:
            _switch(options, name, _boolean(name, argument))
        elif name in _VALUES:
            if not value:
                raise CompileError(f"Option -{name} needs a value: -{name}=<value>. Use -h for the flags.")
            _value(options, name, value)
        elif name not in WITHOUT_EFFECT:
            sys.stderr.write(f"warning: unknown option {argument} is ignored\n")
    return options


def _boolean(name: str, argument: str) -> bool:
    _, given, value = argument.partition("=")
    if given and value not in ("true", "false"):
        raise CompileError(f"Option -{name} is true or false, not '{value}'")
    return value != "false"


def _switch(options: Options, name: str, on: bool) -> None:
    if name == "aic-hw":
        options.hw = on
    elif name == "convert-to-fp16":
        options.fp16 = on
    elif name == "retained-state":
        options.retained_state = on
    elif on:
        options.show = "version" if name == "version" else "usage"


def _value(options: Options, name: str, value: str) -> None:
    if name in ("m", "model"):
        options.model = Path(value)
    elif name == "aic-hw-version":
        options.hw_version = value
    elif name == "aic-binary-dir":
        options.binary_dir = Path(value)
    elif name == "aic-num-cores":
        options.num_cores = positive(value, "-aic-num-cores")
    elif name == "network-specialization-config":
        options.specializations = Path(value)
    elif name == "custom-IO-list-file":
        options.custom_io = Path(value)
    elif name == "batchsize":
        options.batch = positive(value, "-batchsize")
    else:
        symbol, comma, number = value.partition(",")
        if not symbol or not comma:
            raise CompileError(f"Option -onnx-define-symbol is <symbol>,<value>, not '{value}'")
        options.symbols[symbol] = positive(number, f"-onnx-define-symbol={symbol}")
