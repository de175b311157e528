# SPDX-License-Identifier: Apache-2.0
"""Pooled embeddings: texts to rows of token ids, the reference, and the run over any session.

`PooledModel` is the torch module that is exported; it lives in `pooling` and is loaded on first use, so that
a run whose artifacts are all stored imports no framework.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.case import Case
from qeff_validate.errors import ConfigError, RunError
from qeff_validate.models.corpus import TEXTS
from qeff_validate.models.options import EmbeddingOptions
from qeff_validate.models.sources import Given, Source, Tokenize, foreign, resolve
from qeff_validate.protocols import Graph, Session
from qeff_validate.tensors import Array, Tensors, TensorSpec


def __getattr__(name: str) -> Any:
    if name == "PooledModel":
        from qeff_validate.models.pooling import PooledModel

        return PooledModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


FILLERS = (
    "the man and a woman went to see it in an old town on time with all of his new work for that day",
    "a b c d e f g h i j k l m",
    ".",
)
"""Words that most tokenizers turn into one token each; boundary rows are built from them."""

EMPTY_ROW = "(a row without a token)"


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids of each row, without padding; the last row has none and is tested structurally."""

    ids: tuple[Array, ...]
    pad: int
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def tokenless(self) -> frozenset[int]:
        """Rows that hold no token."""
        return frozenset(row for row, ids in enumerate(self.ids) if ids.size == 0)

    def stored(self) -> dict[str, Array]:
        """Return the rows as arrays for a safetensors file."""
        text = json.dumps({"labels": self.labels, "notes": self.notes, "pad": self.pad})
        return {
            "ids": np.concatenate(self.ids).astype(np.int64),
            "lengths": np.array([ids.size for ids in self.ids], dtype=np.int64),
            "texts": np.frombuffer(text.encode(), dtype=np.uint8),
        }

    @classmethod
    def from_stored(cls, stored: Tensors) -> TokenRows:
        """Return the rows that `stored` wrote."""
        texts = json.loads(stored["texts"].tobytes())
        ends = np.cumsum(stored["lengths"].astype(np.int64))
        ids = tuple(np.split(stored["ids"], ends[:-1]))
        return cls(ids, int(texts["pad"]), tuple(texts["labels"]), tuple(texts["notes"]))


