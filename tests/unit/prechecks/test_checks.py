# SPDX-License-Identifier: Apache-2.0
"""Each precheck: same, differs, unknown. The evidence is written by hand, so nothing is exported or run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import qeff_validate as qv
from qeff_validate.builders.provenance import METADATA_KEY, QPC_PROVENANCE, GraphProvenance, read_provenance
from qeff_validate.engine import model
from qeff_validate.errors import ConfigError
from qeff_validate.models.sources.embedding_tables import file_tables, tables
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.prechecks.checks import (
    PRECHECKS,
    Evidence,
    collect_evidence,
    run_prechecks,
    with_feed_prechecks,
    with_prechecks,
)
from qeff_validate.prechecks.feed_monitor import FeedMonitor
from qeff_validate.prechecks.weights_in_graph import WeightMatches, find_weights
from qeff_validate.report.result import Precheck, Result
from qeff_validate.report.text import problems
from qeff_validate.tensors import TensorSpec

HEAD = {"pooling": "mean", "code": None, "normalize": False, "truncate_dim": None}
BODY = {"random": "bert", "config": {}, "seed": 0, "torch": "1", "transformers": "2"}
ASKED = {"texts": ["a b", "c", "d"], "prompt": "", "seq_len": [8], "truncate": False, "boundary": False}
LORA = {"a": {"peft_method": "lora", "r": 4}}


class Wrapper:
    """A model wrapper that says what it is told to."""

    def __init__(self, **settings: Any) -> None:
        self.said = {"kind": "embedding", "head": dict(HEAD), **settings}
        self.made, self.asks, self.files, self.tokenized = rows(), dict(ASKED), dict[str, Any](), 0
        self.key: Any = {"words": "bert", "transformers": "5"}

    def settings(self) -> Mapping[str, Any]:
        return self.said

    def asked(self) -> Mapping[str, Any]:
        return self.asks

    def tokenizer_key(self) -> Any:
        if isinstance(self.key, Exception):
            raise self.key
        return self.key

    def rows(self) -> TokenRows:
        self.tokenized += 1
        return self.made

    def reach(self, inputs: TokenRows) -> int:
        return 8

    def published(self) -> Mapping[str, Any]:
        return self.files


def rows(*ids: list[int], pad: int = 0, **sizes: int) -> TokenRows:
    given = ids or ([1, 2, 3], [4, 5], [6])
    texts = tuple(f"text {row}" for row in range(len(given)))
    return TokenRows(tuple(np.array(row, dtype=np.int64) for row in given), pad, texts, tables=sizes)


def made_from(**changes: Any) -> dict[str, Any]:
    return {"kind": "embedding", "head": dict(HEAD), "body": dict(BODY), **changes}


def recorded(**changes: Any) -> dict[str, Any]:
    said = {"model": made_from(), "tokens": {"asked": dict(ASKED), "tokenizer": {"words": "bert", "transformers": "4"}}}
    return {**said, **changes}


def precheck(name: str, wrapper: Any = None, inputs: Any = None, body: Any = BODY, **evidence: Any) -> Precheck:
    prechecks = run_prechecks(wrapper or Wrapper(), inputs or rows(), Evidence(**evidence), lambda: body)
    assert [result.name for result in prechecks] == list(PRECHECKS)
    return next(result for result in prechecks if result.name == name)


def test_what_the_case_builds_itself_is_the_same_and_nothing_is_looked_at() -> None:
    def body() -> Any:
        raise AssertionError("weights were hashed")

    wrapper = Wrapper()
    prechecks = run_prechecks(wrapper, rows(tokens=9, positions=8), Evidence(), body)
    states = {result.name: result.state for result in prechecks}
    assert states == {name: "unknown" if name in ("mask", "positions") else "same" for name in PRECHECKS}
    assert wrapper.tokenized == 0


def test_a_plug_in_without_settings_is_unknown_throughout() -> None:
    prechecks = run_prechecks(object(), object(), Evidence(), dict)
    assert [(result.name, result.state) for result in prechecks] == [(name, "unknown") for name in PRECHECKS]


def test_a_foreign_graph_says_nothing() -> None:
    for name in ("pooling", "normalize", "weights", "adapters"):
        result = precheck(name, graph=GraphProvenance())
        assert (result.state, "nothing says" in result.detail) == ("unknown", True), result


# --- token ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "said"), [([1, 7], "the id 7"), ([-1, 1], "the id -1")])
def test_an_id_that_is_not_embedded_differs(ids: list[int], said: str) -> None:
    result = precheck("token ids", inputs=rows([1], ids, tokens=7))
    assert result.state == "differs"
    assert "row 1 ('text 1')" in result.detail
    assert said in result.detail
    assert "0 to 6" in result.detail
    assert precheck("token ids", inputs=rows([1], [6, 0], [], tokens=7)).state == "same"


def test_recorded_inputs_of_the_same_texts_and_tokenizer_are_not_tokenized_again() -> None:
    wrapper = Wrapper()
    assert precheck("token ids", wrapper, recorded=recorded()).state == "same", (
        "another version of a package is no difference"
    )
    assert wrapper.tokenized == 0


def test_recorded_inputs_with_another_tokenizer_file_are_compared_one_by_one() -> None:
    wrapper = Wrapper()
    wrapper.key = {"words": "other"}
    assert precheck("token ids", wrapper, recorded=recorded()).state == "same"
    assert wrapper.tokenized == 1
    wrapper.made = rows([1, 2, 3], [4, 9], [6])
    result = precheck("token ids", wrapper, recorded=recorded())
    assert result.state == "differs"
    assert "row 1 is [4, 5]" in result.detail
    assert "[4, 9]" in result.detail


@pytest.mark.parametrize(
    ("now", "said"), [(rows(pad=3), "padding is 0 in the recorded file, 3"), (rows([1, 2, 3]), "has 3 rows")]
)
def test_padding_and_number_of_rows_are_compared(now: TokenRows, said: str) -> None:
    wrapper = Wrapper()
    wrapper.made = now
    result = precheck("token ids", wrapper, recorded={})  # recorded before this was kept: only the rows can tell
    assert (result.state, said in result.detail) == ("differs", True), result


def test_recorded_inputs_are_unknown_where_nothing_can_be_tokenized() -> None:
    wrapper = Wrapper()
    wrapper.key = ConfigError("no such directory")

    def refuse() -> TokenRows:
        raise ConfigError("no such directory")

    wrapper.rows = refuse  # type: ignore[method-assign]
    result = precheck("token ids", wrapper, recorded=recorded())
    assert (result.state, "no such directory" in result.detail) == ("unknown", True)


def test_texts_are_compared_where_the_source_is_far() -> None:
    wrapper = Wrapper()
    assert precheck("token ids", wrapper, recorded=recorded(), local=False).state == "unknown"
    wrapper.asks["texts"] = ["a b ", "c", "d"]
    assert precheck("token ids", wrapper, recorded=recorded(), local=False).state == "unknown", (
        "a blank may be no difference"
    )
    wrapper.asks["texts"] = ["a b", "c", "e"]
    assert precheck("token ids", wrapper, recorded=recorded(), local=False).state == "differs"
    assert wrapper.tokenized == 0


# --- head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "state"),
    [
        ("pooling", {"pooling": "cls"}, "differs"),
        ("pooling", {"pooling": "avg"}, "same"),
        ("pooling", {"pooling": "mine:pool", "code": "x"}, "unknown"),
        ("pooling", {"truncate_dim": 64}, "differs"),
        ("pooling", {}, "same"),
        ("normalize", {"normalize": True}, "differs"),
        ("normalize", {}, "same"),
    ],
)
@pytest.mark.parametrize("side", ["graph", "recorded"])
def test_the_head_of_each_side_is_compared(side: str, name: str, change: dict[str, Any], state: str) -> None:
    said = made_from(head={**HEAD, **change})
    evidence: dict[str, Any] = (
        {"graph": GraphProvenance(said)} if side == "graph" else {"recorded": recorded(model=said)}
    )
    result = precheck(name, **evidence)
    assert result.state == state
    if state == "differs":
        begins = "the graph was exported with" if side == "graph" else "the reference was recorded with"
        assert result.detail.startswith(begins)
        assert "the case asks for" in result.detail
    assert result.suspect == (state == "unknown")


def test_a_difference_of_one_side_is_not_hidden_by_the_other() -> None:
    graph = GraphProvenance(made_from(head={**HEAD, "pooling": "cls"}))
    assert precheck("pooling", graph=graph, recorded=recorded()).state == "differs"
    assert precheck("pooling", graph=graph, recorded={}).state == "differs"
    assert precheck("pooling", graph=GraphProvenance(), recorded=recorded()).state == "unknown"


def test_what_sentence_transformers_says_is_a_remark() -> None:
    wrapper = Wrapper()
    wrapper.files = {"pooling": "cls", "normalize": True, "max_seq_length": 4}
    for name in ("pooling", "normalize", "max length"):
        result = precheck(name, wrapper)
        assert (result.state, "sentence-transformers' files" in result.detail) == ("same", True), result
    wrapper.files = {"pooling": "avg", "normalize": False, "max_seq_length": 8}
    assert not any("sentence" in precheck(name, wrapper).detail for name in ("pooling", "normalize", "max length"))


# --- max length ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "sizes", "state", "said"),
    [
        (GraphProvenance(), {"positions": 8}, "same", ""),
        (GraphProvenance(), {"positions": 7}, "differs", "asks for 8 tokens, the model has positions for 7"),
        (GraphProvenance(max_tokens=2), {}, "differs", "the graph takes 2 tokens, the longest row has 3"),
        (GraphProvenance(max_tokens=3), {}, "unknown", "no row is longer"),
        (GraphProvenance(max_tokens=8), {}, "same", ""),
        (GraphProvenance(), {"positions": 10, "first_position": 2}, "same", ""),
        (
            GraphProvenance(),
            {"positions": 9, "first_position": 2},
            "differs",
            "positions for 7 (a table of 9 rows, in which the",
        ),
        (GraphProvenance(max_positions=7), {}, "differs", "keeps 7 positions"),
        (GraphProvenance(max_positions=8), {}, "same", ""),
        (None, {}, "same", ""),
    ],
)
def test_lengths(graph: GraphProvenance | None, sizes: dict[str, int], state: str, said: str) -> None:
    result = precheck("max length", inputs=rows(**sizes), graph=graph)
    assert (result.state, said in result.detail) == (state, True), result


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"], {"tokens": 9, "positions": 9}),
        (["transformer.wte.weight", "transformer.wpe.weight"], {"tokens": 9, "positions": 9}),
        (["model.embed_tokens.weight", "visual.position_embedding.weight"], {"tokens": 9}),
        (["encoder.relative_attention_bias.weight"], {}),
    ],
)
def test_tables_are_those_of_the_text(names: list[str], sizes: dict[str, int], tmp_path: Path) -> None:
    assert tables(dict.fromkeys(names, (9, 4))) == sizes
    save_file({name: np.zeros((9, 4), np.float32) for name in names}, tmp_path / "model.safetensors")
    assert file_tables([tmp_path / "model.safetensors"]) == sizes
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert file_tables([tmp_path / "model.safetensors"]) == {}


# --- weights ---------------------------------------------------------------------------------------


def test_weights_from_a_seed_differ_by_it_and_not_by_a_package() -> None:
    assert precheck("weights", graph=GraphProvenance(made_from(body={**BODY, "torch": "9"}))).state == "same"
    result = precheck("weights", graph=GraphProvenance(made_from(body={**BODY, "seed": 3})))
    assert (result.state, "seed: 3, the case asks for 0" in result.detail) == ("differs", True), result
    result = precheck("weights", graph=GraphProvenance(made_from(body={**BODY, "config": {"eos_token_id": 1}})))
    assert (result.state, result.suspect) == ("unknown", True), "a config may change nothing in the graph"
    assert precheck("weights", graph=GraphProvenance(made_from()), local=False).state == "unknown"


FILES = {"files": {"model.safetensors": "1", "config.json": "2"}}


@pytest.mark.parametrize(
    ("matches", "own", "state"),
    [
        (WeightMatches(4, 4, 0), True, "same"),
        (WeightMatches(4, 0, 4), True, "differs"),
        (WeightMatches(4, 0, 4), False, "unknown"),
        (WeightMatches(4, 0, 3), True, "unknown"),
        (WeightMatches(4, 1, 3), True, "unknown"),
        (WeightMatches(0, 0, 0), True, "unknown"),
    ],
)
def test_files_with_another_digest_are_decided_by_what_stands_in_the_graph(
    matches: WeightMatches, own: bool, state: str
) -> None:
    said = made_from(body={"files": {**FILES["files"], "model.safetensors": "3"}}) if own else None
    got = precheck("weights", body=FILES, graph=GraphProvenance(said), find_weights=lambda: matches)
    assert got.state == state
    if state == "differs":
        assert "model.safetensors" in got.detail


def test_matrices_are_found_as_they_are_and_transposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, two, other = (rng.normal(size=(32, 48)).astype(np.float32) for _ in range(3))
    half = (rng.normal(size=(40, 40)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    save_file(
        {"one": one, "two": two, "bias": one[0], "zero": np.zeros((64, 64), np.float32)}, tmp_path / "a.safetensors"
    )
    raw = {"half": {"dtype": "BF16", "shape": [40, 40], "data_offsets": [0, 3200]}}
    text = json.dumps(raw).encode()
    data = (half.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    (tmp_path / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    def graph(*arrays: np.ndarray, external: bool) -> Path:
        initializers = [
            numpy_helper.from_array(np.ascontiguousarray(array), f"w{at}") for at, array in enumerate(arrays)
        ]
        graph_model = helper.make_model(helper.make_graph([], "g", [], [], initializers))
        name = f"{len(list(tmp_path.iterdir()))}"
        onnx.save(
            graph_model, str(tmp_path / f"{name}.onnx"), save_as_external_data=external, location=name, size_threshold=0
        )
        return tmp_path / f"{name}.onnx"

    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for external in (False, True):
        assert find_weights(graph(one, two.T, half, external=external), files) == WeightMatches(3, 3, 0)
        assert find_weights(graph(one, other, external=external), files) == WeightMatches(3, 1, 1)
    changed = one.copy()
    changed[-1, -1] += 1e-3
    assert find_weights(graph(changed, two, half, external=False), files) == WeightMatches(3, 2, 1)


# --- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        ({"adapters": LORA}, "same", ""),
        ({"adapters": {"b": {"peft_method": "lora", "r": 4}}}, "same", ""),
        ({"adapters": {"a": {"peft_method": "lora", "r": 8}}}, "differs", "r 8, the case's have 4"),
        ({"adapters": {"a": {"peft_method": "rslora", "r": 4}}}, "differs", "use_rslora True, the case's have False"),
        ({"adapters": {"a": {"peft_type": "LORA", "r": 4}}}, "unknown", ""),
        ({"adapters": {"a": {"saved": {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}}}}, "unknown", ""),
        ({"adapters": {"a": {"saved": {"peft_type": "LORA", "r": 2}}}}, "differs", "r 2, the case's have 4"),
        ({"adapters": {}}, "differs", "for 0 adapters, the case has 1"),
        ({"adapters": LORA, "mixed": True}, "differs", "mixed_batch True"),
    ],
)
def test_adapters(said: dict[str, Any], state: str, words: str) -> None:
    wrapper = Wrapper(adapters=LORA, mixed=False)
    result = precheck("adapters", wrapper, graph=GraphProvenance(made_from(**{"mixed": False, **said})))
    assert (result.state, words in result.detail) == (state, True), result


def test_a_number_of_adapters_counts_in_a_mixed_batch_alone() -> None:
    two = {**LORA, "b": {"peft_method": "lora", "r": 4}}
    for mixed, state in ((False, "same"), (True, "differs")):
        wrapper = Wrapper(adapters=LORA, mixed=mixed)
        assert precheck("adapters", wrapper, graph=GraphProvenance(made_from(adapters=two, mixed=mixed))).state == state


# --- feeds -----------------------------------------------------------------------------------------


class Sink:
    """A session that takes anything."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    shapes: tuple[Any, ...] = ()

    def run(self, feeds: Any, *, fetch: Any = None) -> Any:
        return {}

    def reset(self) -> None:
        pass


