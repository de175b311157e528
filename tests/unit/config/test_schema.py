# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of configs: every config here fits, a typo inside of options does not, whichever model kind it is of.

The judge is the library jsonschema.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qeff_validate.cli.config_schema import config_schema
from qeff_validate.engine import load
from qeff_validate.errors import ConfigError
from qeff_validate.registry import registered

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "qeff_validate" / "config" / "schema.json"
CONFIGS = sorted(
    {*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/**/*.yaml"), *ROOT.glob("qeff_validate/suites/*.yaml")}
)
SCHEMA = json.loads(SHIPPED.read_text(encoding="utf-8"))


def problems(data: Any) -> list[str]:
    """Where and why data does not fit the schema; dates of YAML are strings, as in JSON."""
    plain = json.loads(json.dumps(data, default=str))
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(plain)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def case(**keys: Any) -> dict[str, Any]:
    return {"cases": [{"name": "x", "source": "random:bert", **keys}]}


def test_schema_is_one_and_the_shipped_copies_are_what_the_command_prints() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert re.fullmatch(r"urn:qeff-validate:config:\d+", SCHEMA["$id"])
    for path in (SHIPPED, ROOT / "configs" / "schema.json"):
        assert path.read_text(encoding="utf-8") == config_schema(), f"stale: qeff-validate schema > {path}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_of_this_repository_fits(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("kind", sorted(registered("models")))
def test_typo_in_options_is_refused_for_every_model_kind(kind: str) -> None:
    """With the kind in the case or in defaults, and the options in either."""
    wrong, right = {"batch_sise": 4}, {"batch_size": 4}
    for options, fits in ((right, True), (wrong, False)):
        for data in (
            case(model=kind, options=options),
            {"defaults": {"model": kind}, **case(options=options)},
            {"defaults": {"model": kind, "options": options}, **case()},
        ):
            assert (problems(data) == []) is fits, (data, problems(data))


def test_options_belong_to_the_kind_of_the_case() -> None:
    assert problems(case(options={"pooling": "cls"})) == []
    assert problems(case(model="peft-causal-lm", options={"pooling": "cls"}))
    assert problems(case(model="peft-causal-lm", options={"ctx_len": 64})) == []
    assert problems(case(options={"ctx_len": 64}))
    assert problems({"defaults": {"model": "peft-causal-lm"}, **case(model="reranker", options={"ctx_len": 64})})


WRONG = {
    "slowdown": case(performance={"max_slowdown": "5 per cent"}),
    "runtime of budgets": case(performance={"p50_ms": 5.0, "runtimes": ["otr"]}),
    "pooling": case(options={"pooling": "maen"}),
    "runtime": case(runtimes=["otr"]),
    "model": case(model="embeding"),
    "key": case(optoins={}),
    "runtime of a tolerance": case(tolerance={"otr": {"rel_l2": 1e-4, "why": "x"}}),
    "length": case(options={"seq_len": [0]}),
    "key of defaults": {"defaults": {"optoins": {}}, **case()},
    "name in defaults": {"defaults": {"name": "x"}, **case()},
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_loading_refuses_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    assert problems(data)
    with pytest.raises(ConfigError):
        load([path])


RIGHT = {
    "one length": case(options={"seq_len": 32}),
    "own pooling": case(options={"pooling": "my.module:pool"}),
    "one known failure": case(expect={"runtime": "ai100", "reason": "bug", "until": "2027-01-31"}),
    "source in defaults": {"defaults": {"source": "random:bert"}, "cases": [{"name": "x"}]},
    "bounds": case(tolerance={"ort": {"rel_l2": 1e-4, "why": "x"}}),
    "slowdown": case(performance={"max_slowdown": "5 %"}),
    "no options": case(options={}),
}


@pytest.mark.parametrize("data", RIGHT.values(), ids=RIGHT)
def test_what_loading_takes_fits(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    assert problems(data) == []
    load([path])


def test_source_is_needed_in_a_case_or_in_defaults() -> None:
    assert problems({"cases": [{"name": "x"}]})
