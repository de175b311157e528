# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with the original Hugging Face or PEFT model: the reference.

Each prompt runs alone and unpadded, with the published attention and the cache of transformers; the logits come from
one forward pass over the whole text without a cache. Adapters are loaded by PEFT. None of our cache, wrapper, decode
loop or names of adapter tensors is used.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.numpy import save_file

from qeff_validate.config.case import Precision
from qeff_validate.errors import ConfigError, IncomparableError
from qeff_validate.files import expand_user, temporary_folder
from qeff_validate.models.adapters.base_state import BaseState
from qeff_validate.models.adapters.config import generate_peft_config
from qeff_validate.models.adapters.files import CONFIG, WEIGHTS, read_adapter, read_config, tensor_shapes
from qeff_validate.models.adapters.pruned_ranks import without_pruning
from qeff_validate.models.causal_lm.attach_adapters import find_parameter_names
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.models.causal_lm.virtual_tokens import TENSOR
from qeff_validate.models.emulation.ensemble import ENSEMBLE, run_ensemble
from qeff_validate.models.emulation.float64 import compute_in_dtype, is_large, one_thread_if_small
from qeff_validate.models.emulation.integers import compressed_weights
from qeff_validate.models.emulation.microscaling import CompressedCache
from qeff_validate.models.emulation.precision import ComputationVariant, RoundedWeights
from qeff_validate.models.framework_calls import (
    cache_argument,
    first_line,
    last_logits,
    quiet_transformers,
    returned_cache,
    translated_errors,
)
from qeff_validate.models.row_order import probes, refuse_change
from qeff_validate.models.token_rows import together
from qeff_validate.tensors import Array, Tensors


def continuations(
    model: Any,
    named: Mapping[str, str | Mapping[str, Any]],
    inputs: Any,
    steps: int,
    dtype: str,
    chosen: Sequence[Array] | None = None,
) -> Tensors:
    """Continue every prompt with the base and with each adapter; see `PeftCausalLM.reference`.

    Args:
        model: the base, or a user's `PeftModel`.
        named: directory of each adapter, or its PEFT options.
        inputs: prompts and tensors of ``base`` and each adapter.
        steps: the most tokens of a continuation.
        dtype: ``float32`` or ``float64``.
        chosen: the greedy continuations, if they are known, in the order adapter, prompt.
    """
    logits: list[Array] = []
    tokens: list[Array] = []
    for count, adapted in enumerate(adapted_models(model, named, inputs.adapters)):
        # not inference_mode: it would mark weights that are converted in it, and some methods refuse those later
        with translated_errors("run the Hugging Face model"), torch.no_grad(), one_thread_if_small(adapted):
            if chosen is None:
                texts = [_greedy(adapted, prompt, steps, inputs.eos) for prompt in inputs.ids]
            else:
                known = chosen[count * len(inputs.ids) : (count + 1) * len(inputs.ids)]
                texts = [np.concatenate(pair) for pair in zip(inputs.ids, known, strict=True)]
            starts = [prompt.size for prompt in inputs.ids]
            tokens += [text[start:] for text, start in zip(texts, starts, strict=True)]
            with _in_dtype(adapted, dtype, partial(_logits, adapted, texts[0], starts[0])):
                logits += [_logits(adapted, text, start) for text, start in zip(texts, starts, strict=True)]
                if count == 0:
                    first = {row: logits[row] for row in probes([text.size for text in texts])}
                    refuse_change(first, partial(_logits_of_row, adapted, texts, starts), inputs.labels)
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
    """Return the ``logits`` along given continuations for each variant of `ENSEMBLE`, in the order adapter, prompt."""
    adapters = frozenset(_adapter_parameters(model))
    compressed = compressed_weights(model, precision, adapters)
    prompts, forced, parts = inputs.ids, list(texts), [list[Array]() for _ in ENSEMBLE]
    beyond_range = precision.beyond_range is not None
    weights = RoundedWeights(precision.compute, large=is_large(model), beyond_range=beyond_range)
    for adapted in adapted_models(model, named, inputs.adapters):
        adapter_texts, forced = forced[: len(prompts)], forced[len(prompts) :]
        whole = [np.concatenate([prompt, text]) for prompt, text in zip(prompts, adapter_texts, strict=True)]
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
    """Return for each text the logits of its tokens from a start on, float32 ``[tokens, vocab]``.

    Args:
        model: a causal LM, with or without an adapter.
        variant: its batch size; batches are padded on the right. Its block size applies to the cache.
        texts: token ids of prompt and continuation.
        starts: index of the first token of each continuation.
        pad: id of the padding token.
        keep: use a cache with keys and values in MXINT8.
    """
    results: list[Array] = [np.zeros(0)] * len(texts)
    for rows in together(texts, variant.batch):
        length = max(texts[row].size for row in rows) - 1
        first = min(starts[row] for row in rows) - 1  # whose logits somebody wants
        padded = [np.pad(texts[row][:-1], (0, length + 1 - texts[row].size), constant_values=pad) for row in rows]
        mask = [np.arange(length) < texts[row].size - 1 for row in rows]
        cache = None
        if keep:
            cache = CompressedCache(config=model.config.get_text_config())
            cache.block = variant.block
        logits = model(
            input_ids=torch.from_numpy(np.stack(padded)),
            attention_mask=torch.from_numpy(np.stack(mask).astype(np.int64)),
            use_cache=keep,
            **{cache_argument(model): cache},
            **activation(model, [texts[row][: starts[row]] for row in rows], length),
            **last_logits(model, length - first),
        ).logits
        for row, values in zip(rows, logits[:, first - length :], strict=True):  # virtual tokens may precede
            results[row] = values[starts[row] - 1 - first : texts[row].size - 1 - first].numpy().copy()
    return results


