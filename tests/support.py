# SPDX-License-Identifier: Apache-2.0
"""Which PEFT methods work on which architectures: ``make support`` tries every pair and writes docs/support.md.

Each pair is a case of its own with two random adapters, run on ONNX Runtime and on the simulated AI 100; each decoder
type of transformers is one, with LoRA. Outcomes are kept in tests/support.json with the time of their run as they are
made, so ``--before TIME`` goes on where a run was broken off, and ``--only lora,llama`` renews some. Behind the pairs
stand the model types that ``random:`` builds; ``--bodies`` writes these alone, ``--page`` the page from what is kept.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from support_decoders import RUNTIMES as DECODER_RUNTIMES
from support_decoders import SOURCE, decoder_case, decoder_types
from support_results import Outcome, Pair, Results, run_of_now

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner, environment
from qeff_validate.errors import ValidateError
from qeff_validate.models.adapters.config import METHODS as KNOWN
from qeff_validate.models.adapters.config import REFUSED
from qeff_validate.protocols import Settings
from qeff_validate.report.result import Result

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
RUNTIMES = ("ort", "sim")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where adapters go; PEFT knows no modules for a third of these architectures, so they are named for all.

    Attributes:
        source: model type of the ``random:`` source.
        targets: projections of attention.
        scaled: modules of IA3.
        inputs: those of them whose input IA3 scales, not the output.
    layers: how many kinds of layers there are, or how many make adapters strong enough.
    """

    source: str
    targets: Sequence[str] = ("q_proj", "v_proj")
    scaled: Sequence[str] = ("k_proj", "v_proj", "down_proj")
    inputs: Sequence[str] = ("down_proj",)
    layers: int = 1


EXPERTS = {"scaled": ("k_proj", "v_proj", "o_proj"), "inputs": ("o_proj",)}
"""IA3 where experts are tensors of three dims, which are no modules that PEFT could scale."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "Llama": Architecture("llama"),
    "Mistral": Architecture("mistral"),
    "Qwen2": Architecture("qwen2", layers=2),
    "Qwen3": Architecture("qwen3"),
    "Qwen3-MoE": Architecture("qwen3_moe", **EXPERTS),
    "GPT-2": Architecture("gpt2", ("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "Phi-3": Architecture("phi3", ("qkv_proj",), ("qkv_proj", "down_proj")),
    "Gemma-2": Architecture("gemma2", layers=2),
    "Gemma-3": Architecture("gemma3_text", layers=2),
    "Granite": Architecture("granite"),
    "GPT-NeoX": Architecture(
        "gpt_neox", ("query_key_value",), ("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)
    ),
    "Mixtral": Architecture("mixtral", **EXPERTS),
    "StableLM": Architecture("stablelm"),
    "OLMo-2": Architecture("olmo2"),
    "StarCoder2": Architecture("starcoder2", scaled=("k_proj", "v_proj", "c_proj"), inputs=("c_proj",), layers=2),
}

# init: noise with which most adapters' effect stands out of fp16; for the others `tried` doubles it
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"r": 4, "init": 0.1},
    "rslora": {"r": 4, "init": 0.1},
    "dora": {"r": 4, "init": 0.1},
    "ia3": {"init": 0.2},
    "adalora": {"init_r": 6, "target_r": 4, "total_step": 100, "init": 0.3},
    "loha": {"r": 4, "init": 0.2},
    "lokr": {"r": 4, "init": 0.1},
    "vera": {"r": 8, "init": 0.6},
    "oft": {"oft_block_size": 8, "init": 0.1},
    "randlora": {"r": 4, "randlora_alpha": 8, "init": 0.15},
}

STRENGTHS = (1, 2, 4, 8)
"""Random adapters that cannot be told from the base in fp16 are drawn anew, so many times as strong."""

OTHERS: Mapping[str, Mapping[str, Any]] = {
    **{name: {} for name in sorted(KNOWN) if name not in METHODS},
    "c3a": {"block_size": 8, "init": 0.2},
    "hira": {"init": 0.2},
    **{name: {"num_virtual_tokens": 4, "init": 0.5} for name in ("prefix_tuning", "prompt_tuning")},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16, "init": 0.5},
    "pvera": {"init": 0.6},
    "road": {"group_size": 8},
    "supertuning": {"init": 0.2},
    "trainable_tokens": {"token_indices": [150, 310, 705]},
    "unilora": {"init": 0.5},
    "vblora": {"vector_length": 16, "num_vectors": 32, "init": 0.3},
    "waveft": {"n_frequency": 64},
}
"""The rest of PEFT's methods, on Llama alone, where their own defaults do not fit a small model."""

