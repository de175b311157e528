# SPDX-License-Identifier: Apache-2.0
"""Whether the original causal LM leaves the range of fp16, where a run in fp16 has given NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qeff_validate.models.causal_lm.adapter_specs import FP16_MOST
from qeff_validate.models.causal_lm.reference import activation, load_adapter
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.tensors import Array, Tensors


def beyond_half(
    model: Any, spec: str | Mapping[str, Any] | None, tensors: Tensors, prompts: Sequence[Array], adapter: str
) -> str:
    """Say where the original model first leaves the range of fp16 on a text; empty if it does not.

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
    watch = RangeWatch(model)
    (text,) = prompts
    with watch, translated_errors("run the Hugging Face model"), torch.no_grad():
        model(input_ids=torch.from_numpy(text)[None], use_cache=False, **activation(model, [text], text.size - 1))
    if watch.beyond is None:
        return ""
    path, operation, greatest = watch.beyond
    return (
        f"the original model itself leaves the range of fp16: {operation} in {path.removeprefix('base_model.model.')}"
        f" reaches {greatest:.3g} with {adapter}, and the greatest number is {FP16_MOST:.0f} (qeff-validate tune finds"
        " what must stay in float32)"
    )


class RangeWatch(TorchDispatchMode):
    """Finds the first operation of a model that computes a number beyond fp16.

    Norms and scans square and exponentiate inside of a module, whose output shows nothing of it. Numbers that are
    written down, such as those of masks, are no results.

    Args:
        model: its modules give operations a place; hooks are there while the watch is entered.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._inside, self._handles = model, [""], list[Any]()
        self.beyond: tuple[str, str, float] | None = None

    def __enter__(self) -> RangeWatch:
        """Watch."""
        for path, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path)),
                module.register_forward_hook(lambda *_: self._inside.pop() and None),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Watch no longer."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at its result."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        computed = name not in WRITTEN and not func.is_view and isinstance(result, torch.Tensor)
        if self.beyond is None and computed:
            greatest = _greatest(result)
            operands = [item for item in args if isinstance(item, torch.Tensor)]
            if greatest > FP16_MOST and operands and all(_greatest(item) < MASKED for item in operands):
                self.beyond = self._inside[-1], name.strip("_"), greatest
        return result


MASKED = 1e30
"""Numbers of this size are those of masks."""

WRITTEN = frozenset({"fill_", "full_like", "index_put", "masked_fill", "masked_fill_", "where"})
"""Operations whose results may be numbers that are written in the code."""


def _greatest(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.detach().abs().max())
