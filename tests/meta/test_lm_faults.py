# SPDX-License-Identifier: Apache-2.0
"""Faults of language models with adapters, on small random models: each must fail, and the reason must name it.

A fault is a session that changes feeds or logits, a decode loop that is patched, or a module that is damaged. Twelve
legitimate variants must pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import Faulty

from qeff_validate.artifact import Artifact
from qeff_validate.builders.store import Store
from qeff_validate.case import Case
from qeff_validate.engine import check
from qeff_validate.models import cache, decoder
from qeff_validate.models.generate import _Batch
from qeff_validate.models.prompts import LONG
from qeff_validate.pipeline import Pipeline, Silent
from qeff_validate.protocols import Session, Settings, runtime
from qeff_validate.report import Result
from qeff_validate.tensors import Array, Tensors

CHUNK, ROWS = 8, 2
VISITS = ("base", "a", "b", "base", "a")
"""The order in which `PeftCausalLM.infer` feeds adapters."""

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
    sizes = {"prefill_seq_len": CHUNK, "ctx_len": 48, "batch_size": ROWS}
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

Feeds = dict[str, Array]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and words that the reason must have."""

    words: Sequence[str]
    feed: Callable[[Damaged, Feeds], Feeds] = lambda _, feeds: feeds
    out: Callable[[Damaged, Array], Array] = lambda _, logits: logits
    zeroed: bool = False
    """The state starts with zeros, as on a machine that clears its memory."""


class Damaged:
    """A session with a fault."""

    shapes: Sequence[Any] = ()

    def __init__(self, session: Session, fault: Fault, adapters: Mapping[str, Tensors]) -> None:
        self._session, self._fault, self.adapters = session, fault, adapters
        self.inputs, self.outputs = session.inputs, session.outputs
        self.runs, self.visit, self.batch = 0, -1, -1
        self.feeds: Feeds = {}
        self.before: Array | None = None
        self.ends = np.zeros(0, np.int64)
        self.columns = 0

    @property
    def decoding(self) -> bool:
        return self.feeds["input_ids"].shape[1] == 1

    @property
    def swapping(self) -> bool:
        """Adapter tensors are fed."""
        return any(name in self.feeds for name in self.adapters["base"])

    @property
    def state(self) -> list[str]:
        return [spec.name for spec in self.inputs if spec.name.startswith("past_")]

    def kept(self) -> Feeds:
        """Return keys and values as the last run left them: none of the real sessions shows them, so it runs again."""
        padding = {"input_ids": self.feeds["input_ids"], "position_ids": np.full_like(self.feeds["position_ids"], -1)}
        found = self._session.run(padding, fetch=[f"{name}_RetainedState" for name in self.state])
        return {name: found[f"{name}_RetainedState"] for name in self.state}

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        self.feeds = dict(feeds)
        self.visit += self.swapping
        self.batch += bool(not self.decoding and (feeds["position_ids"] == 0).any())
        if self._fault.zeroed and not self.runs:
            sizes = {"batch_size": len(feeds["input_ids"]), "ctx_len": 48}
            for spec in self.inputs:
                if spec.name in self.state:
                    self.feeds[spec.name] = np.zeros([sizes.get(str(dim), dim) for dim in spec.shape], np.float32)
        logits = self._session.run(self._fault.feed(self, self.feeds), fetch=fetch)["logits"]
        self.runs += 1
        return {"logits": self._fault.out(self, logits)}

    def reset(self) -> None:
        self._session.reset()


def judged(made: Pipeline, fault: Fault, name: str = "ort") -> Result:
    adapters = made.inputs().adapters
    faulty: Any = Faulty(lambda session: Damaged(session, fault, adapters), name)
    return made.result(faulty)


def served(**instead: str) -> Callable[[Damaged, Feeds], Feeds]:
    """Feed other adapters' tensors than those that were meant."""

    def feed(session: Damaged, feeds: Feeds) -> Feeds:
        name = VISITS[session.visit]
        return {**feeds, **session.adapters[instead.get(name, name)]} if session.swapping else feeds

    return feed


