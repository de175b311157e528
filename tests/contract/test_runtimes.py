# SPDX-License-Identifier: Apache-2.0
"""One contract for every registered runtime, model kind and pooling; the registry is asked, so none escapes.

``ai100`` runs here where a card is; elsewhere it is skipped with its probe's reason, and `test_installed_sdk` drives
the same adapter through an SDK prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

from qeff_validate.artifact import Artifact, Kind
from qeff_validate.builders.store import Store
from qeff_validate.case import Case
from qeff_validate.engine import build, check, model
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.models import oracle
from qeff_validate.models.options import POOLINGS
from qeff_validate.pipeline import Pipeline, Silent
from qeff_validate.protocols import Runtime, Session, Settings, registered, runtime
from qeff_validate.runtimes.isolated import Isolated

RUNTIMES = sorted(registered("runtimes"))
ISOLATED = [f"isolated-{name}" for name in RUNTIMES if runtime(name).kind == "qpc"]
"""What the engine does with native bindings: the same runtimes in a process of their own."""
KINDS = sorted(registered("models"))
SMALL: dict[str, dict[str, Any]] = {"embedding": {"source": "random:bert", "options": {"seq_len": [48, 64]}}}

assert RUNTIMES, "no runtime is registered: is the package installed?"


def pipeline(kind: str, **options: Any) -> Pipeline:
    spec = SMALL[kind]
    case = Case(name="contract", model=kind, source=spec["source"], options={**spec["options"], **options})
    return Pipeline(case, check(case), Store(), Silent())


def adapter_of(name: str) -> Runtime:
    entry = name.removeprefix("isolated-")
    adapter = runtime(entry)
    return Isolated(adapter, entry, Settings()) if name in ISOLATED else adapter


def opened(name: str, made: Pipeline) -> Any:
    adapter = adapter_of(name)
    missing = adapter.probe()
    if missing:
        pytest.skip(missing)
    return adapter.open(made.artifact(adapter.kind, getattr(adapter, "sdk", None)))


def test_every_model_kind_has_a_small_case_here() -> None:
    assert sorted(SMALL) == KINDS


@pytest.fixture(params=[(name, kind) for name in RUNTIMES + ISOLATED for kind in KINDS], ids="-".join)
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    name, kind = request.param
    with opened(name, pipeline(kind)) as made:
        yield made


def feeds(session: Session, seed: int = 0) -> dict[str, np.ndarray]:
    batch, length = session.shapes[0]["input_ids"] if session.shapes else (3, 11)
    ids = np.random.default_rng(seed).integers(5, 900, (batch, length))
    mask = (np.arange(length)[None] < np.arange(1, batch + 1)[:, None] * 2).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def test_names_and_dtypes_are_those_of_the_graph(session: Session) -> None:
    assert [(spec.name, spec.dtype) for spec in session.inputs] == [("input_ids", "int64"), ("attention_mask", "int64")]
    assert [(spec.name, spec.dtype) for spec in session.outputs] == [("output", "float32")]


def test_results_are_copies_and_runs_are_repeatable(session: Session) -> None:
    given = feeds(session)
    kept = {name: array.copy() for name, array in given.items()}
    first = session.run(given)["output"]
    before = first.copy()
    other = session.run(feeds(session, 1))["output"]
    assert np.array_equal(first, before), "a later run wrote into an earlier result"
    assert not np.array_equal(first, other)
    assert np.array_equal(session.run(given)["output"], before)
    first[:] = 7
    assert np.array_equal(session.run(given)["output"], before)
    assert all(np.array_equal(given[name], kept[name]) for name in given), "the caller's feeds were changed"


def test_fetch_chooses_outputs_and_an_unknown_one_is_an_error(session: Session) -> None:
    assert list(session.run(feeds(session), fetch=["output"])) == ["output"]
    assert session.run(feeds(session), fetch=[]) == {}
    with pytest.raises(RunError, match=r"no output 'outptu'\. Did you mean 'output'"):
        session.run(feeds(session), fetch=["outptu"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": None}, "missing"),
        ({"attention_msk": np.zeros((1, 1), np.int64)}, "unknown"),
        ({"attention_mask": "float64"}, "dtype float64, wanted int64"),
        ({"input_ids": "uint64"}, "dtype uint64, wanted int64"),
        ({"input_ids": "int32"}, "dtype int32, wanted int64"),
        ({"attention_mask": "wider"}, "shape"),
        ({"attention_mask": "an axis more"}, "shape"),
    ],
    ids=str,
)
def test_wrong_feeds_are_an_error_and_the_session_goes_on(session: Session, change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = feeds(session)
    for name, what in change.items():
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
    assert np.isfinite(session.run(feeds(session))["output"]).all()


def test_arrays_in_any_memory_order_are_taken(session: Session) -> None:
    given = feeds(session)
    wanted = session.run(given)["output"]
    strided = {name: np.asfortranarray(array) for name, array in given.items()}
    assert np.array_equal(session.run(strided)["output"], wanted)


def test_reset_is_harmless_without_state(session: Session) -> None:
    wanted = session.run(feeds(session))["output"]
    session.reset()
    assert np.array_equal(session.run(feeds(session))["output"], wanted)


def test_a_row_without_a_token_gives_zeros_and_touches_no_other(session: Session) -> None:
    given = feeds(session)
    wanted = session.run(given)["output"]
    masked = {**given, "attention_mask": given["attention_mask"].copy()}
    masked["attention_mask"][1] = 0
    got = session.run(masked)["output"]
    assert np.array_equal(got[1], np.zeros_like(got[1]))
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pooling", "normalize"), [*((name, False) for name in POOLINGS), ("mean", True)], ids=str)
def test_every_pooling_agrees_with_hugging_face(name: str, kind: str, pooling: str, normalize: bool) -> None:
    made = pipeline(kind, pooling=pooling, normalize=normalize)
    adapter = runtime(name)
    result = made.result(adapter)
    if result.status == "not_run":
        pytest.skip(result.reason)
    assert result.status == "pass", result.reason
    assert result.compared == result.planned > 24
    assert result.simulated == (name == "sim")


def test_every_pooling_has_an_oracle() -> None:
    from qeff_validate.models import pooling

    assert sorted(oracle.POOLINGS) == sorted(POOLINGS) == sorted(pooling.POOLINGS)


@pytest.mark.parametrize("name", RUNTIMES + ISOLATED)
def test_a_broken_artifact_is_an_error_that_names_it(name: str, tmp_path: Any) -> None:
    adapter = adapter_of(name)
    if adapter.kind == "module":
        pytest.skip("a module lives in memory, it has no file that can break")
    missing = adapter.probe()
    if missing:
        pytest.skip(missing)
    made = pipeline("embedding").artifact(adapter.kind, getattr(adapter, "sdk", None))
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
        assert session.run(feeds(session))["output"].shape[1] == 64
