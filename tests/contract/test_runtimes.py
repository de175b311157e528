# SPDX-License-Identifier: Apache-2.0
"""One contract for every registered runtime, model kind and pooling; the registry is asked, so none escapes.

``ai100`` runs here where a card is; elsewhere it is skipped once, with its reason, and `test_installed_sdk` drives
the same adapter through an SDK prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from bounds import close

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.builders.store import Store
from qeff_validate.config.case import Case
from qeff_validate.engine import build, check, model
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.models.embedding import pooling_oracle
from qeff_validate.models.embedding.options import POOLINGS
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.stages import Silent
from qeff_validate.protocols import Runtime, Session, Settings, capabilities, runtime
from qeff_validate.registry import registered
from qeff_validate.runtimes.isolation.parent import IsolatedRuntime

UNUSABLE = {name: reason for name in sorted(registered("runtimes")) if (reason := runtime(name).probe())}
"""Why a registered runtime cannot be tried on this host."""
RUNTIMES = sorted(registered("runtimes").keys() - UNUSABLE.keys())
ISOLATED = [f"isolated-{name}" for name in RUNTIMES if runtime(name).kind == "qpc"]
"""What the engine does with native bindings: the same runtimes in a process of their own."""
KINDS = sorted(registered("models"))
SMALL: dict[str, dict[str, Any]] = {
    "embedding": {"source": "random:bert", "options": {"seq_len": [48, 64]}},
    "peft-causal-lm": {
        "source": "random:llama",
        "options": {
            "peft_method": "lora",
            "peft": {"r": 4},
            "prompts": ["one two three", "four", "five six seven eight nine"],
            "max_new_tokens": 4,
            "prefill_seq_len": 4,
            "ctx_len": 16,
        },
    },
    "multi-vector": {"source": "random:bert", "options": {"seq_len": [48, 64]}},
    "reranker": {"source": "random:bert"},
    "sparse-embedding": {"source": "random:bert", "options": {"seq_len": [48, 64]}},
    "sequence-classification": {"source": "random:bert", "options": {"seq_len": [48, 64]}},
}
OUTPUTS = {"output", "logits", "scores", "vectors"}
"""Names of what model kinds are about."""

assert RUNTIMES, "no runtime is registered: is the package installed?"


@pytest.mark.parametrize("name", sorted(registered("runtimes")))
def test_registered_runtime_is_in_this_contract_or_says_why_not(name: str) -> None:
    if name in UNUSABLE:
        pytest.skip(UNUSABLE[name])
    assert name in RUNTIMES


def pipeline(kind: str, *, exporter: Any = "dynamo", **options: Any) -> Pipeline:
    spec = SMALL[kind]
    made = {"source": spec["source"], "options": {**spec.get("options", {}), **options}}
    case = Case(name="contract", model=kind, **made, exporter=exporter, tolerance="table")
    return Pipeline(case, check(case), Store(), Silent())


def adapter_of(name: str) -> Runtime:
    entry = name.removeprefix("isolated-")
    adapter = runtime(entry)
    return IsolatedRuntime(adapter, entry, Settings()) if name in ISOLATED else adapter


def opened(name: str, made: Pipeline) -> Any:
    adapter = adapter_of(name)
    missing = adapter.probe()
    if missing:
        pytest.skip(missing)
    return adapter.open(made.artifact(adapter.kind, capabilities(adapter).sdk))


def test_every_model_kind_has_a_small_case_here() -> None:
    assert sorted(SMALL) == KINDS


@pytest.fixture(scope="module", params=[(name, kind) for name in RUNTIMES + ISOLATED for kind in KINDS], ids="-".join)
def open_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """One session for all tests of a runtime and a kind: opening an isolated one takes as long as ten of them."""
    name, kind = request.param
    with opened(name, pipeline(kind)) as made:
        yield made


@pytest.fixture
def session(open_session: Session) -> Session:
    """The session without state."""
    open_session.reset()
    return open_session


def feeds(session: Session, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs that differ by seed; retained state is left out, but for what an adapter needs to be defined."""
    batch, length = session.shapes[0]["input_ids"] if session.shapes else (3, 11)
    generator = np.random.default_rng(seed)
    ids = generator.integers(5, 900, (batch, length))
    lengths = np.arange(1, batch + 1)[:, None] * 2
    if "position_ids" not in {spec.name for spec in session.inputs}:
        types = {spec.name: np.zeros_like(ids) for spec in session.inputs if spec.name == "token_type_ids"}
        return {"input_ids": ids, "attention_mask": (np.arange(length)[None] < lengths).astype(np.int64), **types}
    places = np.where(np.arange(length)[None] < lengths, np.arange(length)[None], -1)
    weights = {
        spec.name: generator.normal(scale=0.1, size=spec.shape).astype(spec.dtype)
        for spec in session.inputs
        if spec.name.startswith("base_model.")
    }
    return {"input_ids": ids, "position_ids": places, **weights}


