# SPDX-License-Identifier: Apache-2.0
"""Inputs that nobody means well with, by kind: each writes its files and says how it is run and what may come of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hostile_graphs
import numpy as np
from mutations import DEEP, LONG_NAME, THINGS, VALUES, Change, byte_changes, json_changes, things
from processes import SMALL_BERT
from warm_cli import WarmCli

from qeff_validate.artifact import fingerprint
from qeff_validate.pipeline.recorded_file import sealed
from qeff_validate.tensors import load_tensors, save_tensors

Arguments = Sequence[str | Path]
Judge = Callable[[Sequence[str], Path], str]
"""Takes the statuses of a run that gave verdicts, and its folder; returns what is wrong with them, or nothing."""

TABLE = "    exporter: torchscript\n    tolerance: table\n"
CONFIG = f"cases:\n  - name: tiny\n{SMALL_BERT}{TABLE}    runtimes: [ort, sim]\n"
TEXTS = ("the man", "a river begins", "the old house by the sea")
WORDS = sorted({word for text in TEXTS for word in text.split()})
ADAPTED = """\
cases:
  - name: tiny
    model: peft-causal-lm
    source: random:llama
    config: {hidden_size: 32, intermediate_size: 64, vocab_size: 64, num_hidden_layers: 1}
    tolerance: table
    options: {ctx_len: 16, prefill_seq_len: 4, max_new_tokens: 2, prompts: [a, b c], adapters: {one: ADAPTER}}
