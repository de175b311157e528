# SPDX-License-Identifier: Apache-2.0
"""Positions that begin behind the padding token (RoBERTa and its kin): graphs that begin elsewhere are told by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qeff_validate as qv
from qeff_validate.models.sources.embedding_tables import module_tables
from qeff_validate.models.sources.resolve import Folder
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 18}
KIN = ["camembert", "mpnet", "roberta", "xlm-roberta"]
TEXTS = ["one two three", "four five", "six seven eight nine ten eleven"]


class Pooled(torch.nn.Module):
    """A user's own export: mean pooling, with positions counted by a rule."""

    def __init__(self, body: Any, rule: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.body, self.rule = body, rule

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        more = {} if self.rule is None else {"position_ids": self.rule(input_ids)}
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, **more)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def from_zero(ids: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(torch.ones_like(ids), dim=1) - 1


def export(body: Any, rule: Callable[[torch.Tensor], torch.Tensor] | None, path: Path) -> Path:
    body.set_attn_implementation("eager")
    ids = torch.full((2, 5), 7)
    torch.onnx.export(
        Pooled(body, rule).eval(), (ids, torch.ones_like(ids)), path, dynamo=False, opset_version=17,
        input_names=["input_ids", "attention_mask"], output_names=["output"],
        dynamic_axes={name: {0: "batch_size", 1: "seq_len"} for name in ("input_ids", "attention_mask")}
        | {"output": {0: "batch_size"}},
    )  # fmt: skip
    return path


def validate(folder: Path, onnx: Path, **options: Any) -> Any:
    case = qv.Case(
        name="x", model="embedding", source=f"path:{folder}", inputs={"texts": TEXTS}, tolerance="table",
        exporter="torchscript", artifacts={"onnx": str(onnx)}, options={"seq_len": [16], "batch_size": 3, **options},
    )  # fmt: skip
    (result,) = qv.validate(case, runtimes=["ort"], store=folder / "store").results
    return result, {precheck.name: precheck for precheck in result.prechecks}


@pytest.fixture(scope="module", params=KIN)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    source = Random(request.param, SMALL, 0)
    source.body().save_pretrained(folder)
    words(folder)
    return folder, source


def words(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *" ".join(TEXTS).split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def test_where_positions_begin_is_known_of_models_and_of_files(saved: tuple[Path, Any]) -> None:
    folder, source = saved
    table = next(m for n, m in source.body().named_modules() if n.endswith("position_embeddings"))
    assert source.tables()["first_position"] == table.padding_idx + 1 == 2
    assert Folder(folder).tables() == source.tables()
    assert "first_position" not in module_tables(Random("bert", SMALL, 0).body())


@pytest.mark.filterwarnings("ignore")  # tracing warns of every Python branch
def test_a_graph_that_begins_at_zero_is_told_by_name_and_a_right_one_is_not(saved: tuple[Path, Any]) -> None:
    folder, source = saved
    right, prechecks = validate(folder, export(source.body(), None, folder / "right.onnx"))
    assert right.status == "pass", right.reason
    assert prechecks["positions"].state == prechecks["max length"].state == "same"
    wrong, prechecks = validate(folder, export(source.body(), from_zero, folder / "wrong.onnx"))
    assert wrong.status == "fail"
    assert prechecks["positions"].state == "differs"
    assert "gives the first token row 0 of the table of positions, the model row 2" in wrong.reason


@pytest.mark.filterwarnings("ignore")
def test_a_cut_table_that_is_read_from_its_own_beginning_is_right(saved: tuple[Path, Any]) -> None:
    """Other exporters leave out the rows of padding: the numbers are the same, so nothing differs."""
    folder, source = saved
    body = source.body()
    table = next(m for n, m in body.named_modules() if n.endswith("position_embeddings"))
    table.weight = torch.nn.Parameter(table.weight[2:].clone())
    table.padding_idx = None
    result, prechecks = validate(folder, export(body, from_zero, folder / "cut.onnx"))
    assert result.status == "pass", result.reason
    assert prechecks["positions"].state == "same"


def test_rows_of_padding_are_no_positions(saved: tuple[Path, Any]) -> None:
    """A table of 18 rows serves 16 tokens."""
    folder, _ = saved
    case = qv.Case(name="x", model="embedding", source=f"path:{folder}", inputs={"texts": TEXTS}, tolerance="table",
                   exporter="torchscript", options={"seq_len": [17], "batch_size": 3})  # fmt: skip
    (result,) = qv.validate(case, runtimes=["torch"], store=folder / "store").results
    said = "asks for 17 tokens, the model has positions for 16 (a table of 18 rows, in which the first token has row 2)"
    assert said in result.reason


@pytest.mark.filterwarnings("ignore")
def test_a_table_that_is_too_short_for_a_row_is_told(saved: tuple[Path, Any]) -> None:
    folder, source = saved
    body = source.body()
    table = next(m for n, m in body.named_modules() if n.endswith("position_embeddings"))
    table.weight = torch.nn.Parameter(table.weight[:7].clone())
    result, prechecks = validate(folder, export(body, None, folder / "short.onnx"))
    assert prechecks["max length"].state == "differs"
    assert "the graph's table of positions serves 5 tokens, the longest row has 6" in result.reason