def _adapter_parameters(model: Any) -> Iterator[str]:
    """Yield the names of the adapter parameters of a PeftModel."""
    if isinstance(model, PeftModel):
        for adapter in model.peft_config:
            yield from find_parameter_names(model, adapter).values()


def merged_logits(
    model: Any,
    spec: str | Mapping[str, Any],
    tensors: Tensors,
    prompts: Sequence[Array],
    forced: Sequence[Array],
) -> list[Array]:
    """Return the logits of given continuations from the model with an adapter merged into its weights by PEFT.

    Args:
        model: the base; must not be used afterwards.
        spec: directory of the adapter, or its PEFT options.
        tensors: its tensors by saved names.
        prompts: token ids.
        forced: the continuation of each.

    Raises:
        IncomparableError: PEFT cannot merge this method.
    """
    with translated_errors("load the adapter with PEFT"):
        adapted = load_adapter(model, spec, tensors)
    _untie(adapted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")  # which is meant
            whole = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as exc:
        raise IncomparableError(f"PEFT cannot merge this adapter: {first_line(exc)}") from exc
    with translated_errors("run the merged model"), torch.inference_mode():
        return [
            _logits(whole, np.concatenate([prompt, text]), prompt.size)
            for prompt, text in zip(prompts, forced, strict=True)
        ]


def _untie(model: Any) -> None:
    """Give every module its own copy of a weight that it shares with another.

    PEFT merges an adapter of a tied embedding into the shared weight, which would change the head as well.
    """
    owners: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.data_ptr() in owners:
                copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, copied)
            owners.add(parameter.data_ptr())


def keys_and_values(
    model: Any, spec: str | Mapping[str, Any] | None, tensors: Tensors, prompts: Sequence[Array]
) -> list[dict[str, Array]]:
    """Return for each prompt the keys and values in the cache of transformers after the prompt.

    Args:
        model: the base; must not be used afterwards.
        spec: directory of the adapter, or its PEFT options; None: no adapter.
        tensors: its tensors by saved names.
        prompts: token ids.

    Returns:
        ``past_key.i`` and ``past_value.i``, float32 ``[heads, tokens, head_dim]``; layers with a sliding window hold
        the last tokens only.
    """
    if spec is not None:
        with translated_errors("load the adapter with PEFT"):
            model = load_adapter(model, spec, tensors)
    caches = []
    for prompt in prompts:
        with translated_errors("run the Hugging Face model"), torch.inference_mode():
            layers = returned_cache(model(input_ids=torch.from_numpy(prompt)[None], use_cache=True)).layers
        caches.append(
            {
                f"past_{name}.{index}": tensor[0].numpy()
                for index, layer in enumerate(layers)
                if getattr(layer, "keys", None) is not None
                for name, tensor in (("key", layer.keys), ("value", layer.values))
            }
        )
    return caches


def adapted_models(
    model: Any, named: Mapping[str, str | Mapping[str, Any]], adapters: Mapping[str, Tensors]
) -> Iterator[Any]:
    """Yield the base model, then the model with each adapter; then restore it, except a PeftModel's active adapter."""
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        for name in adapters:
            with torch.inference_mode():  # after a run in float64 PEFT cannot set requires_grad outside inference mode
                if name == BASE:
                    tuner.disable_adapter_layers()
                else:
                    tuner.enable_adapter_layers()
                    tuner.set_adapter(name)
            yield model
        return
    yield model
    for name, spec in named.items():
        saved = tensor_shapes(expand_user(spec)) if isinstance(spec, str) else adapters[name]
        before = BaseState(model, saved)
        with translated_errors(f"load adapter {name} with PEFT"):
            adapted = load_adapter(model, spec, None if isinstance(spec, str) else adapters[name])
        yield adapted
        before.restore()