SHARED = ("vera", "randlora", *OTHERS)
"""Methods that share, or may share, tensors between layers: they get two."""

ELSEWHERE = ("ln_tuning", "p_tuning", "prefix_tuning", "prompt_tuning", "trainable_tokens")
"""Methods without modules, or whose modules are not projections; PEFT's default for Llama is taken."""

VIRTUAL = ("p_tuning", "prefix_tuning", "prompt_tuning")
"""Methods with virtual tokens, for which the context has room."""

BY_TABLE = ("adamss",)
"""Methods that do not compute in float64, so that bounds are not measured."""

PROMPTS = (  # the first and second make one uneven batch; two are longer than every window
    "Once",
    "def add(a, b): return a + b # and so on",
    "A river begins in the hills, where rain gathers in small streams that nobody",
)
SIZES: Mapping[str, Any] = {"prefill_seq_len": 8, "ctx_len": 24, "max_new_tokens": 4, "prompts": list(PROMPTS)}


TEMPLATE = """\
# PEFT methods and architectures

Written by `make support`: **{passed} of {all} pairs pass** on ONNX Runtime and on the simulated AI 100 in fp16
(run of {run}).
{older}
Each pair is a small random model, one layer of each kind (two where a method shares tensors between layers), with two
random adapters, run as base, a, b, base and a again on one session; prompts are uneven, run in chunks, and reach beyond
every sliding window. Adapters that are too weak to be told from the base in fp16 are drawn anew with twice the noise,
up to eight times. RandLoRA has `randlora_alpha: 8`, because its default would drown the base. A number is the worst
metric over its bound, so 1 is the limit; a number in brackets is a note below. Random weights say that a graph is
right, not how much fp16 costs a trained model. AdaMSS does not compute in float64: it is judged by the table of bounds.

{tables}
## Notes

{notes}

## Other methods, on Llama

| method | ort | sim |
|---|---|---|
{others}

## Decoder types

{decoders}
"""


def case_for(method: str, name: str, strength: float = 1) -> Case:
    """Return the case of a method on an architecture, with so many times the usual noise on its adapters."""
    if name.startswith(SOURCE):
        return decoder_case(name, strength, dict(SIZES))
    architecture = ARCHITECTURES[name]
    options = {"init": 0.1, **{**METHODS, **OTHERS}[method]}
    options["init"] = min(1.0, options["init"] * strength)  # the greatest that is taken
    if method == "ia3":
        options |= {"target_modules": list(architecture.scaled), "feedforward_modules": list(architecture.inputs)}
    elif method not in ELSEWHERE:
        options["target_modules"] = list(architecture.targets)
    return Case(
        name=f"{name}-{method}".lower(),
        model="peft-causal-lm",
        source=f"random:{architecture.source}",
        config={"num_hidden_layers": max(architecture.layers, 2 if method in SHARED else 1)},
        runtimes=list(RUNTIMES),
        tolerance="table" if method in BY_TABLE else "auto",
        options={"peft_method": method, "peft": options, **SIZES, **({"ctx_len": 32} if method in VIRTUAL else {})},
    )


