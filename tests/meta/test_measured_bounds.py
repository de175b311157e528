# SPDX-License-Identifier: Apache-2.0
"""What measured bounds must never let pass, and what they find that a table of bounds does not; on small models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qeff_validate as qv
from qeff_validate.artifact import digest_tree
from qeff_validate.builders.store import PROVENANCE, Store
from qeff_validate.cli import main
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.config.case import Precision
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.prompts import LONG
from qeff_validate.mutation.mutant import mutants
from qeff_validate.pipeline.recorded_file import DIGEST, sealed
from qeff_validate.protocols import Session
from qeff_validate.report.result import Result
from qeff_validate.selftest.faulty_runtime import FaultyRuntime
from qeff_validate.tensors import Array, Tensors, load_tensors, save_tensors

FP32 = "floor.fp32/"
"""Begins names of the floor of float32 in a recorded file."""

FILE = "tensors.safetensors"

WIDE = {"rel_l2": 0.9, "cosine": 0.9, "norm_ratio": 0.9, "max_abs_rms": 9, "why": "a slip"}

TEXTS = [" ".join(LONG.split()[at * at : at * at + 1 + 3 * at % 11]) for at in range(10)]


def bert(name: str = "measured", **more: Any) -> qv.Case:
    options = {"pooling": "mean", "seq_len": [16, 32], "batch_size": 4}
    config = {"initializer_range": 0.2, "hidden_act": "gelu"}
    given = {"inputs": {"texts": TEXTS}, "options": options, "exporter": "torchscript", **more}
    return qv.Case(name=name, source="random:bert", config=config, **given)


def only(report: qv.Report) -> Result:
    (result,) = report.results
    return result


def on_torch(case: qv.Case, store: Path | None = None) -> Result:
    return only(qv.validate(case, ["torch"], store=store))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """What `record` writes."""
    folder = tmp_path_factory.mktemp("recorded")
    assert qv.validate(bert("own", precision={"compute": "fp32"}), ["torch"], record=folder).passed
    return load_tensors(folder / "own.safetensors")


@pytest.fixture(scope="module")
def other() -> Tensors:
    """The floor of a model that differs in its weights alone."""
    floor = Runner().pipeline(bert("other", seed=1)).floor(Precision(compute="fp32"))
    assert floor is not None
    return floor.stored()


def against(path: Path, tensors: Tensors) -> Result:
    """Validate the first model against a recorded file of these tensors."""
    save_tensors(path / "reference.safetensors", sealed({n: tensors[n] for n in tensors if n != DIGEST}))
    return on_torch(bert(artifacts={"reference": str(path / "reference.safetensors")}))


def floor_of(tensors: Tensors) -> dict[str, Array]:
    return {name.removeprefix(FP32): array for name, array in tensors.items() if name.startswith(FP32)}


def in_file(floor: Tensors) -> dict[str, Array]:
    return {f"{FP32}{name}": array for name, array in floor.items()}


# --- what cannot pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bound_that_is_no_number_is_refused_before_anything_runs(value: float, tmp_path: Path) -> None:
    tolerance = {"torch": {"rel_l2": value, "why": "a slip"}}
    with pytest.raises(ValueError, match="no usable bound"):
        bert(tolerance=tolerance)
    with pytest.raises(ConfigError, match="no usable bound"):
        qv.validate(bert().model_copy(update={"tolerance": tolerance}), ["torch"], store=tmp_path / "store")
    config = tmp_path / "case.yaml"
    line = "- {name: x, source: 'random:bert', tolerance: {torch: {rel_l2: %s, why: a slip}}}"
    config.write_text(f"cases:\n{line % ('.nan' if math.isnan(value) else '.inf')}\n")
    assert main(["run", str(config), "--runtimes", "torch", "--store", str(tmp_path / "store")]) == 2
    assert not (tmp_path / "store").exists()


def test_recorded_noise_that_is_no_number_gives_no_verdict(recorded: Tensors, tmp_path: Path) -> None:
    tensors = dict(recorded)
    tensors["floor.fp32/errors.rel_l2"] = tensors["floor.fp32/errors.rel_l2"] * np.nan
    result = against(tmp_path, tensors)
    assert result.status == "inconclusive"
    assert "the original model itself gives NaN or infinity in fp32" in result.reason


class Empty:
    """A session without rows, or without outputs."""

    def __init__(self, session: Session, *, outputs: bool) -> None:
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes
        self._session, self._outputs = session, outputs

    def run(self, feeds: Tensors, **options: Any) -> Tensors:
        out = self._session.run(feeds, **options)
        return {name: array[:0] for name, array in out.items()} if self._outputs else {}

    def reset(self) -> None:
        self._session.reset()


@pytest.mark.parametrize("outputs", [True, False], ids=["no row", "no output"])
def test_an_empty_comparison_does_not_pass(outputs: bool) -> None:
    result = Runner().pipeline(bert()).result(FaultyRuntime(lambda session: Empty(session, outputs=outputs), "torch"))
    assert result.status in ("fail", "error")
    assert result.compared == 0
    assert on_torch(bert(inputs={"texts": []})).status == "error"


def test_intact_the_recorded_files_pass(recorded: Tensors, tmp_path: Path) -> None:
    result = against(tmp_path, recorded)
    assert (result.status, result.reference) == ("pass", "recorded"), result.reason
    assert {item.bound.source for item in result.metrics if item.bound} == {"floor", "exact"}
    assert result.power is not None


def test_a_recorded_floor_of_another_model_or_precision_is_refused(
    recorded: Tensors, other: Tensors, tmp_path: Path
) -> None:
    own = floor_of(recorded)
    assert own.keys() == other.keys()
    result = against(tmp_path, {**recorded, **in_file(other)})
    assert (result.status, result.compared) == ("error", 0)
    assert "measured for other reference outputs" in result.reason
    half = replace(Floor.from_stored(own), profile="fp16").stored()
    result = against(tmp_path, {**recorded, **in_file(half)})
    assert (result.status, result.compared) == ("error", 0)
    assert "measured in fp16, and this run computes in fp32" in result.reason
    result = against(tmp_path, {**recorded, "output": recorded["output"] * np.float32(1 + 1e-6)})
    assert "measured for other reference outputs" in result.reason


def test_a_stored_floor_of_another_model_is_made_anew_or_refused(other: Tensors, tmp_path: Path) -> None:
    assert on_torch(bert(), tmp_path).status == "pass"
    ((place),) = (tmp_path / "floor").iterdir()
    right = digest_tree(place)[FILE]
    save_tensors(place / FILE, other)
    wrong = digest_tree(place)[FILE]
    assert on_torch(bert(), tmp_path).status == "pass"
    assert digest_tree(place)[FILE] == right, "it was not made anew"
    save_tensors(place / FILE, other)
    told = json.loads((place / PROVENANCE).read_text())
    (place / PROVENANCE).write_text(json.dumps({**told, "files": {FILE: wrong}}))
    result = on_torch(bert(), tmp_path)
    assert (result.status, result.compared) == ("error", 0)
    assert "measured for other reference outputs" in result.reason


# --- adapters ---------------------------------------------------------------------------------------------


def lora(**adapters: Mapping[str, Any]) -> qv.Case:
    made = {"peft_method": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    options = {"adapters": {name: {**made, **own} for name, own in adapters.items()}}
    sizes = {"prefill_seq_len": 8, "ctx_len": 48, "batch_size": 2, "max_new_tokens": 3, "prompts": ["a b c", "d e"]}
    return qv.Case(name="lora", model="peft-causal-lm", source="random:llama", options={**options, **sizes})


def test_an_adapter_without_effect_is_no_pass_and_one_with_is() -> None:
    result = on_torch(lora(a={"init": "peft"}, b={"init": "random", "seed": 1}))
    assert result.status == "inconclusive"
    assert "adapter 'a' changes log-probabilities by 0.0e+00, 0.0 times the noise" in result.reason
    assert "adapter 'b' changes" not in result.reason
    same = {"init": "random", "seed": 1}
    result = on_torch(lora(a=same, b=same))
    assert result.status == "inconclusive"
    assert "adapters 'a' and 'b' say the same, so a swap would not be seen" in result.reason
    result = on_torch(lora(a=same, b={**same, "seed": 2}))
    assert result.status == "pass", result.reason
    result = on_torch(lora(a={"init": 0}))
    assert (result.status, result.stage) == ("error", "config")
    assert "init: wanted peft, random, or a standard deviation above 0" in result.reason


# --- tables, and bounds of the case's own ------------------------------------------------------------------


def test_the_table_measures_nothing(tmp_path: Path) -> None:
    kinds = {}
    for tolerance in ("table", "auto"):
        result = on_torch(bert(tolerance=tolerance), tmp_path / tolerance)
        assert result.status == "pass", result.reason
        kinds[tolerance] = {kept.kind for kept in Store(tmp_path / tolerance).entries()}
        sources = {item.bound.source for item in result.metrics if item.bound}
        assert sources == ({"fallback", "exact"} if tolerance == "table" else {"floor", "exact"})
        assert (result.power is None) == (tolerance == "table")
    assert kinds["table"] == {"inputs", "reference", "states"}
    assert kinds["auto"] == {"inputs", "reference", "states", "floor", "ceiling"}


def test_bounds_that_let_gross_faults_through_prove_nothing() -> None:
    result = on_torch(bert(tolerance={"torch": WIDE}))
    assert result.status == "inconclusive"
    assert all(item.passed for item in result.metrics), "the outputs are right"
    gross = {mutant.name for mutant in mutants("embedding") if mutant.gross}
    named = {name for name in gross if repr(name) in result.reason}
    assert named
    assert result.power is not None
    assert named == set(result.power.gross) == gross & set(result.power.missed)
    tight = on_torch(bert(tolerance={"torch": {"rel_l2": 1e-4, "why": "measured"}}))
    assert tight.status == "pass", tight.reason


def test_the_report_holds_the_power_and_what_values_are_over(tmp_path: Path) -> None:
    report = qv.validate([bert(), bert("wide", tolerance={"torch": WIDE})], ["torch"])
    report.write(tmp_path)
    good, wide = json.loads((tmp_path / "report.json").read_text())["results"]
    for result in (good, wide):
        power = result["power"]
        assert set(power) == {"tried", "caught", "share", "missed"}
        assert power["caught"] == power["tried"] - len(power["missed"])
        assert power["share"] == pytest.approx(power["caught"] / power["tried"])
    assert good["power"]["tried"] == wide["power"]["tried"] > 5
    assert good["power"]["share"] > 0.9
    assert wide["power"]["share"] < 0.5
    (metric,) = [item for item in good["metrics"] if item["name"] == "output.rel_l2"]
    assert metric["over_bound"] == pytest.approx(metric["value"] / metric["bound"])
    assert metric["over_floor"] == pytest.approx(metric["value"] / metric["floor"])
    assert 0 < metric["floor"] < metric["bound"]


# --- below the noise of a precision -------------------------------------------------------------------------


class Changed:
    """A session whose outputs go through a function."""

    def __init__(self, session: Session, change: Callable[[Array], Array]) -> None:
        self.inputs, self.outputs, self.shapes = session.inputs, session.outputs, session.shapes
        self._session, self._change = session, change

    def run(self, feeds: Tensors, **options: Any) -> Tensors:
        return {name: self._change(array) for name, array in self._session.run(feeds, **options).items()}

    def reset(self) -> None:
        self._session.reset()


def scaled(array: Array) -> Array:
    return array * np.float32(1.0008)


def shifted(array: Array) -> Array:
    out = array.copy()
    out[:, 7] += np.float32(0.01) * np.sqrt((array**2).mean(axis=1))
    return out


@pytest.mark.parametrize(
    ("change", "gate"), [(scaled, "mean_norm"), (shifted, "mean_signed")], ids=["all x 1.0008", "one column + 1 %"]
)
def test_a_device_s_error_below_its_noise_is_seen_if_all_rows_have_it(
    change: Callable[[Array], Array], gate: str
) -> None:
    pipeline = Runner().pipeline(bert())
    intact = pipeline.result(FaultyRuntime(lambda session: session, "sim"))
    assert intact.status == "pass", intact.reason
    result = pipeline.result(FaultyRuntime(lambda session: Changed(session, change), "sim"))
    assert result.status == "fail"
    failed = {item.metric.name for item in result.metrics if not item.passed}
    assert f"output.{gate}" in failed
    assert not {"output.rel_l2", "output.cosine", "output.neighbour_order"} & failed