def scaled(factor: float, *parts: str) -> Callable[[Damaged, Feeds], Feeds]:
    """Scale what an adapter adds, in all modules or in those whose names have one of the parts."""

    def feed(session: Damaged, feeds: Feeds) -> Feeds:
        hit = [name for name in feeds if "lora_B" in name and (not parts or any(part in name for part in parts))]
        assert hit or not session.swapping
        return {**feeds, **{name: feeds[name] * np.float32(factor) for name in hit}}

    return feed


def stays_on(session: Damaged, feeds: Feeds) -> Feeds:
    off = session.swapping and VISITS[session.visit] == "base" and session.visit > 0
    return {name: array for name, array in feeds.items() if not off or name not in session.adapters["base"]}


def leaks(session: Damaged, feeds: Feeds) -> Feeds:
    """Let the second row of the batch read a slot of the first one: not slot 0, where all have the same token."""
    if not session.decoding:
        return feeds
    state = session.kept()
    for array in state.values():
        array[1, :, 1] = array[0, :, 1]
    return {**feeds, **state}


def goes_on(session: Damaged, feeds: Feeds) -> Feeds:
    """Append every second batch of prompts to what the first one left in the cache."""
    places = feeds["position_ids"]
    if session.batch % 2 == 0:
        if (places == 0).any() and not session.decoding:
            session.ends = np.zeros(len(places), np.int64)
        session.ends = np.maximum(session.ends, places.max(axis=1) + 1)
        return feeds
    return {**feeds, "position_ids": np.where(places >= 0, places + session.ends[:, None], -1)}


def starts_again(_: Damaged, feeds: Feeds) -> Feeds:
    """Give later chunks the positions of the first one."""
    places = feeds["position_ids"]
    return {**feeds, "position_ids": np.where(places >= 0, places % CHUNK, -1)} if places.shape[1] > 1 else feeds


def one_further(session: Damaged, feeds: Feeds) -> Feeds:
    places = feeds["position_ids"]
    return {**feeds, "position_ids": np.where(places >= 0, places + 1, -1)} if session.decoding else feeds


def ends_early(session: Damaged, logits: Array) -> Array:
    if session.decoding and session.runs % 3 == 0:
        logits[0, 0, EOS[5]] = logits[0, 0].max() + 1
    return logits


def one_run_late(session: Damaged, logits: Array) -> Array:
    session.before, found = logits.copy(), session.before if session.before is not None else logits
    return found


def one_bit(session: Damaged, logits: Array) -> Array:
    if session.visit == 4 and session.decoding:
        logits[1, 0, 77] = np.nextafter(logits[1, 0, 77], np.float32(np.inf))
    return logits


def not_a_number(session: Damaged, logits: Array) -> Array:
    if VISITS[session.visit] == "b" and session.decoding:
        logits[0, 0, 5] = np.nan
    return logits


def at_column(session: Damaged, logits: Array) -> Array:
    logits[..., 123] += 1e-3
    return logits


def rounded(session: Damaged, logits: Array) -> Array:
    noise = np.random.default_rng(session.runs).standard_normal(logits.shape)
    return (logits + 0.004 * noise).astype(np.float32)