def pairs(only: str | None) -> list[Pair]:
    """Return (method, architecture) in the order of the page; ``only``: METHOD, ARCHITECTURE or both, with a comma."""
    every = [(method, name) for name in ARCHITECTURES for method in METHODS] + [(method, "Llama") for method in OTHERS]
    every += [("lora", f"{SOURCE}{kind}") for kind in decoder_types()]
    wanted = {word.strip().lower() for word in (only or "").split(",") if word.strip()}
    if "decoders" in wanted:
        wanted = wanted - {"decoders"} | {name.lower() for _, name in every if name.startswith(SOURCE)}
    unknown = wanted - {word.lower() for pair in every for word in pair}
    if unknown:
        raise SystemExit(f"--only: {', '.join(sorted(unknown))}: no method and no architecture of the matrix")
    methods = wanted & {*METHODS, *OTHERS}
    names = wanted - methods
    return [
        (method, name)
        for method, name in every
        if (not methods or method in methods) and (not names or name.lower() in names)
    ]


def tried(runner: Runner, method: str, name: str) -> Outcome:
    """Run one pair on every runtime; the graph is the same however strong the adapters are."""
    for strength in STRENGTHS:
        case = case_for(method, name, strength)
        try:
            results = {runtime: runner.result(case, runtime) for runtime in case.runtimes}
        except ValidateError as exc:  # of the case as such
            return Outcome({}, dict.fromkeys(case.runtimes, f"error: {first_sentence(str(exc))}"))
        if not any("is it trained?" in result.reason for result in results.values()):
            break
    return Outcome(
        {runtime: worst(result) for runtime, result in results.items() if result.status == "pass"},
        {runtime: reason(result) for runtime, result in results.items() if result.status != "pass"},
    )


def worst(result: Result) -> float:
    """Return the greatest value over its bound; gates that allow nothing are passed, so they are 0."""
    return max(item.metric.value / item.bound.value for item in result.metrics if item.bound and item.bound.value > 0)


UNTRIED = Outcome({}, dict.fromkeys(RUNTIMES, "not tried yet"))

MOST_NAMED = 12
"""Pairs of an earlier run that are named."""

MOST_REASON = 250
"""Characters of a reason in a table."""


def reason(result: Result) -> str:
    """Return status and the first sentence of the reason, which can stand in a table."""
    return f"{result.status}: {first_sentence(result.reason)}"


def first_sentence(text: str) -> str:
    """Return the first sentence of a message, without what it proposes."""
    ends = r"; (?!what reads)|\. |: (?=give|leave|take (?!random)|save|choose|op )"
    first = re.split(ends, text.replace("|", "/"))[0]
    return textwrap.shorten(first, MOST_REASON, placeholder=" …")


def page(results: Results) -> str:
    """Return docs/support.md without its section on bodies."""
    outcomes, runs = results.outcomes, results.runs
    run = max(runs.values())
    passed = sum(
        (method, name) in outcomes and outcomes[method, name].passed for name in ARCHITECTURES for method in METHODS
    )
    notes: dict[str, int] = {}
    tables = [line for runtime in RUNTIMES for line in table(outcomes, runtime, notes)]
    others = [other_row(method, outcomes.get((method, "Llama"))) for method in OTHERS]
    others += [f"| {method} | refused: {why} | |" for method, why in sorted(REFUSED.items())]
    notes_list = [f"{number}. {escaped(text)}" for text, number in notes.items()]
    return TEMPLATE.format(
        passed=passed,
        all=len(METHODS) * len(ARCHITECTURES),
        run=run,
        older=older(runs, run),
        tables="\n".join(tables),
        notes="\n".join(notes_list),
        others="\n".join(others),
        decoders=decoders(outcomes),
    )


def older(runs: Mapping[Pair, str], newest: str) -> str:
    """Return a sentence for each earlier run that outcomes are of; empty if all are of the newest."""
    said = []
    for run in sorted({*runs.values()} - {newest}, reverse=True):
        pairs_of = [f"{method} on {name}" for (method, name), own in runs.items() if own == run]
        shown = ", ".join(f"`{pair}`" for pair in pairs_of[:MOST_NAMED])
        more = f" and {len(pairs_of) - MOST_NAMED} more" if len(pairs_of) > MOST_NAMED else ""
        said.append(f"Of {run}: {shown}{more}.")
    return "\n".join(["", *said, ""]) if said else ""


