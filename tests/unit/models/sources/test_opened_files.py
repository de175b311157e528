# SPDX-License-Identifier: Apache-2.0
"""Every file of a source, an adapter or an artifact that is opened is part of its key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import external_data_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from qeff_validate import build, model
from qeff_validate.config.case import Case
from qeff_validate.errors import BuildError, ConfigError, Unavailable
from qeff_validate.models.adapters.apply import apply_peft
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.pipeline.user_artifacts import user_artifact
from tests.open_sources import keys

ROOT = Path(__file__).resolve().parents[4]

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, 40)}}

EMBEDDING: Mapping[str, Any] = {
    "options": {"pooling": "mean", "seq_len": [8]}, "inputs": {"texts": ["w3 w4", "w5", "w6 w7"]},
}  # fmt: skip
CAUSAL: Mapping[str, Any] = {
    "model": "peft-causal-lm",
    "options": {"prompts": ["w5 w6"], "prefill_seq_len": 2, "ctx_len": 8, "max_new_tokens": 2},
}


def tokenizer(folder: Path) -> None:
    raw = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    made.chat_template = {"default": "{{ messages }}", "other": "{{ messages }}!"}
    made.save_pretrained(folder)
    (folder / "README.md").write_text("no file that is read")


def bert(folder: Path, **saving: Any) -> Path:
    Random("bert", {"vocab_size": 40, "num_hidden_layers": 1}, 0).body().save_pretrained(folder, **saving)
    tokenizer(folder)
    return folder


def into_subfolder(folder: Path) -> Path:
    """Move all shards but the first into a subfolder."""
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    shards = sorted(set(said["weight_map"].values()))[1:]
    assert shards
    (folder / "more").mkdir()
    for shard in shards:
        (folder / shard).rename(folder / "more" / shard)
    said["weight_map"] = {k: f"more/{v}" if v in shards else v for k, v in said["weight_map"].items()}
    index.write_text(json.dumps(said))
    return folder


def sentence_transformers(folder: Path) -> Path:
    bert(folder)
    modules = ("models.Transformer", ""), ("models.Pooling", "1_Pooling"), ("models.Normalize", "2_Normalize")
    listed = [{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.{name}"}
              for n, (name, path) in enumerate(modules)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}}))
    return folder


def hub_cache(cache: Path) -> Path:
    """A snapshot as huggingface_hub stores one: links into a folder of blobs."""
    plain, repo = bert(cache / "plain"), cache / "models--someone--tiny"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        path.rename(blobs / f"blob{number}")
        link = snapshot / path.relative_to(plain)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"blob{number}", link.parent))
    return snapshot


def llama(folder: Path) -> Path:
    Random("llama", {"vocab_size": 40, "num_hidden_layers": 1}, 0).causal_lm().save_pretrained(folder)
    tokenizer(folder)
    return folder


def adapter(folder: Path) -> Path:
    body = Random("llama", {"vocab_size": 40, "num_hidden_layers": 1}, 0).causal_lm()
    apply_peft(body, {"peft_method": "lora", "r": 2, "target_modules": ["q_proj"], "init": "random"}).save_pretrained(
        folder
    )
    return folder


def artifacts(root: Path) -> tuple[Path, Path]:
    """An ONNX file with external data in a subfolder, and a QPC of the simulated compiler."""
    case = Case(name="x", source="random:bert", exporter="torchscript", config={"num_hidden_layers": 1}, **EMBEDDING)
    wrapper = model(case)
    graph = onnx.load(str(build(wrapper, "onnx", store=root / "store").path))
    (root / "onnx" / "weights").mkdir(parents=True)
    external_data_helper.convert_model_to_external_data(graph, location="weights/w.data", size_threshold=100)
    onnx.save(graph, root / "onnx" / "model.onnx")
    qpc = build(wrapper, "qpc", store=root / "store").path
    assert qpc is not None
    shutil.copytree(qpc.parent, root / "qpc")
    return root / "onnx" / "model.onnx", root / "qpc" / "qpc"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each kind of source: its folder, and a case that uses it."""
    root = tmp_path_factory.mktemp("sources")
    package = root / "packages" / "tiny_weights_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    folders = {
        "single file": bert(root / "single"),
        "shards": bert(root / "shards", max_shard_size="60KB"),
        "shards in a subfolder": into_subfolder(bert(root / "sub", max_shard_size="60KB")),
        "hub cache": hub_cache(root / "cache"),
        "causal": llama(root / "causal"),
    }
    said: dict[str, dict[str, Any]] = {
        name: {
            "folder": str(folder),
            "case": {"source": f"path:{folder}", **EMBEDDING},
        }
        for name, folder in folders.items()
    }
    said["causal"]["case"] |= CAUSAL
    said["hub cache"]["watched"] = str(root / "cache" / "models--someone--tiny")
    bert(package / "model")
    said["package"] = {
        "folder": str(package / "model"), "case": {"source": "package:tiny_weights_of_a_test/model", **EMBEDDING},
    }  # fmt: skip
    said["sentence-transformers"] = {
        "folder": str(sentence_transformers(root / "st")),
        "case": {"source": f"path:{root / 'st'}", **EMBEDDING, "options": {"pooling": "auto", "seq_len": [8]}},
    }
    said["tiny"] = {"folder": str(bert(root / "tiny")), "case": {"source": f"tiny:{root / 'tiny'}", **EMBEDDING}}
    folder = adapter(root / "adapter")
    options = {**CAUSAL["options"], "adapters": {"first": str(folder)}}
    said["adapter"] = {
        "folder": str(folder), "adapter": str(folder),
        "case": {**CAUSAL, "source": f"path:{root / 'causal'}", "options": options},
    }  # fmt: skip
    graph, qpc = artifacts(root)
    said["onnx"] = {
        "folder": str(graph.parent), "runtime": "ort", "kind": "onnx", "known": ["model.onnx", "weights/w.data"],
        "case": {"source": "random:bert", "artifacts": {"onnx": str(graph)}, **EMBEDDING},
    }  # fmt: skip
    said["qpc"] = {
        "folder": str(qpc), "runtime": "sim", "kind": "qpc", "known": ["programqpc.bin"],
        "case": {"source": "random:bert", "artifacts": {"qpc": str(qpc)}, **EMBEDDING},
    }  # fmt: skip
    for entry in said.values():
        entry["case"]["name"] = "x"
        entry.setdefault("watched", entry["folder"])
    (root / "sources.json").write_text(json.dumps(said))
    said["root"] = {"folder": str(root)}
    return said