def output(session: Session) -> str:
    """The name of what a model kind is about."""
    return session.outputs[0].name


def test_names_and_dtypes_are_those_of_the_graph(session: Session) -> None:
    names = [spec.name for spec in session.inputs]
    assert names[:2] in (["input_ids", "attention_mask"], ["input_ids", "position_ids"])
    assert {spec.dtype for spec in session.inputs[:2]} == {"int64"}
    assert output(session) in OUTPUTS
    assert session.outputs[0].dtype == "float32"
    state = [name for name in names[2:] if name != "token_type_ids"]
    assert [spec.name for spec in session.outputs[1:]] == [f"{name}_RetainedState" for name in state]


def test_results_are_copies_and_runs_are_repeatable(session: Session) -> None:
    given = feeds(session)
    kept = {name: array.copy() for name, array in given.items()}
    first = session.run(given)[output(session)]
    before = first.copy()
    other = session.run(feeds(session, 1))[output(session)]
    assert np.array_equal(first, before), "a later run wrote into an earlier result"
    assert not np.array_equal(first, other)
    assert np.array_equal(session.run(given)[output(session)], before)
    first[:] = 7
    assert np.array_equal(session.run(given)[output(session)], before)
    assert all(np.array_equal(given[name], kept[name]) for name in given), "the caller's feeds were changed"


def test_fetch_chooses_outputs_and_an_unknown_one_is_an_error(session: Session) -> None:
    name = output(session)
    assert list(session.run(feeds(session), fetch=[name])) == [name]
    assert session.run(feeds(session), fetch=[]) == {}
    with pytest.raises(RunError, match=rf"no output '{name}x'\. Did you mean '{name}'"):
        session.run(feeds(session), fetch=[f"{name}x"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({1: None}, "missing"),
        ({"attention_msk": np.zeros((1, 1), np.int64)}, "unknown"),
        ({1: "float64"}, "dtype float64, wanted int64"),
        ({0: "uint64"}, "dtype uint64, wanted int64"),
        ({0: "int32"}, "dtype int32, wanted int64"),
        ({1: "wider"}, "shape"),
        ({1: "an axis more"}, "shape"),
    ],
    ids=str,
)
def test_wrong_feeds_are_an_error_and_the_session_goes_on(session: Session, change: dict[Any, Any], words: str) -> None:
    given: dict[str, Any] = feeds(session)
    for place, what in change.items():
        name = session.inputs[place].name if isinstance(place, int) else place
        if what is None:
            del given[name]
        elif what == "wider":
            given[name] = np.pad(given[name], ((0, 0), (0, 1)))
        elif what == "an axis more":
            given[name] = given[name][..., None]
        else:
            given[name] = given[name].astype(what) if isinstance(what, str) else what
    with pytest.raises(RunError, match=words):
        session.run(given)
    assert np.isfinite(session.run(feeds(session))[output(session)]).all()


def test_arrays_in_any_memory_order_are_taken(session: Session) -> None:
    given = feeds(session)
    wanted = session.run(given)[output(session)]
    strided = {name: np.asfortranarray(array) for name, array in given.items()}
    assert np.array_equal(session.run(strided)[output(session)], wanted)


def test_reset_forgets_state_and_harms_nothing_else(session: Session) -> None:
    wanted = session.run(feeds(session))[output(session)]
    session.reset()
    assert np.array_equal(session.run(feeds(session))[output(session)], wanted)


@pytest.mark.numeric
@pytest.mark.slow  # it is the only numeric test on these artifacts
def test_a_row_without_a_token_touches_no_other(session: Session) -> None:
    given = feeds(session)
    wanted = session.run(given)[output(session)]
    second = session.inputs[1].name
    masked = {**given, second: given[second].copy()}
    masked[second][1] = 0 if second == "attention_mask" else -1
    got = session.run(masked)[output(session)]
    if output(session) == "output":
        assert np.array_equal(got[1], np.zeros_like(got[1]))
    close(got[0], wanted[0], rtol=0, atol=1e-5)


@pytest.fixture(params=RUNTIMES)
def stateful(request: pytest.FixtureRequest) -> Iterator[Session]:
    with opened(request.param, pipeline("peft-causal-lm")) as made:
        yield made


