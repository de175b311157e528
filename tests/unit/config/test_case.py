# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qeff_validate.config.case import Case, Inputs
from qeff_validate.config.loader import load_cases
from qeff_validate.engine import check, load
from qeff_validate.errors import ConfigError

GOOD = "cases:\n  - {name: one, source: 'random:bert'}\n"


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_reach_every_case_and_the_case_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "defaults: {source: 'random:bert', runtimes: [ort], options: {pooling: max, batch_size: 2}}\n"
        "cases:\n  - {name: a}\n  - {name: b, runtimes: [sim], options: {pooling: cls}}\n",
    )
    a, b = load([path])
    assert (a.runtimes, a.options) == (["ort"], {"pooling": "max", "batch_size": 2})
    assert (b.runtimes, b.options) == (["sim"], {"pooling": "cls", "batch_size": 2})


def test_paths_are_relative_to_the_config(tmp_path: Path) -> None:
    text = "cases:\n  - {name: a, source: 'path:model', inputs: {texts_file: texts.txt}}\n"
    (case,) = load_cases([write(tmp_path, text)])
    assert case.source == f"path:{tmp_path}/model"
    assert case.inputs.texts_file == str(tmp_path / "texts.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a config is a mapping"),
        ("[]", "a config is a mapping"),
        ("cases: []", "at least 1 item"),
        ("case: []", "Did you mean 'cases'"),
        ("cases:\n  - {name: a, sorce: x}", "Did you mean 'source'"),
        ("cases:\n  - {name: a}", "source (case 'a'): is missing"),
        ("cases:\n  - {name: a, source: x, compile: {num_corse: 1}}", "Did you mean 'num_cores'"),
        ("cases:\n  - {name: a, source: x, compile: {num_cores: 0}}", "greater than or equal to 1"),
        ("cases:\n  - {name: a, source: x, compile: {num_cores: '4'}}", "valid integer"),
        ("cases:\n  - {name: 'a b', source: x}", "pattern"),
        ("cases:\n  - {name: a, source: x, runtimes: [ort, ort]}", "named twice"),
        ("cases:\n  - {name: a, source: x, runtimes: []}", "at least 1 item"),
        ("cases:\n  - {name: a, source: x, inputs: {texts: [a], texts_file: b}}", "not both"),
        ("cases:\n  - {name: a, source: x, tolerance: {ort: {rel_l2: .nan, why: y}}}", "no usable bound"),
        ("cases:\n  - {name: a, source: x, tolerance: {ort: {rel_l2: 1.0e-3}}}", "add why"),
        ("cases:\n  - {name: a, source: x, seed: -1}", "seed"),
        ("cases:\n  - {name: a, name: b, source: x}", ":2:15: key 'name' stands twice"),
        ("defaults: {nme: 1}\ncases: []", "defaults.nme: unknown key"),
        ("defaults: 3\ncases: []", "defaults: is a mapping"),
        ("cases: {a: [}", "is no YAML"),
        ("cases: &a [*a]", ":1:8: an alias stands inside what it stands for"),
        ("cases:\n  - !!python/object/apply:os.system ['true']", "python/object/apply:os.system"),
        ("cases:\n  - just text", "valid dictionary"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_error_of_a_file_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load([write(tmp_path, "cases:\n  - {name: a, sorce: x, sed: 1}")])
    assert len(str(caught.value).splitlines()) == 3


def test_names_are_unique_over_all_files(tmp_path: Path) -> None:
    first, second = write(tmp_path, GOOD), write(tmp_path, GOOD, "d.yaml")
    with pytest.raises(ConfigError, match=r"'one' is taken already, in .*c\.yaml"):
        load([first, second])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*none\.yaml"):
        load([tmp_path / "none.yaml"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runtimes": ["onnxruntime"]}, "no runtime is called 'onnxruntime'"),
        ({"tolerance": {"otr": {"rel_l2": 1e-3, "why": "x"}}}, "Did you mean 'ort'"),
        ({"model": "embeding"}, "Did you mean 'embedding'"),
        ({"options": {"poolin": "mean"}}, "Did you mean 'pooling'"),
        ({"options": {"pooling": "median"}}, "no pooling is called 'median'"),
        ({"options": {"seq_len": []}}, "at least 1"),
        ({"options": {"seq_len": [0]}}, "greater than or equal to 1"),
        ({"options": {"seq_len": -5}}, "greater than or equal to 1"),
        ({"options": {"seq_len": "32"}}, "valid list"),
        ({"options": {"seq_len": [8, 8]}}, "named twice"),
        ({"options": {"batch_size": 0}}, "greater than or equal to 1"),
    ],
)
def test_options_and_names_are_checked_without_a_framework(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(Case(**{"name": "one", "source": "random:bert", **changes}))
    assert words in str(caught.value)


def test_buckets_are_sorted_and_one_number_is_a_list() -> None:
    assert check(Case(name="a", source="x", options={"seq_len": [64, 32]})).seq_len == [32, 64]
    assert check(Case(name="a", source="x", options={"seq_len": 16})).seq_len == [16]


def test_the_projects_own_configs_are_right() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    assert load(configs)


@pytest.mark.parametrize(
    "keys",
    [
        {"inputs": {"texts": ["a\ud800", "b", "c"]}},
        {"options": {"prompt": "\udfff"}},
        {"options": {"prompts": [{"deep": ["\ud800"]}]}},
        {"config": {"\ud800": 1}},
        {"tolerance": {"ort": {"rel_l2": 1e-4, "why": "\ud800"}}},
        {"source": "path:\udcff"},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"half of a surrogate pair \(U\+D"):
        Case(**{"name": "a", "source": "random:bert", **keys})


def test_half_of_a_surrogate_pair_is_no_text_of_inputs() -> None:
    with pytest.raises(ValidationError, match="half of a surrogate pair"):
        Inputs(texts=["a\ud800", "b", "c"])
