# SPDX-License-Identifier: Apache-2.0
"""Model directories that are broken, or that nobody means well with: an error with a reason, at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper, save

from qeff_validate.config.case import Case
from qeff_validate.errors import BuildError, ConfigError, Unavailable, ValidateError
from qeff_validate.files import MOST_CONFIG
from qeff_validate.models.adapters.files import read_adapter
from qeff_validate.models.sources.resolve import resolve
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.pipeline.user_artifacts import user_artifact

LIMIT_S = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that waits for a pipe."""

    def stop(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    Random("bert", {"vocab_size": 40}, 0).body().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder: Path, prefix: str = "path", **more: Any) -> None:
    """All that a run does with a source."""
    source = resolve(Case(name="x", source=f"{prefix}:{folder}", **more))
    source.body_key()
    source.tokenizer_key()
    source.tokenizer()
    source.body()


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    def to(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return to


SPECIAL = {
    "pipe": pipe,
    "endless device": link("/dev/zero"),
    "dangling link": link("nowhere"),
    "link to itself": lambda path: link(path.name)(path),
    "directory": link("../model"),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json",
                                  "generation_config.json", "modules.json"])  # fmt: skip
def test_what_is_no_regular_file_is_refused_by_name(name: str, special: str, folder: Path) -> None:
    SPECIAL[special](folder / name)
    with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
        load(folder)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("beside", ["a model", "nothing"])
def test_adapter_config_beside_weights_is_never_opened(beside: str, special: str, folder: Path) -> None:
    SPECIAL[special](folder / "adapter_config.json")
    if beside == "nothing":
        (folder / "config.json").unlink()
    words = "put that adapter on by itself: move" if beside == "a model" else r"cannot read .*adapter_config\.json"
    with pytest.raises(ConfigError, match=words):
        load(folder)


BAD_JSON = {
    "no UTF-8": (b'{"model_type": "\xff\xfe"}', "no UTF-8"),
    "no object": (b"[1, 2]", "an object is needed"),
    "nested": (b"[" * 200_000 + b"]" * 200_000, "nested too deep"),
    "cut short": (b'{"model_type"', "cannot read"),
    "empty": (b"", "cannot read"),
    "a number of 5,000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot read"),
    "large": (b" " * (MOST_CONFIG + 1), "at most"),
}


