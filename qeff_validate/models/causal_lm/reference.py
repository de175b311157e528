# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with the original model of Hugging Face or PEFT, as its authors publish it: the reference.

Each prompt runs by itself at its natural length, with the published attention and transformers' own cache; the logits
come from one forward pass over the whole text without any cache. Adapters are put on by PEFT's own loader. Nothing of
our cache, wrapper, decode loop or names of adapter tensors is used.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import save_file

from qeff_validate.config.case import Precision
from qeff_validate.errors import IncomparableError
from qeff_validate.files import temporary_folder
from qeff_validate.models.adapters.config import generate_peft_config
from qeff_validate.models.adapters.files import CONFIG, WEIGHTS
from qeff_validate.models.causal_lm.attach_adapters import find_parameter_names
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.emulation.ensemble import ENSEMBLE, run_ensemble
from qeff_validate.models.emulation.float64 import LARGE, compute_in_dtype, one_thread_if_small
from qeff_validate.models.emulation.microscaling import CompressedCache, CompressedWeights
from qeff_validate.models.emulation.precision import ComputationVariant, RoundedWeights
from qeff_validate.models.framework_calls import first_line, quiet_transformers, translated_errors
from qeff_validate.models.row_order import probes, refuse_change
from qeff_validate.models.token_rows import together
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
    for count, adapted in enumerate(adapted_models(model, named, inputs.adapters)):
        texts: list[Array] = []
        # not inference_mode: it would mark weights that are widened in it, and some methods refuse those later
        with translated_errors("run the Hugging Face model"), torch.no_grad(), one_thread_if_small(adapted):
            for prompt in inputs.ids:
                texts.append(_greedy(adapted, prompt, steps, inputs.eos))
                logits.append(_logits(adapted, texts[-1], prompt.size, dtype))
                tokens.append(texts[-1][prompt.size :])
            if count == 0:
                first = {row: logits[row] for row in probes([text.size for text in texts])}
                refuse_change(first, partial(_repeated, adapted, texts, inputs.ids, dtype), inputs.labels)
    return {
        "logits": np.concatenate(logits),
        "tokens": np.concatenate(tokens),
        "steps": np.array([text.size for text in tokens], dtype=np.int64),
    }


def ensemble(
    model: Any,
    named: Mapping[str, str | Mapping[str, Any]],
    inputs: Any,
    texts: Sequence[Array],
    precision: Precision,
) -> list[Tensors]:
    """Return ``logits`` along given continuations, in the order adapter, prompt, in each of `ensemble.ENSEMBLE`."""
    adapters = frozenset(_adapter_parameters(model))
    blocks = {variant.block for variant in ENSEMBLE} if precision.weights else set()
    compressed = {block: CompressedWeights(model, adapters, block) for block in blocks}
    prompts, forced, parts = inputs.ids, list(texts), [list[Array]() for _ in ENSEMBLE]
    weights = RoundedWeights(precision.compute, large=sum(p.nbytes for p in model.parameters()) > LARGE)
    for adapted in adapted_models(model, named, inputs.adapters):
        own, forced = forced[: len(prompts)], forced[len(prompts) :]
        whole = [np.concatenate([prompt, text]) for prompt, text in zip(prompts, own, strict=True)]
        starts = [prompt.size for prompt in prompts]
        run = partial(batched_logits, texts=whole, starts=starts, pad=inputs.pad, keep=precision.kv is not None)
        with translated_errors("run the Hugging Face model"):
            runs = run_ensemble(adapted, precision.compute, run, weights=weights, compressed=compressed)
        for part, logits in zip(parts, runs, strict=True):
            part.extend(logits)
    return [{"logits": np.concatenate(part)} for part in parts]


def batched_logits(
    model: Any,
    variant: ComputationVariant,
    *,
    texts: Sequence[Array],
    starts: Sequence[int],
    pad: int,
    keep: bool = False,
) -> list[Array]:
    """Return for each text the logits that choose its tokens from a start on.

    Texts run together as a way asks for, padded on the right to the longest of their batch; ``keep`` writes keys and
    values as MXINT8 holds them.
    """
    found: list[Array] = [np.zeros(0)] * len(texts)
    for rows in together(texts, variant.batch):
        length = max(texts[row].size for row in rows) - 1
        padded = [np.pad(texts[row][:-1], (0, length + 1 - texts[row].size), constant_values=pad) for row in rows]
        mask = [np.arange(length) < texts[row].size - 1 for row in rows]
        cache = None
        if keep:
            cache = CompressedCache(config=model.config.get_text_config())
            cache.block = variant.block
        logits = model(
            input_ids=torch.from_numpy(np.stack(padded)),
            attention_mask=torch.from_numpy(np.stack(mask).astype(np.int64)),
            past_key_values=cache,
            use_cache=keep,
        ).logits
        for row, values in zip(rows, logits, strict=True):
            found[row] = values[starts[row] - 1 : texts[row].size - 1].numpy().copy()
    return found


