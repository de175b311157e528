# SPDX-License-Identifier: Apache-2.0
"""Pooling in torch, robust to fp16, left padding, arbitrary values in masked positions, and rows without a token.

Each function takes hidden states ``[batch, seq, hidden]`` (float) and a mask ``[batch, seq]`` (1 = real token) and
returns ``[batch, hidden]`` in the same dtype (`none`: ``[batch, seq, hidden]``). Inputs are not modified. A row without
a token pools to zeros.
Masked positions are replaced, not multiplied by zero, because 0 · NaN is NaN.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qeff_validate.errors import ConfigError, suggest
from qeff_validate.models.layers import normalized

Pooling = Callable[[Tensor, Tensor], Tensor]
PoolingName: TypeAlias = "str | tuple[str, ...] | Pooling"

SHARE = 1 / 64
"""A power of two, so that scaling by it is exact."""


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the real tokens.

    Hidden states and token count are scaled down before the sum and the division: the sum of 8192 values of 500 stays
    within fp16, and the division rounds once, whereas a rounded 1/n would shift all elements alike.
    """
    real = mask.unsqueeze(-1) > 0
    total = (torch.where(real, hidden, 0.0) * SHARE).sum(dim=1)
    return total / (mask.sum(dim=1, keepdim=True).clamp(min=1).to(hidden.dtype) * SHARE)