def fed(*runs: dict[str, Any], inputs: Any = None) -> dict[str, Precheck]:
    monitor = FeedMonitor(Sink(), rows() if inputs is None else inputs)
    for feeds in runs:
        monitor.run({name: np.array(value) for name, value in feeds.items()})
    return {result.name: result for result in monitor.prechecks()}


IDS, MASK = [[1, 2, 3], [4, 5, 0], [0, 0, 6]], [[1, 1, 1], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("mask", "ids", "said"),
    [
        (MASK, IDS, None),
        ([[1, 1, 1], [1, 0, 0], [0, 0, 1]], IDS, "1 tokens that are none of the case's rows"),
        ([[1, 1, 1], [1, 1, 1], [0, 0, 1]], IDS, "3 tokens that are none"),
        ([[1, 1, 1], [1, 2, 0], [0, 0, 1]], IDS, "other numbers than 0 and 1"),
        ([[1, 1, 1], [1, 1, 0], [1, 1, 0]], [[1, 2, 3], [4, 5, 0], [4, 5, 0]], "1 of 3 rows were never fed"),
    ],
)
def test_masks_cover_each_row(mask: Any, ids: Any, said: str | None) -> None:
    result = fed({"input_ids": ids, "attention_mask": mask})
    assert result["mask"].state == ("same" if said is None else "differs")
    assert (said or "") in result["mask"].detail
    assert result["positions"].state == "same"


