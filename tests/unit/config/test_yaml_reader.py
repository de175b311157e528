# SPDX-License-Identifier: Apache-2.0
"""Configs that nobody means well with: a ConfigError with file, line and column, soon, whatever they hold."""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qeff_validate.config import yaml_reader
from qeff_validate.config.case import Case
from qeff_validate.config.loader import MOST_BYTES
from qeff_validate.config.yaml_reader import MOST_LEVELS, parse_yaml
from qeff_validate.engine import case_for, load
from qeff_validate.errors import ConfigError

BASE = "cases:\n  - {name: a, source: 'random:bert'}\n"
LEVELS = range(1, 10)


def bomb(inner: str, step: str) -> str:
    """Ten references to the level below, nine times."""
    lines = [f"a0: &a0 {inner}"]
    return "\n".join(lines + [f"a{n}: &a{n} {step.format(','.join([f'*a{n - 1}'] * 10))}" for n in LEVELS])


WRONG_SCALARS = {
    "day that is none": "2027-02-30",
    "month that is none": "2027-13-01",
    "tagged int": "!!int abc",
    "tagged float": "!!float abc",
    "tagged bool": "!!bool abc",
    "tagged null": "!!int ''",
    "tagged timestamp": "!!timestamp abc",
    "tagged binary": "!!binary '%'",
    "time zone": "2001-12-14t21:59:43.10+99:99",
    "int of many digits": "9" * 5000,
    "negative int of many digits": "-" + "9" * 5000,
    "hexadecimal int beyond 64 bits": "0x" + "f" * 5000,
    "sexagesimal float": ":".join(["59"] * 400) + ".5",
    "sexagesimal int": "1" + ":59" * 400,
}

WRONG_KINDS = {
    "timestamp": "2001-12-14t21:59:43.10-05:00",
    "date": "2027-02-01",
    "bytes": "!!binary aGk=",
    "set": "!!set {a, b}",
    "ordered map": "!!omap [a: 1]",
    "pairs": "!!pairs [a: 1]",
    "python": "!!python/name:os.system ''",
    "own tag": "!mine 1",
    "int key": "{1: 2}",
    "key read as a bool": "{on: 1}",
    "null key": "{~: 1}",
    "list as key": "{[a, b]: 1}",
    "mapping as key": "{{a: b}: 1}",
    "key twice": "{a: 1, a: 2}",
    "surrogate": '"\\ud800"',
    "NUL": '"a\\0b"',
    "surrogate in a key": '{"\\udfff": 1}',
    "NUL in a key": '{"\\0": 1}',
    "alias to what it stands in": "&x [*x]",
    "alias to what it stands in, deeper": "&x {a: {b: [*x]}}",
    "flow lists": "[" * 1000 + "]" * 1000,
    "flow mappings": "{a: " * 1000 + "1" + "}" * 1000,
    "undefined alias": "*nobody",
    "character": "a\x00b",
    "bell": "\x07",
    "two documents": "1\n---\n2",
    "unclosed": "[1, 2",
    "tab": "\n\t- 1",
}


@pytest.mark.parametrize("value", [*WRONG_SCALARS.values(), *WRONG_KINDS.values()], ids=[*WRONG_SCALARS, *WRONG_KINDS])
def test_value_that_is_no_plain_data_is_an_error_with_line_and_column(value: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(f"{BASE}x: {value}\n".encode())
    with pytest.raises(ConfigError) as caught:
        load([path])
    text = str(caught.value)
    assert len(text) < 1000
    assert f"{path}:3:" in text or ("line " in text and "column " in text), text


@pytest.mark.parametrize("value", [*WRONG_SCALARS.values(), *WRONG_KINDS.values()], ids=[*WRONG_SCALARS, *WRONG_KINDS])
def test_option_of_the_command_line_is_read_with_the_same_care(value: str) -> None:
    with pytest.raises(ConfigError, match="pooling"):
        case_for("random:bert", options=[f"pooling={value}"])


@pytest.mark.parametrize(
    "text",
    [
        bomb("[x]", "[{}]"),
        bomb("{k: x}", "{{<<: [{}]}}"),
        bomb("{k: x}", "{{a: [{}]}}"),
        "\n".join(" " * n + "a:" for n in range(1000)),
        "\n".join("- " * n + "a" for n in (1000,)),
        "x: [" + "[]," * 20_000 + "]",
    ],
    ids=["lists", "merge keys", "mappings", "indented mappings", "indented lists", "many values"],
)
def test_file_that_expands_without_end_is_refused_soon(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_reader, "MOST_VALUES", 10_000)
    path = tmp_path / "c.yaml"
    path.write_text(f"{text}\n{BASE}", encoding="utf-8")
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=r"levels inside each other|more than 10,000 values"):
        load([path])
    assert time.perf_counter() - start < 60


