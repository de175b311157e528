# SPDX-License-Identifier: Apache-2.0
"""What a graph or a recorded reference was made from, beside what the case asks for: head, body, adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qeff_validate.models.embedding.options import POOLINGS
from qeff_validate.report.result import Rung

VERSIONED = frozenset({"gguf", "onnx", "peft", "tokenizers", "torch", "transformers"})
"""Keys of fingerprints that hold the version of a package: another one need not change anything."""

STARTS = ("init_ia3_weights", "init_lora_weights", "init_weights", "seed", "init", "task_type")
"""Options of an adapter that do not shape a graph."""

NAMES = {"avg": "mean"}
"""Poolings with two names."""

Said = Mapping[str, Any] | None
"""The fingerprint of the wrapper that something was made from; None if it does not say."""


def without_versions(value: Any) -> Any:
    """Return a fingerprint without versions of packages."""
    if isinstance(value, Mapping):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONED}
    return value


def _unsaid(name: str, who: str) -> Rung:
    return Rung(name, "unknown", f"nothing says what {who} from")


def head(name: str, who: str, theirs: Said, ours: Mapping[str, Any] | str) -> Rung:
    """Compare ``pooling`` (with what is cut) or ``normalize``.

    Args:
        name: of the rung.
        who: begins a sentence, such as "the graph was exported".
        theirs: what it was made from.
        ours: settings of the case's wrapper, or why there are none.
    """
    if isinstance(ours, str):
        return Rung(name, "unknown", ours)
    if theirs is None:
        return _unsaid(name, who)
    if "head" not in ours or "head" not in theirs:
        return Rung(name, "unknown", "this kind of model has no such setting")
    said, asked = theirs["head"], ours["head"]
    if name == "normalize":
        if said[name] == asked[name]:
            return Rung(name, "same")
        return Rung(name, "differs", f"{who} with normalize {said[name]}, the case asks for {asked[name]}")
    if said["truncate_dim"] != asked["truncate_dim"]:
        cut = f"truncate_dim {said['truncate_dim']}, the case asks for {asked['truncate_dim']}"
        return Rung(name, "differs", f"{who} with {cut}")
    one, other = (NAMES.get(found[name], found[name]) for found in (said, asked))
    if (one, said["code"]) == (other, asked["code"]):
        return Rung(name, "same")
    text = f"{who} with {said[name]}, the case asks for {asked[name]}"
    if {one, other} <= set(POOLINGS):
        return Rung(name, "differs", text)
    return Rung(name, "unknown", f"{text}: a function of one's own may compute the same", suspect=True)


def body(who: str, theirs: Said, ours: Mapping[str, Any] | str) -> Rung:
    """Compare what weights come from; files with another digest may hold the same numbers."""
    name = "weights"
    if isinstance(ours, str):
        return Rung(name, "unknown", ours)
    if theirs is None or "body" not in theirs:
        return _unsaid(name, who)
    said, asked = without_versions(theirs["body"]), without_versions(json.loads(json.dumps(ours)))
    if said == asked:
        return Rung(name, "same")
    differing = sorted(key for key in said.keys() | asked.keys() if said.get(key) != asked.get(key))
    if said.keys() != asked.keys():
        return Rung(name, "unknown", f"{who} from another kind of source", suspect=True)
    text = "; ".join(f"{key}: {_pair(said[key], asked[key])}" for key in differing)
    certain = "seed" in differing or "random" in differing
    return Rung(name, "differs" if certain else "unknown", f"{who} from other weights ({text})", suspect=not certain)


def _pair(said: Any, asked: Any) -> str:
    """Say where two values differ: of files their names alone."""
    if isinstance(said, Mapping) and isinstance(asked, Mapping):
        differing = sorted(key for key in said.keys() | asked.keys() if said.get(key) != asked.get(key))
        return ", ".join(differing[:4])
    one, other = (str(value)[:40] for value in (said, asked))
    return f"{one}, the case asks for {other}" if len(one) < 40 else "differs"


def adapters(who: str, theirs: Said, ours: Mapping[str, Any] | str) -> Rung:
    """Compare what shapes a graph for adapters; all adapters of a case are of one shape."""
    name = "adapters"
    if isinstance(ours, str):
        return Rung(name, "unknown", ours)
    if theirs is None:
        return _unsaid(name, who)
    if "adapters" not in ours or "adapters" not in theirs:
        return Rung(name, "unknown", "this kind of model has none")
    said, asked = theirs["adapters"], json.loads(json.dumps(ours["adapters"]))
    mixed = theirs["mixed"] or ours["mixed"]
    if theirs["mixed"] != ours["mixed"]:
        return Rung(name, "differs", f"{who} with mixed_batch {theirs['mixed']}, the case asks for {ours['mixed']}")
    if bool(said) != bool(asked) or (mixed and len(said) != len(asked)):
        return Rung(name, "differs", f"{who} for {len(said)} adapters, the case has {len(asked)}")
    if not said or next(iter(said.values())) == next(iter(asked.values())):
        return Rung(name, "same")
    return _configs(who, next(iter(said.values())), next(iter(asked.values())))


def _configs(who: str, said: Mapping[str, Any], asked: Mapping[str, Any]) -> Rung:
    name = "adapters"
    try:
        one, other = _full(said), _full(asked)
    except Exception as exc:  # PEFT is missing, or another version of it
        return Rung(name, "unknown", f"{who} for another adapter config; PEFT cannot tell how: {exc}", suspect=True)
    known = [key for key in sorted(one.keys() & other.keys()) if one[key] is not None and other[key] is not None]
    differing = [key for key in known if one[key] != other[key]]
    if not differing:
        return Rung(name, "unknown", f"{who} for a config that leaves other options to PEFT", suspect=one != other)
    text = "; ".join(f"{key} {one[key]!r}, the case's have {other[key]!r}" for key in differing[:4])
    return Rung(name, "differs", f"{who} for adapters with {text}")


def _full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with PEFT's defaults, in a form that can be compared."""
    if "saved" in config:
        full = config["saved"]
    else:
        from qeff_validate.models.adapters.config import generate_peft_config
        from qeff_validate.models.adapters.files import content

        full = content(generate_peft_config(config).to_dict())
    return {key: value for key, value in json.loads(json.dumps(full, default=sorted)).items() if key not in STARTS}
