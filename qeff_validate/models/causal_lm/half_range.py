# SPDX-License-Identifier: Apache-2.0
"""Whether the original causal LM leaves the range of fp16, where a run in fp16 has given NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qeff_validate.models.causal_lm.adapter_specs import FP16_MOST
from qeff_validate.models.causal_lm.reference import activation, load_adapter
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.tensors import Array, Tensors


def beyond_half(
    model: Any, spec: str | Mapping[str, Any] | None, tensors: Tensors, prompts: Sequence[Array], adapter: str
) -> str:
    """Say which module of the original model first leaves the range of fp16 on a text; empty if none does.

    Args:
        model: the base, float32; must not be used afterwards.
        spec: directory of the adapter, or its PEFT options; None: no adapter.
        tensors: its tensors by saved names.
        prompts: token ids of one text.
        adapter: its name, for the sentence.
    """
    if spec is not None:
        with translated_errors("load the adapter with PEFT"):
            model = load_adapter(model, spec, tensors)
    beyond: list[tuple[str, float]] = []

    def watch(path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                greatest = float(tensor.abs().max())
                if not greatest <= FP16_MOST:
                    beyond.append((path, greatest))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    (text,) = prompts
    try:
        with translated_errors("run the Hugging Face model"), torch.inference_mode():
            model(input_ids=torch.from_numpy(text)[None], use_cache=False, **activation(model, [text], text.size - 1))
    finally:
        for handle in handles:
            handle.remove()
    if not beyond:
        return ""
    path, greatest = beyond[0]
    return (
        f"the original model itself leaves the range of fp16: {path.removeprefix('base_model.model.')} reaches"
        f" {greatest:.3g} with {adapter}, and the greatest number is {FP16_MOST:.0f} (qeff-validate tune finds what"
        " must stay in float32)"
    )