def maximum(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the maximum of each feature over the real tokens."""
    real = mask.unsqueeze(-1) > 0
    lowest = torch.finfo(hidden.dtype).min
    highest = torch.where(real, hidden, lowest).amax(dim=1)
    return torch.where(real.any(dim=1), highest, 0.0)


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the first real token of each row, with padding on either side."""
    first = mask.to(torch.int32).argmax(dim=1)
    rows = torch.gather(hidden, 1, first.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
    return torch.where((mask > 0).any(dim=1, keepdim=True), rows, 0.0)


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Take the last real token of each row, with padding on either side."""
    places = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    final = (mask.to(torch.int32) * places).argmax(dim=1)
    rows = torch.gather(hidden, 1, final.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)
    return torch.where((mask > 0).any(dim=1, keepdim=True), rows, 0.0)


def mean_sqrt_len(hidden: Tensor, mask: Tensor) -> Tensor:
    """Divide the sum of the real tokens by the square root of their number."""
    return mean(hidden, mask) * mask.sum(dim=1, keepdim=True).to(hidden.dtype).sqrt()


def weighted_mean(hidden: Tensor, mask: Tensor, before: int = 0) -> Tensor:
    """Average the real tokens with weights 1, 2, 3, … (SGPT, Muennighoff 2022), counted from the first real token.

    Weights are divided by the number of tokens, so that they and their sum stay within fp16.

    Args:
        hidden: hidden states ``[batch, seq, hidden]``.
        mask: ``[batch, seq]``.
        before: number of tokens of each row that the mask leaves out and that are counted all the same.
    """
    real = mask.unsqueeze(-1) > 0
    count = mask.sum(dim=1, keepdim=True).clamp(min=1).to(hidden.dtype)
    weights = ((mask.cumsum(dim=1) + before) * mask).to(hidden.dtype) / (count + before)
    total = (torch.where(real, hidden, 0.0) * (weights * SHARE).unsqueeze(-1)).sum(dim=1)
    return total / (weights * SHARE).sum(dim=1, keepdim=True).clamp(min=SHARE / 2)


def none(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden states of all tokens ``[batch, seq, hidden]``; masked positions hold zeros."""
    return torch.where(mask.unsqueeze(-1) > 0, hidden, 0.0)


POOLINGS: Mapping[str, Pooling] = {
    "avg": mean,
    "cls": cls,
    "last": last,
    "max": maximum,
    "mean": mean,
    "mean_sqrt_len": mean_sqrt_len,
    "none": none,
    "weighted_mean": weighted_mean,
}
"""Poolings by name; ``avg`` is upstream's name for ``mean``."""


def resolve_pooling(pooling: PoolingName, prompt_tokens: int = 0) -> Pooling:
    """Return the function for a name, names, a dotted path ``package.module:function`` or a callable.

    Args:
        pooling: several names concatenate their vectors.
        prompt_tokens: number of first real tokens of each row that are not pooled.

    Raises:
        ConfigError: there is no such name or function, or it does not take hidden states and a mask.
    """
    if isinstance(pooling, tuple) or prompt_tokens:
        weighted = partial(weighted_mean, before=prompt_tokens)
        names = pooling if isinstance(pooling, tuple) else (pooling,)
        return _Concatenation(
            [weighted if name == "weighted_mean" else resolve_pooling(name) for name in names], prompt_tokens
        )
    if isinstance(pooling, str) and pooling in POOLINGS:
        return POOLINGS[pooling]
    found: Any = pooling
    if isinstance(pooling, str):
        module, _, name = pooling.partition(":")
        if not name:
            raise ConfigError(
                f"no pooling is called {pooling!r}.{suggest(pooling, POOLINGS)} Or package.module:function"
            )
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as exc:
            raise ConfigError(f"pooling {pooling!r} cannot be imported: {exc}") from exc
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"pooling {pooling!r} must be callable with (hidden_states, attention_mask): {exc}") from exc
    made: Pooling = found
    return made


class _Concatenation:
    """Concatenates the vectors of several poolings, which leave out the first tokens of each row."""

    def __init__(self, poolings: Sequence[Pooling], prompt_tokens: int) -> None:
        self.poolings, self.prompt_tokens = poolings, prompt_tokens

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return ``[batch, hidden · poolings]``."""
        if self.prompt_tokens:
            mask = torch.where(mask.cumsum(dim=1) > self.prompt_tokens, mask, 0)
        return torch.cat([pooling(hidden, mask) for pooling in self.poolings], dim=-1)


class PooledModel(nn.Module):
    """A transformer body with pooling on top: ``input_ids, attention_mask → [batch, hidden]``.

    Args:
        base_model: any body that takes ``input_ids`` and ``attention_mask`` by keyword and returns hidden states
            ``[batch, seq, hidden]`` as ``last_hidden_state`` or first in a tuple.
        pooling: a name in `POOLINGS`, a dotted path ``package.module:function``, or a callable that takes hidden
            states ``[batch, seq, hidden]`` and a mask ``[batch, seq]`` and returns ``[batch, any]``.
        normalize: scale each vector to length 1.
        truncate_dim: keep the first so many elements (Matryoshka), before normalizing.
        shorter: a ``truncate_dim`` beyond the width of the vectors is an error; else all elements are kept.
        layers: modules ``[batch, in] → [batch, out]`` between pooling and truncation.
        prompt_tokens: number of first real tokens of each row that are not pooled.

    Raises:
        ConfigError: unknown pooling, or one of another signature.

    Examples:
        >>> class Body(nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return (torch.stack([input_ids, -input_ids], dim=-1).float(),)
        >>> model = PooledModel(Body(), pooling="mean")
        >>> model(torch.tensor([[2, 4, 9]]), torch.tensor([[1, 1, 0]]))  # the last token is padding
        tensor([[ 3., -3.]])
    """

    def __init__(
        self,
        base_model: nn.Module,
        pooling: PoolingName = "mean",
        *,
        normalize: bool = False,
        truncate_dim: int | None = None,
        shorter: bool = True,
        layers: Sequence[nn.Module] = (),
        prompt_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.pool = resolve_pooling(pooling, prompt_tokens)
        self.layers = nn.ModuleList(layers)
        self.base_model = base_model
        self.pooling = pooling
        self.normalize = normalize
        self.truncate_dim, self.shorter = truncate_dim, shorter

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return vectors ``[batch, hidden]`` (``none``: ``[batch, seq, hidden]``) in the dtype of the hidden states.

        Raises:
            ConfigError: a custom pooling returned something else than a float tensor with one row for each text.
        """
        if token_type_ids is not None:  # by name in the signature, because the exporter wants to see every input there
            kwargs["token_type_ids"] = token_type_ids
        out = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        vectors = pooled(self.pool, self.pooling, hidden, attention_mask)
        if len(self.layers):
            vectors = self._through_layers(vectors, attention_mask)
        if self.truncate_dim is not None:
            if self.shorter and self.truncate_dim > vectors.shape[-1]:
                raise ConfigError(f"truncate_dim {self.truncate_dim} exceeds the vectors' width {vectors.shape[-1]}")
            vectors = vectors[..., : self.truncate_dim]
        return normalized(vectors) if self.normalize else vectors

    def _through_layers(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Apply the layers; a row without a token stays zeros."""
        for layer in self.layers:
            vectors = layer(vectors)
        return torch.where((mask > 0).any(dim=1, keepdim=True), vectors, 0.0)


def pooled(pool: Pooling, name: PoolingName, hidden: Tensor, mask: Tensor) -> Tensor:
    """Apply a pooling; check the dtype and shape of what a custom pooling returns."""
    vectors = pool(hidden, mask)
    if not isinstance(name, tuple) and name not in POOLINGS:
        got = f"a {type(vectors).__name__}"
        if isinstance(vectors, Tensor):
            got = f"{vectors.dtype} {list(vectors.shape)}"
            if vectors.ndim == 2 and vectors.shape[0] == hidden.shape[0] and vectors.dtype == hidden.dtype:
                return vectors
        wanted = f"{hidden.dtype} [{hidden.shape[0]}, width]"
        raise ConfigError(f"pooling {name!r} returned {got} for hidden states {list(hidden.shape)}, wanted {wanted}")
    return vectors
