# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files as QEfficient's ``QEFFAutoModel(..., pooling=...).export()`` does, without QEfficient.

Written after commit ebf55e8 of quic/efficient-transformers, and compared with what that wrote of MiniLM and small BERT,
RoBERTa, XLM-R and MPNet (torch 2.13, transformers 5.5.4): opset 17 by the TorchScript exporter, ``input_ids,
attention_mask → output``, constants clipped to float16's range, those above 1 kB in ``NAME_0.onnx.data`` beside it.
Decoders do not export there with this torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

NAMES = ("input_ids", "attention_mask")
DIMS = {0: "batch_size", 1: "seq_len"}
SPLIT_ABOVE = 1024
"""Bytes of a tensor that stays in the file."""


def mean(hidden: Any, mask: Any) -> Any:
    weights = mask.unsqueeze(-1).expand(hidden.size()).float()
    return torch.sum(hidden * weights, 1) / torch.clamp(weights.sum(1), min=1e-9)


def avg(hidden: Any, mask: Any) -> Any:
    """As it is there: every row is pooled from the hidden states of the first."""
    return hidden[0].masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1) / mask.sum(dim=1)[..., None]


def maximum(hidden: Any, mask: Any) -> Any:
    hidden[mask.unsqueeze(-1).expand(hidden.size()).float() == 0] = -1e9
    return torch.max(hidden, 1)[0]


def last(hidden: Any, mask: Any) -> Any:
    """A function of the caller's own."""
    return hidden[torch.arange(hidden.shape[0]), mask.sum(1) - 1]


POOLINGS: Mapping[str, Callable[[Any, Any], Any]] = {
    "mean": mean, "avg": avg, "cls": lambda hidden, mask: hidden[:, 0], "max": maximum, "last": last,
}  # fmt: skip


class Pooled(torch.nn.Module):
    def __init__(self, body: Any, pooling: str) -> None:
        super().__init__()
        self.base_model, self.pooling_fn = body, POOLINGS[pooling]

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.pooling_fn(self.base_model(input_ids, attention_mask)[0], attention_mask)


class Unpooled(torch.nn.Module):
    """A body with the outputs that it has, which the exporter names by numbers behind the first."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return tuple(value for value in self.body(input_ids, attention_mask).to_tuple() if value is not None)


def write(body: Any, path: Path, pooling: str | None) -> None:
    """Write a body (its attention eager, in eval mode) with a pooling; None: as it is."""
    model = (Unpooled(body) if pooling is None else Pooled(body, pooling)).eval()
    ids = torch.zeros((1, 32), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (ids, torch.ones_like(ids)), str(path), input_names=list(NAMES), output_names=["output"],
            dynamic_axes=dict.fromkeys(NAMES, DIMS), opset_version=17, dynamo=False,
        )  # fmt: skip
    file = onnx.load(path)
    for tensor in onnx.external_data_helper._get_all_tensors(file):
        array = numpy_helper.to_array(tensor)
        limit = float(np.finfo(np.float16).max)
        if array.dtype == np.float32 and (np.abs(array) > limit).any():
            clipped = np.where(np.isneginf(array), array, np.clip(array, -limit, limit)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(clipped, tensor.name))
        if tensor.HasField("raw_data") and len(tensor.raw_data) > SPLIT_ABOVE:
            onnx.external_data_helper.set_external_data(tensor, f"{path.stem}_0.onnx.data")
    onnx.helper.set_model_props(file, {"qeff_transforms": "CustomOpsTransform,FP16ClipTransform,SplitTensorsTransform"})
    onnx.save(file, path)
