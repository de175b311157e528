# SPDX-License-Identifier: Apache-2.0
"""A transformers model with a function behind its head: the module that is exported, and the original as a session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import translated_errors
from qeff_validate.protocols import Graph
from qeff_validate.tensors import Shapes, Tensors, TensorSpec


class HeadModule(nn.Module):
    """``input_ids, attention_mask[, token_type_ids] → output``.

    Args:
        base_model: a transformers model with its head.
        pool: maps the model's output and the mask ``[batch, seq]`` to what the graph returns; may be a module.
        field: the name of that output.
    """

    pooling = "head"
    """Mutants of the pooling replace ``pool``."""

    def __init__(self, base_model: nn.Module, pool: Callable[[Tensor, Tensor], Tensor], field: str) -> None:
        super().__init__()
        self.base_model, self.field = base_model, field
        if isinstance(pool, nn.Module):
            self.head, pool = pool, pool.forward
        self.pool = pool

    def get_base_model(self) -> nn.Module:
        """Return the transformers model, whose attention is chosen for a variant."""
        return self.base_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the output for ids and masks ``[batch, seq]``."""
        output = read_output(self.field, self.base_model, input_ids, attention_mask, token_type_ids)
        return self.pool(output, attention_mask)


def run_module(module: Any, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
    """Run a `HeadModule`."""
    with translated_errors("run the Hugging Face model"):
        output: Tensor = module(ids, mask, types)
    return output


def read_output(field: str, model: Any, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
    """Run a transformers model, and return one of its outputs ``[batch, …]``.

    Raises:
        ConfigError: the model has no such output.
        Unavailable: it fails.
    """
    extra = {} if types is None else {"token_type_ids": types}
    with translated_errors("run the Hugging Face model"):
        outputs: Any = model(input_ids=ids, attention_mask=mask, **extra)
    value: Tensor | None = getattr(outputs, field, None)
    if value is None:
        raise ConfigError(
            f"{type(model).__name__} returns no {field} but {', '.join(outputs.keys())}: give a model with the head of"
            " this kind"
        )
    return value


class OriginalWithHead:
    """Runs the original model on batches, and what follows its head in numpy, for applying faults to it.

    Args:
        model: in eval mode, already in ``dtype``.
        graph: the interface whose names it has.
        field: the model's output that is read.
        finish: maps a row of that output and its mask, bool ``[seq]``, to the row of the result.
        dtype: ``float32`` or ``float64``, also of the outputs.
    """

    shapes: tuple[Shapes, ...] = ()

    def __init__(
        self,
        model: Any,
        graph: Graph,
        field: str,
        finish: Callable[[Floats, NDArray[np.bool_]], Floats],
        dtype: str,
    ) -> None:
        self.inputs: tuple[TensorSpec, ...] = graph.inputs
        self.outputs: tuple[TensorSpec, ...] = graph.outputs
        self.model, self._field, self._finish, self._dtype = model, field, finish, dtype
        self.head_override: Callable[[Tensor, Tensor], Tensor] | None = None
        """Replaces what follows the head: maps the model's output and the mask ``[batch, seq]`` to the result."""

    def run(self, feeds: Tensors, *, fetch: Sequence[str] | None = None) -> Tensors:  # noqa: ARG002
        """Run one batch."""
        tensors = [torch.from_numpy(feeds[spec.name]) for spec in self.inputs]
        mask = tensors[1]
        with torch.no_grad():
            output = read_output(self._field, self.model, *tensors)
            if self.head_override is not None:
                return {self.outputs[0].name: self.head_override(output, mask).numpy().astype(self._dtype)}
        rows = [self._finish(*row) for row in zip(output.double().numpy(), mask.numpy() > 0, strict=True)]
        return {self.outputs[0].name: np.stack(rows).astype(self._dtype)}

    def reset(self) -> None:
        """Forget nothing: there is no state."""
