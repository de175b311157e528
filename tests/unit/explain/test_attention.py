# SPDX-License-Identifier: Apache-2.0
"""What an attention computes in place of its own is named: against attention written out in numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bounds import within
from transformers import LlamaConfig, LlamaModel

from qeff_validate.explain.arrays import relative_error
from qeff_validate.explain.operators import operator_finding
from qeff_validate.explain.reference_values import Call

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 8, 5
HIDDEN = -1e30

Change = Callable[[Any], Any]


def halves(x: Any) -> Any:
    half = x.shape[-1] // 2
    return np.concatenate([-x[..., half:], x[..., :half]], axis=-1)


def neighbours(x: Any) -> Any:
    return np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)


def softmax(scores: Any, axis: int = -1) -> Any:
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def over_queries(scores: Any) -> Any:
    return softmax(scores, -2)


def attention(
    module: Any,
    states: Any,
    cos: Any,
    sin: Any,
    mask: Any,
    *,
    rotate: Change = halves,
    in_place: bool = True,
    normalize: Change = softmax,
    factor: float = 1,
) -> Any:
    """Causal attention with grouped heads and rotary positions, float64."""
    weight = {name: child.weight.detach().double().numpy() for name, child in module.named_children()}

    def split(name: str, count: int) -> Any:
        return (states @ weight[name].T).reshape(1, LENGTH, count, SIZE).transpose(0, 2, 1, 3)

    query, key, value = split("q_proj", HEADS), split("k_proj", GROUPS), split("v_proj", GROUPS)
    query, key = (x * cos[:, None] + rotate(x) * sin[:, None] for x in (query, key))
    times = HEADS // GROUPS
    key, value = (np.repeat(x, times, 1) if in_place else np.tile(x, (1, times, 1, 1)) for x in (key, value))
    scores = factor * (query @ key.transpose(0, 1, 3, 2)) / np.sqrt(SIZE) + mask
    context = normalize(scores) @ value
    return context.transpose(0, 2, 1, 3).reshape(1, LENGTH, -1) @ weight["o_proj"].T


CAUSAL = np.triu(np.full((LENGTH, LENGTH), HIDDEN), 1)[None, None]
PADDED = CAUSAL.copy()
PADDED[..., -1] = HIDDEN  # the last place is padding

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rotary positions pair neighbours, not halves", {"rotate": neighbours}),
    ("rotary positions turn the other way", {"rotate": lambda x: -halves(x)}),
    ("rotary positions are left out in one of their two terms", {"rotate": np.zeros_like}),
    ("rotary positions have no sign in one of their two terms", {"rotate": lambda x: np.roll(x, SIZE // 2, -1)}),
    (
        "rotary positions have another base: 1e+06 instead of 1e+04",
        {"frequencies": 1e6 ** -(np.arange(SIZE // 2) / (SIZE // 2))},
    ),
    ("rotary positions are scaled by 0.5", {"frequencies": 0.5 * 1e4 ** -(np.arange(SIZE // 2) / (SIZE // 2))}),
    ("rotary positions are left out", {"turned": False}),
    ("heads of keys and values are repeated one after the other, not each in place", {"in_place": False}),
    ("scores are zero", {"factor": 0}),
    ("scores are negated", {"factor": -1}),
    ("scores scaled by 0.3", {"factor": 0.3}),
    ("its softmax runs over axis -2, not the last", {"normalize": over_queries}),
    ("its softmax is left out", {"normalize": lambda scores: scores}),
    ("the mask is shifted by +1", {"mask": np.roll(PADDED, 1, -1)}),
    ("the mask is left out", {"mask": np.zeros_like(CAUSAL)}),
    ("the mask adds -10 to hidden places, which does not hide them", {"mask": np.maximum(PADDED, -10)}),
    ("the mask adds -5.5 to hidden places, which does not hide them", {"mask": np.maximum(PADDED, -5.5)}),
    ("the mask is not causal", {"mask": np.broadcast_to(PADDED[..., -1:, :], PADDED.shape)}),
    ("the mask hides no padding", {"mask": CAUSAL}),
]


def model_and_call() -> tuple[Any, Call]:
    """A model of one layer, and what its attention is called with."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=HEADS * SIZE, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, intermediate_size=16, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaModel(config).eval()
        states = torch.randn(1, LENGTH, HEADS * SIZE, dtype=torch.float64)
    for parameter in model.layers[0].self_attn.parameters():
        parameter.data *= 20  # so that scores differ
    cos, sin = (x.double() for x in model.rotary_emb(states.float(), torch.arange(LENGTH)[None]))
    fed = {"hidden_states": states, "position_embeddings": (cos, sin), "attention_mask": torch.from_numpy(PADDED)}
    return model, ((), fed)


