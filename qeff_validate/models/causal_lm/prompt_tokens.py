# SPDX-License-Identifier: Apache-2.0
"""From a case's texts or conversations to token ids, by the tokenizer of the model or of an adapter that grew it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qeff_validate.config.case import Case
from qeff_validate.errors import ConfigError
from qeff_validate.models.causal_lm.adapter_specs import AdapterSpecs
from qeff_validate.models.causal_lm.options import PeftCausalLMOptions
from qeff_validate.models.causal_lm.prompts import LONG, TEXTS
from qeff_validate.models.sources.checkpoint import digests, has_tokenizer, tokenizer_files
from qeff_validate.models.sources.resolve import Source
from qeff_validate.models.sources.tokenizers import Tokenize, conversation_ids, load_tokenizer, tokenize_with
from qeff_validate.models.token_rows import TokenRows
from qeff_validate.tensors import Array


class PromptTokenizer:
    """The prompts of a case as token ids.

    Args:
        case: the case.
        options: validated options.
        source: returns the source of weights and tokenizer.
        adapters: the adapters of the case.
    """

    def __init__(
        self, case: Case, options: PeftCausalLMOptions, source: Callable[[], Source], adapters: AdapterSpecs
    ) -> None:
        self._case, self._options, self._source, self._adapters = case, options, source, adapters

    def key(self) -> Mapping[str, Any]:
        """Return what identifies the tokenizer, those in the directories of adapters included."""
        own = {name: digests(tokenizer_files(folder), folder) for name, folder in self._own_tokenizers().items()}
        return {**self._source().tokenizer_key(), **({"adapters": own} if own else {})}

    @property
    def note(self) -> str:
        """A note if the prompts are tokenized with the tokenizer of an adapter; else empty."""
        return self._grown[1]

    def texts(self) -> list[str] | None:
        """Return the user's prompts; None: the built-in ones, or ``messages``."""
        for name in self._case.inputs.given():
            if name != "texts":
                raise ConfigError(
                    f"case {self._case.name!r}: inputs: {name}: the model kind {self._case.model!r} reads prompts: give"
                    " texts, or options: {prompts: […]}"
                )
        return self._options.prompts if self._options.prompts is not None else self._case.inputs.texts

    def messages(self) -> list[list[dict[str, str]]]:
        """Return the messages of each conversation, plain; empty without."""
        return [[message.model_dump() for message in messages] for messages in self._options.messages or ()]

    def _own_tokenizers(self) -> dict[str, Path]:
        """Return the directories of adapters that hold a tokenizer, by the adapter's name."""
        return {name: folder for name, folder in self._adapters.folders.items() if has_tokenizer(folder)}

    def rows(self) -> TokenRows:
        """Tokenize the prompts without using stored inputs.

        Raises:
            ConfigError: a prompt and its continuation are longer than the context.
        """
        tokenize, pad = self._tokenizer()
        user_texts = self.texts()
        if self._options.messages is not None:
            conversations = list(self._conversations())
            texts = [text for text, _ in conversations]
            ids = [tokens for _, tokens in conversations]
        else:
            texts = [*(TEXTS if user_texts is None else user_texts)]
            ids = [np.array(tokens, dtype=np.int64) for tokens in self._once_begun(map(tokenize, texts))]
        if user_texts is None and self._options.messages is None:
            boundary = list(self._boundary(np.array(tokenize(LONG), dtype=np.int64)))
            texts += [text for text, _ in boundary]
            ids += [tokens for _, tokens in boundary]
            ids = [_with_invocation(tokens, self._adapters.invocation()) for tokens in ids]
        room = self._room()
        hidden = self._adapters.virtual_tokens()
        virtual = f" and {hidden} virtual tokens" if hidden else ""
        for text, tokens in zip(texts, ids, strict=True):
            if not 1 <= tokens.size <= room:
                raise ConfigError(
                    f"case {self._case.name!r}: prompt {text[:60]!r} has {tokens.size} tokens, and 1 to {room}"
                    f" fit beside max_new_tokens {self._options.max_new_tokens}{virtual} in ctx_len"
                    f" {self._options.ctx_len}:"
                    " shorten it, or raise ctx_len"
                )
        return TokenRows(tuple(ids), pad, tuple(texts))

    def _tokenizer(self) -> tuple[Tokenize, int]:
        """Return the tokenizer and the padding id."""
        tokenizer, _ = self._grown
        return self._source().tokenizer() if tokenizer is None else tokenize_with(tokenizer)

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        """The transformers tokenizer of the prompts: that of an adapter with more tokens, else the model's or None."""
        return self._grown[0] or self._source().pretrained_tokenizer()

    @cached_property
    def _grown(self) -> tuple[Any, str]:
        """The transformers tokenizer of an adapter with more tokens than the model's, and a note; or None.

        Raises:
            ConfigError: several adapters have added different tokens.
        """
        own = {name: load_tokenizer(folder) for name, folder in self._own_tokenizers().items()}
        published = self._source().pretrained_tokenizer() if own else None
        size = 0 if published is None else len(published)
        grown = {name: tokenizer for name, tokenizer in own.items() if len(tokenizer) > size}
        if not grown:
            return None, ""
        first, *others = grown
        for name in others:
            if grown[name].get_vocab() != grown[first].get_vocab():
                raise ConfigError(
                    f"case {self._case.name!r}: the adapters {first!r} and {name!r} have added different tokens to the"
                    " tokenizer, so a prompt has no ids that both understand: give each a case"
                )
        note = f"prompts are tokenized with the tokenizer of adapter {first!r}: {len(grown[first])} tokens"
        return grown[first], f"{note}, the base's has {size}" if size else note

    def _once_begun(self, rows: Iterable[list[int]]) -> Iterator[list[int]]:
        """Yield token ids with one begin token, where a text holds it and the tokenizer has added another."""
        for ids in rows:
            repeated = len(ids) > 1 and ids[0] == ids[1]
            doubled = repeated and ids[0] == getattr(self._pretrained_tokenizer, "bos_token_id", None)
            yield ids[1:] if doubled else ids

    def _conversations(self) -> Iterator[tuple[str, Array]]:
        """Yield text and token ids of each conversation.

        Raises:
            ConfigError: neither the model's tokenizer nor those of its adapters have a chat template, or it refuses.
        """
        tokenizer = self._pretrained_tokenizer
        if not getattr(tokenizer, "chat_template", None):
            own = (load_tokenizer(folder) for folder in self._own_tokenizers().values())
            tokenizer = next((other for other in own if other.chat_template), tokenizer)
        for messages in self.messages():
            ids, text = conversation_ids(tokenizer, messages, add_generation_prompt=self._options.add_generation_prompt)
            yield text, np.array(ids, dtype=np.int64)

    def _room(self) -> int:
        """Return the number of tokens that a prompt may have, beside virtual tokens and the continuation."""
        return self._options.ctx_len - self._options.max_new_tokens - self._adapters.virtual_tokens()

    def _boundary(self, long: Array) -> Iterator[tuple[str, Array]]:
        """Yield prompts that end just before, at and after a chunk boundary, if they fit.

        Each starts at another offset of the text, because a leak from a prompt with the same prefix would not be seen.
        """
        room = self._room()
        around = {chunk + more for chunk in self._options.prefill_lengths for more in (-1, 0, 1)}
        for start, length in enumerate(sorted({1, *around, room})):
            if 1 <= length <= min(room, long.size):
                yield f"({length} tokens of a long text, from {5 * start})", np.roll(long, -5 * start)[:length]


def _with_invocation(tokens: Array, invocation: Sequence[int]) -> Array:
    """Return a built-in prompt with the invocation in its middle, if it is long enough."""
    at = (tokens.size - len(invocation)) // 2
    if at < 1 or not invocation:
        return tokens
    return np.concatenate([tokens[:at], np.array(invocation), tokens[at + len(invocation) :]])