CHUNKS = ([[1, 2], [4, 5]], [[0, 1], [0, 1]]), ([[3, 0], [7, 0]], [[2, -1], [2, -1]]), ([[6], [0]], [[0], [-1]])


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (None, "", ""),
        ((1, 1, 0, 0, 3), "positions", "go on with [3] after 2 tokens"),
        ((0, 1, 1, 0, 1), "positions", "go on with [1, 1] after 0 tokens"),
        ((0, 0, 0, 1, 9), "mask", "begins with none of the case's rows"),
        ((2, 1, 0, 0, -1), "mask", "1 of 3 rows were never fed"),
    ],
)
def test_positions_count_up_over_runs(change: Any, name: str, said: str) -> None:
    runs: Any = copy.deepcopy(CHUNKS)
    if change:
        run, what, row, column, value = change
        runs[run][what][row][column] = value
    result = fed(*({"input_ids": ids, "position_ids": places} for ids, places in runs))
    for each in ("mask", "positions"):
        assert result[each].state == ("differs" if each == name else "same"), result
    assert not name or said in result[name].detail


def test_what_a_plug_in_feeds_is_unknown() -> None:
    assert {result.state for result in fed({"pixels": [1]}).values()} == {"unknown"}
    assert {result.state for result in fed({"input_ids": IDS, "attention_mask": MASK}, inputs=object()).values()} == {
        "unknown"
    }


