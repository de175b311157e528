# SPDX-License-Identifier: Apache-2.0
"""The table of flags in docs/simulated-sdk.md agrees with the compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qeff_validate.sdk.simulated.compiler import function_inlining, index_guard, model_import, options

ROOT = Path(__file__).parents[5]
TEXT = (ROOT / "docs" / "simulated-sdk.md").read_text(encoding="utf-8")


def documented() -> dict[str, str]:
    """The text of each flag's row."""
    rows = re.findall(r"^\| (`-.*?) \| (.*?) \|$", TEXT, flags=re.MULTILINE)
    pairs = [(flag, text) for flags, text in rows for flag in re.findall(r"`-([\w-]+)`", flags)]
    assert len(pairs) == len(dict(pairs)), "a flag is in two rows"
    return dict(pairs)


def in_code() -> dict[str, str]:
    checked = dict.fromkeys([*options.RANGES, *options.CHOICES], "checked")
    honoured = dict.fromkeys([*options._SWITCHES, *options._VALUES], "honoured")
    missed = dict.fromkeys(options.MISSED, "without effect, with a warning")
    return {**dict.fromkeys(options.WITHOUT_EFFECT, "without effect"), **checked, **honoured, **missed}


def test_table_lists_the_flags_of_the_compiler():
    code, docs = in_code(), documented()
    assert set(code) == set(docs)
    # The one flag that old compilers take and new ones refuse.
    assert docs.pop("compile-only").startswith("refused")
    for flag, text in docs.items():
        assert text.startswith(code[flag]), flag
        assert code[flag] != "without effect" or text == "without effect", flag


@pytest.mark.parametrize("flag", sorted(in_code()))
def test_every_flag_has_the_effect_in_the_table(flag, capsys):
    value = "1" if flag not in options.CHOICES else options.CHOICES[flag][0]
    value = str(options.RANGES[flag][0]) if flag in options.RANGES else value
    value = {"operators-supported": "onnx", "onnx-define-symbol": "a,1"}.get(flag, value)
    argument = f"-{flag}" if flag in options._SWITCHES else f"-{flag}={value}"
    before = options.Options()
    if flag == "compile-only":
        with pytest.raises(options.CompileError):
            options.parse([argument])
        return
    after = options.parse([argument])
    warned = "warning" in capsys.readouterr().err
    kind = in_code()[flag]
    assert warned == (kind == "without effect, with a warning")
    changes = after != before
    # One core and ai100 are the defaults.
    assert changes == (kind == "honoured") or flag == "aic-num-cores"


def test_usage_names_every_honoured_flag():
    for flag in options._SWITCHES | options._VALUES:
        assert re.search(rf"-{flag}\b", options.USAGE), flag


def test_numbers_and_names_in_the_text():
    flat = " ".join(TEXT.split())
    assert f"opset {model_import.MIN_OPSET} to {model_import.MAX_OPSET}" in flat
    assert f"stored as {model_import.MAX_IR} at most" in flat
    for operator in (*index_guard._GATHERS, *index_guard._SCATTERS):
        assert operator in flat
    body_of, domain = function_inlining._built_in, function_inlining.CLOUD
    known = [name for name in re.findall(r"\bCtx\w+", flat) if body_of(domain, name, 18)]
    assert len(set(known)) == 9
    assert set(known) == set(re.findall(r"\bCtx\w+", flat)), "an operator without a body is promised"