@pytest.mark.parametrize("bad", BAD_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_json_that_is_none_is_refused_by_name(name: str, bad: str, folder: Path) -> None:
    data, words = BAD_JSON[bad]
    (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        load(folder)
    assert name in str(caught.value)


def test_huge_vocabulary_is_refused_by_its_size(folder: Path) -> None:
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 1,099,511,627,776 bytes"):
        load(folder)


SIZES = [
    ("num_hidden_layers", 10_000_000), ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("num_hidden_layers", 500),
    ("hidden_size", -4), ("vocab_size", 10**12), ("num_attention_heads", 0), ("vocab_size", 3_000_000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SIZES)
def test_absurd_size_in_the_config_of_a_checkpoint_is_refused(name: str, value: int, folder: Path) -> None:
    change(folder, {name: value})
    with pytest.raises(ConfigError, match=r"config says|config asks for"):
        load(folder)


@pytest.mark.parametrize("prefix", ["random", "tiny"])
@pytest.mark.parametrize(("name", "value"), [*SIZES[:3], ("vocab_size", 10**12), ("hidden_size", 2**25),
                                             ("intermediate_size", 2**45), ("num_attention_heads", -2)])  # fmt: skip
def test_absurd_size_in_overrides_is_refused(prefix: str, name: str, value: int, folder: Path) -> None:
    with pytest.raises(ConfigError, match=name if value < 2**24 or name == "vocab_size" else "GB in float32|size"):
        load(folder if prefix == "tiny" else Path("bert"), prefix, config={name: value})


@pytest.mark.parametrize(("name", "value"), SIZES[:3])
def test_absurd_depth_in_a_config_that_is_shrunk_is_refused(name: str, value: int, folder: Path) -> None:
    change(folder, {name: value})
    with pytest.raises(ConfigError, match=name):
        load(folder, "tiny")


def test_keys_that_count_no_stored_layers_may_be_greater_than_the_number_of_tensors(folder: Path) -> None:
    change(folder, {"max_window_layers": 500})
    load(folder)


@pytest.mark.parametrize("special", SPECIAL)
def test_gguf_of_special_files_and_one_beside_an_adapter_are_refused(special: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "m.gguf"
    SPECIAL[special](path)
    with pytest.raises(ConfigError, match=r"m\.gguf|no config\.json|no model"):
        load(path)
    path.unlink()
    path.write_bytes(b"GGUF")
    (tmp_path / "model" / "adapter_config.json").touch()
    with pytest.raises(ConfigError, match="put that adapter on by itself"):
        load(path)


def change(folder: Path, values: dict[str, Any], name: str = "config.json") -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path: Path, dtype: str, name: str, width: int) -> None:
    """Give one tensor of a safetensors file another type."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entries, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata, start, out = entries.pop("__metadata__", {}), 0, b""
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        piece = body[slice(*entry["data_offsets"])]
        if key == name:
            entry["dtype"], piece = dtype, bytes(len(piece) // 4 * width)
        entry["data_offsets"] = [start, start + len(piece)]
        start, out = start + len(piece), out + piece
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + out)


@pytest.mark.parametrize(("dtype", "width"), [("C64", 8), ("I8", 1), ("I64", 8), ("U8", 1), ("BOOL", 1), ("I32", 4)])
@pytest.mark.parametrize("part", ["output.dense.weight", "output.LayerNorm.bias"])
def test_weights_that_are_no_real_numbers_are_refused_by_name(dtype: str, width: int, part: str, folder: Path) -> None:
    name = f"encoder.layer.1.{part}"
    rewrite(folder / "model.safetensors", dtype, name, width)
    with pytest.raises(ConfigError, match=rf"{name} (is complex|holds integers) \({dtype}\)"):
        load(folder)


def test_half_precision_and_buffers_of_integers_are_weights_as_others(folder: Path) -> None:
    rewrite(folder / "model.safetensors", "F16", "encoder.layer.1.output.dense.weight", 2)
    load(folder)


@pytest.mark.parametrize("damage", ["short", "long", "no header", "empty", "header of a list", "endless header"])
def test_damaged_weights_are_an_error_with_the_name_of_the_file(damage: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({
        "short": data[:-10], "long": data + b"0", "no header": data[:100], "empty": b"",
        "header of a list": struct.pack("<Q", 2) + b"[]", "endless header": b"\xff" * 8 + data,
    }[damage])  # fmt: skip
    with pytest.raises(Unavailable, match=r"model\.safetensors"):
        load(folder)


OUTSIDE = ["../other.safetensors", "/etc/passwd", "sub/../../other.safetensors", "", "..", "a\0b", 3, None]


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_never_leaves_its_directory(name: Any, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors").unlink()
    said = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"index\.json.*(outside of|no name of a file)"):
        load(folder)


@pytest.mark.parametrize(
    "said", [{}, *({"weight_map": names} for names in ({}, [], {"a": "model.bin"}, {"a": "missing.safetensors"}))]
)
def test_index_that_is_none_is_refused(said: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"index\.json|missing\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_modules_and_named_weights_never_leave_their_directory(name: str, folder: Path) -> None:
    entries = [{"idx": 0, "name": "0", "path": name, "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"modules\.json.*outside of"):
        load(folder)
    (folder / "modules.json").unlink()
    change(folder, {"transformers_weights": name})
    with pytest.raises(ConfigError, match=r"config\.json.*outside of"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_and_never_imported(name: str, folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('the code of the model was run')")
    if name == "config.json":
        change(folder, {"auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}, "model_type": "of-its-own"})
    else:
        change(folder, {"model_type": "of-its-own"})
        change(folder, {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "T"}, name)
    with pytest.raises(ValidateError, match="code from a model is never run"):
        load(folder)


# --- adapters and ONNX files -----------------------------------------------------------------------


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_of_special_files_is_refused(name: str, special: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = tmp_path / "model"
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    SPECIAL[special](folder / name)
    with pytest.raises(ConfigError, match=name):
        read_adapter(folder)


def graph(path: Path, location: str | None, where: str = "initializer") -> Path:
    """An ONNX file with one external tensor."""
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    if location is not None:
        external_data_helper.set_external_data(tensor, location, length=16)
        tensor.ClearField("raw_data")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y", "z")]
    constant = helper.make_node("Constant", [], ["z"])
    constant.attribute.append(helper.make_attribute("value", tensor))
    inner = helper.make_graph([constant], "inner", [], value[2:])
    sparse = helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.arange(4)), [4])
    branches = {"then_branch": inner, "else_branch": inner}
    nodes = {
        "constant": [constant],
        "subgraph": [helper.make_node("If", ["b"], ["z"], **branches)],
    }.get(where, [helper.make_node("Identity", ["w"], ["z"])])
    made = helper.make_graph(nodes, "g", [], value[2:], [tensor] if where == "initializer" else [],
                             sparse_initializer=[sparse] if where == "sparse" else None)  # fmt: skip
    functions = [helper.make_function("d", "f", [], ["z"], [constant], [])] if where == "function" else []
    save(helper.make_model(made, functions=functions), path)
    return path


PLACES = ("initializer", "constant", "subgraph", "sparse", "function")


def digest(path: Path) -> str:
    return user_artifact(Case(name="x", source="random:bert", artifacts={"onnx": str(path)}), "onnx", path).digest


@pytest.mark.parametrize("where", PLACES)
def test_external_data_anywhere_in_a_graph_is_part_of_its_digest(where: str, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    data = tmp_path / "deep" / "er" / "w.data"
    path = graph(tmp_path / "model.onnx", "deep/er/w.data", where)
    with pytest.raises(ConfigError, match=r"artifacts\.onnx: cannot read .*w\.data"):
        digest(path)
    data.write_bytes(bytes(16))
    before = digest(path)
    (tmp_path / "unrelated.onnx.data").write_bytes(b"1")
    assert digest(path) == before
    data.write_bytes(bytes(15) + b"1")
    assert digest(path) != before


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("location", ["../w.data", "/etc/hostname", "a/../../w.data", "", ".."])
def test_external_data_never_leaves_the_directory_of_its_graph(location: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "w.data").write_bytes(bytes(16))
    with pytest.raises(ConfigError, match=r"outside of|no name of a file"):
        digest(graph(tmp_path / "in" / "model.onnx", location, where))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["model.onnx", "w.data"])
def test_graph_of_special_files_is_refused(name: str, special: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = graph(folder / "model.onnx", "w.data")
    (folder / "w.data").write_bytes(bytes(16))
    SPECIAL[special](folder / name)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        digest(path)


def test_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(BuildError, match="as ONNX"):
        digest(tmp_path / "model.onnx")


def test_tokenizer_that_fails_on_a_text_is_named(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": "abc"}))
    tokenize, _ = resolve(Case(name="x", source=f"path:{folder}")).tokenizer()
    with pytest.raises(ValidateError, match="cannot tokenize 'the man': TypeError"):
        tokenize("the man")