SESSIONS: dict[str, Fault] = {
    "base served for an adapter": Fault(["adapter 'a' behaves as base", "with a only"], served(a="base")),
    "base served for all adapters": Fault(
        ["adapter 'a' behaves as base", "adapter 'b' behaves as base", "with a, b only"], served(a="base", b="base")
    ),
    "A and B swapped": Fault(
        ["adapter 'a' gives the outputs of 'b'", "adapter 'b' gives the outputs of 'a'"], served(a="b", b="a")
    ),
    "an adapter served for base": Fault(["base gives the outputs of adapter 'a'", "with base only"], served(base="a")),
    "alpha / r dropped": Fault(["adapter 'a' acts 0.", "times as strongly", "alpha / r"], scaled(1 / SCALE)),
    "merged, and fed as well": Fault(["adapter 'a' acts ", "merged and fed"], scaled(2.0)),
    "one target module missing": Fault(["adapter 'a'", "a part of it missing", "with a, b only"], scaled(0, "v_proj")),
    "one layer missing": Fault(["adapter 'a'", "a part of it missing", "with a, b only"], scaled(0, "layers.1.")),
    "an adapter stays on": Fault(["second visit to base gives the outputs of 'b': an adapter stays on"], stays_on),
    "a row sees its neighbour's slot": Fault(["decode steps only", "only prompts 2, "], leaks),
    "keys and values are not reset": Fault(["the second visit to base differs", "b last, is still seen"], goes_on),
    "last chunk at the first one's positions": Fault(["only prompts of 9 tokens and more"], starts_again, zeroed=True),
    "position + 1 at decode, NaN beyond": Fault(["NaN or infinite", "decode steps only"], one_further),
    "position + 1 at decode": Fault(["decode steps only"], one_further, zeroed=True),
    "early end": Fault(["logits.flips", "first divergent token: base: ", "one of them ends the text"], out=ends_early),
    "NaN": Fault(["NaN or infinite", "with b only, no first token"], out=not_a_number),
    "rows of the batch shifted by one": Fault(
        ["first divergent token: base: ", "no tie"], out=lambda _, logits: np.roll(logits, 1, axis=0)
    ),
    "logits of the run before": Fault(["logits.flips", "no tie"], out=one_run_late),
    "one column of the vocabulary": Fault(["logits.all_error"], out=at_column),
    "temperature 1.01": Fault(["logits.kl_max"], out=lambda _, logits: logits * np.float32(1.01)),
    "noise of half precision": Fault(["logits.kl_p99", "logits.top1_error"], out=rounded),
    "a second visit that differs in one bit": Fault(["second visit to a", "revisit "], out=one_bit),
}


@pytest.mark.parametrize("name", SESSIONS)
def test_fault_of_a_session_fails_and_is_named(name: str, llama: Pipeline) -> None:
    result = judged(llama, SESSIONS[name])
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in SESSIONS[name].words:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


# --- faults of the loop and of the module ----------------------------------------------------------


def of_the_last_chunk(self: Any, state: Tensors) -> list[Array]:
    """Take every row's first token from the last chunk, as the upstream loop does."""
    for ids, places in self._chunks():
        out, state = self._step(ids, places, state), {}
    return [out[row] for row in range(len(self._rows))]


def one_short(self: Any, logits: Array, step: int, forced: Array) -> int | None:
    return int(forced[step]) if step + 2 < forced.size else None


