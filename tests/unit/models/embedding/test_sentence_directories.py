# SPDX-License-Identifier: Apache-2.0
"""Directories of sentence-transformers, written by its own ``save``: the reference is what its ``encode`` returns."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import close
from encode_oracle import TEXTS, WIDTH, WORDS, assert_near, encoded, reference
from torch import nn

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import runtime


def dense(*sizes: int, activation: nn.Module | None = None, **options: Any) -> list[Any]:
    from sentence_transformers.base.modules import Dense

    activation = nn.Tanh() if activation is None else activation
    return [Dense(a, b, activation_function=activation, **options) for a, b in itertools.pairwise(sizes)]


def layer_norm() -> Any:
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    layer = LayerNorm(WIDTH)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    return layer


def weighted_layers() -> Any:
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

    return WeightedLayerPooling(
        WIDTH, num_hidden_layers=2, layer_start=1, layer_weights=nn.Parameter(torch.tensor([1.0, 3.0]))
    )


def normalize() -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def dropout() -> Any:
    from sentence_transformers.sentence_transformer.modules import Dropout

    return Dropout(0.5)


Modules = Callable[[], list[Any]]
SAVED: Mapping[str, tuple[Any, Modules, Modules, dict[str, Any]]] = {
    # pooling (modes, or options of Pooling) | modules before it | modules after it | options of SentenceTransformer
    "mean": ("mean", list, list, {}),
    "max": ("max", list, list, {}),
    "cls": ("cls", list, list, {}),
    "last token": ("lasttoken", list, list, {}),
    "weighted mean": ("weightedmean", list, list, {}),
    "mean by root of length": ("mean_sqrt_len_tokens", list, list, {}),
    "several at once": (("cls", "max", "mean_sqrt_len_tokens", "weightedmean"), list, list, {}),
    "normalized": ("mean", list, lambda: [normalize()], {}),
    "dense": ("mean", list, lambda: dense(WIDTH, 24), {}),
    "two dense, normalized": ("cls", list, lambda: [*dense(WIDTH, 64, 16, bias=False), normalize()], {}),
    "identity": ("mean", list, lambda: dense(WIDTH, WIDTH, activation=nn.Identity()), {}),
    "GELU": ("mean", list, lambda: dense(WIDTH, 8, activation=nn.GELU()), {}),
    "RReLU, which draws numbers in training": ("mean", list, lambda: dense(WIDTH, 8, activation=nn.RReLU()), {}),
    "PReLU, which has a weight": ("mean", list, lambda: dense(WIDTH, 8, activation=nn.PReLU(init=0.7)), {}),
    "residual": ("mean", list, lambda: dense(WIDTH, WIDTH, use_residual=True), {}),
    "residual of another width": ("mean", list, lambda: dense(WIDTH, 8, use_residual=True), {}),
    "normalized before dense": ("mean", list, lambda: [normalize(), *dense(WIDTH, 8)], {}),
    "layer norm": ("mean", list, lambda: [layer_norm()], {}),
    "dropout": ("mean", list, lambda: [dropout(), *dense(WIDTH, 8)], {}),
    "dense on tokens": ("max", lambda: dense(WIDTH, 8, module_input_name="token_embeddings"), list, {}),
    "default prompt": ("mean", list, list, {"prompts": {"query": "query : "}, "default_prompt_name": "query"}),
    "first numbers": ("mean", list, lambda: [normalize()], {"truncate_dim": 8}),
    "more numbers than there are": ("mean", list, list, {"truncate_dim": 500}),
    "first numbers of dense": ("mean", list, lambda: dense(WIDTH, 16), {"truncate_dim": 8}),
}
for MODE in ("mean", "max", "cls", "lasttoken", "weightedmean"):
    NAME, OPTIONS = f"prompt left out of {MODE}", {"prompts": {"query": "query : "}, "default_prompt_name": "query"}
    SAVED = {**SAVED, NAME: ({"pooling_mode": MODE, "include_prompt": False}, list, list, OPTIONS)}


def save(
    folder: Path,
    body: Path,
    pooling: Any = "mean",
    before: Modules = list,
    after: Modules = list,
    limit: int | None = None,
    lower_case: bool = False,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a directory as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with torch.random.fork_rng():
        torch.manual_seed(1)
        pooling_options = pooling if isinstance(pooling, dict) else {"pooling_mode": pooling}
        transformer = Transformer(str(body), do_lower_case=lower_case, config_kwargs=dict(config or {}))
        if limit:
            transformer.max_seq_length = limit
        first = before()
        width = first[-1].out_features if first and hasattr(first[-1], "out_features") else WIDTH
        modules = [transformer, *first, Pooling(width, **pooling_options), *after()]
        SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder))
    return folder


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAVED)
def test_reference_is_what_encode_returns_and_the_module_agrees(name: str, body: Path, tmp_path: Path) -> None:
    pooling, before, after, options = SAVED[name]
    folder = save(tmp_path / "saved", body, pooling, before, after, **options)
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


def test_bounds_of_concatenated_poolings_are_measured(body: Path, tmp_path: Path) -> None:
    """Faults of the pooling take the place of each part, so that the modules behind it still fit."""
    modes = {"pooling_mode": ("cls", "mean"), "include_prompt": False}
    folder = save(tmp_path / "saved", body, modes, list, lambda: dense(2 * WIDTH, 8), prompts={"query": "query : "})
    case = qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS}, options={"prompt": "query"})
    result = Runner(store=tmp_path / "store").pipeline(case).result(runtime("torch"))
    assert result.status == "pass", result.reason
    assert {metric.bound.source for metric in result.metrics if metric.metric.name == "output.rel_l2"} == {"floor"}


@pytest.mark.numeric
def test_weighted_layers(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body, "mean", lambda: [weighted_layers()], config={"output_hidden_states": True})
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_long_texts_are_cut_as_encode_cuts_them(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body, "lasttoken", limit=6, prompts={"query": "query : "})
    assert_near(reference(folder, tmp_path, prompt="query"), encoded(folder, TEXTS, prompt_name="query"))


@pytest.mark.numeric
def test_prompt_that_is_cut_itself_and_texts_with_nothing_behind_it(body: Path, tmp_path: Path) -> None:
    prompt = {"prompts": {"long": "one two three one two three one "}, "default_prompt_name": "long"}
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    folder = save(tmp_path / "saved", body, pooling, limit=6, **prompt)
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))  # the closing token is left
    config = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**config, "post_processor": None}), encoding="utf-8")
    texts = {"texts": ["red", "blue", "one"]}
    case = qv.Case(name="bare", source=f"path:{folder}", inputs=texts, options={"seq_len": [8]})
    rows = qv.model(case).rows()
    assert [ids.size for ids in rows.ids] == [0, 0, 0, 0]
    assert any(note.startswith("3 of 3 texts have no token behind the prompt") for note in rows.notes)


def test_tokenizer_without_files_is_told(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()  # transformers makes an empty tokenizer then, and encode is content
    notes = qv.model(qv.Case(name="x", source=f"path:{folder}", options={"seq_len": [64]})).rows().notes
    assert any(note.startswith("the tokenizer knows no word of any text") for note in notes)


@pytest.mark.numeric
def test_length_that_only_the_tokenizer_knows(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 7}))
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_lower_case(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    theirs = encoded(folder, TEXTS)
    close(theirs[0], theirs[4], rtol=1e-5, atol=1e-6)  # red and Red are one word
    assert_near(reference(folder, tmp_path), theirs)


@pytest.mark.numeric
def test_truncation_keeps_the_closing_token(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body, "lasttoken")
    ours = reference(folder, tmp_path, seq_len=[8], truncate=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 8}))
    assert_near(ours, encoded(folder, TEXTS))


@pytest.mark.numeric
def test_layout_of_version_two(body: Path, tmp_path: Path) -> None:
    """The Transformer in a directory of its own, old names of poolings, and no settings file."""
    folder = save(tmp_path / "saved", body, "mean", list, lambda: dense(WIDTH, 8))
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
        shutil.move(path, inside / path.name)
    (inside / "config_sentence_transformers.json").unlink()
    (inside / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6, "do_lower_case": False}))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    old = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    dense_config = json.loads((folder / "2_Dense" / "config.json").read_text())
    (folder / "2_Dense" / "config.json").write_text(json.dumps({**dense_config, "in_features": 2 * WIDTH}))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "2_Dense" / "model.safetensors")
    wide = {**weights, "linear.weight": torch.cat([weights["linear.weight"]] * 2, dim=1).contiguous()}
    save_file(wide, folder / "2_Dense" / "model.safetensors")
    assert_near(reference(folder, tmp_path), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_prompt_by_name_by_text_and_unknown(body: Path, tmp_path: Path) -> None:
    folder = save(
        tmp_path / "saved", body, prompts={"query": "query : ", "passage": "one : "}, default_prompt_name="query"
    )
    for asked, theirs in (
        ("passage", {"prompt_name": "passage"}),
        ("two : ", {"prompt": "two : "}),
        ("", {"prompt": ""}),
    ):
        assert_near(reference(folder, tmp_path, prompt=asked), encoded(folder, TEXTS, **theirs))
    with pytest.raises(ConfigError, match=r"no prompt is called 'pasage'\. Did you mean 'passage'\? The directory has"):
        qv.model(qv.Case(name="x", source=f"path:{folder}", options={"prompt": "pasage"})).inputs_key()


def test_named_pooling_that_drops_a_dense_is_a_precheck_that_differs(body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body, "mean", list, lambda: dense(WIDTH, WIDTH))
    case = qv.Case(
        name="x", source=f"path:{folder}", inputs={"texts": TEXTS}, options={"pooling": "mean"}, tolerance="table"
    )
    result = Runner(store=tmp_path / "store").pipeline(case).result(runtime("torch"))
    assert result.status == "fail"
    assert "modules.json goes on with Dense, which the case's pooling mean leaves out" in result.reason
    left_out = case.model_copy(update={"options": {"pooling": "mean", "leave_out": ["Dense"]}})
    assert Runner(store=tmp_path / "store").pipeline(left_out).result(runtime("torch")).status == "pass"


def _add_cnn(modules: list[Any], _: Path) -> None:
    modules.append({"type": "sentence_transformers.models.CNN", "path": "3_CNN"})


def _add_splade(modules: list[Any], _: Path) -> None:
    modules.append({"type": "sentence_transformers.sparse_encoder.models.SpladePooling", "path": "1_Pooling"})


def _reranker(modules: list[Any], folder: Path) -> None:
    del modules[1:]
    _change("sentence_bert_config.json", transformer_task="sequence-classification")(modules, folder)


def _climb(modules: list[Any], _: Path) -> None:
    modules[2]["path"] = "../2_Dense"


def _change(name: str, **values: Any) -> Any:
    def change(_: list[Any], folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _pickled(_: list[Any], folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


def _without_weights(_: list[Any], folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").unlink()


def _add_transformer(modules: list[Any], _: Path) -> None:
    modules.insert(1, modules[0])


def _without_pooling(_: list[Any], folder: Path) -> None:
    shutil.rmtree(folder / "1_Pooling")


DAMAGES: Mapping[str, tuple[Any, str]] = {
    "unsupported module": (_add_cnn, "a CNN module"),
    "directory outside": (_climb, "lies outside of"),
    "another module that reads tokens": (_add_transformer, "a Transformer module behind others"),
    "wrong width": (
        _change("2_Dense/config.json", in_features=7),
        "do not fit: linear.weight has the shape [8, 32], and its config asks for [8, 7]",
    ),
    "width that is a word": (
        _change("2_Dense/config.json", in_features="32"),
        "in_features of the Dense module is '32'",
    ),
    "activation with arguments": (
        _change("2_Dense/config.json", activation_function="torch.nn.Threshold"),
        "'torch.nn.Threshold' needs arguments",
    ),
    "no pooling": (_change("1_Pooling/config.json", pooling_mode=[]), "pooling_mode is [], wanted one or several"),
    "pooling by number": (_change("1_Pooling/config.json", pooling_mode=3), "pooling_mode is 3, wanted one or several"),
    "module without a path": (lambda modules, _: modules[1].pop("path"), "no list of modules, each with type and path"),
    "weights of another module": (
        lambda modules, _: modules[2].update(path=""),
        "are those of no Dense module: linear.weight is missing",
    ),
    "activation that is no name": (
        _change("2_Dense/config.json", activation_function=3),
        "activation_function is 3, wanted a class of torch.nn",
    ),
    "missing pooling": (_without_pooling, "names a Pooling module, and"),
    "unknown activation": (
        _change("2_Dense/config.json", activation_function="torch.nn.Nothing"),
        "no class of torch",
    ),
    "pickled weights": (_pickled, "pickled weights"),
    "no weights": (_without_weights, "which the directory's Dense module needs: copy it whole"),
    "unknown pooling": (_change("1_Pooling/config.json", pooling_mode="median"), "'median'"),
    "unknown default prompt": (_change("config_sentence_transformers.json", default_prompt_name="q"), "none of the"),
    "another output": (
        _change(
            "sentence_bert_config.json", modality_config={"text": {"method": "forward", "method_output_name": "x"}}
        ),
        "the module reads ['x'] of 'forward'; supported is last_hidden_state",
    ),
    "module of another kind": (_add_splade, "has a SpladePooling module: say model: sparse-embedding"),
    "other task without a pooling": (_reranker, "say model: reranker or sequence-classification"),
    "other task": (_change("sentence_bert_config.json", transformer_task="fill-mask"), "fill-mask"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_broken_directories_are_errors_that_name_what_is_wrong(name: str, body: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    folder = save(tmp_path / "saved", body, "mean", list, lambda: dense(WIDTH, 8))
    modules = json.loads((folder / "modules.json").read_text())
    damage(modules, folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    case = qv.Case(name="x", source=f"path:{folder}", options={"pooling": "auto"}, tolerance="table")
    result = Runner(store=tmp_path / "store").pipeline(case).result(runtime("torch"))
    assert (result.status, words in result.reason) == ("error", True), result.reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"route": "query"}, r"route: 'query': .* has no Router"),
        ({"leave_out": ["Dens"]}, r"leave_out: .* has no Dens module; it has Transformer, Pooling"),
    ],
)
def test_options_that_fit_no_module_are_errors(options: Any, words: str, body: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", body)
    with pytest.raises(ConfigError, match=words):
        qv.model(qv.Case(name="x", source=f"path:{folder}", options=options)).settings()


def test_sentence_transformer_in_memory_is_to_be_saved(body: Path) -> None:
    from sentence_transformers import SentenceTransformer

    with pytest.raises(ConfigError, match=r"a SentenceTransformer in memory .* name the directory as source"):
        qv.model(qv.Case(name="x", source="random:bert"), given=SentenceTransformer(str(body), device="cpu"))


def test_what_encode_does_otherwise_with_a_table_is_told(body: Path, tmp_path: Path) -> None:
    """A text without a token goes through Dense as zeros, and a table in half precision computes in that."""
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "saved"
    SentenceTransformer(modules=[table(body), *dense(12, 8)], device="cpu").save(str(folder))
    (path,) = (path for path in folder.rglob("model.safetensors") if "Dense" not in str(path))
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    notes = " ".join(qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS})).rows().notes)
    assert "1 of 5 texts have no token: their vectors are zeros here" in notes
    assert "loads this directory in float16 and computes in it" in notes


def table(body: Path, width: int = 12) -> Any:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    return StaticEmbedding(Tokenizer.from_file(str(body / "tokenizer.json")), embedding_dim=width)


@pytest.mark.numeric
def test_table_of_token_vectors_without_a_transformer(body: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "saved"
    SentenceTransformer(modules=[table(body), normalize()], prompts={"query": "one "}, device="cpu").save(str(folder))
    assert_near(reference(folder, tmp_path, prompt="query"), encoded(folder, TEXTS, prompt_name="query"))


@pytest.mark.numeric
def test_table_of_model2vec(body: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "saved"
    SentenceTransformer(modules=[table(body)], device="cpu").save(str(folder))
    size = len(WORDS)
    rows = {"embeddings": torch.randn(5, 12), "mapping": torch.arange(size) % 5, "weights": torch.rand(size)}
    save_file(rows, folder / "model.safetensors")
    texts = [text for text in TEXTS if text]
    assert_near(reference(folder, tmp_path, texts), encoded(folder, texts))


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["query", "document", None])
def test_each_route_of_a_router_is_a_case(route: str | None, body: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = tmp_path / "saved"
    documents = [Transformer(str(body)), Pooling(WIDTH, "mean"), *dense(WIDTH, 12)]
    router = Router.for_query_document([table(body)], documents, default_route="document")
    SentenceTransformer(modules=[router, normalize()], device="cpu").save(str(folder))
    texts = [text for text in TEXTS if text]
    ours = reference(folder, tmp_path, texts, **({"route": route} if route else {}))
    assert_near(ours, encoded(folder, texts, task=route or "document"))
    with pytest.raises(ConfigError, match="has the routes document, query, and none is called 'passage'"):
        qv.model(qv.Case(name="x", source=f"path:{folder}", options={"route": "passage"})).inputs_key()


@pytest.mark.parametrize("kind", ["SequenceClassification", "MaskedLM"])
def test_head_of_a_checkpoint_is_said_to_be_left_out(kind: str, body: Path, tmp_path: Path) -> None:
    import transformers

    folder = shutil.copytree(body, tmp_path / "headed")
    config = transformers.AutoConfig.from_pretrained(body)
    getattr(transformers, f"BertFor{kind}")(config).save_pretrained(folder)
    notes = qv.model(qv.Case(name="x", source=f"path:{folder}")).rows().notes
    assert [f"a BertFor{kind}, and its head" in note for note in notes].count(True) == 1
    assert not qv.model(qv.Case(name="x", source=f"path:{body}")).rows().notes


def test_head_is_not_seen_where_there_is_none(tmp_path: Path) -> None:
    """An embedding takes the encoder of an encoder-decoder, and RoFormerModel has no head though its name has a For."""
    from transformers import RoFormerConfig, RoFormerModel, T5Config, T5ForConditionalGeneration

    from qeff_validate.models.sources.checkpoint import head_tensors

    t5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    RoFormerModel(RoFormerConfig(vocab_size=9, embedding_size=8, **sizes)).save_pretrained(tmp_path / "roformer")
    assert head_tensors(tmp_path / "t5")[1] == []
    assert head_tensors(tmp_path / "roformer")[1] == []
