# SPDX-License-Identifier: Apache-2.0
"""Tensors in mapped files, and large checkpoints, whose weights are pages of files and no memory of the process."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from qeff_validate.models import scratch
from qeff_validate.models.emulation import float64
from qeff_validate.models.emulation.float64 import compute_in_dtype
from qeff_validate.models.emulation.microscaling import E2M3, CompressedWeights, in_blocks
from qeff_validate.models.emulation.precision import InPlaceRoundedWeights
from qeff_validate.models.scratch import filled, scratch_tensor
from qeff_validate.models.sources import half_checkpoints
from qeff_validate.models.sources.gguf import copied_to_files
from qeff_validate.models.sources.resolve import Folder

SIZES = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 2048}
FILE = "(deleted)"
"""What the system says of a file without a name."""
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint in float32 whose matrices have 1 MiB or more."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=1024, **SIZES)).save_pretrained(path)
    return path


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model count as large."""
    monkeypatch.setattr(float64, "LARGE", 0)
    monkeypatch.setattr(half_checkpoints, "LARGE", 0)


def place(tensor: torch.Tensor) -> str:
    """Return the file that a tensor's memory is mapped from; empty: none."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        limits, _, _, _, _, *name = line.split(None, 5)
        low, high = (int(limit, 16) for limit in limits.split("-"))
        if low <= address < high:
            return name[0] if name else ""
    raise AssertionError("no such address")


def own_memory() -> int:
    """Return the bytes of this process that no file holds."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_a_scratch_tensor_is_a_file_without_a_name_and_a_small_one_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tensor = scratch_tensor((512, 512), torch.float32)
    assert str(tmp_path) in place(tensor)
    assert FILE in place(tensor)
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in place(scratch_tensor((5,), torch.float32))


def test_without_room_for_a_file_a_scratch_tensor_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert FILE not in place(scratch_tensor((512, 512), torch.float32))


def test_what_is_computed_in_pieces_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PIECE", 1000)
    values = torch.randn(700, 513)
    for source in (values, values.T):
        got = filled(source, torch.float32, lambda part: part.to(torch.float16))
        assert torch.equal(got, source.to(torch.float16).to(torch.float32))


@pytest.mark.usefixtures("large")
def test_weights_of_a_float32_checkpoint_stay_in_their_file(folder: Path) -> None:
    body = Folder(folder).body()
    weight = body.encoder.layer[1].output.dense.weight
    assert place(weight) == str(folder / "model.safetensors")
    with torch.inference_mode(), compute_in_dtype(body, "float64", probe=lambda: body(IDS)):
        assert FILE in place(body.embeddings.word_embeddings.weight)
        body(IDS)
    assert place(weight) == str(folder / "model.safetensors"), "float64 has left a copy"
    assert place(body.embeddings.word_embeddings.weight) == str(folder / "model.safetensors")
    before = weight.clone()
    InPlaceRoundedWeights("fp16", body, large=True)
    assert FILE in place(weight)
    assert torch.equal(weight, before.to(torch.float16).to(torch.float32))
    assert torch.equal(load_file(folder / "model.safetensors")["encoder.layer.1.output.dense.weight"], before)


def test_weights_of_a_gguf_file_are_copied_to_files() -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    weights = np.arange(1 << 19, dtype=np.float32).reshape(512, 1024)
    with copied_to_files():
        copy = torch.from_numpy(reader.np.copy(weights.T))
        assert isinstance(reader.np.float32(1), np.float32)
    assert reader.np is np
    assert FILE in place(copy)
    np.testing.assert_array_equal(copy.numpy(), weights.T, strict=True)


def test_what_is_written_into_mapped_weights_stays_out_of_the_file_and_outlives_it(
    folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = Folder(tmp_path).body().encoder.layer[1].output.dense.weight
    before = weights.clone()
    with torch.no_grad():
        weights[0].zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["encoder.layer.1.output.dense.weight"], before)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(weights[1:], before[1:])


def test_large_models_compress_weights_into_files_with_equal_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qeff_validate.models.emulation.microscaling.PIECE", 10_000)
    layer, products = torch.nn.Linear(513, 600), []
    for most in (0, 1 << 60):
        monkeypatch.setattr(float64, "LARGE", most)
        compressed = CompressedWeights(layer)
        with compressed, torch.no_grad():
            products.append(layer(torch.ones(2, 513)))
        assert {FILE in place(weight) for weight in compressed._cache.values()} == {most == 0}
    assert torch.equal(*products)
    whole = in_blocks(layer.weight.detach(), E2M3, -1)
    assert torch.equal(products[0], torch.nn.functional.linear(torch.ones(2, 513), whole, layer.bias))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_of_half_precision_is_converted_to_files(
    dtype: torch.dtype, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    names = sorted(halves)
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: halves[name] for name in part}, tmp_path / file, metadata={"format": "pt"})
    index = {name: file for file, part in (("a", names[::2]), ("b", names[1::2])) for name in part}
    index = {name: f"{file}.safetensors" for name, file in index.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    Folder(tmp_path).body()  # imports and tables of transformers
    before = own_memory()
    body = Folder(tmp_path).body()
    assert own_memory() - before < 4 << 20, "29 MB of weights"
    assert FILE in place(body.encoder.layer[0].output.dense.weight)
    for name, tensor in body.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, halves[name].float()), name
    monkeypatch.setattr(half_checkpoints, "LARGE", 1 << 60)
    assert FILE not in place(Folder(tmp_path).body().encoder.layer[0].output.dense.weight)


@pytest.mark.usefixtures("large")
def test_a_layer_may_return_its_own_weights_and_call_another_layer() -> None:
    class Layer(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module | None = None) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))
            self.inner = [inner]  # no child of this one

        def forward(self, x: torch.Tensor) -> Any:
            inside = self.inner[0](x)[0] if self.inner[0] is not None else x
            return inside * self.weight, self.weight.view(2, 2)

    torch.manual_seed(0)
    first = Layer()
    body = torch.nn.Module()
    body.layers = torch.nn.ModuleList([first, Layer(first), Layer()])

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        views = []
        for layer in body.layers:
            x, view = layer(x)
            views.append(view)
        return [x, *views]

    x = torch.randn(4, dtype=torch.float64)
    weights = [layer.weight.detach().double() for layer in body.layers]
    with torch.no_grad(), compute_in_dtype(body, "float64", probe=lambda: run(x)):
        outputs = run(x)
    wanted = [x * weights[0] * weights[0] * weights[1] * weights[2], *(weight.view(2, 2) for weight in weights)]
    assert all(torch.equal(got, want) for got, want in zip(outputs, wanted, strict=True))
    assert {parameter.dtype for parameter in body.parameters()} == {torch.float32}