def test_defaults_that_many_cases_multiply_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    texts = ", ".join(f"t{n}" for n in range(1000))
    path.write_text(f"defaults: {{inputs: {{texts: [{texts}]}}}}\ncases: [{'{},' * 1000}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="defaults of 1,000 cases"):
        load([path])


def test_nesting_up_to_the_limit_is_read() -> None:
    deep = MOST_LEVELS - 1
    assert json.dumps(parse_yaml("[" * deep + "1" + "]" * deep, "c")) == "[" * deep + "1" + "]" * deep


def test_aliases_that_stand_for_little_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "c") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]
    }  # fmt: skip


def test_date_belongs_to_until_alone_and_any_character_to_texts() -> None:
    assert parse_yaml("until: 2027-01-31", "c") == {"until": date(2027, 1, 31)}
    assert parse_yaml('texts: ["a\\0b"]', "c") == {"texts": ["a\0b"]}
    with pytest.raises(ConfigError, match=r"c:1:8: .* is read as timestamp"):
        parse_yaml("until: 2001-12-14t21:59:43.10", "c")


@pytest.mark.parametrize("encode", [lambda t: b"\xef\xbb\xbf" + t.encode(), lambda t: t.replace("\n", "\r\n").encode()])
def test_byte_order_mark_and_windows_line_ends_are_read(encode: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(encode(BASE))
    assert [case.name for case in load([path])] == ["a"]


def no_file(path: Path) -> None:
    del path


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/null")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


def latin(path: Path) -> None:
    path.write_bytes(BASE.encode() + b"# \xe4\n")


def utf16(path: Path) -> None:
    path.write_bytes(BASE.encode("utf-16"))


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def circle(path: Path) -> None:
    path.symlink_to(path)


PLACES = [no_file, Path.mkdir, pipe, endless, terminal, listening, huge, latin, utf16, dangling, circle]


@pytest.mark.parametrize("make", PLACES)
def test_config_that_is_no_small_text_file_is_named_and_never_waited_for(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    make(path)
    with pytest.raises(ConfigError, match=r"cannot read config .*c\.yaml"):
        load([path])


def test_limit_of_a_config_is_in_the_message(tmp_path: Path) -> None:
    huge(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=f"at most {MOST_BYTES:,} are read"):
        load([tmp_path / "c.yaml"])


@pytest.mark.parametrize(
    "text",
    [
        "{name: a, source: 'path:~nosuchuser/x'}",
        "{name: a, source: x, inputs: {texts_file: ~nosuchuser/x}}",
        "{name: a, source: x, artifacts: {onnx: ~nosuchuser/x}}",
        "{name: a, source: x, artifacts: {qpc: ~nosuchuser/x}}",
        "{name: a, source: x, artifacts: {reference: ~nosuchuser/x}}",
        "{name: a, source: x, model: peft-causal-lm, options: {adapters: {b: ~nosuchuser/x}}}",
    ],
)
def test_home_of_nobody_is_an_error_in_every_path(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"cases:\n  - {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml.*'a'.*no such user"):
        load([path])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e300", "0", "-1"])
def test_time_limit_is_a_finite_number_of_seconds(value: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"cases: [{{name: a, source: x, compile: {{timeout_s: {value}}}}}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="timeout_s"):
        load([path])


@pytest.mark.parametrize("field", ["source", "revision", "texts_file", "onnx"])
def test_control_characters_are_refused_in_what_names_a_place(field: str) -> None:
    value = "a\0b"
    keys: dict[str, Any] = {"source": "random:bert"}
    if field == "texts_file":
        keys["inputs"] = {field: value}
    elif field == "onnx":
        keys["artifacts"] = {field: value}
    else:
        keys[field] = value
    with pytest.raises(ValueError, match=r"U\+0000"):
        Case(name="a", **keys)


@pytest.mark.parametrize("source", ["path:_x", "path:...", "path:~nosuchuser/x", "", "random:\udcff", "x" * 10_000])
def test_source_of_the_command_line_becomes_a_case_or_an_error(source: str) -> None:
    try:
        case = case_for(source)
    except ConfigError:
        return
    assert case.name[0].isalnum()
    assert len(case.name) <= 200


SCALARS = st.sampled_from(
    [
        "1",
        "a",
        "~",
        ".inf",
        "on",
        "2027-02-30",
        "!!int x",
        "!!set {a}",
        "'\\0'",
        '"\\ud800"',
        "*x",
        "&x [*x]",
        "{}",
        "[]",
    ]
) | st.text(max_size=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 200), SCALARS), max_size=4))
@example([(25, "&x [*x]")])
def test_config_with_anything_in_it_is_read_or_refused(tmp_path: Path, edits: list[tuple[int, str]]) -> None:
    text = (
        "defaults: {seed: 0}\n"
        "cases:\n  - name: a\n    source: random:bert\n    compile: {timeout_s: 3, flags: {a: b}}\n"
        "    expect: {runtime: ort, reason: x, until: 2027-01-31}\n    tolerance: {ort: {rel_l2: 1.0e-4, why: w}}\n"
    )
    for place, inserted in edits:
        text = text[: place % len(text)] + inserted + text[place % len(text) :]
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        cases = load([path])
    except ConfigError:
        return
    for case in cases:
        json.dumps(case.plain())
