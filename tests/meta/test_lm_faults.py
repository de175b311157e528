# SPDX-License-Identifier: Apache-2.0
"""Faults of language models with adapters, on small random models: each must fail, and the reason must name it.

A fault is a mutant of the library's table, a decode loop that is patched, or a module that is damaged. Twelve
legitimate variants must pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qeff_validate.artifact import Artifact
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case, Precision
from qeff_validate.engine import check
from qeff_validate.models.causal_lm import decode_loop, kv_cache, wrapper
from qeff_validate.models.causal_lm.decoder_feeds import prefill_chunks
from qeff_validate.models.causal_lm.prompts import LONG
from qeff_validate.mutation.causal_lm_mutants import CAUSAL_LM_MUTANTS, serving
from qeff_validate.mutation.mutant import session_of
from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Feeds
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Session, Settings, runtime
from qeff_validate.report.result import Result
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Array, Tensors

LENGTHS = (3, 13, 6, 1, 17, 7)
"""Words; with a first and a last token, short and long ones stand side by side; 8 and 9 are a chunk and one more."""

EOS = list(range(0, 1000, 8))
"""One token in eight ends a text, so that continuations end at different steps."""

LORA = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
SCALE = LORA["lora_alpha"] / LORA["r"]  # type: ignore[operator]


def words(start: int, count: int) -> str:
    """Return words of a text; prompts that begin alike would hide what rows see of each other."""
    return " ".join(LONG.replace(".", "").replace(",", "").replace(";", "").split()[start : start + count])


def lm(source: str = "random:llama", method: str = "lora", **options: Any) -> Case:
    given = {
        "peft_method": method,
        "peft": LORA,
        "prompts": [words(7 * i, n) for i, n in enumerate(LENGTHS)],
        "max_new_tokens": 4,
    }
    sizes = {"prefill_seq_len": 8, "ctx_len": 48, "batch_size": 2}
    options = {**given, **sizes, **options}
    if "adapters" in options:
        del options["peft_method"], options["peft"]
    return Case(
        name="faults", model="peft-causal-lm", source=source, options=options,
        config={"eos_token_id": EOS},
    )  # fmt: skip


def pipeline(case: Case) -> Pipeline:
    return Pipeline(case, check(case), Store(), Silent())


@pytest.fixture(scope="module")
def llama() -> Pipeline:
    return pipeline(lm())


@pytest.fixture(scope="module")
def on_torch() -> Pipeline:
    """The same for the torch runtime: a pipeline lets go of its module when it has exported it."""
    return pipeline(lm(batch_size=6))


@pytest.fixture(scope="module")
def mistral() -> Pipeline:
    return pipeline(lm("random:mistral", "rslora", batch_size=6))


# --- faults of a session ---------------------------------------------------------------------------


def judged(made: Pipeline, damage: Callable[[Session], Any], name: str = "ort") -> Result:
    return made.result(FaultyRuntime(damage, name))


SESSIONS: dict[str, Sequence[str]] = {
    "base served for the first adapter": ["adapter 'a' behaves as base", "with a only"],
    "base served for every adapter": ["adapter 'a' behaves as base", "adapter 'b' behaves as base", "with a, b only"],
    "first two adapters swapped": ["adapter 'a' gives the outputs of 'b'", "adapter 'b' gives the outputs of 'a'"],
    "first adapter served for base": ["base gives the outputs of adapter 'a'", "with base only"],
    "first adapter served for all adapters": ["adapter 'b' gives the outputs of 'a'", "with b only"],
    "alpha / r dropped, x 0.5": ["adapter 'a' acts 0.", "times as strongly", "alpha / r"],
    "merged and fed, x 2": ["adapter 'a' acts ", "merged and fed"],
    "one target module without adapter": ["adapter 'a'", "a part of it missing", "with a, b only"],
    "one layer without adapter": ["adapter 'a'", "a part of it missing", "with a, b only"],
    "an adapter stays on": ["second visit to base gives the outputs of 'b': an adapter stays on"],
    "a row sees its neighbour's slot": ["decode steps only", "only prompts 2, "],
    "keys and values not reset": ["the second visit to base differs", "b last, is still seen"],
    "later chunks at the first one's positions": ["only prompts of 9 tokens and more"],
    "position + 1 at decode, into undefined memory": ["NaN or infinite", "decode steps only"],
    "position + 1 at decode": ["decode steps only"],
    "prompts cut to 8 tokens": ["only prompts of 9 tokens and more"],
    "last token of each prompt dropped": ["logits.flips", "no tie"],
    "first token from the token before the last": ["first tokens only"],
    "first token from padding in the last chunk": ["first tokens only", "only prompts "],
    "tokens of two prompts exchanged": ["logits.flips", "no tie"],
    "early end": ["logits.flips", "first divergent token: base: ", "one of them ends the text"],
    "NaN with one adapter at decode": ["NaN or infinite", "with a only, no first token"],
    "NaN in one row": ["NaN or infinite"],
    "zeros": ["logits.flips"],
    "rows of the batch shifted by one": ["first divergent token: base: ", "no tie"],
    "logits of the run before": ["logits.flips", "no tie"],
    "one column + 1e-3": ["logits.all_error"],
    "two columns exchanged": ["logits."],
    "padding of the vocabulary unmasked": ["logits."],
    "logits clipped at the 99.9th percentile": ["logits."],
    "temperature 1.01": ["logits.kl_max"],
    "noise 0.004": ["logits.kl_p99", "logits.top1_error"],
    "one bit at a second visit": ["second visit to a", "revisit "],
}
"""Words that the reason must have, by mutant."""

NAMED = {mutant.name: mutant for mutant in CAUSAL_LM_MUTANTS}


@pytest.mark.parametrize("name", SESSIONS)
def test_fault_of_a_session_fails_and_is_named(name: str, llama: Pipeline) -> None:
    result = judged(llama, serving(NAMED[name], llama.inputs().adapters))
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in SESSIONS[name]:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


# --- faults of the loop and of the module ----------------------------------------------------------


def of_the_last_chunk(self: Any, state: Tensors) -> list[Array]:
    """Take every row's first token from the last chunk, as the upstream loop does."""
    rows, kept = dict(enumerate(self._rows)), dict(enumerate(self._kept))
    for ids, places in prefill_chunks(rows, kept, self._sizes, self._plan):
        out, state = self._step(ids, places, state), {}
    return [out[row] for row in range(len(self._rows))]