# --- what comes of it ------------------------------------------------------------------------------


def test_a_difference_fails_whatever_the_numbers_say_and_is_told_first() -> None:
    wrong = Precheck("pooling", "differs", "the graph was exported with cls, the case asks for mean")
    for status, reason in (("pass", ""), ("fail", "rel_l2 0.3"), ("error", "there are none: it broke")):
        result = with_prechecks(Result("c", "ort", status, reason, prechecks=(wrong,)))  # type: ignore[arg-type]
        assert (result.status, result.stage) == ("fail", "precheck")
        assert result.reason.startswith(
            "pooling: the graph was exported with cls, the case asks for mean. The numbers: "
        )
        assert result.reason.endswith(reason or "within their bounds all the same")


def test_a_suspicion_is_told_only_if_the_numbers_fail() -> None:
    suspect = Precheck("weights", "unknown", "0 of the model's 4 largest matrices are in the graph", suspect=True)
    assert with_prechecks(Result("c", "ort", "pass", prechecks=(suspect,))).reason == ""
    failed = with_prechecks(Result("c", "ort", "fail", "rel_l2 0.3", "compare", prechecks=(suspect,)))
    assert (failed.status, failed.stage) == ("fail", "compare")
    assert failed.reason.startswith("rel_l2 0.3. Before looking further: weights: 0 of the model's 4")
    plain = Precheck("weights", "unknown", "nothing says")
    assert with_prechecks(Result("c", "ort", "fail", "rel_l2 0.3", prechecks=(plain,))).reason == "rel_l2 0.3"


