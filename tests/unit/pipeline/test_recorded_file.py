# SPDX-License-Identifier: Apache-2.0
"""Recorded files that somebody edited: an edit is seen by the digest, and each part is checked where it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from floors import EVEN, made_floor
from safetensors.numpy import save_file

from qeff_validate.builders.store import Store
from qeff_validate.comparison.noise_floor import digest_of
from qeff_validate.config.case import Artifacts, Case, Precision
from qeff_validate.engine import check
from qeff_validate.errors import IncomparableError, Unavailable, ValidateError
from qeff_validate.json_tensor import json_tensor
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.mutation.power import FaultEffects
from qeff_validate.pipeline.case_pipeline import Pipeline
from qeff_validate.pipeline.recorded_file import parts, read_recorded, sealed
from qeff_validate.pipeline.stages import Silent
from qeff_validate.tensors import save_tensors

Changes = Callable[[dict[str, Any]], Any]
ROWS = TokenRows((np.array([5, 6, 7]), np.array([8]), np.array([9, 10])), 0, ("a b c", "d", "e f"))
VECTORS = {"output": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)}
LOGITS = {
    "logits": np.random.default_rng(1).standard_normal((4, 11)).astype(np.float32),
    "tokens": np.array([1, 2, 3, 4]),
    "steps": np.array([2, 2]),
}
PROMPTS: dict[str, Any] = {
    "texts": ["a b", "c"], "notes": [], "pad": 0, "eos": [2], "tables": {}, "adapters": ["base"],
    "interface": {"dims": [[[2, 4], [2, 4]]], "vocab": 11},
}  # fmt: skip
ADAPTED = {"peft_method": "lora", "ctx_len": 16, "prefill_seq_len": 4, "max_new_tokens": 2}


def with_floors(tensors: dict[str, Any], errors: Any) -> dict[str, Any]:
    """Add floors, a ceiling and what was recorded."""
    center = {name: array for name, array in tensors.items() if array.dtype == np.float32}
    floors = {
        profile: made_floor(errors, profile=profile, of=digest_of(outputs_in(tensors)), center=center).stored()
        for profile in ("fp32",)
    }
    ceiling = FaultEffects(("one", "two"), ("one",), {name: np.array([1.0, 2.0]) for name in errors})
    about = {"model": {"kind": "x", "head": 3, "adapters": [], "body": None}, "tokens": {"asked": {}, "tokenizer": {}}}
    return {**tensors, **parts({**floors, "ceiling": ceiling.stored()}), "about": json_tensor(about)}


def outputs_in(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in tensors.items() if name in (*VECTORS, *LOGITS)}


def embedding() -> dict[str, Any]:
    return with_floors({**ROWS.stored(), **VECTORS}, EVEN)


def causal() -> dict[str, Any]:
    rows = {"ids": np.array([5, 6, 7]), "lengths": np.array([2, 1]), "texts": json_tensor(PROMPTS)}
    return with_floors({**rows, **LOGITS}, {"all_error": 1e-3})


KINDS = {
    "embedding": (embedding, {"seq_len": [16]}),
    "peft-causal-lm": (causal, ADAPTED),
}


def read_all(path: Path, kind: str, *, prechecks: bool = True) -> None:
    """Read all that a run reads of a recorded file; no model is loaded."""
    case = Case(name="c", model=kind, source="random:llama", options=KINDS[kind][1])
    case = case.model_copy(update={"artifacts": Artifacts(reference=str(path))})
    pipeline = Pipeline(case, check(case), Store(path.parent / "store"), Silent())
    pipeline.inputs()
    pipeline.reference()
    if prechecks:
        pipeline.prechecks("onnx")
    pipeline.floor(Precision(compute="fp32"))
    pipeline.ceiling()


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_file_is_read(kind: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "r", sealed(KINDS[kind][0]()))
    read_all(tmp_path / "r", kind)


# --- edits that do not know of the digest -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_edit_is_seen(kind: str, tmp_path: Path) -> None:
    tensors = dict(sealed(KINDS[kind][0]()))
    for name, array in tensors.items():
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[-1] ^= 1
        for edited in ({**tensors, name: changed}, {n: a for n, a in tensors.items() if n != name}):
            save_tensors(tmp_path / "r", edited)
            if name == "digest" and "digest" not in edited:
                match = "no digest says"
            else:
                match = "it was changed since it was recorded"
            with pytest.raises(IncomparableError, match=match):
                read_recorded(tmp_path / "r")


def test_a_file_without_floors_needs_no_digest(tmp_path: Path) -> None:
    save_tensors(tmp_path / "r", {**ROWS.stored(), **VECTORS})
    assert set(read_recorded(tmp_path / "r")) == {"ids", "lengths", "texts", "output"}


# --- edits that compute the digest anew ---------------------------------------------------------------


def as_json(value: Any) -> Changes:
    return lambda _: json_tensor(value)


def attempt(path: Path, kind: str, *, prechecks: bool) -> str | None:
    """Return what is wrong with a recorded file."""
    try:
        read_all(path, kind, prechecks=prechecks)
    except ValidateError as exc:
        return str(exc)
    return None


RAW: dict[str, Any] = {
    "missing": None,
    "float": np.zeros(3, np.float32),
    "complex": np.zeros(3, np.complex64),
    "boolean": np.zeros(3, bool),
    "bytes": np.frombuffer(b"\xff\xfe\xff", np.uint8),
    "no JSON": np.frombuffer(b"{", np.uint8),
    "deep": np.frombuffer(b"[" * 200_000, np.uint8),
    "a number": np.frombuffer(b"3", np.uint8),
    "a list": np.frombuffer(b"[]", np.uint8),
    "an empty mapping": np.frombuffer(b"{}", np.uint8),
    "negative": np.array([-1, 2, 3]),
    "huge": np.array([1 << 62, 1 << 62, 1 << 62]),
    "another rank": np.zeros((2, 2), np.int64),
    "a scalar": np.array(3),
    "empty": np.zeros(0, np.int64),
    "no rows": np.zeros((0, 8), np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", RAW.values(), ids=RAW)
def test_a_part_of_another_form_is_an_error_of_ours_that_names_the_file(kind: str, value: Any, tmp_path: Path) -> None:
    whole = KINDS[kind][0]()
    silent = []
    for name in whole:
        tensors = {n: a for n, a in whole.items() if n != name or value is not None}
        save_tensors(tmp_path / "r", sealed(tensors if value is None else {**tensors, name: value}))
        problem = attempt(tmp_path / "r", kind, prechecks=name == "about")
        assert problem is None or str(tmp_path / "r") in problem, name
        silent += [name] if problem is None else []
    # what may be left out, or is judged by the comparison
    allowed = {n for n in whole if n in ("about", "output") or n.startswith("floor.")}
    assert set(silent) <= allowed, sorted(set(silent) - allowed)


@pytest.mark.parametrize(
    ("kind", "part", "update"),
    [
        ("embedding", "texts", {"texts": "abc"}),
        ("embedding", "texts", {"texts": ["a", "b"]}),
        ("embedding", "texts", {"texts": [1, 2, 3]}),
        ("embedding", "texts", {"pad": -1}),
        ("embedding", "texts", {"pad": "0"}),
        ("embedding", "texts", {"notes": None}),
        ("embedding", "texts", {"tables": {"tokens": -5}}),
        ("embedding", "texts", {"tables": [1]}),
        ("peft-causal-lm", "texts", {"interface": {"dims": [[2, 4]], "vocab": 11}}),
        ("peft-causal-lm", "texts", {"interface": {"dims": [], "vocab": -11}}),
        ("peft-causal-lm", "texts", {"interface": None}),
        ("peft-causal-lm", "texts", {"adapters": ["other"]}),
        ("peft-causal-lm", "texts", {"adapters": "base"}),
        ("peft-causal-lm", "texts", {"eos": ["a"]}),
        ("peft-causal-lm", "steps", np.array([2, 3])),
        ("peft-causal-lm", "steps", np.array([4, 0])),
        ("peft-causal-lm", "steps", np.array([4])),
        ("peft-causal-lm", "tokens", np.array([1, 2, 3, 11])),
        ("peft-causal-lm", "logits", np.zeros((4, 12), np.float32)),
        ("peft-causal-lm", "lengths", np.array([3, 0])),
        ("embedding", "lengths", np.array([7, -2, 1])),
        ("embedding", "ids", np.array([5, 6, -7, 8, 9, 10])),
        ("embedding", "floor.fp32/errors.rel_l2", np.full(8, -1e-3)),
        ("embedding", "floor.fp32/center.output", np.zeros((3, 9), np.float32)),
        ("embedding", "floor.ceiling/errors.rel_l2", np.zeros(3)),
    ],
)
def test_values_that_do_not_fit_are_named(kind: str, part: str, update: Any, tmp_path: Path) -> None:
    tensors = KINDS[kind][0]()
    if isinstance(update, dict):
        tensors[part] = json_tensor({**json.loads(tensors[part].tobytes()), **update})
    else:
        tensors[part] = update
    save_tensors(tmp_path / "r", sealed(tensors))
    with pytest.raises(IncomparableError) as caught:
        read_all(tmp_path / "r", kind)
    assert str(tmp_path / "r") in str(caught.value)
    assert part.rpartition(".")[2] in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("said", [3, [], None, {"model": 3}, {"model": {}, "tokens": 3}, {"tokens": {}}])
def test_what_a_file_says_of_itself_has_a_form(said: Any, tmp_path: Path) -> None:
    save_tensors(tmp_path / "r", sealed({**embedding(), "about": json_tensor(said)}))
    with pytest.raises(IncomparableError, match="tensor 'about'"):
        read_recorded(tmp_path / "r")


# --- files that are none ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["pipe", "device", "folder", "nothing", "nul", "long", "text", "half", "bf16", "claim"]
)
def test_what_is_no_safetensors_file_is_unavailable(what: str, tmp_path: Path) -> None:
    path = tmp_path / {"nul": "\0", "long": "x" * 300}.get(what, "r")
    whole = tmp_path / "whole"
    save_file({"output": np.zeros((3, 8), np.float32)}, whole)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("texts")
    elif what == "half":
        path.write_bytes(whole.read_bytes()[:-1])
    elif what in ("bf16", "claim"):
        shape, dtype, end = ([48], "BF16", 96) if what == "bf16" else ([1 << 40, 1 << 20], "F32", 96)
        header = json.dumps({"output": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(96))
    if what == "bf16":  # which numpy may know by another package
        with pytest.raises(ValidateError):
            read_recorded(path)
    else:
        with pytest.raises(Unavailable, match="cannot read"):
            read_recorded(path)