def _adapter_parameters(model: Any) -> Iterator[str]:
    """Yield the names of the parameters that a PeftModel's adapters are."""
    if isinstance(model, PeftModel):
        for adapter in model.peft_config:
            yield from find_parameter_names(model, adapter).values()


def merged(
    model: Any,
    made: str | Mapping[str, Any],
    tensors: Tensors,
    prompts: Sequence[Array],
    forced: Sequence[Array],
) -> list[Array]:
    """Return the logits of given continuations by the model with an adapter merged into its weights, as PEFT merges it.

    Args:
        model: the base; it is of no use afterwards.
        made: directory of the adapter, or what it is made from.
        tensors: its tensors by saved names.
        prompts: token ids.
        forced: the continuation of each.

    Raises:
        IncomparableError: PEFT cannot merge this method.
    """
    with translated_errors("load the adapter with PEFT"):
        adapted = load_adapter(model, made, tensors)
    _untie(adapted)
    try:
        whole = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as exc:
        raise IncomparableError(f"PEFT cannot merge this adapter: {first_line(exc)}") from exc
    with translated_errors("run the merged model"), torch.inference_mode():
        return [
            _logits(whole, np.concatenate([prompt, text]), prompt.size, "float32")
            for prompt, text in zip(prompts, forced, strict=True)
        ]


def _untie(model: Any) -> None:
    """Give every module its own copy of a weight that it shares with another.

    PEFT merges an adapter of a tied embedding into the one weight, so that the head changes as well.
    """
    owners: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.data_ptr() in owners:
                copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, copied)
            owners.add(parameter.data_ptr())


def kept(
    model: Any, made: str | Mapping[str, Any] | None, tensors: Tensors, prompts: Sequence[Array]
) -> list[dict[str, Array]]:
    """Return for each prompt the keys and values that transformers' own cache holds after it.

    Args:
        model: the base; it is of no use afterwards.
        made: directory of the adapter, or what it is made from; None: no adapter.
        tensors: its tensors by saved names.
        prompts: token ids.

    Returns:
        ``past_key.i`` and ``past_value.i``, float32 ``[heads, tokens, head_dim]``; of layers with a sliding window the
        last tokens alone.
    """
    if made is not None:
        with translated_errors("load the adapter with PEFT"):
            model = load_adapter(model, made, tensors)
    found = []
    for prompt in prompts:
        with translated_errors("run the Hugging Face model"), torch.inference_mode():
            layers = model(input_ids=torch.from_numpy(prompt)[None], use_cache=True).past_key_values.layers
        found.append(
            {
                f"past_{name}.{at}": tensor[0].numpy()
                for at, layer in enumerate(layers)
                for name, tensor in (("key", layer.keys), ("value", layer.values))
            }
        )
    return found


def adapted_models(
    model: Any, named: Mapping[str, str | Mapping[str, Any]], adapters: Mapping[str, Tensors]
) -> Iterator[Any]:
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
        with translated_errors(f"load adapter {name} with PEFT"):
            adapted = load_adapter(model, made, None if isinstance(made, str) else adapters[name])
        yield adapted
        model = adapted.unload()


def load_adapter(model: Any, made: str | Mapping[str, Any], tensors: Tensors | None) -> Any:
    """Put an adapter on a model with PEFT's own loader.

    Args:
        model: the base; ``unload`` of what is returned gives it back.
        made: directory of the adapter, or what it is made from.
        tensors: its tensors by saved names; None: those of the directory.
    """
    with ExitStack() as held:
        held.enter_context(_silent())
        folder = str(made) if tensors is None else held.enter_context(_folder(made, tensors))
        return PeftModel.from_pretrained(model, folder).eval()


@contextmanager
def _silent() -> Iterator[None]:
    """Ignore warnings: `apply_peft` has logged what PEFT has to say of the same config."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _folder(made: str | Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Return a directory that PEFT can load, with an adapter's config and tensors."""
    with temporary_folder() as path:
        folder = str(path)
        if isinstance(made, str):
            shutil.copy(Path(made) / CONFIG, folder)
        else:
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


def _repeated(model: Any, texts: Sequence[Array], prompts: Sequence[Array], dtype: str, row: int) -> Array:
    """Return the logits of a text once more."""
    return _logits(model, texts[row], prompts[row].size, dtype)


def _logits(model: Any, text: Array, start: int, dtype: str) -> Array:
    """Return the logits that choose each token from ``start`` on, without a cache."""
    tokens = torch.from_numpy(text[:-1])[None]

    def run() -> Any:
        return model(input_ids=tokens, use_cache=False).logits[0, start - 1 :]

    with compute_in_dtype(model, dtype, probe=run):
        found: Array = run().numpy().copy()
    return found