def load_adapter(model: Any, spec: str | Mapping[str, Any], tensors: Tensors | None) -> Any:
    """Load an adapter onto a model with PEFT.

    Args:
        model: the base, changed in place; `BaseState` gives it back.
        spec: directory of the adapter, or its PEFT options.
        tensors: its tensors by saved name; None: those of the directory.
    """
    if tensors is None and not os.path.lexists(expand_user(str(spec)) / WEIGHTS):
        tensors = read_adapter(str(spec))[1]  # in shards, which PEFT does not read
    with ExitStack() as stack:
        stack.enter_context(_no_warnings())
        folder = str(spec) if tensors is None else stack.enter_context(_folder(spec, tensors))
        return PeftModel.from_pretrained(model, folder).eval()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Ignore warnings: `apply_peft` has logged PEFT's warnings for the same config."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _folder(spec: str | Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Write an adapter's config and tensors into a temporary directory that PEFT can load."""
    with temporary_folder() as path:
        folder = str(path)
        if isinstance(spec, str):
            config = without_pruning(read_config(expand_user(spec)))
            (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        else:
            generate_peft_config(spec).save_pretrained(folder)
        if TENSOR in tensors:  # padded to the number of the adapter with the most
            count = read_config(path)["num_virtual_tokens"]
            tensors = {TENSOR: tensors[TENSOR][:count]}
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, f"{folder}/{WEIGHTS}")
        yield folder


def _greedy(model: Any, prompt: Array, steps: int, eos: frozenset[int]) -> Array:
    """Return the token ids of a prompt and its greedy continuation, including the end token."""
    tokens, cache, text = torch.from_numpy(prompt)[None], None, list(prompt)
    argument = cache_argument(model)
    if _virtual(model):
        return _greedy_without_cache(model, prompt, steps, eos)
    for _ in range(steps):
        options = activation(model, [prompt], len(text))
        output = model(input_ids=tokens, use_cache=True, **{argument: cache}, **options)
        cache, token = returned_cache(output), int(output.logits[0, -1].argmax())
        text.append(token)
        if token in eos:
            break
        tokens = torch.tensor([[token]])
    return np.array(text, dtype=np.int64)


def activation(model: Any, prompts: Sequence[Array], length: int) -> dict[str, Any]:
    """Return where activated LoRA acts, as PEFT counts it: from the last invocation in each prompt to the end.

    Args:
        model: a model with or without an adapter.
        prompts: the prompt of each row; an invocation in its continuation changes nothing, as in PEFT's ``generate``.
        length: tokens of a row so far, padding on the right included.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not getattr(config, "alora_invocation_tokens", None):
        return {}
    offsets = []
    for prompt in prompts:
        ids = torch.from_numpy(np.ascontiguousarray(prompt))[None]
        (offset,) = calculate_alora_offsets(model.peft_config, model.active_adapter, ids)
        offsets.append(None if offset is None else offset + length - prompt.size)
    return {"alora_offsets": offsets}


def _virtual(model: Any) -> int:
    """Return the number of virtual tokens that PEFT puts before each text."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def _greedy_without_cache(model: Any, prompt: Array, steps: int, eos: frozenset[int]) -> Array:
    """Return what `_greedy` does, from whole texts: PEFT puts virtual tokens before the tokens of each run."""
    text = list(prompt)
    for _ in range(steps):
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] in eos:
            break
    return np.array(text, dtype=np.int64)


def _logits_of_row(model: Any, texts: Sequence[Array], starts: Sequence[int], row: int) -> Array:
    """Return the logits of one of several texts."""
    return _logits(model, texts[row], starts[row])


def _logits(model: Any, text: Array, start: int) -> Array:
    """Return the logits of each token from ``start`` on, ``[tokens, vocab]``, without a cache."""
    tokens = torch.from_numpy(text[:-1])[None]
    options = activation(model, [text[:start]], text.size - 1)
    # virtual tokens may precede
    logits: Array = model(input_ids=tokens, use_cache=False, **options).logits[0, start - text.size :].numpy().copy()
    return logits


@contextmanager
def _in_dtype(model: Any, dtype: str, probe: Callable[[], object]) -> Iterator[None]:
    """Run a model in a dtype until the context ends; see `compute_in_dtype`.

    Raises:
        ConfigError: something in the model cannot be computed in float64.
    """
    with compute_in_dtype(model, dtype, probe=probe):
        try:
            yield
        except RuntimeError as exc:
            if dtype != "float64" or "dtype" not in str(exc):
                raise
            raise ConfigError(
                "the reference cannot be computed in float64, so bounds are not measured: give tolerance: table (the"
                f" model or its adapter keeps tensors in float32: {first_line(exc)})"
            ) from exc