def decoders(outcomes: Mapping[Pair, Outcome]) -> str:
    """Return the section on decoder types: those that pass on all runtimes, and the outcome and reason of others."""
    types = {name.removeprefix(SOURCE): found for (_, name), found in outcomes.items() if name.startswith(SOURCE)}
    passing = [f"`{kind}`" for kind, outcome in sorted(types.items()) if outcome.passed]
    untried = [f"`{kind}`" for kind in decoder_types() if kind not in types]
    lines = [
        f"LoRA on each type that transformers has a causal head for, judged by the table of bounds: **{len(passing)} of"
        f" {len(types)} types pass** as PyTorch modules, on ONNX Runtime and on the simulated AI 100. The others are no"
        " decoders, are parts of other models, or have a reason."
        + (f" Not tried yet: {', '.join(untried)}." if untried else ""),
        "",
        f"**Passing ({len(passing)}):** {', '.join(passing)}",
        "",
        "| type | torch | ort | sim | reason |",
        "|---|---|---|---|---|",
    ]
    for kind, outcome in sorted(types.items()):
        if not outcome.passed:
            said = {**dict.fromkeys(outcome.worst, "pass"), **outcome.reasons}
            cells = [said[runtime].partition(":")[0] for runtime in DECODER_RUNTIMES]
            why = in_words(kind, next(iter(outcome.reasons.values())).partition(": ")[2])
            lines.append(f"| `{kind}` | {' | '.join(cells)} | {escaped(why)} |")
    return "\n".join(lines)


def in_words(kind: str, reason: str) -> str:
    """Return a reason in place of one that quotes transformers' exception."""
    raw = ("its default config, shrunk", "do not go together", "cannot make a config", "shrunk it still has")
    known = (said for part, said in OUTCOMES.items() if part in reason and any(text in reason for text in raw))
    return next((f"random:{kind} {said}" for said in known), reason)


def escaped(text: str) -> str:
    """Return an error message as Markdown that shows its brackets, stars and underscores instead of reading them."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", text)


def table(outcomes: Mapping[Pair, Outcome], runtime: str, notes: dict[str, int]) -> Iterator[str]:
    """Yield the table of a runtime; reasons become numbered notes."""
    yield f"## {runtime}"
    yield ""
    yield f"| | {' | '.join(METHODS)} |"
    yield f"|---|{'---|' * len(METHODS)}"
    for name in ARCHITECTURES:
        cells = []
        for method in METHODS:
            outcome = outcomes.get((method, name), UNTRIED)
            if runtime in outcome.worst:
                cells.append(f"{outcome.worst[runtime]:.2f}")
            else:
                cells.append(f"[{notes.setdefault(outcome.reasons[runtime], len(notes) + 1)}]")
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def other_row(method: str, outcome: Outcome | None) -> str:
    """Return the row of a method that is tried on Llama alone."""
    outcome = outcome or UNTRIED
    cells = [
        f"{outcome.worst[runtime]:.2f}" if runtime in outcome.worst else escaped(outcome.reasons[runtime])
        for runtime in RUNTIMES
    ]
    return f"| {method} | {' | '.join(cells)} |"


_OWN: list[Runner] = []
"""This process's runner, from `start` on."""


def start(store: str | None) -> None:
    """Set a process up: its runner, one thread, and no garbage collection but between pairs.

    An export makes millions of objects and hardly any garbage; looking for it is a fifth of the time.
    """
    import torch

    torch.set_num_threads(1)
    gc.disable()
    _OWN.append(Runner(store=store))


def timed(pair: Pair) -> tuple[Outcome, float]:
    """Try a pair in this process; return its outcome and the seconds."""
    began = time.perf_counter()
    outcome = tried(_OWN[0], *pair)
    gc.collect()
    return outcome, time.perf_counter() - began