def test_the_report_holds_every_rung_and_prints_those_that_differ() -> None:
    prechecks = with_feed_prechecks(
        (Precheck("mask", "unknown", "not yet"), Precheck("pooling", "differs", "x")), [Precheck("mask", "same")]
    )
    result = with_prechecks(Result("c", "ort", "pass", prechecks=prechecks, precision="fp32"))
    said = [{"name": "mask", "state": "same", "detail": ""}, {"name": "pooling", "state": "differs", "detail": "x"}]
    assert result.plain()["prechecks"] == said
    (line,) = problems((result,))
    assert line.startswith("c-ort: fail at precheck: pooling: x")


# --- where it is kept ------------------------------------------------------------------------------


def test_a_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 12])
    graph_model = helper.make_model(helper.make_graph([], "g", [ids], []))
    path = tmp_path / "m.onnx"
    onnx.save(graph_model, str(path))
    assert read_provenance("onnx", path, "ids") == GraphProvenance(None, 12)
    helper.set_model_props(graph_model, {METADATA_KEY: json.dumps(made_from())})
    onnx.save(graph_model, str(path))
    assert read_provenance("onnx", path) == GraphProvenance(made_from())
    path.write_bytes(path.read_bytes()[:-5])
    assert (
        read_provenance("onnx", path)
        == read_provenance("onnx", tmp_path / "none")
        == read_provenance("qpc", tmp_path / "qpc")
        == GraphProvenance()
    )
    (tmp_path / QPC_PROVENANCE).write_text(json.dumps({"model": None, "buckets": [{"seq_len": 8}, {"seq_len": 4}]}))
    assert read_provenance("qpc", tmp_path / "qpc") == GraphProvenance(None, 8)
    (tmp_path / QPC_PROVENANCE).write_text(json.dumps({"model": {}, "buckets": [{"seq_len": 8, "ctx_len": 32}]}))
    assert read_provenance("qpc", tmp_path / "qpc") == GraphProvenance({}, None, 32)


