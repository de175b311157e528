# SPDX-License-Identifier: Apache-2.0
"""What generation_config.json asks for that a greedy continuation leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qeff_validate.models.framework_calls import base_of

GREEDY: Mapping[str, Any] = {
    "do_sample": False, "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip
"""Settings of a generation config that greedy continuation has, and their neutral values."""


def sampling_notes(model: Any) -> list[str]:
    """Return a note if a model's generation_config.json asks for something else than greedy continuation.

    Args:
        model: of transformers, or a PeftModel around one.
    """
    config = getattr(base_of(model), "generation_config", None)
    asked = {name: getattr(config, name, None) for name in GREEDY}
    ignored = [f"{name}: {value}" for name, value in asked.items() if value not in (None, GREEDY[name])]
    if not ignored:
        return []
    return [f"generation_config asks for {', '.join(ignored)}, which is ignored: texts are continued greedily"]
