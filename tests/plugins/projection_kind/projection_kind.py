# SPDX-License-Identifier: Apache-2.0
"""The least that a model kind needs: options, inputs, module, reference. The verdict is `RowModel`'s default."""

from __future__ import annotations

from typing import Any

import numpy as np

from qeff_validate.config.case import Strict
from qeff_validate.models.row_model import RowModel
from qeff_validate.protocols import Graph, ModelKind
from qeff_validate.tensors import Tensors, TensorSpec


class ProjectionOptions(Strict):
    """Options of the kind ``projection``."""

    width: int = 16
    batch_size: int = 4


class Projection(RowModel):
    """A linear layer over rows that are drawn from the case's seed."""

    @property
    def graph(self) -> Graph:
        """``rows [batch_size, width] → output [batch_size, width]``."""
        shape = ("batch_size", self.options.width)
        ports = [(TensorSpec(name, "float32", shape),) for name in ("rows", "output")]
        return Graph(*ports, ({"batch_size": self.options.batch_size},))

    def arrays(self) -> Tensors:
        """Draw 10 rows."""
        rng = np.random.default_rng(self.case.seed)
        return {"rows": rng.standard_normal((10, self.options.width)).astype(np.float32)}

    def module(self) -> tuple[Any, Tensors]:
        """Return the layer with seeded weights; ``forward`` takes ``rows``."""
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(self.case.seed)
            layer = torch.nn.Linear(self.options.width, self.options.width).eval()
        layer.forward = lambda rows: torch.nn.functional.linear(rows, layer.weight, layer.bias)
        return layer, {"rows": self.arrays()["rows"][:2]}

    def reference(self, inputs: Any, *, dtype: str) -> Tensors:
        """Multiply in numpy."""
        layer, rows = self.module()[0], inputs.arrays["rows"].astype(dtype)
        weight, bias = (tensor.detach().numpy().astype(dtype) for tensor in (layer.weight, layer.bias))
        return {"output": rows @ weight.T + bias}


PROJECTION = ModelKind(options=ProjectionOptions, create=Projection, suite="projection")