def test_a_hub_id_is_not_looked_for_where_the_reference_is_recorded(tmp_path: Path) -> None:
    for source, local in (
        ("some/model", False),
        ("tiny:some/model", False),
        ("random:bert", True),
        (str(tmp_path), True),
    ):
        case = qv.Case(name="c", source=source)
        assert collect_evidence(case, "onnx", object(), {}, in_memory=False).local is local
        assert collect_evidence(case, "onnx", object(), None, in_memory=False).local is True
    assert model(qv.Case(name="c", source="random:bert")).settings()["head"] == HEAD


@pytest.mark.parametrize(("limit", "said"), [(7, "the tokenizer cuts at 7, the case asks for 8"), (8, ""), (None, "")])
def test_the_tokenizers_limit_is_a_note(limit: int | None, said: str) -> None:
    wrapper = Wrapper()
    wrapper.files = {"model_max_length": limit}
    result = next(r for r in run_prechecks(wrapper, rows(), Evidence(), lambda: BODY) if r.name == "max length")
    assert (result.state, result.detail) == ("same", said)


@pytest.mark.parametrize(
    ("source", "base", "suspect"),
    [
        ("path:/models/Llama-3", "meta/llama-3", False),
        ("org/Llama-3", "meta/Llama-3", False),
        ("path:/models/llama-3", "meta/Llama-2", True),
        ("org/other", "meta/Llama-2", True),
        ("random:llama", "meta/Llama-2", False),
        ("path:/models/x", None, False),
        ("path:/models/x", "", False),
    ],
)
def test_the_base_that_an_adapter_names_is_a_suspicion(source: str, base: str | None, suspect: bool) -> None:
    wrapper = Wrapper()
    wrapper.files = {"bases": {"a": base}}
    wrapper.case = qv.Case(name="x", model="peft-causal-lm", source=source)  # type: ignore[attr-defined]
    result = next(r for r in run_prechecks(wrapper, rows(), Evidence(), lambda: BODY) if r.name == "adapters")
    assert (result.state, result.suspect) == ("same", suspect)
    assert (f"was trained on {base!r}" in result.detail) == suspect


def test_contrib_operators_of_a_graph_are_a_suspicion() -> None:
    graph = GraphProvenance(contrib="2 com.microsoft::BiasGelu, made by ONNX Runtime's optimizer")
    result = precheck("weights", graph=graph)
    assert (result.state, result.suspect) == ("unknown", True)
    assert (
        "the graph has contrib operators: 2 com.microsoft::BiasGelu, made by ONNX Runtime's optimizer" in result.detail
    )


def test_contrib_operators_are_counted(tmp_path: Path) -> None:
    nodes = [helper.make_node("FastGelu", ["x"], ["h"], domain="com.microsoft"), helper.make_node("Neg", ["h"], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:]), opset_imports=opsets), tmp_path / "m"
    )
    result = read_provenance("onnx", tmp_path / "m").contrib
    assert result is not None
    assert result.startswith("1 com.microsoft::FastGelu, made by ONNX Runtime's optimizer")
