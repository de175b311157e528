# SPDX-License-Identifier: Apache-2.0
"""Adapters on bodies: directories that hold an adapter alone, and a PeftModel in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bounds import close
from encode_oracle import TEXTS, WIDTH, WORDS, assert_near, encoded, reference

import qeff_validate as qv
from qeff_validate.engine import Runner
from qeff_validate.errors import ConfigError
from qeff_validate.protocols import runtime

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's own

PAIRS = [["red", "green one"], ["red", "blue"], ["two", "three red blue"], ["one two", "one"]]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options})


def noisy(model: Any) -> Any:
    """Give an adapter an effect."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def adapted(body: Path, config: Any, auto: str = "AutoModel") -> Any:
    """Return a PeftModel in eval mode."""
    return noisy(peft.get_peft_model(getattr(transformers, auto).from_pretrained(body), config)).eval()


def with_modules(folder: Path, body: Path) -> Path:
    """Make a directory with an adapter one of sentence-transformers."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    pooling = folder / "1_Pooling"
    pooling.mkdir()
    Pooling(WIDTH, "mean").save(str(pooling))
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    entries = [
        {"name": kind, "type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    transformers.AutoTokenizer.from_pretrained(body).save_pretrained(folder)
    return folder


def saved_by_sentence_transformers(folder: Path, body: Path, *, wrap: bool) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    model = SentenceTransformer(modules=[Transformer(str(body)), Pooling(WIDTH, "mean"), Normalize()], device="cpu")
    if wrap:
        model[0].model = peft.get_peft_model(model[0].model, lora())
    else:
        model.add_adapter(lora())
    noisy(model[0].model)
    model.save_pretrained(str(folder))
    return folder


def decoder(folder: Path) -> Path:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), **sizes, pad_token_id=0, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def on_causal_lm(folder: Path, body: Path) -> Path:
    config = lora(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapted(decoder(folder.parent / "decoder"), config, "AutoModelForCausalLM").save_pretrained(folder)
    return with_modules(folder, body)


def with_method(config: Any) -> Callable[[Path, Path], Path]:
    def build(folder: Path, body: Path) -> Path:
        adapted(body, config).save_pretrained(folder)
        return with_modules(folder, body)

    return build


DIRECTORIES: Mapping[str, Callable[[Path, Path], Path]] = {
    "add_adapter": lambda folder, body: saved_by_sentence_transformers(folder, body, wrap=False),
    "PeftModel": lambda folder, body: saved_by_sentence_transformers(folder, body, wrap=True),
    "trained on a causal LM": on_causal_lm,
    "other scales": with_method(lora(use_rslora=True, lora_alpha=3, rank_pattern={"query": 2})),
    "IA3": with_method(peft.IA3Config(target_modules=["value"], feedforward_modules=[])),
    "saved embeddings": with_method(lora(modules_to_save=["word_embeddings"])),
}


@pytest.mark.numeric
@pytest.mark.parametrize("name", DIRECTORIES)
def test_directory_with_an_adapter_alone_gives_the_vectors_of_encode(name: str, body: Path, tmp_path: Path) -> None:
    folder = DIRECTORIES[name](tmp_path / "saved", body)
    assert not (folder / "config.json").exists()
    runtimes = ("torch", "ort", "sim") if name == "add_adapter" else ("torch",)
    assert_near(reference(folder, tmp_path, runtimes=runtimes), encoded(folder, TEXTS))


@pytest.mark.numeric
def test_model_in_memory_is_judged_with_its_adapter_and_left_as_it_was(body: Path, tmp_path: Path) -> None:
    model = adapted(body, lora())
    tokenizer = transformers.AutoTokenizer.from_pretrained(body)
    case = qv.Case(name="mine", source="memory", exporter="torchscript", tolerance="table", inputs={"texts": TEXTS})
    pipeline = Runner(store=tmp_path / "store", model=model, tokenizer=tokenizer).pipeline(case)
    result = pipeline.result(runtime("ort"))
    assert result.status == "pass", result.reason
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    close(pipeline.reference()["output"][: len(TEXTS)], torch.stack([s.mean(0) for s in states]), atol=2e-5)
    assert model.active_adapters == ["default"]


def test_adapter_without_modules_and_tokenizer_takes_the_tokenizer_of_its_base(body: Path, tmp_path: Path) -> None:
    adapted(body, lora()).save_pretrained(tmp_path)
    case = qv.Case(name="x", source=f"path:{tmp_path}", inputs={"texts": TEXTS})
    plain = case.model_copy(update={"source": f"path:{body}"})
    ours, wanted = qv.model(case).rows().ids, qv.model(plain).rows().ids
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in wanted]


def test_changed_adapter_is_another_model(body: Path, tmp_path: Path) -> None:
    adapted(body, lora()).save_pretrained(tmp_path)

    def key() -> Any:
        return qv.model(qv.Case(name="x", source=f"path:{tmp_path}")).fingerprint()

    before, config = key(), json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    assert key() != before


@pytest.mark.numeric
@pytest.mark.parametrize("wrap", [False, True])
def test_reranker_whose_adapter_brings_the_classifier(wrap: bool, body: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    config = lora(task_type="SEQ_CLS", modules_to_save=["classifier"])
    model = CrossEncoder(str(body), num_labels=1, device="cpu")
    if wrap:
        model[0].model = peft.get_peft_model(model[0].model, config)
    else:
        model.add_adapter(config)
    noisy(model[0].model)
    folder = tmp_path / "saved"
    model.save_pretrained(str(folder))
    case = qv.Case(
        name="x", model="reranker", source=f"path:{folder}", exporter="torchscript", tolerance="table",
        inputs={"pairs": PAIRS},
    )  # fmt: skip
    pipeline = Runner(store=tmp_path / "store").pipeline(case)
    result = pipeline.result(runtime("torch"))
    assert result.status == "pass", result.reason
    wanted = CrossEncoder(str(folder), device="cpu").predict(PAIRS, batch_size=1)
    close(pipeline.reference()["scores"][:, 0], wanted, atol=2e-6)


def changed(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def renamed(folder: Path, other: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name.replace("encoder", "coder"): tensor for name, tensor in load_file(path).items()}, path)


DAMAGES: Mapping[str, tuple[Callable[[Path, Path], None], str]] = {
    "another base": (
        lambda folder, other: changed(folder, base_model_name_or_path=str(other)),
        "does not fit LlamaModel: Target modules",
    ),
    "no such base": (
        lambda folder, other: changed(folder, base_model_name_or_path="/nowhere/model"),
        "the base model of the adapter in .* is neither a directory nor a hub id",
    ),
    "unnamed base": (
        lambda folder, other: changed(folder, base_model_name_or_path=None),
        "names no base_model_name_or_path",
    ),
    "other names": (renamed, "does not fit its base, a BertModel: transformers has no place for 8 tensors"),
    "learns a prompt": (
        lambda folder, _: peft.PromptTuningConfig(
            num_virtual_tokens=4,
            base_model_name_or_path=json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"],
        ).save_pretrained(folder),
        "PROMPT_TUNING learns a prompt",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_adapter_that_does_not_fit_is_an_error_that_says_why(name: str, body: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    folder = tmp_path / "adapter"
    adapted(body, lora()).save_pretrained(folder)
    damage(folder, decoder(tmp_path / "decoder"))
    with pytest.raises(ConfigError, match=words):
        qv.model(qv.Case(name="x", source=f"path:{folder}")).module()


def test_adapter_alone_is_no_causal_language_model(body: Path, tmp_path: Path) -> None:
    adapted(body, lora()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"name its base model as source, and this directory in options\.adapters"):
        qv.load_model_and_tokenizer({"source": f"path:{tmp_path}"})