LOOPS: dict[str, tuple[str, Any, Sequence[str]]] = {
    "first token from the last chunk": ("_prefill", of_the_last_chunk, ["first tokens only", "only prompts "]),
    "a continuation that ends early": ("_chosen", one_short, ["a continuation ended early", "wanted "]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_fault_of_the_loop_fails_and_is_named(name: str, llama: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    method, patched, texts = LOOPS[name]
    monkeypatch.setattr(_Batch, method, patched)
    result = llama.result(runtime("ort"))
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in texts:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


def padding_is_text(session: Damaged, feeds: Feeds) -> Feeds:
    """Count positions from the first column, over the padding on the left."""
    places = feeds["position_ids"]
    if session.decoding:
        session.columns = 0
        return {**feeds, "position_ids": np.where(places >= 0, places + session.ends[:, None], -1)}
    columns = np.arange(CHUNK) + session.columns
    session.columns += CHUNK
    session.ends = columns[-1] - places[:, -1]
    return {**feeds, "position_ids": np.broadcast_to(columns, places.shape).copy()}


def test_left_padding_that_is_read_as_text_fails_and_spares_the_longest_rows(llama: Pipeline) -> None:
    result = judged(variant(llama, padding_side="left"), Fault([], padding_is_text))
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
    original = decoder.masks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decoder, "masks", lambda places, slots, _, dtype: original(places, slots, SimpleNamespace(), dtype)
        )
        yield


@contextmanager
def stale_slots(_: Pipeline) -> Iterator[None]:
    """Let each token see the two slots behind it, which hold what was there before."""
    original, write = decoder.masks, cache.StateLayer.update

    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        write(self, keys, values)
        return self.keys, self.values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "masks", lambda places, *rest: original(places + 2, *rest))
        patch.setattr(cache.StateLayer, "update", update)
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
        result = judged(made, Fault([], zeroed=True), "torch")
    assert result.status == "fail", f"{name}: {result.status} {result.reason}"
    for text in texts:
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


@pytest.mark.parametrize("fixture", ["on_torch", "mistral"])
def test_healthy_module_passes_afterwards(fixture: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(fixture).result(runtime("torch"))
    assert result.status == "pass", result.reason


# --- what cannot be told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"init": "peft"}, "adapter 'b' changes log-probabilities by 0.0e+00, 0.0 times the noise"),
        ({"seed": 1}, "adapters 'a' and 'b' say the same, so a swap would not be seen"),
    ],
    ids=["without effect", "equal"],
)
def test_adapter_that_cannot_be_told_from_another_is_inconclusive(second: dict[str, Any], words: str) -> None:
    one = {"peft_method": "lora", "seed": 1, **LORA}
    made = pipeline(lm(adapters={"a": one, "b": {**one, **second}}, prompts=["a river", "in the"], max_new_tokens=2))
    result = made.result(runtime("torch"))
    assert (result.status, words in result.reason) == ("inconclusive", True), result.reason


# --- legitimate variants ---------------------------------------------------------------------------


def variant(made: Pipeline, **options: Any) -> Pipeline:
    """Return a pipeline of the same model and prompts in which what does not change is not made again."""
    found = pipeline(made.case.model_copy(update={"options": {**made.case.options, **options}}))
    made.floor(), made.onnx()
    found._done.update({name: made._done[name] for name in ("tokenize", "reference", "floor", "export")})
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


class Reversed(Damaged):
    """Runs the rows of a batch in the other order."""

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        rows = ("input_ids", "position_ids")
        turned = {name: array[::-1] if name in rows else array for name, array in feeds.items()}
        return {name: array[::-1] for name, array in self._session.run(turned, fetch=fetch).items()}


def test_rows_in_another_order_pass(llama: Pipeline) -> None:
    faulty: Any = Faulty(lambda session: Reversed(session, Fault([]), {}))
    result = llama.result(faulty)
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
    changed = Artifact("module", None, "0" * 64, payload=(change(copy.deepcopy(module)), made.model().graph))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "module", lambda: changed)
        result = made.result(runtime("torch"))
    assert result.status == "pass", result.reason


class Merged(Damaged):
    """Serves each adapter from merged weights."""

    layers: dict[str, Any]

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        self.feeds = dict(feeds)
        if self.swapping:
            self.visit += 1
            for name, layer in self.layers.items():
                if self.visit:
                    layer.base_layer.weight.data.copy_(self.plain[name])
                else:
                    self.plain = getattr(self, "plain", {}) | {name: layer.base_layer.weight.detach().clone()}
                tensors = self.adapters[VISITS[self.visit]]
                layer.base_layer.weight.data += change_of(name, tensors, layer.scaling["default"])
            self.feeds |= self.adapters["base"]
        return self._session.run(self.feeds, fetch=fetch)


def test_adapters_merged_into_the_weights_pass(on_torch: Pipeline) -> None:
    def wrap(session: Session) -> Damaged:
        found = Merged(session, Fault([]), on_torch.inputs().adapters)
        found.layers = adapted(on_torch)
        return found

    with merged(on_torch, "base"):  # which changes nothing, and puts the weights back afterwards
        result = on_torch.result(Faulty(wrap, "torch"))  # type: ignore[arg-type]
    assert result.status == "pass", result.reason


def test_healthy_session_behind_the_same_wrapper_passes(llama: Pipeline) -> None:
    result = judged(llama, Fault([]))
    assert result.status == "pass", result.reason
    assert result.planned == result.compared > 60
