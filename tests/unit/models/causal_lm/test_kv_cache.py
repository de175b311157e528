# SPDX-License-Identifier: Apache-2.0
"""The cache of fixed size: writes and masks against plain loops, and the wrapper against transformers' own cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from qeff_validate.artifact import Artifact
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan
from qeff_validate.models.causal_lm.decoder_state import cache_for, state_shapes
from qeff_validate.models.causal_lm.kv_cache import masks
from qeff_validate.models.causal_lm.wrapper import Decoder
from qeff_validate.models.framework_calls import cache_argument, returned_cache
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.protocols import Graph, runtime
from qeff_validate.tensors import RETAINED, TensorSpec

HEADS, WIDTH = 2, 3


def places_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows)


def written_by_a_loop(state: np.ndarray, new: np.ndarray, places: np.ndarray) -> np.ndarray:
    out = state.copy()
    for row in range(len(places)):
        for token, place in enumerate(places[row]):
            if place >= 0:
                out[row, :, place] = new[row, :, token]
    return out


def mask_by_a_loop(places: np.ndarray, slots: int, window: int | None) -> np.ndarray:
    seen = np.zeros((*places.shape, slots), bool)
    for index, place in np.ndenumerate(places):
        for slot in range(slots):
            seen[(*index, slot)] = slot <= place and (window is None or place - slot < window)
        seen[index] |= (place < 0) & (np.arange(slots) == 0)  # the softmax over nothing would be NaN
    return seen


@st.composite
def positions(draw: Any) -> tuple[np.ndarray, int]:
    """Return rows of consecutive places with padding on one side, or of padding alone, and a number of slots."""
    tokens = draw(st.integers(1, 6))
    slots = draw(st.integers(tokens, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        real = draw(st.integers(0, tokens))
        start = draw(st.integers(0, slots - real))
        row = [-1] * (tokens - real)
        at = 0 if draw(st.booleans()) else len(row)
        rows.append([*row[:at], *range(start, start + real), *row[at:]])
    return np.array(rows), slots


def layer_of(keys: np.ndarray, values: np.ndarray, places: np.ndarray) -> Any:
    state = {"past_key.0": torch.from_numpy(keys), "past_value.0": torch.from_numpy(values)}
    return cache_for(state, 1, torch.from_numpy(places)).layers[0]


@settings(max_examples=80, deadline=None)
@given(positions(), st.integers(0, 9))
def test_tokens_are_written_at_their_places_and_padding_writes_nothing(given: Any, seed: int) -> None:
    places, slots = given
    rng = np.random.default_rng(seed)
    state, new = (rng.standard_normal((2, len(places), HEADS, n, WIDTH)).astype(np.float32)
                  for n in (slots, places.shape[1]))  # fmt: skip
    state[..., rng.integers(slots), :] = np.nan
    layer = layer_of(*state, places)
    layer.update(*torch.from_numpy(new))
    for which, found in enumerate((layer.keys, layer.values)):
        np.testing.assert_array_equal(found.numpy(), written_by_a_loop(state[which], new[which], places))


@settings(max_examples=80, deadline=None)
@given(positions())
def test_what_attention_reads_is_what_was_written_in_every_slot(given: Any) -> None:
    places, slots = given
    assume((places >= 0).any())
    state = np.full((len(places), HEADS, slots, WIDTH), np.nan, np.float32)
    new = torch.ones(len(places), HEADS, places.shape[1], WIDTH)
    layer = layer_of(state, state.copy(), places)
    for found in layer.update(new, new):
        for row, at in zip(found.numpy(), places, strict=True):
            assert (row[:, at.max() + 1 :] == 1).all(), "a slot that was never written is read"
            assert (row[:, at[at >= 0]] == 1).all()
    assert np.isnan(layer.keys.numpy()).sum() == np.isnan(written_by_a_loop(state, new.numpy(), places)).sum()


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, int | None]]] = {
    "full": ({}, {"": None}),
    "a window that is off": ({"sliding_window": None}, {"": None}),
    "a window for all": ({"sliding_window": 3}, {"": 3}),
    "typed, all alike": ({"sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, {"": 3}),
    "typed, none slides": ({"sliding_window": 3, "layer_types": ["full_attention"] * 2}, {"": None}),
    "both types": (
        {"sliding_window": 2, "layer_types": ["sliding_attention", "full_attention"]},
        {"full_attention": None, "sliding_attention": 2},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(positions())
def test_masks_are_those_of_a_loop_for_each_kind_of_config(name: str, given: Any) -> None:
    places, slots = given
    options, windows = CONFIGS[name]
    config = type("Config", (), options)()
    found = masks(torch.from_numpy(places), slots, config, torch.float32)
    found = found if isinstance(found, dict) else {"": found}
    assert set(found) == set(windows)
    for kind, window in windows.items():
        seen = mask_by_a_loop(places, slots, window)
        wanted = np.where(seen, np.float32(0), np.finfo(np.float32).min)[:, None]
        np.testing.assert_array_equal(found[kind].numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masks_have_the_dtype_of_the_state(dtype: torch.dtype) -> None:
    found = masks(places_of([[0, 1]]), 3, type("Config", (), {})(), dtype)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == dtype
    assert found[0, 0].tolist() == [[0.0, torch.finfo(dtype).min, torch.finfo(dtype).min], [0.0, 0.0, found.min()]]


# --- the wrapper against transformers ---------------------------------------------------------------

CTX, STEPS = 32, 4
FAMILIES = ("llama", "mistral", "gemma2", "gpt2")


def model(name: str) -> Any:
    return Random(name, {}, 0).causal_lm()


def graph(layers: int, dims: Any, vocab: int, *, slots: int = 0) -> Graph:
    tokens = [TensorSpec(name, "int64", ("batch_size", "seq_len")) for name in ("input_ids", "position_ids")]
    tokens += [TensorSpec("batch_index", "int64", ("batch_size", 1))] if slots else []
    state = [
        TensorSpec(f"past_{what}.{layer}", "float32", ("slots" if slots else "batch_size", heads, "ctx_len", size))
        for layer in range(layers)
        for what, (heads, size) in zip(("key", "value"), dims[layer], strict=True)
    ]
    twins = [TensorSpec(f"{spec.name}{RETAINED}", spec.dtype, spec.shape) for spec in state]
    logits = TensorSpec("logits", "float32", ("batch_size", 1, vocab))
    return Graph((*tokens, *state), (logits, *twins), ({"ctx_len": CTX, "slots": slots},))


def as_transformers_does(name: str, prompt: np.ndarray) -> np.ndarray:
    """Return the logits of greedy decoding with `DynamicCache` on a model of its own, one row by itself."""
    theirs, cache, fed = model(name), DynamicCache(), torch.from_numpy(prompt)[None]
    found = []
    with torch.inference_mode():
        for _ in range(STEPS):
            out = theirs(input_ids=fed, use_cache=True, **{cache_argument(theirs): cache})
            cache = returned_cache(out)
            found.append(out.logits[0, -1].numpy())
            fed = out.logits[:, -1].argmax(dim=-1, keepdim=True)
    return np.stack(found)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "side", "slots"),
    [
        *((name, side, 0) for name in FAMILIES for side in ("right", "left")),
        ("gemma2", "right", 2),
        ("llama", "left", 3),
    ],
)
def test_chunks_and_steps_from_undefined_state_give_transformers_logits(name: str, side: str, slots: int) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 1000, length) for length in (13, 4, 1, 9)]  # windows reach 8
    ours = model(name)
    dims = state_shapes(ours).dims
    module = Decoder(ours, len(dims)).eval()
    made = Artifact(
        "module", None, "0" * 64, payload=(module, graph(len(dims), dims, ours.config.vocab_size, slots=slots))
    )
    plan = Plan(2 if slots else 4, (5,), side, 0, frozenset(), STEPS, slots=slots)  # with slots, two are taken again
    with runtime("torch").open(made) as session:
        found = generate(session, prompts, plan)
    for prompt, rows in zip(prompts, found, strict=True):
        wanted = as_transformers_does(name, prompt)
        close(rows, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert rows.argmax(axis=1).tolist() == wanted.argmax(axis=1).tolist()


def test_tokens_are_those_of_generate() -> None:
    theirs = model("llama")
    prompt = torch.tensor([[5, 17, 900, 33, 8, 21, 7]])
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    rows = as_transformers_does("llama", prompt[0].numpy())
    assert text[0, prompt.shape[1] :].tolist() == rows.argmax(axis=1).tolist()


def test_a_head_sees_the_last_real_token_of_each_row_alone() -> None:
    ours = model("llama")
    dims, seen = state_shapes(ours).dims, []
    module = Decoder(ours, len(dims)).eval()
    ours.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    state = {f"past_{what}.{i}": torch.full((2, pair[k][0], CTX, pair[k][1]), torch.nan)
             for i, pair in enumerate(dims) for k, what in enumerate(("key", "value"))}  # fmt: skip
    with torch.inference_mode():
        out = module(torch.tensor([[5, 6, 7], [5, 0, 0]]), places_of([[0, 1, 2], [0, -1, -1]]), **state)
    assert (seen, out[0].shape) == ([(2, 1, 64)], (2, 1, 1000))
    assert torch.isfinite(out[0]).all()
