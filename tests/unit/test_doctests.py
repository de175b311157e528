# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of public names run and print what they say."""

from __future__ import annotations

import doctest
import sys
from types import ModuleType

import pytest

import qeff_validate

NAMES = qeff_validate.__all__


def failures(docstring: str, name: str, module: ModuleType) -> tuple[int, str]:
    """How many examples of a docstring fail, and what the runner says of them."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(docstring, dict(vars(module)), name, module.__file__, 0)
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    return failed, "".join(said)


def test_every_public_name_has_an_example() -> None:
    assert [name for name in NAMES if ">>>" not in (getattr(qeff_validate, name).__doc__ or "")] == []


@pytest.mark.parametrize("name", NAMES)
def test_example_in_the_docstring_prints_what_it_says(name: str) -> None:
    value = getattr(qeff_validate, name)
    failed, said = failures(value.__doc__, name, sys.modules[value.__module__])
    assert failed == 0, said


def test_wrong_example_is_found() -> None:
    failed, said = failures("Text.\n\n    >>> 1 + 1\n    3\n", "wrong", sys.modules[__name__])
    assert failed == 1
    assert "Expected:\n    3\nGot:\n    2" in said
