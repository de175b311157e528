# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

import qeff_validate as qv
from qeff_validate.models.framework_calls import first_line
from qeff_validate.models.token_rows import TokenRows, cut, padded

ROWS = (np.array([5, 6, 7]), np.array([8]))


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 7, 9], [8, 9, 9, 9], [8, 9, 9, 9]], [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]),
        ("left", [[9, 5, 6, 7], [9, 9, 9, 8], [9, 9, 9, 8]], [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]),
    ],
)
def test_rows_are_padded_on_either_side_and_a_batch_is_filled_with_the_last(side: str, ids: list, mask: list) -> None:
    made = padded(ROWS, 3, 4, pad=9, side=side)
    assert made["input_ids"].tolist() == ids
    assert made["attention_mask"].tolist() == mask
    assert not made["token_type_ids"].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_cutting_gives_back_what_belongs_to_the_rows(side: str) -> None:
    ids = padded(ROWS, 3, 4, pad=9, side=side)["input_ids"]
    assert cut(ids, ROWS, side=side, per_token=False).tolist() == ids[:2].tolist()
    assert cut(ids, ROWS, side=side, per_token=True).tolist() == [5, 6, 7, 8]


def test_labels_are_of_texts_or_of_tokens() -> None:
    rows = TokenRows((*ROWS, np.array([], dtype=np.int64)), 0, ("a", "b", "none"))
    assert (list(rows.labels), rows.tokenless) == (["a", "b", "none"], {2})
    tokens = TokenRows.from_stored(rows.stored(), per_token=True)
    assert list(tokens.labels) == ["token 0 of a", "token 1 of a", "token 2 of a", "token 0 of b"]
    assert tokens.tokenless == frozenset()


@pytest.mark.parametrize("pooling", ["last", "weighted_mean"])
def test_left_padding_agrees_with_hugging_face_where_positions_are_relative(pooling: str) -> None:
    options = {"pooling": pooling, "padding_side": "left", "seq_len": [48, 64]}
    case = qv.Case(name="left", source="random:llama", options=options, tolerance="table", exporter="torchscript")
    report = qv.validate(case, ["ort", "sim"])
    assert report.passed, report.plain()


def test_left_padding_is_seen_where_positions_are_absolute() -> None:
    """BERT counts positions from the left edge, so its authors' answer is another one: this must not pass."""
    options = {"pooling": "mean", "padding_side": "left", "seq_len": [48, 64]}
    case = qv.Case(name="left", source="random:bert", options=options, tolerance="table", exporter="torchscript")
    (result,) = qv.validate(case, ["ort"]).results
    assert result.status == "fail"


def test_token_types_are_an_input_where_they_are_asked_for() -> None:
    options = {"token_type_ids": True, "seq_len": [48, 64]}
    case = qv.Case(name="types", source="random:bert", options=options, tolerance="table")
    with qv.runtime("ort").open(qv.build(qv.model(case), "onnx")) as session:
        assert [spec.name for spec in session.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert qv.validate(case, ["torch", "ort", "sim"]).passed


def test_the_line_that_an_exception_says_ends_where_its_sentence_does() -> None:
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("one\ntwo")) == "one"
    assert (
        first_line(ValueError("bad field 'x':\n    wanted int, got 1.0\n  more"))
        == "bad field 'x': wanted int, got 1.0"
    )