def chunks(session: Session) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Four tokens of a prompt with an adapter, and the token behind them, which sees the prompt through state alone."""
    batch = session.shapes[0]["input_ids"][0] if session.shapes else 2
    ids = np.random.default_rng(0).integers(5, 900, (batch, 5))
    weights = {name: array for name, array in feeds(session).items() if name.startswith("base_model.")}
    prompt = {"input_ids": ids[:, :4], "position_ids": np.tile(np.arange(4), (batch, 1)), **weights}
    return prompt, {"input_ids": ids[:, 4:], "position_ids": np.full((batch, 1), 4)}


def test_state_lives_in_the_session_from_undefined_content_on(stateful: Session) -> None:
    prompt, token = chunks(stateful)
    stateful.run(prompt, fetch=[])
    wanted = stateful.run(token, fetch=["logits"])["logits"]
    assert np.isfinite(wanted).all()
    assert not np.array_equal(
        stateful.run({**token, "input_ids": token["input_ids"] + 1}, fetch=["logits"])["logits"], wanted
    )
    again = stateful.run(token, fetch=["logits"])["logits"]
    assert np.array_equal(again, wanted), "slot 4 was overwritten, the four before it were not"


def test_reset_makes_state_undefined_again(stateful: Session) -> None:
    prompt, token = chunks(stateful)
    stateful.run(prompt, fetch=[])
    assert np.isfinite(stateful.run(token, fetch=["logits"])["logits"]).all()
    stateful.reset()
    assert np.isnan(stateful.run(token, fetch=["logits"])["logits"]).all(), "old keys, values or weights were seen"
    stateful.run(prompt, fetch=[])
    assert np.isfinite(stateful.run(token, fetch=["logits"])["logits"]).all()


def test_fed_state_becomes_the_state_and_a_twin_hands_it_out(stateful: Session) -> None:
    prompt, token = chunks(stateful)
    name = next(spec.name for spec in stateful.inputs if spec.name.startswith("base_model."))
    twin = f"{name}_RetainedState"
    assert np.array_equal(stateful.run(prompt, fetch=[twin])[twin], prompt[name])
    before = stateful.run(token, fetch=["logits", twin])
    assert np.array_equal(before[twin], prompt[name])
    changed = prompt[name] * 2
    after = stateful.run({**token, name: changed}, fetch=["logits", twin])
    assert np.array_equal(after[twin], changed)
    assert not np.array_equal(after["logits"], before["logits"])
    assert np.array_equal(stateful.run(token, fetch=["logits"])["logits"], after["logits"]), "it stays"


def test_all_outputs_come_if_none_are_named(stateful: Session) -> None:
    prompt, _ = chunks(stateful)
    found = stateful.run(prompt)
    assert sorted(found) == sorted(spec.name for spec in stateful.outputs)
    keys = found["past_key.0_RetainedState"]
    assert np.isfinite(keys[:, :, :4]).all()
    assert np.isnan(keys[:, :, 4:]).all(), "what was never written stays undefined"


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_language_model_agrees_with_hugging_face(name: str) -> None:
    result = pipeline("peft-causal-lm").result(runtime(name))
    if result.status == "not_run":
        pytest.skip(result.reason)
    assert result.status == "pass", result.reason
    assert result.compared == result.planned == 60
    assert result.simulated == (name == "sim")


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("kind", ["embedding"])
@pytest.mark.parametrize(("pooling", "normalize"), [*((name, False) for name in POOLINGS), ("mean", True)], ids=str)
def test_every_pooling_agrees_with_hugging_face(name: str, kind: str, pooling: str, normalize: bool) -> None:
    plain = pooling == "mean" and not normalize
    made = pipeline(kind, exporter="dynamo" if plain else "torchscript", pooling=pooling, normalize=normalize)
    adapter = runtime(name)
    result = made.result(adapter)
    if result.status == "not_run":
        pytest.skip(result.reason)
    assert result.status == "pass", result.reason
    assert result.compared == result.planned > 24
    assert result.simulated == (name == "sim")


def test_every_pooling_has_an_oracle() -> None:
    from qeff_validate.models.embedding import pooling

    assert sorted(pooling_oracle.POOLINGS) == sorted(POOLINGS) == sorted(pooling.POOLINGS)


@pytest.mark.parametrize("name", RUNTIMES + ISOLATED)
def test_a_broken_artifact_is_an_error_that_names_it(name: str, tmp_path: Any) -> None:
    adapter = adapter_of(name)
    if adapter.kind == "module":
        pytest.skip("a module lives in memory, it has no file that can break")
    missing = adapter.probe()
    if missing:
        pytest.skip(missing)
    made = pipeline("embedding").artifact(adapter.kind, capabilities(adapter).sdk)
    assert made.path is not None
    for cut in (0, 10, 1000):
        place = tmp_path / f"{cut}"
        place.mkdir()
        path = place / ("programqpc.bin" if adapter.kind == "qpc" else "model.onnx")
        origin = made.path / path.name if adapter.kind == "qpc" else made.path
        path.write_bytes(origin.read_bytes()[:cut])
        broken = Artifact(adapter.kind, place if adapter.kind == "qpc" else path, "0" * 64)
        with pytest.raises((Unavailable, RunError), match=str(place)), adapter.open(broken):
            pass


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_public_build_gives_what_a_runtime_opens(kind: Kind) -> None:
    case = Case(name="contract", source="random:bert", options={"seq_len": [48, 64]})
    made = model(case)
    artifact = build(made, kind)
    name = {"module": "torch", "onnx": "ort", "qpc": "sim"}[kind]
    with runtime(name).open(artifact) as session:
        assert session.run(feeds(session))[output(session)].shape[1] == 64
