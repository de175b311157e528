# SPDX-License-Identifier: Apache-2.0
"""``tiny:`` keeps the architecture of a config and shrinks the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qeff_validate as qv
from qeff_validate.models.sources.resolve import resolve


def config(folder: Path, **changes: object) -> Path:
    from transformers import AutoConfig

    plain = AutoConfig.for_model("modernbert").to_dict()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**plain, "model_type": "modernbert", **changes}))
    return folder


@pytest.mark.slow
def test_a_large_config_becomes_a_small_model_that_validates(tmp_path: Path) -> None:
    case = qv.Case(
        name="t", source=f"tiny:{config(tmp_path / 'm')}", options={"seq_len": [48, 64]}, exporter="torchscript"
    )
    body = resolve(case).body()
    assert sum(parameter.numel() for parameter in body.parameters()) < 2e6
    assert body.config.num_hidden_layers == 2
    report = qv.validate(case, ["ort", "sim"])
    assert report.passed, report.plain()


def test_the_key_changes_with_the_config_and_the_seed(tmp_path: Path) -> None:
    def key(folder: Path, seed: int = 0) -> object:
        return resolve(qv.Case(name="t", source=f"tiny:{folder}", seed=seed)).body_key()

    first, other = config(tmp_path / "a"), config(tmp_path / "b", norm_eps=1e-3)
    assert key(first) == key(config(tmp_path / "c"))
    assert key(first) != key(other)
    assert key(first) != key(first, seed=1)


def test_a_missing_config_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises((qv.ConfigError, qv.Unavailable), match=r"config\.json"):
        resolve(qv.Case(name="t", source=f"tiny:{tmp_path}")).body()
