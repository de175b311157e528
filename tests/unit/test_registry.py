# SPDX-License-Identifier: Apache-2.0
"""The registry: entry points by group, and what is said of a name that is not there or cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from qeff_validate import registry
from qeff_validate.errors import ConfigError, Unavailable


def test_built_in_entries_are_registered_like_those_of_plugins() -> None:
    assert {"torch", "ort", "ai100", "sim"} <= registry.registered("runtimes").keys()
    assert {"embedding", "peft-causal-lm"} <= registry.registered("models").keys()
    assert all(map(registry.is_built_in, registry.registered("writers").values()))
    assert not registry.is_built_in(EntryPoint("x", "qeff_validate_extras:X", "qeff_validate.models"))


def test_unknown_name_and_failed_import_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no model is called 'embeding'\. Did you mean 'embedding'"):
        registry.load_entry("models", "embeding")
    broken = {"mine": EntryPoint("mine", "no_such_module:X", "qeff_validate.runtimes")}
    monkeypatch.setattr(registry, "registered", lambda _: broken)
    with pytest.raises(Unavailable, match="runtime 'mine' cannot be imported: No module named 'no_such_module'"):
        registry.load_entry("runtimes", "mine")


def test_importing_it_loads_no_numpy() -> None:
    code = "import sys, qeff_validate.registry; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
