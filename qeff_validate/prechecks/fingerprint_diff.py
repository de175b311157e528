# SPDX-License-Identifier: Apache-2.0
"""Compares the fingerprint that an artifact was made from with the case's: pooling, body, adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from qeff_validate.models.embedding.options import POOLINGS
from qeff_validate.report.result import Precheck

VERSIONED = frozenset({"gguf", "onnx", "peft", "tokenizers", "torch", "transformers"})
"""Keys of fingerprints that hold the version of a package; another version need not change anything."""

INITIAL = ("init_ia3_weights", "init_lora_weights", "init_weights", "seed", "init", "task_type")
"""Options of an adapter that set its initial weights or its task, not the shape of a graph."""

POOLING_SYNONYMS = {"avg": "mean"}

Fingerprint = Mapping[str, Any] | None
"""The fingerprint of the model wrapper that an artifact was made from; None if the artifact does not say."""


def without_versions(value: Any) -> Any:
    """Return a fingerprint without versions of packages."""
    if isinstance(value, Mapping):
        return {key: without_versions(item) for key, item in value.items() if key not in VERSIONED}
    return value


def _unstated(name: str, who: str) -> Precheck:
    return Precheck(name, "unknown", f"nothing says what {who} from")


def compare_pooling_config(name: str, who: str, theirs: Fingerprint, ours: Mapping[str, Any] | str) -> Precheck:
    """Compare ``pooling`` (with its ``truncate_dim``) or ``normalize``.

    Args:
        name: of the precheck.
        who: begins a sentence, such as "the graph was exported".
        theirs: the fingerprint that the artifact was made from.
        ours: settings of the case's wrapper, or why there are none.
    """
    if isinstance(ours, str):
        return Precheck(name, "unknown", ours)
    if theirs is None:
        return _unstated(name, who)
    if "head" not in ours or "head" not in theirs:
        return Precheck(name, "unknown", "this kind of model has no such setting")
    said, asked = theirs["head"], ours["head"]
    if name == "normalize":
        if said[name] == asked[name]:
            return Precheck(name, "same")
        return Precheck(name, "differs", f"{who} with normalize {said[name]}, the case asks for {asked[name]}")
    if said.get("layers", []) != json.loads(json.dumps(asked.get("layers", []))):
        theirs_kinds, ours_kinds = ([layer["kind"] for layer in head.get("layers", [])] for head in (said, asked))
        around = f"modules {theirs_kinds or 'none'} around the pooling, the case asks for {ours_kinds or 'none'}"
        return Precheck(name, "differs", f"{who} with {around}, or with other options of theirs")
    if said.get("prompt_tokens", 0) != asked.get("prompt_tokens", 0):
        left_out = [head.get("prompt_tokens", 0) for head in (said, asked)]
        text = f"{who} to leave {left_out[0]} tokens out of the pooling, the case asks for {left_out[1]}"
        return Precheck(name, "differs", text)
    if said["truncate_dim"] != asked["truncate_dim"]:
        cut = f"truncate_dim {said['truncate_dim']}, the case asks for {asked['truncate_dim']}"
        return Precheck(name, "differs", f"{who} with {cut}")
    theirs_by_name, ours_by_name = (POOLING_SYNONYMS.get(head[name], head[name]) for head in (said, asked))
    if (theirs_by_name, said["code"]) == (ours_by_name, asked["code"]):
        return Precheck(name, "same")
    text = f"{who} with {said[name]}, the case asks for {asked[name]}"
    if {theirs_by_name, ours_by_name} <= set(POOLINGS):
        return Precheck(name, "differs", text)
    return Precheck(name, "unknown", f"{text}: a function of one's own may compute the same", suspect=True)


def compare_body(who: str, theirs: Fingerprint, ours: Mapping[str, Any] | str) -> Precheck:
    """Compare the sources of the weights; files with another digest may hold the same numbers."""
    name = "weights"
    if isinstance(ours, str):
        return Precheck(name, "unknown", ours)
    if theirs is None or "body" not in theirs:
        return _unstated(name, who)
    said, asked = without_versions(theirs["body"]), without_versions(json.loads(json.dumps(ours)))
    if said == asked:
        return Precheck(name, "same")
    differing = sorted(key for key in said.keys() | asked.keys() if said.get(key) != asked.get(key))
    if said.keys() != asked.keys():
        return Precheck(name, "unknown", f"{who} from another kind of source", suspect=True)
    text = "; ".join(f"{key}: {_pair(said[key], asked[key])}" for key in differing)
    certain = "seed" in differing or "random" in differing
    state: Literal["differs", "unknown"] = "differs" if certain else "unknown"
    return Precheck(name, state, f"{who} from other weights ({text})", suspect=not certain)


def _pair(said: Any, asked: Any) -> str:
    """Return how two values differ, as text; of mappings, such as digests of files, the first keys alone."""
    if isinstance(said, Mapping) and isinstance(asked, Mapping):
        differing = sorted(key for key in said.keys() | asked.keys() if said.get(key) != asked.get(key))
        return ", ".join(differing[:4])
    theirs, ours = (str(value)[:40] for value in (said, asked))
    return f"{theirs}, the case asks for {ours}" if len(theirs) < 40 else "differs"


def compare_adapters(who: str, theirs: Fingerprint, ours: Mapping[str, Any] | str) -> Precheck:
    """Compare the adapter options that shape a graph; all adapters of a case have the same shape."""
    name = "adapters"
    if isinstance(ours, str):
        return Precheck(name, "unknown", ours)
    if theirs is None:
        return _unstated(name, who)
    if "adapters" not in ours or "adapters" not in theirs:
        return Precheck(name, "unknown", "this kind of model has none")
    said, asked = theirs["adapters"], json.loads(json.dumps(ours["adapters"]))
    mixed = theirs["mixed"] or ours["mixed"]
    if theirs["mixed"] != ours["mixed"]:
        return Precheck(name, "differs", f"{who} with mixed_batch {theirs['mixed']}, the case asks for {ours['mixed']}")
    if bool(said) != bool(asked) or (mixed and len(said) != len(asked)):
        return Precheck(name, "differs", f"{who} for {len(said)} adapters, the case has {len(asked)}")
    if not said or next(iter(said.values())) == next(iter(asked.values())):
        return Precheck(name, "same")
    return _configs(who, next(iter(said.values())), next(iter(asked.values())))


def _configs(who: str, said: Mapping[str, Any], asked: Mapping[str, Any]) -> Precheck:
    name = "adapters"
    try:
        theirs, ours = _full(said), _full(asked)
    except Exception as exc:  # PEFT is missing, or another version of it
        return Precheck(name, "unknown", f"{who} for another adapter config; PEFT cannot tell how: {exc}", suspect=True)
    known = [key for key in sorted(theirs.keys() & ours.keys()) if theirs[key] is not None and ours[key] is not None]
    differing = [key for key in known if theirs[key] != ours[key]]
    if not differing:
        reason = f"{who} for a config that leaves other options to PEFT"
        return Precheck(name, "unknown", reason, suspect=theirs != ours)
    text = "; ".join(f"{key} {theirs[key]!r}, the case's have {ours[key]!r}" for key in differing[:4])
    return Precheck(name, "differs", f"{who} for adapters with {text}")


def _full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with PEFT's defaults, in a form that can be compared."""
    if "saved" in config:
        full = config["saved"]
    else:
        from qeff_validate.models.adapters.config import generate_peft_config
        from qeff_validate.models.adapters.files import content

        full = content(generate_peft_config(config).to_dict())
    return {key: value for key, value in json.loads(json.dumps(full, default=sorted)).items() if key not in INITIAL}
