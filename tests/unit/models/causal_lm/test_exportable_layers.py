# SPDX-License-Identifier: Apache-2.0
"""Layers of PEFT that are exported in another form. The oracles are PEFT's layers and numpy's solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounds import close
from peft.tuners.c3a.utils import BlockCircularConvolution

import qeff_validate as qv
from qeff_validate.builders.decompositions import solve_without_pivots
from qeff_validate.models.causal_lm.attach_adapters import find_parameter_names
from qeff_validate.models.causal_lm.exportable_layers import EXPORTABLE, circulant, use_exportable_layers
from qeff_validate.models.causal_lm.wrapper import Decoder
from qeff_validate.models.sources.synthetic import Random

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 1}
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "hra": ("llama", {"r": 4, **PROJECTIONS}),
    "c3a": ("llama", {"block_size": 8, "init": 0.3, **PROJECTIONS}),
    "lora": ("mixtral", EXPERTS),
}


def case(method: str, base: str, peft: dict[str, Any]) -> qv.Case:
    options = {
        "peft_method": method, "peft": {"init": 0.2, **peft}, "prompts": ["a b c d e", "f g", "h i j"],
        "max_new_tokens": 3, "prefill_seq_len": 4, "ctx_len": 16,
    }  # fmt: skip
    config = {**SMALL, **({"num_local_experts": 4} if base == "mixtral" else {})}
    return qv.Case(
        name="layers",
        model="peft-causal-lm",
        source=f"random:{base}",
        config=config,
        tolerance="table",
        options=options,
    )


@pytest.mark.numeric
@pytest.mark.parametrize("method", METHODS)
def test_layer_computes_what_that_of_peft_does(method: str) -> None:
    base, options = METHODS[method]
    source = Random(base, case(method, base, options).config, 0)
    adapted = qv.apply_peft(source.causal_lm(), {"peft_method": method, "init": 0.2, **options})
    ids = torch.tensor([[3, 17, 5, 29]])
    adapted.set_experts_implementation("batched_mm") if base == "mixtral" else None
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        replaced = {type(module) for module in adapted.modules()} & set(EXPORTABLE)
        use_exportable_layers(adapted)
        assert replaced
        assert not {type(module) for module in adapted.modules()} & set(EXPORTABLE)
        close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
def test_circulant_matrix_is_the_convolution() -> None:
    kernel, x = torch.randn(3, 2, 4), torch.randn(5, 8)
    close(x @ circulant(kernel).T, BlockCircularConvolution.apply(x, kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.numeric
@pytest.mark.parametrize("left", [True, False])
def test_systems_of_orthogonal_adapters_are_solved(left: bool) -> None:
    rng = np.random.default_rng(0)
    skew = rng.standard_normal((2, 8, 8)).astype(np.float32) * 3
    skew = skew - skew.transpose(0, 2, 1)
    matrix, right = np.eye(8, dtype=np.float32) + skew, rng.standard_normal((2, 8, 8)).astype(np.float32)
    exact = np.linalg.solve(*((m if left else m.transpose(0, 2, 1)).astype(np.float64) for m in (matrix, right)))
    solution = solve_without_pivots(torch.from_numpy(matrix), torch.from_numpy(right), left=left)
    close(solution, exact if left else exact.transpose(0, 2, 1), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hra", "c3a", "lora", "boft", "psoft"])
def test_layer_is_exported(method: str, tmp_path: Path) -> None:
    options = {"boft": {"boft_block_size": 4, **PROJECTIONS}, "psoft": {"r": 4, **PROJECTIONS}}
    base, peft = METHODS[method] if method in METHODS else ("llama", options[method])
    report = qv.validate(case(method, base, peft), runtimes=["ort"], store=tmp_path)
    assert report.passed, report.results[0].reason


def test_experts_without_target_modules_are_served(tmp_path: Path) -> None:
    alone = {**EXPERTS, "target_modules": []}
    report = qv.validate(case("lora", "mixtral", alone), runtimes=["torch"], store=tmp_path)
    assert report.passed, report.results[0].reason


def test_decoder_takes_exportable_layers() -> None:
    base, options = METHODS["hra"]
    model = qv.apply_peft(Random(base, SMALL, 0).causal_lm(), {"peft_method": "hra", **options})
    Decoder(model, 1)
    assert not {type(module) for module in model.modules()} & set(EXPORTABLE)


@pytest.mark.numeric
def test_run_leaves_learnt_rows_of_tied_embeddings_in_the_model() -> None:
    """Embedding and head hold the same dict of parameters; an export after a run found the run's tensor there."""
    config = {**SMALL, "tie_word_embeddings": True}
    learnt = {"peft_method": "lora", "r": 2, "trainable_token_indices": [3], **PROJECTIONS}
    model = qv.apply_peft(Random("llama", config, 0).causal_lm(), learnt)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = find_parameter_names(model)
    state = {saved: torch.ones_like(parameters[name]) for saved, name in names.items()}
    cache = torch.zeros(1, model.config.num_key_value_heads, 8, model.config.head_dim)
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        logits = Decoder(model, 1, names)(tokens, tokens, **{"past_key.0": cache, "past_value.0": cache}, **state)[0]
        for saved, name in names.items():
            parameters[name].copy_(state[saved])
        close(logits[0, 0], Decoder(model, 1)(tokens, tokens, **{"past_key.0": cache, "past_value.0": cache})[0][0, 0])
    assert all(tensor is parameters[name] for name, tensor in model.named_parameters(remove_duplicate=False))
