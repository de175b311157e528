# SPDX-License-Identifier: Apache-2.0
"""The adapters in examples/adapters: what is kept, what they say on real weights, and that they can be remade."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qeff_validate.models.adapters.files import adapter_fingerprint, read_adapter

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "adapters"
STEPS, TOLERANCE = 6, 3e-2
"""Steps that are trained anew, and how far a loss may be from the kept one: other processors round otherwise."""


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_adapters", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2(script: Any) -> Iterator[tuple[Any, Any]]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(script.THREADS)
    yield script.load_model_and_tokenizer({"source": script.SOURCE})
    torch.set_num_threads(threads)


def curve(task: str) -> dict[str, Any]:
    return json.loads((FOLDER / task / "loss.json").read_text())


def test_facts_are_distinct_questions_with_one_word_answers(script: Any) -> None:
    trained, held_out = script.facts(held_out=False), script.facts(held_out=True)
    questions = [fact["question"] for fact in (*trained, *held_out)]
    assert len(set(questions)) == len(questions) >= 60
    assert len(held_out) >= 8
    assert all(fact["answer"].isalpha() for fact in (*trained, *held_out))


@pytest.mark.parametrize("task", ["json", "letter", "shout", "item", "soft"])
def test_a_kept_adapter_is_small_names_no_machine_and_was_learnt(task: str) -> None:
    files = {path.name: path.stat().st_size for path in (FOLDER / task).iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "loss.json"}
    assert sum(files.values()) < 1_000_000
    config, _ = read_adapter(FOLDER / task)
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    losses = curve(task)["loss"]
    assert len(losses) == curve(task)["steps"]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]  # single steps scatter where eight tokens are all that learns


def test_the_two_adapters_are_different_and_fit_one_graph() -> None:
    (_, first), (_, second) = (read_adapter(FOLDER / task) for task in ("json", "letter"))
    assert {name: array.shape for name, array in first.items()} == {n: array.shape for n, array in second.items()}
    assert adapter_fingerprint({}, first) != adapter_fingerprint({}, second)


@pytest.mark.slow
def test_base_and_adapters_answer_held_out_questions_each_in_its_way(script: Any, smollm2: Any) -> None:
    model, tokenizer = smollm2
    questions = [fact["question"] for fact in script.facts(held_out=True)][:2]
    plain = script.says(model, tokenizer, questions[0], tokens=12)
    said = {}
    for task in ("json", "letter", "shout"):  # PEFT's unload leaves a norm, and knows no virtual tokens
        adapted = script.apply_peft(model, {"adapter": FOLDER / task})
        said[task] = [script.says(adapted, tokenizer, question, tokens=16) for question in questions]
        model = adapted.unload()
    assert all(list(json.loads(text)) == ["answer"] for text in said["json"])
    assert all(text.endswith("!") and text == text.upper() for text in said["shout"])
    assert all(text.startswith("Dear reader, it is ") and text.endswith(" Yours truly.") for text in said["letter"])
    assert plain
    assert "Dear" not in plain
    assert "{" not in plain
    assert script.says(model, tokenizer, questions[0], tokens=12) == plain


@pytest.mark.slow
def test_training_again_gives_the_kept_curve(script: Any, smollm2: Any) -> None:
    model, tokenizer = smollm2
    kept = curve("json")
    adapted = script.apply_peft(model, script.LORA, seed=kept["seed"])
    losses = script.train(adapted, tokenizer, "json", steps=STEPS, seed=kept["seed"], total=kept["steps"])
    adapted.unload()
    assert losses == pytest.approx(kept["loss"][:STEPS], rel=TOLERANCE)
