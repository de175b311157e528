# SPDX-License-Identifier: Apache-2.0
"""Modules on vectors of words (WordEmbeddings, WordWeights, CNN, LSTM), a bag of words, and CLIP's text tower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_oracle import assert_near, encoded, reference

import qeff_validate as qv
from qeff_validate.errors import ConfigError

WORDS = ["PAD", "red", "green", "blue", "one", "Two", "three"]
WIDTH = 16
TEXTS = [
    "red green (blue)",
    "the Red, one one",
    "Two two TWO three blue red green one one",
    "blue",
    "green unknown! the",
]


def words(tokenizer: Any = None, *, lower: bool = False, **options: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    tokenizer = tokenizer or WhitespaceTokenizer(WORDS, stop_words=["the"], do_lower_case=lower)
    table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    return WordEmbeddings(tokenizer, table.numpy(), **options)


def pretrained_words(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="PAD"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A three", special_tokens=[("three", 6)])
    return words(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="PAD", pad_token="PAD"), **options)


def weights() -> Any:
    from sentence_transformers.sentence_transformer.modules import WordWeights

    return WordWeights(WORDS, {"red": 0.2, "green": 2.5, "two": 3.0, "one": 0.7}, 1.3)


def modules(*names: Any) -> list[Any]:
    """Return modules by name and arguments."""
    import sentence_transformers.sentence_transformer.modules as known

    return [getattr(known, name)(*arguments) for name, *arguments in names]


def save(folder: Path, layers: list[Any], **options: Any) -> Path:
    from sentence_transformers import SentenceTransformer

    with torch.random.fork_rng():
        torch.manual_seed(1)
        SentenceTransformer(modules=layers, device="cpu", **options).save(str(folder))
    return folder


SAVED: Mapping[str, Callable[[], list[Any]]] = {
    "mean of words": lambda: [words(), *modules(("Pooling", WIDTH, "mean"))],
    "small letters, cut": lambda: [words(lower=True, max_seq_length=5), *modules(("Pooling", WIDTH, "max"))],
    "tokenizer of transformers": lambda: [
        pretrained_words(max_seq_length=5),
        *modules(("Pooling", WIDTH, "mean"), ("Normalize",)),
    ],
    "weights": lambda: [words(), weights(), *modules(("Pooling", WIDTH, "mean"))],
    "weights by root of length": lambda: [
        words(),
        weights(),
        *modules(("Pooling", WIDTH, "mean_sqrt_len_tokens"), ("Dense", WIDTH, 8)),
    ],
    "weights and max": lambda: [words(), weights(), *modules(("Pooling", WIDTH, "max"))],
    "weights behind a CNN": lambda: [
        words(),
        *modules(("CNN", WIDTH, 8, [1, 3])),
        weights(),
        *modules(("Pooling", 16, "mean")),
    ],
    "one direction": lambda: [words(), *modules(("LSTM", WIDTH, 8, 1, 0, False), ("Pooling", 8, "lasttoken"))],
}


def chain() -> list[Any]:
    """Return modules in which padding, on either side, must reach nothing."""
    layers = modules(("CNN", WIDTH, 8, [1, 5]), ("LSTM", WIDTH, 8, 2), ("Pooling", WIDTH, ("max", "mean")))
    return [words(), *layers]


@pytest.mark.numeric
@pytest.mark.parametrize("name", SAVED)
def test_reference_is_what_encode_returns_and_the_module_agrees(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", SAVED[name](), prompts={"query": "red red "}, default_prompt_name="query")
    assert_near(reference(folder, tmp_path, TEXTS), encoded(folder, TEXTS))


@pytest.mark.numeric
@pytest.mark.parametrize("side", ["right", "left"])
def test_convolutions_and_recurrence_on_all_runtimes(side: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", chain())
    ours = reference(folder, tmp_path, TEXTS, ("torch", "ort", "sim"), padding_side=side)
    assert_near(ours, encoded(folder, TEXTS))


@pytest.mark.numeric
def test_old_layout_of_word_vectors(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", chain())
    entries = json.loads((folder / "modules.json").read_text())
    for entry in entries:
        entry["type"] = f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(entries))
    for path, name in (("1_CNN/cnn_config.json", "in_"), ("2_LSTM/lstm_config.json", "")):
        config = json.loads((folder / path).read_text())
        config[f"{name}word_embedding_dimension"] = config.pop(f"{name}embedding_dimension")
        (folder / path).write_text(json.dumps(config))
    tokenizer = json.loads((folder / "wordembedding_config.json").read_text())
    tokenizer["tokenizer_class"] = "sentence_transformers.models.tokenizer.WhitespaceTokenizer.WhitespaceTokenizer"
    (folder / "wordembedding_config.json").write_text(json.dumps(tokenizer))
    (folder / "config_sentence_transformers.json").unlink()
    assert_near(reference(folder, tmp_path, TEXTS), encoded(folder, TEXTS))


COUNTS: Mapping[str, Callable[[], list[Any]]] = {
    "each time": lambda: modules(("BoW", WORDS, {"red": 0.5, "two": -2.0}, 1.5), ("Dense", 7, 4)),
    "once": lambda: modules(("BoW", WORDS, {"red": 0.5, "two": -2.0}, 1.5, False), ("Normalize",)),
}


@pytest.mark.numeric
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", COUNTS)
def test_bag_of_words_counts_on_all_runtimes_as_encode_does(name: str, side: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", COUNTS[name](), prompts={"query": "red red "}, default_prompt_name="query")
    texts = [*TEXTS, "PAD red"]  # the id of padding is that of a word
    ours = reference(folder, tmp_path, texts, ("torch", "ort", "sim"), padding_side=side)
    assert_near(ours, encoded(folder, texts))


@pytest.mark.numeric
def test_word_that_stands_twice_in_a_vocabulary_is_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", modules(("BoW", WORDS)))
    path = folder / "0_BoW" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab": ["PAD", *WORDS, "red"]}))
    assert_near(reference(folder, tmp_path, TEXTS), encoded(folder, TEXTS))


@pytest.mark.parametrize(
    ("change", "words_of_reason"),
    [
        ({"vocab": "red"}, "vocab is no list of words"),
        ({"word_weights": {"red": "much"}}, "word_weights and unknown_word_weight hold no number for each word"),
        ({"word_weights": [1]}, "word_weights and unknown_word_weight hold no number for each word"),
        ({"word_weights": 5}, "word_weights and unknown_word_weight hold no number for each word"),
        ({"unknown_word_weight": True}, "word_weights and unknown_word_weight hold no number for each word"),
    ],
)
def test_broken_bag_of_words_is_refused_with_its_file(change: Any, words_of_reason: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", COUNTS["each time"]())
    path = folder / "0_BoW" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS}))
    with pytest.raises(ConfigError, match=rf"0_BoW/config.json: {words_of_reason}"):
        (model.rows(), model.source.body())


def renamed_tokenizer(folder: Path) -> None:
    path = folder / "wordembedding_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "x.PhraseTokenizer"}))


def nothing(folder: Path) -> None:
    """Change nothing."""


REFUSED: Mapping[str, tuple[Callable[[], list[Any]], Callable[[Path], None], str]] = {
    "counts before a pooling": (
        lambda: modules(("BoW", WORDS), ("Pooling", 7, "mean")),
        nothing,
        "has two Pooling modules",
    ),
    "even width": (
        lambda: [words(), *modules(("CNN", WIDTH, 8, [2]), ("Pooling", 8, "mean"))],
        nothing,
        r"a CNN module with kernel_sizes \[2\]",
    ),
    "first token": (
        lambda: [words(), *modules(("Pooling", WIDTH, "cls"))],
        nothing,
        "pools WordEmbeddings with 'cls', which sentence-transformers cannot",
    ),
    "weights of several": (
        lambda: [words(), weights(), *modules(("Pooling", WIDTH, ("max", "mean")))],
        nothing,
        "a WordWeights module before max and mean",
    ),
    "weights too early": (
        lambda: [words(), weights(), *modules(("CNN", WIDTH, 8, [3]), ("Pooling", 8, "mean"))],
        nothing,
        "a WordWeights module before CNN and mean",
    ),
    "phrases": (
        lambda: [words(), *modules(("Pooling", WIDTH, "mean"))],
        renamed_tokenizer,
        "names the tokenizer PhraseTokenizer, which is not supported: it needs the package nltk",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_module_and_reason(name: str, tmp_path: Path) -> None:
    build, change, words_of_reason = REFUSED[name]
    folder = save(tmp_path / "saved", build())
    change(folder)
    model = qv.model(qv.Case(name="x", source=f"path:{folder}", inputs={"texts": TEXTS}))
    with pytest.raises(ConfigError, match=words_of_reason):
        (model.rows(), model.settings())


def test_recurrence_behind_a_transformer_is_refused_as_sentence_transformers_cannot_run_it(tmp_path: Path) -> None:
    types = [("Transformer", ""), ("LSTM", "1_LSTM"), ("Pooling", "2_Pooling")]
    entries = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in types]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "2_Pooling").mkdir()
    (tmp_path / "2_Pooling" / "config.json").write_text("{}")
    from qeff_validate.models.sources.sentence_directory import read_modules

    with pytest.raises(ConfigError, match="an LSTM module behind a Transformer: it reads the lengths of texts"):
        read_modules(tmp_path)


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Write a small CLIP model; encode needs packages for images, so its text features are the oracle."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "red", "green", "one", "<e>"]

    def build(folder: Path, end: int) -> Any:
        tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(names)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <e>", special_tokens=[("<s>", 2), ("<e>", 6)]
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<e>", unk_token="<unk>", eos_token="<e>", model_max_length=12
        )
        fast.save_pretrained(folder)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        text = {**sizes, "vocab_size": 7, "max_position_embeddings": 16, "eos_token_id": end, "pad_token_id": 6}
        config = CLIPConfig(
            text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=24
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = CLIPModel(config).eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)

        def features(text: str) -> Any:
            tokens = fast([text], truncation=True, return_tensors="pt")
            with torch.no_grad():
                found = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
            return found.pooler_output[0].numpy()

        return features

    def saved(kind: str, end: int = 6) -> tuple[Path, Any]:
        path = "0_CLIPModel" if kind == "CLIPModel" else ""
        (tmp_path / "saved" / path).mkdir(parents=True)
        features = build(tmp_path / "saved" / path, end)
        entry = {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}
        (tmp_path / "saved" / "modules.json").write_text(json.dumps([entry]))
        return tmp_path / "saved", features

    return saved


def vectors_config(folder: Path, method: str) -> None:
    modality = {"text": {"method": method, "method_output_name": "pooler_output"}}
    config = {"modality_config": modality, "module_output_name": "sentence_embedding"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(config))


CLIP_TEXTS = ["red green", "one", "red one one green one red red one green red one red one red"]


@pytest.mark.numeric
@pytest.mark.parametrize(("kind", "end"), [("CLIPModel", 6), ("Transformer", 6), ("Transformer", 2)])
def test_text_tower_of_clip_with_its_projection(kind: str, end: int, clip: Any, tmp_path: Path) -> None:
    folder, features = clip(kind, end)
    if kind == "Transformer":
        vectors_config(folder, "get_text_features")
    ours = reference(folder, tmp_path, CLIP_TEXTS, ("torch", "ort") if kind == "CLIPModel" else ("torch",))
    assert_near(ours, np.stack([features(text) for text in CLIP_TEXTS]))


def test_texts_and_modules_that_clip_reads_elsewhere_are_refused(clip: Any) -> None:
    folder, _ = clip("Transformer")
    vectors_config(folder, "get_text_features")
    case = qv.Case(name="x", source=f"path:{folder}", inputs={"texts": [*CLIP_TEXTS, "red <e> green"]})
    with pytest.raises(ConfigError, match="CLIP reads a text's vector at its first end token"):
        qv.model(case).rows()
    vectors_config(folder, "forward")
    with pytest.raises(ConfigError, match="gives sentence_embedding by 'forward'; supported is get_text_features"):
        qv.model(case).settings()