def one_short(logits: Array, step: int, forced: Array, eos: frozenset[int]) -> int | None:
    return int(forced[step]) if step + 2 < forced.size else None


LOOPS: dict[str, tuple[Any, str, Any, Sequence[str]]] = {
    "first token from the last chunk": (
        decode_loop._Batch, "_prefill", of_the_last_chunk, ["first tokens only", "only prompts "],
    ),
    "a continuation that ends early": (
        decode_loop, "next_token", one_short, ["a continuation ended early", "wanted "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_fault_of_the_loop_fails_and_is_named(name: str, llama: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, function, patched, texts = LOOPS[name]
    monkeypatch.setattr(owner, function, patched)
    result = llama.result(runtime("ort"))
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in texts:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


def test_left_padding_that_is_read_as_text_fails_and_spares_the_longest_rows(llama: Pipeline) -> None:
    damage = NAMED["padding on the left read as text"].change
    result = judged(variant(llama, padding_side="left"), damage)
    assert result.status == "fail", result.reason
    assert "logits.kl_p99" in result.reason


def adapted(made: Pipeline) -> dict[str, Any]:
    """Return the layers that have an adapter, by their names in PEFT's model."""
    found = made.module().payload[0].model.named_modules()
    return {name: part for name, part in found if isinstance(getattr(part, "scaling", None), dict)}


def change_of(name: str, tensors: Tensors, scale: float) -> torch.Tensor:
    return torch.from_numpy(scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])


@contextmanager
def scale_of(made: Pipeline, value: float, part: str = "") -> Iterator[None]:
    layers = [layer for name, layer in adapted(made).items() if part in name]
    assert layers
    kept = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling["default"] = value
    yield
    for layer, scaling in zip(layers, kept, strict=True):
        layer.scaling.update(scaling)


@contextmanager
def merged(made: Pipeline, adapter: str) -> Iterator[None]:
    """Add an adapter to the weights of the base."""
    kept = {}
    for name, layer in adapted(made).items():
        kept[name] = layer.base_layer.weight.detach().clone()
        layer.base_layer.weight.data += change_of(name, made.inputs().adapters[adapter], layer.scaling["default"])
    yield
    for name, layer in adapted(made).items():
        layer.base_layer.weight.data.copy_(kept[name])


@contextmanager
def without_window(_: Pipeline) -> Iterator[None]:
    original = wrapper.masks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            wrapper, "masks", lambda places, slots, _, dtype, **__: original(places, slots, SimpleNamespace(), dtype)
        )
        yield


@contextmanager
def stale_slots(_: Pipeline) -> Iterator[None]:
    """Let each token see the two slots behind it, which hold what was there before."""
    original, write = wrapper.masks, kv_cache.StateLayer.update

    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        write(self, keys, values)
        return self.keys, self.values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "masks", lambda places, *rest, **options: original(places + 2, *rest, **options))
        patch.setattr(kv_cache.StateLayer, "update", update)
        yield


Damage = Callable[[Pipeline], Any]
MODULES: dict[str, tuple[str, Damage, Sequence[str]]] = {
    "alpha / r taken for 1": (
        "on_torch", lambda made: scale_of(made, 1.0), ["adapter 'a' acts 0.", "adapter 'b' acts 0.", "alpha / r"],
    ),
    "rsLoRA scale taken for LoRA's": (
        "mistral", lambda made: scale_of(made, SCALE), ["adapter 'a' acts 0.", "alpha / √r with rsLoRA"],
    ),
    "an adapter that is merged and fed": (
        "on_torch", lambda made: merged(made, "a"), ["base gives the outputs of adapter 'a'", "logits.flips"],
    ),
    "one layer without its adapter": (
        "on_torch", lambda made: scale_of(made, 0.0, "layers.1."), ["adapter 'a'", "with a, b only"],
    ),
    "a sliding window that is ignored": ("mistral", without_window, ["only where 9 tokens or more are read"]),
    "slots of the prompt before": ("on_torch", stale_slots, ["the second visit to base differs", "is still seen"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_fault_of_the_module_fails_and_is_named(name: str, request: pytest.FixtureRequest) -> None:
    fixture, damage, texts = MODULES[name]
    made: Pipeline = request.getfixturevalue(fixture)
    with damage(made):
        result = judged(made, lambda session: DecodeTrackingSession(session, zeroed=True), "torch")
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in texts:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


@pytest.mark.parametrize("fixture", ["on_torch", "mistral"])
def test_healthy_module_passes_afterwards(fixture: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(fixture).result(runtime("torch"))
    assert result.status == "pass", result.reason


# --- legitimate variants ---------------------------------------------------------------------------


def variant(made: Pipeline, **options: Any) -> Pipeline:
    """Return a pipeline of the same model and prompts in which what does not change is not made again."""
    found = pipeline(made.case.model_copy(update={"options": {**made.case.options, **options}}))
    made.floor(Precision(compute="fp32")), made.ceiling(), made.onnx()
    found.stages.take(made.stages, ("tokenize", "reference", "floor.fp32", "faults", "export"))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "chunks of 5": {"prefill_seq_len": 5},
    "one chunk": {"prefill_seq_len": 32},
    "one row": {"batch_size": 1},
    "four rows, two of them empty": {"batch_size": 4},
    "left padding": {"padding_side": "left", "batch_size": 6},
    "left padding in chunks of 3": {"padding_side": "left", "prefill_seq_len": 3, "batch_size": 3},
    "a greater context": {"ctx_len": 80},
    "a context that just fits": {"ctx_len": max(LENGTHS) + 2 + 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_legitimate_variant_passes(name: str, llama: Pipeline) -> None:
    result = variant(llama, **OPTIONS[name]).result(runtime("ort"))
    assert result.status == "pass", f"{name}: {result.status} {result.reason}"


def test_rows_in_another_order_pass(llama: Pipeline) -> None:
    rows = ("input_ids", "position_ids")
    damage = session_of(
        feed=lambda _, feeds: {name: array[::-1] if name in rows else array for name, array in feeds.items()},
        out=lambda _, found: {name: array[::-1] for name, array in found.items()},
    )
    result = judged(llama, damage)
    assert result.status == "pass", result.reason


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_does_not_matter(threads: int, llama: Pipeline) -> None:
    result = llama.result(runtime("ort", Settings(threads=threads)))
    assert result.status == "pass", result.reason


class Double(torch.nn.Module):
    """Computes in float64."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        return tuple(tensor.float() for tensor in self.inner(**wide))


def sdpa(module: Any) -> Any:
    module.model.get_base_model().set_attn_implementation("sdpa")
    return module


@pytest.mark.parametrize("change", [sdpa, Double])
@pytest.mark.parametrize("fixture", ["on_torch", "mistral"])
def test_module_that_computes_otherwise_passes(change: Any, fixture: str, request: pytest.FixtureRequest) -> None:
    made: Pipeline = request.getfixturevalue(fixture)
    module, _ = made.module().payload
    changed = Artifact("module", None, "0" * 64, payload=(change(copy.deepcopy(module)), made.graph()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "module", lambda: changed)
        result = made.result(runtime("torch"))
    assert result.status == "pass", result.reason


def test_adapters_merged_into_the_weights_pass(on_torch: Pipeline) -> None:
    adapters = on_torch.inputs().adapters
    plain = {name: layer.base_layer.weight.detach().clone() for name, layer in adapted(on_torch).items()}

    def merge(session: DecodeTrackingSession, feeds: Feeds) -> Feeds:
        if not feeds.keys() & session.weights:
            return feeds
        own = list(adapters.values())[session.adapter or 0]
        for name, layer in adapted(on_torch).items():
            layer.base_layer.weight.data.copy_(plain[name] + change_of(name, own, layer.scaling["default"]))
        return {**feeds, **adapters["base"]}

    with merged(on_torch, "base"):  # which changes nothing, and puts the weights back afterwards
        result = judged(on_torch, lambda session: DecodeTrackingSession(session, merge), "torch")
    assert result.status == "pass", result.reason


def test_healthy_session_behind_the_same_wrapper_passes(llama: Pipeline) -> None:
    result = judged(llama, DecodeTrackingSession)
    assert result.status == "pass", result.reason
    assert result.planned == result.compared > 60
