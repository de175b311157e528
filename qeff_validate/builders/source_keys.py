# SPDX-License-Identifier: Apache-2.0
"""Digests of this library's own source in the keys of the store, so that a fixed bug never meets old output."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from qeff_validate.artifact import digest_files, digest_tree, fingerprint

SHAPES_ARTIFACTS = ("builders", "models")
"""Folders whose source is part of the key of every artifact, except for the modules in `JUDGES` and `EXPLAINS`."""

JUDGES = (
    "models/padding_hint.py",
    "models/row_relations.py",
    "models/classification/verdict.py",
    "models/embedding/filler_rows.py",
    "models/embedding/relations.py",
    "models/multi_vector/verdict.py",
    "models/multi_vector/whole_texts.py",
    "models/sparse_embedding/verdict.py",
    "models/causal_lm/failure_hints.py",
    "models/causal_lm/half_range.py",
    "models/causal_lm/relation_kv_cache.py",
    "models/causal_lm/relation_linearity.py",
    "models/causal_lm/relations.py",
    "models/causal_lm/verdict.py",
    "models/causal_lm/workloads.py",
)
"""Modules in these folders that judge: no artifact, reference or input depends on them."""

EXPLAINS = ("models/embedding/original_run.py", "models/causal_lm/original_run.py")
"""Modules in these folders that serve explanations alone: nothing that is stored depends on them."""

PACKAGE = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def code_key() -> str:
    """Return a digest of the source of everything that shapes an artifact."""
    digests = {f"{folder}/{name}": digest for folder in SHAPES_ARTIFACTS for name, digest in _sources(folder).items()}
    return fingerprint({name: digest for name, digest in digests.items() if name not in (*JUDGES, *EXPLAINS)})


@lru_cache(maxsize=1)
def measures_key() -> str:
    """Return a digest of the source of everything that measures: a stored noise floor holds its numbers."""
    return fingerprint({**_sources("comparison"), **digest_files((PACKAGE / name for name in JUDGES), root=PACKAGE)})


@lru_cache(maxsize=1)
def package_key() -> str:
    """Return a digest of the whole package's source."""
    return fingerprint(_sources("."))


def _sources(folder: str) -> dict[str, str]:
    return digest_tree(PACKAGE / folder, suffixes=(".py",))
