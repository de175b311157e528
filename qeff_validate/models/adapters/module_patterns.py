# SPDX-License-Identifier: Apache-2.0
"""Checks the regular expressions of a PEFT config on a model's module names, in a process with a time limit.

PEFT matches them with `re`, which tries nested repetitions such as ``(a*)*`` in exponentially many ways and cannot be
interrupted. Loads no framework.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from qeff_validate.errors import ConfigError

SECONDS = 2
"""CPU time limit for all patterns; usual patterns take milliseconds on thousands of names."""

MATCH = """
import json, re, resource, sys
patterns, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
for label, pattern in patterns:
    print(label, flush=True)
    try:
        compiled = re.compile(pattern)
        for name in names:
            compiled.search(name), compiled.fullmatch(name)
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"is no regular expression: {error}")
"""


def check_patterns(config: Any, names: Sequence[str]) -> None:
    """Check the regular expressions of a `peft.PeftConfig` before PEFT matches them.

    Args:
        config: the config.
        names: names of the model's modules.

    Raises:
        ConfigError: a pattern is invalid, or matching takes longer than `SECONDS`.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", MATCH]
    done = subprocess.run(
        command,
        input=json.dumps([patterns, list(names), SECONDS]),
        capture_output=True,
        text=True,
        timeout=60 * SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return
    option = done.stdout.splitlines()[-1] if done.stdout else patterns[0][0]
    pattern = next(pattern for name, pattern in patterns if name == option)
    shown = repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}…")
    if done.returncode > 0:
        raise ConfigError(f"{option}: {shown} {done.stderr.strip().splitlines()[-1]}")
    raise ConfigError(
        f"{option}: matching {shown} with {len(names)} module names takes more than {SECONDS} s: repetitions inside of"
        " repetitions, such as (a*)*, are tried in exponentially many ways; write one repetition, or list the modules"
    )


def _patterns(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the options that PEFT treats as regular expressions, with the full patterns."""
    for option in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        value = getattr(config, option, None)
        if isinstance(value, str) and not value.replace("-", "_").isidentifier():
            yield option, value
    layers = getattr(config, "layers_pattern", None)
    for pattern in [layers] if isinstance(layers, str) else layers or []:
        yield "layers_pattern", rf".*\.{pattern}\.(\d+)\."
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option, None) or {}:
            if not pattern.replace(".", "").isidentifier():
                yield option, rf"(.*\.)?({pattern})$"
