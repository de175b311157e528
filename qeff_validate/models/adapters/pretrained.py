# SPDX-License-Identifier: Apache-2.0
"""Puts a saved adapter on a body or a model with a head, as transformers does where a directory holds an adapter alone.

sentence-transformers loads such directories by the same function, so vectors are those of its ``encode``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qeff_validate.errors import ConfigError
from qeff_validate.models.adapters.config import config_from_dict
from qeff_validate.models.adapters.files import CONFIG, WEIGHTS, read_adapter
from qeff_validate.models.adapters.module_patterns import check_patterns
from qeff_validate.models.framework_calls import quiet_transformers, translated_errors


def put_adapter(model: Any, folder: Path) -> None:
    """Put an adapter on a transformers model in place.

    Args:
        model: without an adapter, in float32.
        folder: with ``adapter_config.json`` and safetensors weights.

    Raises:
        ConfigError: a file is missing, broken or pickled, the method is not supported, or the adapter does not fit.
    """
    data, arrays = read_adapter(folder)
    config = config_from_dict({**data, "task_type": None}, f"{folder / CONFIG}")
    if config.is_prompt_learning:
        raise ConfigError(
            f"{folder / CONFIG}: {data['peft_type']} learns a prompt, which a body that gives embeddings cannot take;"
            " virtual tokens are for model: peft-causal-lm"
        )
    check_patterns(config, [name for name, _ in model.named_modules() if name])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with translated_errors(f"put the adapter in {folder} on {type(model).__name__}"), quiet_transformers():
        try:
            found = model.load_adapter(peft_config=config, adapter_state_dict=tensors)
        except ValueError as exc:  # PEFT: no module has such a name
            raise ConfigError(f"{folder / CONFIG} does not fit {type(model).__name__}: {exc}") from exc
    differences = {
        "no place for": found.unexpected_keys,
        "nothing for": found.missing_keys,
        "another size of": {key[0] if isinstance(key, tuple) else key for key in found.mismatched_keys},
    }
    for what, names in differences.items():
        if names:
            raise ConfigError(
                f"{folder / WEIGHTS} does not fit its base, a {type(model).__name__}: transformers has {what}"
                f" {len(names)} tensors, first {min(names)!r}. The adapter belongs to another base or class of model,"
                " or this transformers, with which sentence-transformers loads adapters, does not know its method:"
                " then save the model with the adapter merged (merge_and_unload of PEFT)"
            )
