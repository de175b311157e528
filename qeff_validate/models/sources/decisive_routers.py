# SPDX-License-Identifier: Apache-2.0
"""Makes routers of random mixtures of experts select the same experts in every precision."""

from __future__ import annotations

import re
from typing import Any

import torch

ROUTER = re.compile(r"\.(gate|router)(\.layer)?\.weight$")
"""Suffixes of the names of router weights in transformers."""

WRITER = re.compile(r"\.(dense|down_proj|o_proj|out_proj|output_linear|w2)(\.weight)?$")
"""Suffixes of the names of weights ``[…, width, in]`` whose products are added to the hidden states."""

SIDE, PULL = 6.0, 3.0
"""Magnitude of the first element of a token embedding (others have deviation 1), and of its router weights."""


def make_decisive(model: Any) -> None:
    """Assign each token to one half of the experts with a margin that rounding does not change; in place.

    With random routers two experts sometimes tie within fp16, and a flip changes the text. The sign of the first
    element of an embedding selects one half of the experts, in every layer, because no layer adds to it. The order and
    weights within a half stay random. A model without routers is left unchanged.
    """
    routers = [weight for name, weight in model.named_parameters() if ROUTER.search(name)]
    if not routers:
        return
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.div_(embedding.std())
        embedding[:, 0] = torch.where(embedding[:, 0] < 0, -SIDE, SIDE)  # padding is drawn as zeros
        width = embedding.shape[1]
        for name, weight in model.named_parameters():
            if WRITER.search(name) and weight.ndim > 1 and weight.shape[-2] == width:
                weight[..., 0, :] = 0
        for router in routers:
            half = len(router) // 2
            router[:half, 0], router[half:, 0] = PULL, -PULL