"""


@dataclass(frozen=True, slots=True)
class Input:
    """One hostile input.

    Attributes:
        name: what was done.
        make: writes it into an empty folder and returns the arguments of the command line.
        judge: says what is wrong with verdicts, if any were given.
    """

    name: str
    make: Callable[[Path], Arguments]
    judge: Judge


@dataclass(frozen=True, slots=True)
class GoodFiles:
    """What the inputs are made from: files of one healthy case, in ``folder``; ``store`` has all of its artifacts."""

    folder: Path
    store: Path
    recording: Path
    onnx: Path
    qpc: Path
    bundle: Path
    model: Path
    adapter: Path


def prepare(cli: WarmCli, folder: Path) -> GoodFiles:
    """Make the good files."""
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
    places = ("--store", folder / "store")
    for command in (
        ("run", "c.yaml", *places, "--record", "recorded", "--report", "report"),
        ("build", "c.yaml", *places, "--bundle", "bundle", "--runtime", "sim"),
    ):
        run = cli.run(*command, cwd=folder, limit=240)
        assert run.code == 0, run.text
    (onnx,) = (folder / "store" / "onnx").glob("*/model.onnx")
    (qpc,) = (folder / "store" / "qpc").glob("*/qpc")
    _save_model(folder / "model")
    _save_adapter(folder / "adapter")
    names = ("store", "recorded/tiny.safetensors")
    store, recording = (folder / name for name in names)
    return GoodFiles(
        folder, store, recording, onnx, qpc, folder / "bundle", folder / "model", folder / "adapter" / "one"
    )


def _save_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qeff_validate.models.sources.synthetic import Random

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
    Random("bert", {**sizes, "vocab_size": 64}, 0).body().save_pretrained(folder)
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def _save_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from qeff_validate.models.sources.synthetic import Random

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notes on a base without a config file
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(Random("llama", sizes, 0).causal_lm(), config, adapter_name="one")
        adapted.save_pretrained(folder)


# --- what may come of an input ---------------------------------------------------------------------------


def healthy(statuses: Sequence[str], _: Path) -> str:
    """Accept verdicts on a model that is as it should be; an alarm would be false."""
    return "a healthy model fails" if "fail" in statuses else ""


def anything(_: Sequence[str], __: Path) -> str:
    """Accept any verdict: what was damaged makes another question of it."""
    return ""


def refused(statuses: Sequence[str], _: Path) -> str:
    """Accept no verdict that passes: something that is judged was changed."""
    return "it passes, and should not" if "pass" in statuses else ""


# --- runs ------------------------------------------------------------------------------------------------


def run(config: str | bytes, folder: Path, good: GoodFiles, runtimes: str, *more: str | Path) -> Arguments:
    """Write a config into a folder and return the arguments of a run of it."""
    data = config.encode("utf-8", "surrogatepass") if isinstance(config, str) else config
    (folder / "c.yaml").write_bytes(data)
    places = ("--store", good.store, "--report", folder / "report")
    return ["run", folder / "c.yaml", "--runtimes", runtimes, *places, "--run-timeout", "10", *more]


def on_copies(
    source: Path, name: str, config: str, good: GoodFiles, runtimes: str
) -> Callable[[str, Change, Judge], Input]:
    """Return a function that makes an input: a run on a changed copy of a file, which the config calls ``name``."""

    def inputs(title: str, change: Change, judge: Judge) -> Input:
        def make(folder: Path) -> Arguments:
            change(copied(source, folder / name))
            return run(config, folder, good, runtimes)

        return Input(title, make, judge)

    return inputs


def copied(source: Path, target: Path) -> Path:
    """Copy a file or folder."""
    if source.is_dir():
        return Path(shutil.copytree(source, target))
    return Path(shutil.copyfile(source, target))


# --- kinds -----------------------------------------------------------------------------------------------


PREAMBLE = struct.Struct("<8sIIQQQ")
"""Of a compiled program: magic, version, crc of the header, size of the file, place and size of the header."""

SCALARS = (
    "9" * 5000, "!!int abc", "!!binary aGk=", "!!python/name:os.system ''", "2027-02-30", '"\\ud800"', '"a\\0b"',
    "&x [*x]", "*nobody", "!!set {a, b}", "{1: 2}", "{on: 1}", "[" * 1000 + "]" * 1000, ".inf", ".nan", "-1", "1e300",
    "~nosuchuser/x", LONG_NAME, "x" * 100_000, "\x07", "[1, 2", "", "{}", "[]", "2001-12-14t21:59:43.10+99:99",
)  # fmt: skip
KEYS = (
    "name", "model", "source", "revision", "config", "options", "inputs", "exporter", "artifacts", "compile",
    "precision", "tolerance", "runtimes", "expect", "seed", "marks",
)  # fmt: skip


def configs(good: GoodFiles, count: int) -> Iterator[Input]:
    """Config files: other values, other bytes, bombs, things that are no files."""
    bomb = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
    named = {"bomb": f"{bomb}\n{CONFIG}", "indented": "\n".join(" " * n + "a:" for n in range(2000)), "flow": DEEP}
    named |= {f"layers {n}": CONFIG.replace("num_hidden_layers: 1", f"num_hidden_layers: {n}") for n in (10**7, -1)}
    for value in (".inf", "-1", "1e300", "9" * 5000):
        named[f"time limit {value[:9]}"] = f"{CONFIG}    compile: {{timeout_s: {value}}}\n"
    for name, text in named.items():
        yield Input(name, lambda folder, text=text: run(text, folder, good, "torch"), healthy)
    for name, change in things():
        yield Input(name, _damaged_config(change, good), healthy)
    chance = random.Random("configs")
    for number in range(count // 2):
        key, value = chance.choice(KEYS), chance.choice(SCALARS)
        lines = [line for line in CONFIG.splitlines() if line.strip(" -").partition(":")[0] != key]
        text = "\n".join([*lines, f"    {key}: {value}", ""])
        yield Input(
            f"{key}: {value[:20]!r} {number}", lambda folder, text=text: run(text, folder, good, "torch"), healthy
        )
    for name, change in byte_changes("configs", count - count // 2):
        yield Input(name, _damaged_config(change, good), healthy)


def _damaged_config(change: Change, good: GoodFiles) -> Callable[[Path], Arguments]:
    def make(folder: Path) -> Arguments:
        arguments = run(CONFIG, folder, good, "torch")
        change(folder / "c.yaml")
        return arguments

    return make


def texts_files(good: GoodFiles, count: int) -> Iterator[Input]:
    """Files of texts: separators, encodings, lengths, things that are no files."""
    config = CONFIG.replace('{texts: ["a b c", "d e", "the man"]}', "{texts_file: FILE}")
    data = {
        "separators": "a\u2028b\nc\x0bd\ne\x0cf\x85g\n", "NUL": "a\0b\nc\nd\n", "byte order mark": "\ufeffa\nb\nc\n",
        "Windows": "a\r\nb\r\nc\r\n", "a long line": "x " * 10**6 + "\nb\nc\n", "empty lines": "\n\n\n\n",
        "many lines": "".join(f"{n}\n" for n in range(2000)), "one line": "a\n", "right to left": "\u202ea\n\u200bb\nc",
        "no character": "\uffff\n\U0010ffff\n\ufdd0\n", "tags": "<s>\n</s>\n[MASK]\n<|endoftext|>\n",
    }  # fmt: skip
    raw = {name: text.encode() for name, text in data.items()}
    raw |= {"latin": b"\xe4\nb\nc\n", "UTF-16": "a\nb\nc\n".encode("utf-16"), "surrogate": b"\xed\xa0\x80\nb\nc\n"}

    def inputs(name: str, change: Change, file: str = "t") -> Input:
        def make(folder: Path) -> Arguments:
            if len(file) < 256:
                (folder / file).write_bytes(b"".join(text.encode() + b"\n" for text in TEXTS))
                change(folder / file)
            return run(config.replace("FILE", json.dumps(file)), folder, good, "torch")

        return Input(name, make, healthy)

    for name, text in raw.items():
        yield inputs(name, lambda path, text=text: path.write_bytes(text))
    for name, change in things():
        yield inputs(name, change)
    yield inputs("300 characters", Path.touch, LONG_NAME)
    for name, change in byte_changes("texts", count):
        yield inputs(name, change)


def recordings(good: GoodFiles, count: int) -> Iterator[Input]:
    """Recorded files: other bytes, parts of another form under a digest that fits, things that are no files."""
    config = f"{CONFIG}    artifacts: {{reference: r}}\n"

    inputs = on_copies(good.recording, "r", config, good, "torch")

    def same_tensors(statuses: Sequence[str], folder: Path) -> str:
        one, other = load_tensors(good.recording), load_tensors(folder / "r")
        same = one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        return "" if same else refused(statuses, folder)

    for name, change in things():
        yield inputs(name, change, refused)
    for name, change in byte_changes("recordings", count // 2):
        yield inputs(name, change, same_tensors)
    whole = load_tensors(good.recording)
    chance = random.Random("recordings")
    forms = {
        "missing": None, "floats": np.zeros(3, np.float32), "complex": np.zeros(3, np.complex64), "no UTF-8": b"\xff",
        "no JSON": b"{", "deep": DEEP.encode(), "negative": np.array([-1, 2]), "empty": np.zeros(0, np.int64),
        "huge": np.array([1 << 62] * 3), "NaN": np.full((3, 32), np.nan, np.float32), "scalar": np.array(3),
    }  # fmt: skip
    for number in range(count - count // 2):
        part, form = chance.choice(sorted(whole)), chance.choice(sorted(forms))
        value = forms[form]
        value = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        tensors = {key: array for key, array in whole.items() if key not in (part, "digest")}
        tensors |= {} if value is None else {part: value}
        tensors = tensors if part == "digest" else sealed(tensors)
        # what may be left out, or is text for messages alone, changes no verdict
        judge = anything if part == "about" or part.startswith("floor.") else refused
        yield inputs(f"{part}: {form} {number}", lambda path, tensors=tensors: save_tensors(path, tensors), judge)
    for name, text in json_changes(json.loads(whole["texts"].tobytes()), "texts", count // 4):
        yield inputs(f"texts: {name}", _resealed(whole, text), anything)


def _resealed(whole: Mapping[str, Any], text: Callable[[], str]) -> Change:
    def change(path: Path) -> None:
        tensors = {name: array for name, array in whole.items() if name != "digest"}
        tensors["texts"] = np.frombuffer(text().encode("utf-8", "surrogatepass"), np.uint8)
        save_tensors(path, sealed(tensors))

    return change


def bundles(good: GoodFiles, count: int) -> Iterator[Input]:
    """Bundles: other bytes and things in each file, manifests of another form under a digest that fits."""
    files = sorted(path.relative_to(good.bundle) for path in good.bundle.rglob("*") if path.is_file())
    (manifest,) = (path for path in files if path.name == "bundle.json")

    def inputs(name: str, change: Callable[[Path], object], judge: Judge = refused) -> Input:
        def make(folder: Path) -> Arguments:
            copied(good.bundle, folder / "b")
            change(folder / "b")
            places = ("--store", good.store, "--report", folder / "report")
            return ["run", "--bundle", folder / "b", *places, "--run-timeout", "10"]

        return Input(name, make, judge)

    for file in files:
        for name, change in things():
            yield inputs(f"{file.name}: {name}", lambda path, file=file, change=change: change(path / file))
        for name, change in byte_changes(f"bundle {file}", count // (2 * len(files))):
            yield inputs(f"{file.name}: {name}", lambda path, file=file, change=change: change(path / file))
    for name, change in things():
        yield inputs(f"in place of the bundle: {name}", change)
        if name != "nothing":
            judge = healthy if name == "directory" else refused  # an empty one holds nothing that is judged
            yield inputs(f"added: {name}", lambda path, name=name: THINGS[name](path / "added"), judge)
    data = json.loads((good.bundle / manifest).read_bytes())
    del data["digest"]
    for name, text in json_changes(data, "manifest", count // 2):
        yield inputs(f"manifest: {name}", _with_digest(text), anything)


def _with_digest(text: Callable[[], str]) -> Change:
    def change(folder: Path) -> None:
        written = text()
        try:
            data = json.loads(written)
            written = json.dumps({**data, "digest": fingerprint(data)})
        except (ValueError, TypeError, RecursionError):
            pass  # no digest fits what is no mapping
        (folder / "bundle.json").write_text(written, encoding="utf-8", errors="surrogatepass")

    return change


def graphs(good: GoodFiles, count: int) -> Iterator[Input]:
    """ONNX files: bombs, loops, circles, other bytes, external data that lie elsewhere, things that are no files."""
    config = f"{CONFIG}    artifacts: {{onnx: m.onnx, reference: {good.recording}}}\n"

    inputs = on_copies(good.onnx, "m.onnx", config, good, "ort")

    for make in (*hostile_graphs.BOMBS, hostile_graphs.endless_loop, hostile_graphs.cycle, hostile_graphs.without_ends):
        yield inputs(make.__name__, make, refused)
    for name, change in things():
        yield inputs(name, change, refused)
    for name, change in byte_changes("graphs", count):
        yield inputs(name, change, _same_numbers(good))
    for place in ("missing", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", LONG_NAME, "", ".", "m.onnx"):
        for offset, length in (("0", "64"), ("-1", "64"), (str(2**62), "64"), ("0", str(2**62)), ("x", "y")):
            entries = {"location": place, "offset": offset, "length": length}
            yield inputs(f"external {place[:12]!r} {offset[:3]} {length[:3]}", _external(entries), refused)


def _same_numbers(good: GoodFiles) -> Judge:
    """Accept a pass if the graph still computes what it did, asked of ONNX Runtime itself."""

    def judge(statuses: Sequence[str], folder: Path) -> str:
        if "pass" not in statuses:
            return ""
        import onnxruntime

        feeds = {"input_ids": np.array([[5, 6, 7, 0]]), "attention_mask": np.array([[1, 1, 1, 0]])}
        one, other = (onnxruntime.InferenceSession(path).run(None, feeds)[0] for path in (good.onnx, folder / "m.onnx"))
        apart = float(np.linalg.norm(one - other) / np.linalg.norm(one))
        return "" if apart < 1e-3 else f"it passes, {apart:.1g} off"

    return judge


def _external(entries: Mapping[str, str]) -> Change:
    def change(path: Path) -> None:
        import onnx

        model = onnx.load(str(path))
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())

    return change


def model_directories(good: GoodFiles, count: int) -> Iterator[Input]:
    """Model directories: configs with other values, other bytes, indexes that lead elsewhere, things in each place."""
    texts = json.dumps(list(TEXTS))
    config = (
        f"cases:\n  - name: tiny\n    source: path:model\n    inputs: {{texts: {texts}}}\n"
        f"    options: {{seq_len: [16], batch_size: 2}}\n{TABLE}"
    )
    files = [path.name for path in sorted(good.model.iterdir())]

    def inputs(name: str, change: Change) -> Input:
        def make(folder: Path) -> Arguments:
            copied(good.model, folder / "model")
            change(folder / "model")
            return run(config, folder, good, "torch", "--record", folder / "recorded")

        return Input(name, make, _as_transformers_says)

    for file in files:
        for name, change in things():
            yield inputs(f"{file}: {name}", lambda path, file=file, change=change: change(path / file))
        for name, change in byte_changes(f"model {file}", count // (2 * len(files))):
            yield inputs(f"{file}: {name}", lambda path, file=file, change=change: change(path / file))
    for file in files:
        if file.endswith(".json"):
            data = json.loads((good.model / file).read_bytes())
            for name, text in json_changes(data, file, count // (2 * len(files))):
                yield inputs(f"{file}: {name}", _text(file, text))
    for value in (10**7, -1, 0, 2**63, 10**30):
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"):
            yield inputs(f"{key} {value}", _text("config.json", _config_with(good, key, value)))
    for place in ("../../../etc/passwd", "/dev/zero", "/etc/passwd", "missing", "", "a\0b", LONG_NAME, "config.json"):
        yield inputs(f"index leads to {place[:20]!r}", _index(place))
    yield inputs("code of its own", _text("config.json", _config_with(good, "auto_map", {"AutoModel": "m.M"})))
    yield inputs("a pickle", lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"))


def _config_with(good: GoodFiles, key: str, value: Any) -> Callable[[], str]:
    return lambda: json.dumps({**json.loads((good.model / "config.json").read_bytes()), key: value})


def _text(file: str, text: Callable[[], str]) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(text(), encoding="utf-8", errors="surrogatepass")

    return change


def _index(place: str) -> Change:
    def change(folder: Path) -> None:
        from safetensors.numpy import load_file

        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def _as_transformers_says(statuses: Sequence[str], folder: Path) -> str:
    """Accept a pass if the recorded reference is what transformers computes from the directory."""
    if "pass" not in statuses:
        return ""
    import torch
    from transformers import AutoModel

    tensors = load_tensors(folder / "recorded" / "tiny.safetensors")
    model = AutoModel.from_pretrained(folder / "model", local_files_only=True).eval()
    length = int(tensors["lengths"][0])
    with torch.no_grad():
        hidden = model(torch.as_tensor(tensors["ids"][None, :length])).last_hidden_state
    theirs = hidden[0].mean(0).float().numpy()
    apart = float(np.linalg.norm(theirs - tensors["output"][0]) / np.linalg.norm(theirs))
    return "" if apart < 1e-4 else f"the reference is not transformers' own: {apart:.1g} off"


def adapters(good: GoodFiles, count: int) -> Iterator[Input]:
    """Adapters: configs with other values, other bytes, things in each place."""
    files = ("adapter_config.json", "adapter_model.safetensors")

    def inputs(name: str, change: Change) -> Input:
        def make(folder: Path) -> Arguments:
            copied(good.adapter, folder / "a")
            change(folder / "a")
            more = ("--record", folder / "recorded")
            return run(ADAPTED.replace("ADAPTER", "a"), folder, good, "torch", *more)

        return Input(name, make, healthy)

    for file in files:
        for name, change in things():
            yield inputs(f"{file}: {name}", lambda path, file=file, change=change: change(path / file))
        for name, change in byte_changes(f"adapter {file}", count // 4):
            yield inputs(f"{file}: {name}", lambda path, file=file, change=change: change(path / file))
    data = json.loads((good.adapter / files[0]).read_bytes())
    for name, text in json_changes(data, "adapter", count // 2):
        yield inputs(f"{files[0]}: {name}", _text(files[0], text))
    yield inputs("a pickle", lambda path: (path / files[1]).rename(path / "adapter_model.bin"))


def programs(good: GoodFiles, count: int) -> Iterator[Input]:
    """Compiled programs (QPCs): other bytes, headers of another form under checksums that fit, things in place."""
    config = f"{CONFIG}    artifacts: {{qpc: q, reference: {good.recording}}}\n"

    def inputs(name: str, change: Change, judge: Judge = refused) -> Input:
        def make(folder: Path) -> Arguments:
            copied(good.qpc, folder / "q")
            change(folder / "q" / "programqpc.bin")
            return run(config, folder, good, "sim")

        return Input(name, make, judge)

    def same_program(statuses: Sequence[str], folder: Path) -> str:
        one, other = (good.qpc / "programqpc.bin").read_bytes(), (folder / "q" / "programqpc.bin").read_bytes()
        return "" if _program_parts(one) == _program_parts(other) else refused(statuses, folder)

    for name, change in things():
        yield inputs(name, change)
    for name, change in byte_changes("programs", count // 2):
        yield inputs(name, change, same_program)
    whole = (good.qpc / "programqpc.bin").read_bytes()
    magic, version, _, _, place, length = PREAMBLE.unpack(whole[: PREAMBLE.size])
    header = json.loads(whole[place : place + length])
    for name, text in json_changes(header, "programs", count // 2):

        def forge(path: Path, text: Callable[[], str] = text) -> None:
            data = text().encode("utf-8", "surrogatepass")
            start = PREAMBLE.pack(magic, version, zlib.crc32(data), place + len(data), place, len(data))
            path.write_bytes(start + whole[PREAMBLE.size : place] + data)

        yield inputs(f"header: {name}", forge, anything)


def _program_parts(data: bytes) -> tuple[Any, list[bytes]]:
    """Return the header of a program and its segments; what lies between them is padding."""
    _, _, _, _, place, length = PREAMBLE.unpack(data[: PREAMBLE.size])
    header = json.loads(data[place : place + length])
    return header, [data[entry["offset"] :][: entry["size"]] for entry in header["segments"].values()]


def stores(good: GoodFiles, count: int) -> Iterator[Input]:
    """Stores: other bytes and things in the place of every file and directory."""

    def inputs(name: str, place: str, change: Change) -> Input:
        def make(folder: Path) -> Arguments:
            store = copied(good.store, folder / "store")
            change(sorted(store.glob(place))[0])
            return run(CONFIG, folder, replace(good, store=store), "ort")

        return Input(f"{place}: {name}", make, healthy)

    places = ("inputs/*/tensors.safetensors", "reference/*/tensors.safetensors", "onnx/*/model.onnx", "*/*/prov*.json")
    for place in (*places, "onnx", "onnx/*", "tmp", "locks", "leases", "reference"):
        for name, change in things():
            yield inputs(name, place, change)
    for place in places:
        for name, change in byte_changes(f"stores {place}", count // len(places)):
            yield inputs(name, place, change)


def places(good: GoodFiles, _: int) -> Iterator[Input]:
    """Places that cannot be written, for all that is written."""

    def inputs(option: str, name: str, place: Callable[[Path], str | Path]) -> Input:
        def make(folder: Path) -> Arguments:
            (folder / "file").touch()
            (folder / "link").symlink_to(folder / "nothing" / "there")
            os.mkfifo(folder / "pipe")
            path = place(folder)
            if option == "--bundle":
                (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
                return ["build", folder / "c.yaml", "--bundle", path, "--runtime", "sim", "--store", good.store]
            arguments = list(run(CONFIG, folder, good, "torch"))
            return [*arguments, option, path]

        return Input(f"{option} {name}", make, healthy)

    for option in ("--report", "--record", "--store", "--bundle"):
        for name in ("file", "file/below", "link", "link/below", "pipe", "pipe/below", LONG_NAME, "a/" * 3000):
            yield inputs(option, name[:20], lambda folder, name=name: folder / name)
        for path in ("/proc/here", "/dev/null", "/dev/null/x", "/sys/kernel/here", "~nosuchuser/x", "\udcff", ""):
            yield inputs(option, repr(path), lambda folder, path=path: path)


def command_lines(good: GoodFiles, _: int) -> Iterator[Input]:
    """Options of the command line with values that nobody means well with."""
    values = [str(value) for name, value in VALUES.items() if name not in ("NUL", "surrogate", "5,000 digits")]
    values += ["9" * 5000, "\udcff", "&x [*x]", "!!int abc", "-", "--", "=", "[" * 1000]
    for option in ("--model", "--option", "--run-timeout", "--case", "--runtimes", "--device-ids", "--kind", "--sdk"):
        for value in values:
            given = {"--model": f"path:{value}", "--option": f"pooling={value}"}.get(option, value)
            source = () if option == "--model" else ("--model", "random:bert")
            arguments = ("run", *source, f"{option}={given}", "--store", good.store)
            chosen = () if option == "--runtimes" else ("--runtimes", "ai100")  # not here: what is judged is the words
            yield Input(
                f"{option} {value[:20]!r}",
                lambda folder, arguments=arguments, chosen=chosen: [*arguments, *chosen, "--report", folder / "report"],
                healthy,
            )


KINDS: Mapping[str, tuple[Callable[[GoodFiles, int], Iterator[Input]], int]] = {
    "config files": (configs, 120),
    "texts files": (texts_files, 20),
    "recorded files": (recordings, 80),
    "bundles": (bundles, 60),
    "ONNX files": (graphs, 40),
    "model directories": (model_directories, 120),
    "adapters": (adapters, 60),
    "compiled programs": (programs, 60),
    "stores": (stores, 24),
    "places to write to": (places, 0),
    "command lines": (command_lines, 0),
}
"""Makers of inputs, and how many random ones each makes besides those that it lists."""