def try_all(wanted: Sequence[Pair], jobs: int, store: str | None) -> Iterator[tuple[Pair, Outcome]]:
    """Try pairs in so many processes, and print a line of each."""
    context = get_context("spawn")  # a fork would take torch's threads along
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start, initargs=(store,)) as pool:
        found = zip(wanted, pool.map(timed, wanted), strict=True)
        for count, (pair, (outcome, seconds)) in enumerate(found, start=1):
            said = [f"{runtime} {value:.2f}" for runtime, value in outcome.worst.items()]
            said += [f"{runtime} {text}" for runtime, text in outcome.reasons.items()]
            print(f"[{count}/{len(wanted)}] {' on '.join(pair)}: {' '.join(said)} ({seconds:.0f} s)", flush=True)
            yield pair, outcome


BODIES_HEADING = "## Bodies of `random:`\n"

OUTCOMES: Mapping[str, str] = {
    # part of the message | what it says
    "it is no model of texts": "is no model of texts with a vocabulary",
    "is made of parts; ": "is made of parts, of which one reads texts: the arrow names its type",
    "is made of parts (": "is made of parts that are not shrunk: take a saved model by `path:`",
    "it is a part of other models": "is built as a part of other models only",
    "its default config, shrunk, is none of a whole model": "has a default config that, shrunk, builds no model: say"
    " what is missing in `config`, or take `tiny:` with a published one",
    "the config's values do not go together": "has a default config whose values do not fit when it is shrunk",
    "which the family has": "would lose what makes its family when it is shrunk",
    "shrunk it still has": "is still too large when it is shrunk",
    "cannot make a config for": "has no default config",
}
"""Why a type of transformers builds no small body."""


def bodies() -> str:
    """Return the section about the model types of transformers: which build a small body, and why others do not."""
    from transformers import CONFIG_MAPPING

    from qeff_validate.errors import ConfigError, Unavailable
    from qeff_validate.models.sources.synthetic import Random, empty_body

    built: list[str] = []
    refused: dict[str, list[str]] = {}
    for name in sorted(set(CONFIG_MAPPING)):
        try:
            empty_body(Random(name, {}, 0)._config(), name)
            built.append(f"`{name}`")
        except (ConfigError, Unavailable) as exc:
            message = str(exc)
            why = next((said for part, said in OUTCOMES.items() if part in message), message)
            part = re.search(r"take random:(\S+)$", message)
            refused.setdefault(why, []).append(f"`{name}`" + (f" → `{part[1]}`" if part else ""))
    lines = [
        BODIES_HEADING,
        f"Written by `python tests/support.py --bodies`: of {len(built) + sum(map(len, refused.values()))} model types"
        f" of transformers {environment(Settings())['versions']['transformers']}, {len(built)} build a small body that"
        " keeps every class of modules of its family (`tests/unit/models/sources/test_random_types.py`). That a body"
        " builds does not say that it exports: [tried bodies](models.md).",
        "",
        f"**Built ({len(built)}):** {', '.join(built)}",
    ]
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        lines += ["", f"**{len(names)} × {why}:** {', '.join(names)}"]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Try pairs, keep their outcomes, and write the page from all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", metavar="METHOD,ARCH", help="try these: methods, architectures, random:TYPE, decoders"
    )
    parser.add_argument(
        "--before", metavar="TIME", help="try what was not tried since then (2026-11-30, or with HH:MM, UTC)"
    )
    parser.add_argument("--store", help="directory of the artifact store; default: as qeff-validate")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default: docs/support.md)")
    parser.add_argument("--bodies", action="store_true", help="write the section about bodies alone")
    parser.add_argument("--page", action="store_true", help="try nothing, and write the page from what is kept")
    given = parser.parse_args(arguments)
    results, run = Results(), run_of_now(environment(Settings())["versions"])
    wanted = [] if given.page or given.bodies else pairs(given.only)
    if given.before:
        wanted = [pair for pair in wanted if results.runs.get(pair, "") < given.before]
    for pair, outcome in try_all(wanted, given.jobs, given.store):
        results.put(pair, outcome, run)
    kept = PAGE.read_text(encoding="utf-8").partition(BODIES_HEADING)[2]
    section = bodies() if given.bodies else f"{BODIES_HEADING}{kept}"
    given.output.write_text(f"{page(results)}\n{section}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