def written_out(model: Any, call: Call, *, turned: bool = True, frequencies: Any = None, **changes: Any) -> Any:
    """What the attention gives with some changes."""
    fed = call[1]
    cos, sin = (x.numpy() for x in fed["position_embeddings"])
    cos, sin = (cos, sin) if turned else (np.ones_like(cos), np.zeros_like(sin))
    if frequencies is not None:
        angles = np.tile(np.arange(LENGTH)[:, None] * frequencies, 2)[None]
        cos, sin = np.cos(angles), np.sin(angles)
    given = {"mask": PADDED, **changes}
    return attention(model.layers[0].self_attn, fed["hidden_states"].numpy(), cos, sin, **given)


@pytest.mark.parametrize(("finding", "changes"), CASES, ids=[name for name, _ in CASES])
def test_change_is_named(finding: str, changes: dict[str, Any]) -> None:
    model, call = model_and_call()
    observed, path = written_out(model, call, **changes), "layers.0.self_attn"
    assert operator_finding(model, (path, "out", 0, 0), path, call, observed, relative_error, 1e-6) == finding


@pytest.mark.parametrize(("finding", "change"), [("scores scaled by 0.99", "scale"), ("the mask is left out", "mask")])
def test_change_is_named_by_a_value_beside_the_attention(finding: str, change: str) -> None:
    """A graph may hold nothing of an attention's own, as where its scores are scaled inside an operator."""
    model, (_, fed) = model_and_call()
    layer, path = copy.deepcopy(model).double().layers[0], "layers.0.self_attn"
    given = fed
    if change == "scale":
        layer.self_attn.scaling *= 0.99
    else:
        given = {**fed, "attention_mask": torch.zeros_like(fed["attention_mask"])}
    seen: list[Any] = []
    layer.mlp.down_proj.register_forward_hook(lambda _module, _args, output: seen.append(output.numpy()))
    with torch.no_grad():
        layer(**given)
    own = {**fed, "hidden_states": layer.input_layernorm(fed["hidden_states"]).detach()}
    place = ("layers.0.mlp.down_proj", "out", 0, 0)
    found = operator_finding(
        model, place, path, ((), own), seen[0], relative_error, 1e-6, parent=("layers.0", ((), fed))
    )
    assert found == finding


@pytest.mark.parametrize("index", [0, 1], ids=["cosine", "sine"])
def test_another_base_is_told_from_the_angles_themselves(index: int) -> None:
    model, _ = model_and_call()
    places, halves = np.arange(40), np.arange(SIZE // 2) / (SIZE // 2)
    angles = np.tile(places[:, None] * 5e5**-halves, 2)[None]
    observed = (np.cos, np.sin)[index](angles).astype(np.float16).astype(np.float64)
    call = (torch.zeros(1, dtype=torch.float64), torch.from_numpy(places)[None]), {}
    found = operator_finding(
        model, ("rotary_emb", "out", index, 0), "rotary_emb", call, observed, relative_error, 1.5e-3
    )
    assert found == "rotary positions have another base: 5e+05 instead of 1e+04"


def test_numbers_of_any_size_are_compared_without_a_warning() -> None:
    assert relative_error(np.full(3, 1e-3), np.full(3, 1e300)) == float("inf")


@pytest.mark.numeric
def test_attention_written_out_is_that_of_the_model() -> None:
    model, call = model_and_call()
    with torch.no_grad():
        output = model.double().layers[0].self_attn(**call[1])[0]
    within(relative_error(output.numpy(), written_out(model, call)), 1e-6)  # its softmax is float32
