# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qeff_validate.errors import RunError, Unavailable
from qeff_validate.tensors import TensorSpec, check_feeds, load_tensors, save_tensors, wanted_outputs

SPECS = (
    TensorSpec("ids", "int64", ("b", "s")),
    TensorSpec("mask", "int64", ("b", "s")),
    TensorSpec("k", "float32", (2,)),
)


def feeds(**changes: object) -> dict:
    made = {"ids": np.zeros((2, 3), np.int64), "mask": np.zeros((2, 3), np.int64), "k": np.zeros(2, np.float32)}
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def test_exact_feeds_are_accepted() -> None:
    check_feeds(feeds(), SPECS)
    check_feeds(feeds(k=None), SPECS, optional=("k",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": None}, "missing ['k']"),
        ({"msk": np.zeros(1)}, "Did you mean 'mask'"),
        ({"ids": np.zeros((2, 3), np.float64)}, "dtype float64, wanted int64"),
        ({"ids": np.zeros((2, 3), np.uint64)}, "dtype uint64, wanted int64"),
        ({"ids": np.zeros((2, 3, 1), np.int64)}, "shape [2, 3, 1]"),
        ({"mask": np.zeros((2, 4), np.int64)}, "input 'mask' has shape [2, 4]"),
        ({"k": np.zeros(3, np.float32)}, "wanted [2]"),
        ({"k": [0.0, 0.0]}, "is a list"),
    ],
)
def test_anything_else_is_named(changes: dict, words: str) -> None:
    with pytest.raises(RunError) as caught:
        check_feeds(feeds(**changes), SPECS)
    assert words in str(caught.value)


def test_an_unknown_output_is_named() -> None:
    assert wanted_outputs(SPECS, None) == ["ids", "mask", "k"]
    assert wanted_outputs(SPECS, ["k"]) == ["k"]
    with pytest.raises(RunError, match=r"no output 'maks'\. Did you mean 'mask'"):
        wanted_outputs(SPECS, ["maks"])


def test_tensors_survive_their_file_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": np.arange(6).reshape(2, 3)[:, ::-1], "b": np.ones(3, np.float16)})
    again = load_tensors(path)
    np.testing.assert_array_equal(again["a"], [[2, 1, 0], [5, 4, 3]])
    assert again["b"].dtype == np.float16
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Unavailable, match="cannot read"):
        load_tensors(path)
    with pytest.raises(Unavailable, match="cannot read"):
        load_tensors(tmp_path / "none")
