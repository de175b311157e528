# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a user's graph, pooled on the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from qeff_validate.config.case import Artifacts
from qeff_validate.models.embedding.file_session import FileSession, completed
from qeff_validate.protocols import Graph
from qeff_validate.tensors import TensorSpec

STATES = np.arange(12, dtype=np.float32).reshape(2, 3, 2) + 1


def session() -> Any:
    """A graph that gives `STATES`, whatever it is fed."""
    inputs = [TensorSpec(name, "int64", ("batch", "seq")) for name in ("ids", "attention_mask", "token_type_ids")]
    outputs = (TensorSpec("last_hidden_state", "float32", ("batch", "seq", 2)),)
    fed: list[Any] = []

    def run(feeds: Any, *, fetch: Any = None) -> Any:
        fed.append(feeds)
        return dict.fromkeys(fetch, STATES)

    return SimpleNamespace(inputs=inputs, outputs=outputs, shapes=(), run=run, fed=fed)


def test_real_tokens_are_pooled_a_row_without_one_is_zero_and_token_types_are_fed_with_zeros() -> None:
    graph = session()
    pooled = FileSession(
        graph, "last_hidden_state", "output", "attention_mask", lambda row: row.mean(0), ["token_type_ids"]
    )
    assert [spec.name for spec in pooled.inputs] == ["ids", "attention_mask"]
    assert [(spec.name, spec.shape) for spec in pooled.outputs] == [("output", ("batch", "hidden"))]
    mask = np.array([[0, 1, 1], [0, 0, 0]])
    vectors = pooled.run({"ids": mask, "attention_mask": mask})["output"]
    assert vectors.tolist() == [[4.0, 5.0], [0.0, 0.0]]
    assert graph.fed[0]["token_type_ids"].tolist() == [[0] * 3] * 2


def test_vector_that_the_file_pools_itself_is_taken_before_its_hidden_states() -> None:
    """As optimum exports a whole directory of sentence-transformers."""
    graph = session()
    states = TensorSpec("token_embeddings", "float32", ("batch", "seq", 2))
    graph.outputs = (states, TensorSpec("sentence_embedding", "float32", ("batch", 2)))
    graph.run = lambda feeds, *, fetch: {name: STATES[:, 0] if "sentence" in name else STATES for name in fetch}
    wanted = Graph((), (TensorSpec("output", "float32", ("batch_size", "hidden")),), ())
    taken, findings = completed(graph, wanted, Artifacts(), lambda row: row.mean(0), "mean")
    assert "judged is the file's sentence_embedding, pooled as the file does" in findings
    mask = np.ones((2, 3), np.int64)
    assert taken.run({"attention_mask": mask})["output"].tolist() == STATES[:, 0].tolist()
    graph.outputs = (states,)
    pooled, findings = completed(graph, wanted, Artifacts(), lambda row: row.mean(0), "mean")
    assert "the file ends in token_embeddings, which is pooled on the host: mean" in findings
    assert pooled.run({"attention_mask": mask})["output"].tolist() == STATES.mean(1).tolist()


def test_hidden_states_that_qefficient_calls_output_are_pooled_or_taken_as_they_are() -> None:
    graph = session()
    graph.outputs = (TensorSpec("output", "float32", ("b", "s", 2)), TensorSpec("346", "float32", ("b", 2)))
    mask = np.ones((2, 3), np.int64)
    for shape, said, wanted in (
        (("batch_size", "hidden"), "the file ends in output, which is pooled on the host: mean", STATES.mean(1)),
        (("batch_size", "seq_len", "hidden"), "judged is the file's output, as it is, without 346", STATES),
    ):
        interface = Graph((), (TensorSpec("output", "float32", shape),), ())
        taken, findings = completed(graph, interface, Artifacts(), lambda row: row.mean(0), "mean")
        assert said in findings
        assert [len(spec.shape) for spec in taken.outputs] == [len(shape)]
        assert taken.run({"attention_mask": mask})["output"].tolist() == wanted.tolist()
