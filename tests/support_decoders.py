# SPDX-License-Identifier: Apache-2.0
"""The decoder types of transformers, each with LoRA: cases of ``make support`` beside the pairs."""

from __future__ import annotations

from collections.abc import Sequence

from qeff_validate.config.case import Case

SOURCE = "random:"
"""What tells a type of transformers from an architecture of the matrix."""

RUNTIMES = ("torch", "ort", "sim")

PROJECTIONS: Sequence[Sequence[str]] = (
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("kv_a_proj_with_mqa",),
    ("Wqkv",),
    ("in_proj",),
    ("receptance", "value"),
    ("query", "value"),
    ("attn",),
    ("q_lin", "v_lin"),
)
"""Names of projections that mix or feed tokens; the first of which a body has all carries the adapters."""


def decoder_types() -> list[str]:
    """Return the model types that transformers has a class with a causal head for, encoders and parts of models too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def targets(kind: str) -> Sequence[str] | str:
    """Return target modules for LoRA on the small body of a type; PEFT's own word for all where no name is known."""
    from qeff_validate.errors import ValidateError
    from qeff_validate.models.sources.synthetic import Random, empty_body

    try:
        body = empty_body(Random(kind, {}, 0)._config(), kind)
    except ValidateError:  # the case says why
        return "all-linear"
    known = {name.rpartition(".")[2] for name, module in body.named_modules() if hasattr(module, "weight")}
    return next((list(names) for names in PROJECTIONS if known.issuperset(names)), "all-linear")


def decoder_case(name: str, strength: float, sizes: dict[str, object]) -> Case:
    """Return the case of a type, judged by the table of bounds: the pairs have measured ones."""
    kind = name.removeprefix(SOURCE)
    peft = {"r": 4, "init": min(1.0, 0.1 * strength), "target_modules": targets(kind)}
    return Case(
        name=kind.lower(),
        model="peft-causal-lm",
        source=name,
        runtimes=list(RUNTIMES),
        tolerance="table",
        options={"peft_method": "lora", "peft": peft, **sizes},
    )