class PooledEmbedding:
    """The model kind ``embedding``: ``input_ids, attention_mask → output [batch_size, hidden]``.

    Args:
        case: the case; its source is resolved at once, so that a missing one is known before any work.
        options: validated options.
        given: an in-memory torch model instead of the source; it is left unchanged.
        tokenizer: the tokenizer of ``given``.
    """

    def __init__(self, case: Case, options: EmbeddingOptions, *, given: Any = None, tokenizer: Any = None) -> None:
        self.case = case
        self.options = options
        self.source: Source = resolve(case) if given is None else Given(given, tokenizer)
        dims = ("batch_size", "seq_len")
        self.graph = Graph(
            inputs=(TensorSpec("input_ids", "int64", dims), TensorSpec("attention_mask", "int64", dims)),
            outputs=(TensorSpec("output", "float32", ("batch_size", "hidden")),),
            buckets=tuple({"batch_size": options.batch_size, "seq_len": length} for length in options.seq_len),
        )

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the exported graph depends on."""
        wrapper = {"kind": "embedding", "pooling": self.options.pooling, "normalize": self.options.normalize}
        return {"wrapper": wrapper, "body": self.source.body_key()}

    def inputs_key(self) -> Mapping[str, Any]:
        """Return what the token ids depend on."""
        options = self.options
        limits = {"seq_len": options.seq_len, "truncate": options.truncate, "boundary": self._builtin()}
        return {"texts": self._texts(), "prompt": options.prompt, **limits, "tokenizer": self.source.tokenizer_key()}

    def _builtin(self) -> bool:
        return self.case.inputs.texts is None and self.case.inputs.texts_file is None

    def _texts(self) -> list[str]:
        if self.case.inputs.texts_file is not None:
            path = Path(self.case.inputs.texts_file)
            try:
                texts = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as exc:
                raise ConfigError(f"case {self.case.name!r}: cannot read texts_file {path}: {exc}") from exc
        else:
            texts = list(TEXTS if self.case.inputs.texts is None else self.case.inputs.texts)
        if len(set(texts)) < 3:
            raise ConfigError(f"case {self.case.name!r}: at least 3 distinct texts are needed, got {len(set(texts))}")
        return texts

    def tokenize(self) -> Tensors:
        """Turn the texts into rows of token ids; the built-in corpus gets rows at each bucket's boundary.

        Raises:
            ConfigError: a text is longer than every bucket and ``truncate`` is off.
        """
        tokenize, pad = self.source.tokenizer()
        texts, notes = self._texts(), []
        if self._builtin():
            for length in self.options.seq_len:
                for wanted in (length - 1, length):
                    text = boundary_text(tokenize, self.options.prompt, wanted)
                    if text is None:
                        notes.append(f"no boundary row of exactly {wanted} tokens could be made with this tokenizer")
                    else:
                        texts.insert(len(texts) // 2 if wanted % 2 else len(texts), text)
        ids = [np.array(tokenize(self.options.prompt + text), dtype=np.int64) for text in texts]
        most = self.options.seq_len[-1]
        long = [row for row, tokens in enumerate(ids) if tokens.size > most]
        if long and not self.options.truncate:
            row = long[0]
            raise ConfigError(
                f"case {self.case.name!r}: {len(long)} of {len(texts)} texts are longer than the greatest seq_len"
                f" {most}; text {row} has {ids[row].size} tokens ({texts[row][:60]!r}…):"
                f" add a seq_len of at least {max(ids[r].size for r in long)}, or set truncate: true"
            )
        if long:
            notes.append(f"{len(long)} of {len(texts)} texts were cut to {most} tokens (truncate: true)")
        rows = [*(tokens[:most] for tokens in ids), np.array([], dtype=np.int64)]
        return TokenRows(tuple(rows), pad, (*texts, EMPTY_ROW), tuple(notes)).stored()

    def inputs(self, stored: Tensors) -> TokenRows:
        """Return the rows from their stored form."""
        return TokenRows.from_stored(stored)

    def module(self) -> tuple[Any, Tensors]:
        """Load the body and put the pooling on it; the examples differ from every bucket on purpose."""
        from qeff_validate.models.pooling import PooledModel

        body = self.source.body()
        with foreign("choose eager attention"):
            if hasattr(body, "set_attn_implementation"):
                body.set_attn_implementation("eager")
        ids = np.arange(2 * 7, dtype=np.int64).reshape(2, 7) % 5 + 1
        mask = np.ones((2, 7), dtype=np.int64)
        mask[1, 4:] = 0
        module = PooledModel(body, self.options.pooling, normalize=self.options.normalize).eval()
        return module, {"input_ids": ids, "attention_mask": mask}

    def reference(self, inputs: TokenRows, *, dtype: str) -> Tensors:
        """Run the body alone on each row at its natural length, and pool with the numpy oracle.

        Returns:
            ``output`` [rows, hidden] in ``dtype``; rows without a token hold zeros.
        """
        from qeff_validate.models import oracle, reference

        body = self.source.body()
        rows = [
            oracle.pool(tokens, self.options.pooling, normalize=self.options.normalize) if tokens is not None else None
            for tokens in reference.hidden_states(body, inputs.ids, dtype)
        ]
        width = next(row.size for row in rows if row is not None)
        output = np.stack([row if row is not None else np.zeros(width) for row in rows])
        return {"output": output.astype(dtype)}

    def infer(self, session: Session, inputs: TokenRows) -> Tensors:
        """Run all rows in batches of the case's size, each padded to the smallest shape that fits it.

        Raises:
            RunError: no allowed shape of the session fits, or an output has lost its rows.
        """
        parts: dict[str, list[Array]] = {}
        for rows in _batches(inputs.ids, self._batch_size(session)):
            batch, length = self._shape(session, rows)
            out = session.run(_feeds(session, rows, batch, length, inputs.pad))
            for name, array in out.items():
                if array.ndim < 1 or len(array) != batch:
                    raise RunError(f"output {name!r} has shape {list(array.shape)}, wanted {batch} rows")
                parts.setdefault(name, []).append(array[: len(rows)])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _batch_size(self, session: Session) -> int:
        sizes = [shapes["input_ids"][0] for shapes in session.shapes]
        return max(sizes) if sizes else self.options.batch_size

    @staticmethod
    def _shape(session: Session, rows: Sequence[Array]) -> tuple[int, int]:
        longest = max(1, *(row.size for row in rows))
        if not session.shapes:
            return len(rows), longest
        fitting = [
            (shapes["input_ids"][0], shapes["input_ids"][1])
            for shapes in session.shapes
            if shapes["input_ids"][0] >= len(rows) and shapes["input_ids"][1] >= longest
        ]
        if not fitting:
            allowed = sorted(shapes["input_ids"] for shapes in session.shapes)
            raise RunError(f"no allowed shape holds {len(rows)} rows of {longest} tokens; allowed: {allowed}")
        return min(fitting, key=lambda shape: shape[0] * shape[1])


def _batches(ids: Sequence[Array], size: int) -> Iterator[Sequence[Array]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _feeds(session: Session, rows: Sequence[Array], batch: int, length: int, pad: int) -> dict[str, Array]:
    """Pad on the right; rows beyond the last repeat it, so that a fixed batch holds no row without a token."""
    ids = np.full((batch, length), pad, dtype=np.int64)
    mask = np.zeros((batch, length), dtype=np.int64)
    for place in range(batch):
        row = rows[min(place, len(rows) - 1)]
        ids[place, : row.size] = row
        mask[place, : row.size] = 1
    known: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
    dtypes = {spec.name: spec.dtype for spec in session.inputs}
    return {name: array.astype(dtypes.get(name, "int64"), copy=False) for name, array in known.items()}


def boundary_text(tokenize: Tokenize, prompt: str, length: int) -> str | None:
    """Return a text of exactly so many tokens, or None if no filler word gives one."""
    for filler in FILLERS:
        words = 1
        for _ in range(8):  # each step corrects the count by what is missing; one token a word converges at once
            text = " ".join(itertools.islice(itertools.cycle(filler.split()), words))
            missing = length - len(tokenize(prompt + text))
            if missing == 0:
                return text
            words = max(1, words + missing)
    return None
