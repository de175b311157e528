# SPDX-License-Identifier: Apache-2.0
"""The end of a run on terminals of two widths and in a pipe, beside files that are read whenever they change."""

from __future__ import annotations

import re

import pytest
from terminal_output import FOLDER, TERMINALS, shown

COLOURS = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("name", TERMINALS)
def test_end_of_a_run_is_shown_as_in_the_file(name: str) -> None:
    text = shown(*TERMINALS[name])
    assert text == (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), (
        "if this is what it should be: python tests/terminal_output.py --write"
    )


@pytest.mark.parametrize("name", TERMINALS)
def test_files_fit_their_terminal_and_lose_no_digit(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    width, colour = TERMINALS[name]
    assert bool(COLOURS.search(text)) == (colour and width is not None)
    plain = ESCAPES.sub("", text)
    assert width is None or max(map(len, plain.splitlines())) <= width
    words = " ".join(plain.split())
    for number in ("1.23e-06 of 4.80e-06", "33/33"):
        assert number in words
