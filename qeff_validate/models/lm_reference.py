# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with the original model of Hugging Face or PEFT, as its authors publish it: the reference.

Each prompt runs by itself at its natural length, with the published attention and transformers' own cache; the logits
come from one forward pass over the whole text without any cache. Adapters are put on by PEFT's own loader. Nothing of
our cache, wrapper, decode loop or names of adapter tensors is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import save_file

from qeff_validate.models.adapter import WEIGHTS
from qeff_validate.models.loading import foreign, quiet
from qeff_validate.models.options import BASE
from qeff_validate.models.peft import generate_peft_config
from qeff_validate.models.reference import computing_in
from qeff_validate.tensors import Array, Tensors


def continuations(
    model: Any,
    named: Mapping[str, str | Mapping[str, Any]],
    inputs: Any,
    steps: int,
    dtype: str,
) -> Tensors:
    """Continue every prompt with the base and with each adapter; see `PeftCausalLM.reference`."""
    logits: list[Array] = []
    tokens: list[Array] = []
    for adapted in _models(model, named, inputs.adapters):
        for prompt in inputs.ids:
            with foreign("run the Hugging Face model"), torch.inference_mode():
                text = _greedy(adapted, prompt, steps, inputs.eos)
                logits.append(_logits(adapted, text, prompt.size, dtype))
                tokens.append(text[prompt.size :])
    return {
        "logits": np.concatenate(logits),
        "tokens": np.concatenate(tokens),
        "steps": np.array([text.size for text in tokens], dtype=np.int64),
    }


def _models(model: Any, named: Mapping[str, str | Mapping[str, Any]], adapters: Mapping[str, Tensors]) -> Iterator[Any]:
    """Yield the model as it is, then with each adapter; afterwards it is as it was, but for a PeftModel's choice."""
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        for name in adapters:
            with torch.inference_mode():  # after a run in float64 PEFT may not mark elsewhere what trains
                if name == BASE:
                    tuner.disable_adapter_layers()
                else:
                    tuner.enable_adapter_layers()
                    tuner.set_adapter(name)
            yield model
        return
    yield model
    for name, made in named.items():
        with _folder(made, adapters[name]) as folder, foreign(f"load adapter {name} with PEFT"), quiet():
            adapted = PeftModel.from_pretrained(model, folder).eval()
        yield adapted
        model = adapted.unload()


@contextmanager
def _folder(made: str | Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Return a directory that PEFT can load: the user's own, or one with what was drawn."""
    if isinstance(made, str):
        yield made
        return
    with tempfile.TemporaryDirectory() as folder:
        generate_peft_config(made).save_pretrained(folder)
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, f"{folder}/{WEIGHTS}")
        yield folder


def _greedy(model: Any, prompt: Array, steps: int, eos: frozenset[int]) -> Array:
    """Return prompt and continuation; the token that ends a text is part of it."""
    fed, cache, text = torch.from_numpy(prompt)[None], None, list(prompt)
    for _ in range(steps):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
        text.append(token)
        if token in eos:
            break
        fed = torch.tensor([[token]])
    return np.array(text, dtype=np.int64)


def _logits(model: Any, text: Array, start: int, dtype: str) -> Array:
    """Return the logits that choose each token from ``start`` on."""
    tokens = torch.from_numpy(text[:-1])[None]

    def run() -> Any:
        return model(input_ids=tokens, use_cache=False).logits[0, start - 1 :]

    with computing_in(model, dtype, probe=run):
        found: Array = run().numpy().copy()
    return found
