# SPDX-License-Identifier: Apache-2.0
"""A reference that depends on the order of rows is none: by the config's name for it, and by observation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config

import qeff_validate as qv
from qeff_validate.errors import UnstableReferenceError
from qeff_validate.models.row_order import probes, refuse_change, refuse_frequencies_by_length
from qeff_validate.models.sources.embedding_tables import folder_switch, frequency_switch
from qeff_validate.models.sources.synthetic import Random
from qeff_validate.prechecks.checks import with_feed_prechecks
from qeff_validate.report.result import Precheck

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LlamaConfig(max_position_embeddings=32, rope_parameters=DYNAMIC).to_dict(), {"rope_dynamic": 32}),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2}}, {"rope_dynamic": 64}),
        (
            Phi3Config(
                hidden_size=64, num_attention_heads=4, max_position_embeddings=64, original_max_position_embeddings=16,
                rope_parameters={**LONG, "partial_rotary_factor": 1.0}, pad_token_id=0,
            ).to_dict(),
            {"rope_longrope": 16},
        ),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"type": "su", "original_max_position_embeddings": 8}},
            {"rope_longrope": 8},
        ),
        ({"text_config": {"max_position_embeddings": 9, "rope_scaling": {"type": "dynamic"}}}, {"rope_dynamic": 9}),
        (
            {"max_position_embeddings": 9, "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {}}},
            {"rope_dynamic": 9},
        ),
        (LlamaConfig().to_dict(), {}),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2}}, {}),
        ({"rope_scaling": "dynamic"}, {}),
        ({"rope_scaling": {"type": None}, "max_position_embeddings": None}, {}),
    ],
)  # fmt: skip
def test_the_switch_is_read_from_configs_old_and_new(config: Mapping[str, Any], wanted: Mapping[str, int]) -> None:
    assert frequency_switch(config) == wanted


def test_a_folder_says_it_too_and_a_broken_config_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"max_position_embeddings": 7, "rope_scaling": {"type": "dynamic"}}))
    assert folder_switch(path) == {"rope_dynamic": 7}
    for text in ("[]", "{", ""):
        path.write_text(text)
        assert folder_switch(path) == {}
    assert folder_switch(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    ("kind", "lengths", "refused"),
    [
        ("dynamic", [3, 16], False), ("dynamic", [3, 17], True), ("dynamic", [20, 30], True),
        ("dynamic", [30, 30], False), ("longrope", [3, 16], False), ("longrope", [16, 17], True),
        ("longrope", [20, 30], False), ("longrope", [1, 40], True),
    ],
)  # fmt: skip
def test_lengths_between_which_frequencies_change_are_refused(kind: str, lengths: list[int], refused: bool) -> None:
    tables = {"tokens": 5, f"rope_{kind}": 16}
    if not refused:
        refuse_frequencies_by_length(tables, lengths)
        return
    with pytest.raises(UnstableReferenceError, match=f"rope_type '{kind}': beyond 16 positions"):
        refuse_frequencies_by_length(tables, lengths)


def test_rows_that_run_again_are_the_first_the_shortest_and_the_longest_but_one() -> None:
    assert probes([5, 0, 2, 9, 7, 9]) == [0, 2, 4]
    assert probes([0, 4, 4]) == [1]
    assert probes([0, 0]) == probes([]) == []


def test_rounding_is_no_change_and_everything_else_is() -> None:
    before = {1: np.random.default_rng(0).standard_normal((4, 8))}
    refuse_change(before, lambda _: before[1] * (1 + 1e-6), ["", "x"])
    refuse_change({1: before[1] * np.nan}, lambda _: before[1] * np.nan, ["", "x"])
    for after in (before[1] * (1 + 1e-4), before[1] * np.nan, np.zeros((4, 8))):
        with pytest.raises(UnstableReferenceError, match=r"row 1 \('x'\) other values when it is run again"):
            refuse_change(before, lambda _, after=after: after, ["", "x"])


def test_rounding_of_a_score_near_zero_is_no_change_beside_greater_scores() -> None:
    scores = {0: np.array([1e-6]), 1: np.array([0.5]), 2: np.array([np.inf])}
    refuse_change(scores, lambda row: scores[row] + 1e-8, ["a", "b", "c"])
    for changed in ({0: 1e-5}, {1: 1e-5}, {2: np.nan}):
        with pytest.raises(UnstableReferenceError, match="other values"):
            refuse_change(scores, lambda row, by=changed: scores[row] + by.get(row, 0.0), ["a", "b", "c"])


def test_a_suspicion_stays_when_what_was_fed_is_right_and_goes_when_it_is_wrong() -> None:
    suspect = Precheck("positions", "unknown", "rope", suspect=True)
    for state in ("same", "differs"):
        (found,) = with_feed_prechecks([suspect], [Precheck("positions", state, "fed")])  # type: ignore[arg-type]
        assert found.detail == ("rope" if state == "same" else "fed")


# --- end to end ---------------------------------------------------------------------------------------

TEXTS = ["a b c", " ".join("abcdefghijklmnopqrstuvwx"), " ".join("abcdefghijklmnopqr"), "the man"]
SMALL = {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}


def case(**more: Any) -> qv.Case:
    given = {"name": "rope", "source": "random:llama", "config": SMALL, "inputs": {"texts": TEXTS}, **more}
    options = {"pooling": "mean", "seq_len": [32]} if "model" not in more else more["options"]
    exporter = "dynamo" if "model" in more else "torchscript"
    return qv.Case(**{**given, "options": options, "exporter": exporter, "tolerance": "table"})


def test_an_embedding_with_dynamic_positions_is_inconclusive_by_name_and_passes_within_them() -> None:
    (result,) = qv.validate(case(), ["ort"]).results
    assert (result.status, result.stage) == ("inconclusive", "reference")
    assert result.reason.startswith("rope_type 'dynamic': beyond 16 positions the rotary frequencies of the original")
    (short,) = qv.validate(case(config={**SMALL, "max_position_embeddings": 32}), ["ort"]).results
    assert short.status == "pass", short.reason


def test_a_language_model_with_dynamic_positions_is_inconclusive_by_name() -> None:
    options = {"prefill_seq_len": 8, "ctx_len": 32, "max_new_tokens": 2, "prompts": TEXTS}
    made = case(model="peft-causal-lm", options=options, inputs={})
    (result,) = qv.validate(made, ["torch"]).results
    assert (result.status, result.stage) == ("inconclusive", "reference")
    assert "beyond 16 positions" in result.reason


def test_a_model_in_memory_that_keeps_state_is_found_without_a_name() -> None:
    """Its config says nothing: only what it gives tells. The longest text so far scales all later ones."""
    body, seen = Random("llama", {}, 0).body(), {"most": 0}

    def scaled(_: Any, __: Any, output: Any) -> Any:
        seen["most"] = max(seen["most"], output.shape[1])
        return output * (1 + 0.01 * seen["most"])

    body.norm.register_forward_hook(scaled)
    (result,) = qv.validate(case(config={}, source="in memory"), ["torch"], model=body).results
    assert (result.status, result.stage) == ("inconclusive", "reference"), result.reason
    assert "other values when it is run again after other rows" in result.reason


def test_a_language_model_that_draws_random_numbers_is_found() -> None:
    torch = pytest.importorskip("torch")
    model = Random("llama", {"num_hidden_layers": 1}, 0).causal_lm()
    model.model.norm.register_forward_hook(lambda _, inputs, output: output + 0.01 * torch.randn_like(output))
    options = {"prefill_seq_len": 8, "ctx_len": 32, "max_new_tokens": 2, "prompts": TEXTS[:1] + TEXTS[3:]}
    made = case(model="peft-causal-lm", options=options, inputs={}, config={}, source="in memory")
    (result,) = qv.validate(made, ["torch"], model=model).results
    assert (result.status, result.stage) == ("inconclusive", "reference"), result.reason
    assert "keeps state from row to row or draws random numbers" in result.reason
