# SPDX-License-Identifier: Apache-2.0
"""Wrong artifacts and inputs end to end: each is named as what it is, before the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from upstream.bench import adapters

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.prechecks.checks import PRECHECKS
from qeff_validate.report.result import Result

TEXTS = ["a river begins in the hills", "rain", "small streams that nobody named"]


def case(pooling: str = "mean", texts: list[str] | None = None, **more: Any) -> qv.Case:
    options = {"pooling": pooling, "seq_len": [16], **more.pop("options", {})}
    return qv.Case(
        name="small", source="random:bert", options=options, inputs={"texts": texts or TEXTS}, tolerance="table",
        exporter="torchscript", **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def exported(runner: Runner) -> str:
    return str(runner.pipeline(case()).onnx().path)


def differing(result: Result) -> list[str]:
    assert [precheck.name for precheck in result.prechecks] == list(PRECHECKS)
    return [precheck.name for precheck in result.prechecks if precheck.state == "differs"]


def test_what_is_right_passes_and_its_rungs_say_so(runner: Runner, exported: str) -> None:
    result = runner.result(case(artifacts={"onnx": exported}), "ort")
    assert result.status == "pass", result.reason
    states = {precheck.name: precheck.state for precheck in result.prechecks}
    assert states == {**dict.fromkeys(PRECHECKS, "same"), "adapters": "unknown"}


def test_a_graph_for_another_pooling_is_named_and_its_numbers_are_told(runner: Runner, exported: str) -> None:
    result = runner.result(case("cls", artifacts={"onnx": exported}), "ort")
    assert (result.status, result.stage, differing(result)) == ("fail", "precheck", ["pooling"])
    assert (
        "pooling: the graph was exported with mean, the case asks for cls. The numbers: output.rel_l2" in result.reason
    )


def test_a_graph_of_other_weights_is_named_also_where_its_file_was_edited(
    runner: Runner, exported: str, tmp_path: Path
) -> None:
    onnx.save(onnx.load(exported), str(tmp_path / "copy.onnx"), save_as_external_data=True, size_threshold=100)
    result = runner.result(case(seed=1, artifacts={"onnx": str(tmp_path / "copy.onnx")}), "ort")
    assert (result.status, result.stage, differing(result)) == ("fail", "precheck", ["weights"])
    assert "seed: 0, the case asks for 1" in result.reason


def test_a_graph_of_another_checkpoint_is_told_by_its_matrices(runner: Runner, tmp_path: Path) -> None:
    for seed in (0, 1):
        Random("bert", {}, seed).body().save_pretrained(tmp_path / str(seed))
        (tmp_path / str(seed) / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nrain\na\nriver\n")
    cases = [case().model_copy(update={"source": f"path:{tmp_path / str(seed)}"}) for seed in (0, 1)]
    path = str(runner.pipeline(cases[0]).onnx().path)
    update = {"artifacts": cases[1].artifacts.model_copy(update={"onnx": path})}
    right, wrong = (runner.pipeline(case.model_copy(update=update)).prechecks("onnx") for case in cases)
    assert {precheck.name for precheck in right if precheck.state == "differs"} == set()
    (differing,) = (precheck for precheck in wrong if precheck.state == "differs")
    assert differing.name == "weights"
    assert "model.safetensors" in differing.detail
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    update = {"artifacts": cases[1].artifacts.model_copy(update={"onnx": str(tmp_path / "foreign.onnx")})}
    right, wrong = (runner.pipeline(case.model_copy(update=update)).prechecks("onnx") for case in cases)
    states = [
        [(precheck.state, precheck.suspect) for precheck in prechecks if precheck.name == "weights"]
        for prechecks in (right, wrong)
    ]
    assert states == [[("same", False)], [("unknown", True)]], "a graph that is not ours may be quantized or fused"


def test_a_recorded_reference_of_other_texts_is_named(runner: Runner, tmp_path: Path) -> None:
    path = str(runner.pipeline(case()).record(tmp_path))
    same = runner.result(case(artifacts={"reference": path}), "ort")
    assert (same.status, differing(same)) == ("pass", []), same.reason
    other = runner.result(case(texts=[TEXTS[0], "snow", TEXTS[2]], artifacts={"reference": path}), "ort")
    assert (other.status, other.stage, differing(other)) == ("fail", "precheck", ["token ids"])
    assert "row 1 is" in other.reason
    assert "'rain'" in other.reason
    assert "'snow'" in other.reason
    model = runner.result(case("cls", seed=2, artifacts={"reference": path}), "ort")
    assert differing(model) == ["pooling", "weights"]
    assert "the reference was recorded with mean" in model.reason


def test_a_qpc_says_what_it_was_compiled_for(runner: Runner) -> None:
    qpc = str(qv.build(qv.model(case()), "qpc").path)
    for pooling, wrong in (("mean", []), ("cls", ["pooling"])):
        prechecks = runner.pipeline(case(pooling, artifacts={"qpc": qpc})).prechecks("qpc")
        assert [precheck.name for precheck in prechecks if precheck.state == "differs"] == wrong
    longer = case(texts=[*TEXTS, "word " * 20], options={"seq_len": [32]}, artifacts={"qpc": qpc})
    prechecks = runner.pipeline(longer).prechecks("qpc")
    assert [precheck.detail for precheck in prechecks if precheck.state == "differs"] == [
        "the graph takes 16 tokens, the longest row has 22"
    ]


def test_a_seq_len_beyond_the_positions_is_named_instead_of_a_crash(runner: Runner) -> None:
    result = runner.result(
        case(texts=[*TEXTS, "word " * 45], config={"max_position_embeddings": 40}, options={"seq_len": [48]}), "torch"
    )
    assert (result.status, result.stage, differing(result)) == ("fail", "precheck", ["max length"])
    assert "the case asks for 48 tokens, the model has positions for 40" in result.reason
    assert "The numbers: there are none: cannot run the Hugging Face model" in result.reason


class Letters:
    """A tokenizer of another model: it knows more than a thousand tokens."""

    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) + 900 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 997}


def test_ids_of_another_models_tokenizer_are_named_instead_of_a_crash() -> None:
    body = Random("bert", {"vocab_size": 1000}, 0).body()
    report = qv.validate(case(texts=["a", "be", "c"]), ["torch"], model=body, tokenizer=Letters())
    (result,) = report.results
    assert (result.status, differing(result)) == ("fail", ["token ids"])
    assert "row 1 ('be') has the id 1001, the model embeds 0 to 999" in result.reason


def test_a_graph_for_adapters_of_another_rank_is_named(runner: Runner) -> None:
    path = str(runner.pipeline(adapters()).onnx().path)
    wider = adapters(path, peft={"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]})
    result = runner.result(wider.model_copy(update={"tolerance": "table"}), "ort")
    assert (result.status, result.stage, differing(result)) == ("fail", "precheck", ["adapters"])
    assert "adapters with r 4, the case's have 8" in result.reason
    own = runner.result(adapters(path).model_copy(update={"tolerance": "table"}), "ort")
    assert own.status == "pass", own.reason
    assert {precheck.name for precheck in own.prechecks if precheck.state != "same"} == {"pooling", "normalize"}


def test_a_recorded_reference_is_judged_where_its_source_is_gone(runner: Runner, exported: str, tmp_path: Path) -> None:
    user_artifacts = {"reference": str(runner.pipeline(case()).record(tmp_path)), "onnx": exported}
    gone = case(artifacts=user_artifacts).model_copy(update={"source": "path:/nowhere"})
    result = Runner(store=tmp_path / "empty").result(gone, "ort")
    assert result.status == "pass", result.reason
    unknown = {precheck.name: precheck.detail for precheck in result.prechecks if precheck.state == "unknown"}
    assert set(unknown) == {"token ids", "weights", "adapters"}
    assert "directory /nowhere does not exist" in unknown["weights"]
