# SPDX-License-Identifier: Apache-2.0
"""Routers of random mixtures of experts that choose the same experts in every precision."""

from __future__ import annotations

import re
from typing import Any

import torch

ROUTER = re.compile(r"\.(gate|router)\.weight$")
"""Names of router weights, in all families of transformers that were looked at."""

SIDE, PULL = 6.0, 3.0
"""First element of each token's embedding beside others of deviation 1, and a router's weight for it."""


def make_decisive(model: Any) -> None:
    """Let each token stand for one half of the experts, so clearly that rounding does not change which are chosen.

    As random routers are drawn, two experts are level within fp16 now and then, and a flip there changes the text. The
    first element of an embedding becomes the token's side, and the two halves of the experts are for one side each.
    Which of them are first, and how much each counts, stays random. A model without routers is left as it is.
    """
    routers = [weight for name, weight in model.named_parameters() if ROUTER.search(name)]
    if not routers:
        return
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.div_(embedding.std())
        embedding[:, 0] = torch.where(embedding[:, 0] < 0, -SIDE, SIDE)  # padding is drawn as zeros
        for router in routers:
            half = len(router) // 2
            router[:half, 0], router[half:, 0] = PULL, -PULL