KINDS = ("single file", "shards", "shards in a subfolder", "hub cache", "causal", "package", "sentence-transformers",
         "tiny", "adapter", "onnx", "qpc")  # fmt: skip


@pytest.fixture(scope="module")
def observed(sources: dict[str, dict[str, Any]]) -> dict[str, tuple[list[str], list[str]]]:
    """For each source the files that loading opened, and those in its keys, seen in one process of its own."""
    root = Path(sources["root"]["folder"])
    path = os.pathsep.join([str(ROOT), str(root / "packages")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.open_sources", str(root)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[list[str], list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_is_opened_is_in_the_key(kind: str, observed: dict[str, tuple[list[str], list[str]]]) -> None:
    opened, known = observed[kind]
    assert opened, "the test sees what is opened"
    assert set(opened) <= set(known)
    assert "README.md" not in known


def test_files_are_seen_whether_python_or_native_code_opens_them(
    observed: dict[str, tuple[list[str], list[str]]],
) -> None:
    for kind, names in {
        "single file": ["model.safetensors", "tokenizer.json"],
        "shards in a subfolder": ["model.safetensors.index.json", "more/model-00002-of-00002.safetensors"],
        "sentence-transformers": ["modules.json", "1_Pooling/config.json"],
        "causal": ["generation_config.json", "additional_chat_templates/other.jinja", "chat_template.jinja"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "onnx": ["model.onnx", "weights/w.data"],
        "qpc": ["programqpc.bin"],
    }.items():
        opened = observed[kind][0]
        assert [name for name in names if not any(name.split("-of-")[0] in path for path in opened)] == [], kind


def key(entry: Mapping[str, Any]) -> Any:
    case = Case(**entry["case"])
    if "kind" in entry:
        return user_artifact(case, entry["kind"], Path(case.artifacts.onnx or case.artifacts.qpc or "")).digest
    return keys(case)


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_byte_gives_another_key_or_an_error(
    kind: str, sources: dict[str, dict[str, Any]], observed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = sources[kind]
    monkeypatch.syspath_prepend(str(Path(sources["root"]["folder"]) / "packages"))
    before, files = key(entry), observed[kind][0]

    @settings(max_examples=4 * len(files), deadline=None)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def change(name: str, share: float, bits: int) -> None:
        path = Path(entry["watched"]) / name
        data = path.read_bytes()
        at = int(share * len(data))
        try:
            path.write_bytes(data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
            try:
                changed = key(entry)
            except (BuildError, ConfigError, Unavailable):
                return
            assert changed != before
        finally:
            path.write_bytes(data)

    change()
    assert key(entry) == before


def test_changed_external_data_are_compiled_anew(sources: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["onnx"]["folder"], tmp_path / "onnx"))
    case = Case(**{**sources["onnx"]["case"], "artifacts": {"onnx": str(folder / "model.onnx")}})

    def qpc() -> Any:
        return build(model(case), "qpc", store=tmp_path / "store")

    first = qpc()
    assert qpc().path == first.path, "what has not changed is found in the store"
    data = bytearray((folder / "weights" / "w.data").read_bytes())
    data[3] ^= 1
    (folder / "weights" / "w.data").write_bytes(data)
    assert qpc().path != first.path
