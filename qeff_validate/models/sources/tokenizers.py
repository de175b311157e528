# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as functions from a text to token ids. Loads no framework."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qeff_validate.errors import ConfigError
from qeff_validate.models.framework_calls import first_line, quiet_transformers, translated_errors
from qeff_validate.models.sources.checkpoint import check_tokenizer, read_object

if TYPE_CHECKING:
    from qeff_validate.models.sources.encode_settings import ChatFormat


class Tokenize(Protocol):
    """Maps a text to token ids, with special tokens."""

    def __call__(self, text: str, most: int | None = None, /) -> list[int]:
        """Return all token ids, or at most so many; truncation keeps the special tokens."""


class TokenizePair(Protocol):
    """Maps a text, or a pair of texts, to token ids with special tokens, and their token types."""

    def __call__(self, text: str, other: str | None, most: int | None = None, /) -> tuple[list[int], list[int]]:
        """Return ids and types, all or at most so many; truncation shortens the longer text of a pair first."""


MOST_LENGTH = 10**9
"""transformers uses 1e30 for a tokenizer without a limit."""


def tokenize_with(tokenizer: Any, *, lower_case: bool = False) -> tuple[Tokenize, int]:
    """Return the function of a transformers tokenizer, and its padding id, 0 if it has none.

    Args:
        tokenizer: of transformers; it is left unchanged.
        lower_case: lowercase each text before any other normalization.
    """
    pad = tokenizer.pad_token_id
    encode = _lowercasing(tokenizer) if lower_case else tokenizer

    def tokenize(text: str, most: int | None = None, /) -> list[int]:
        limit = {"truncation": False} if most is None else {"truncation": True, "max_length": most}
        with translated_errors(f"tokenize {text[:40]!r}"):
            return list(encode(text, verbose=False, **limit)["input_ids"])

    return tokenize, 0 if pad is None else int(pad)


def load_tokenizer(folder: Path) -> Any:
    """Return the transformers tokenizer in a directory, which need not hold a model.

    Raises:
        ConfigError: a file is broken, or it needs code of its own.
        Unavailable: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    with translated_errors(f"load the tokenizer in {folder}"), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def conversation_ids(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> tuple[list[int], str]:
    """Return the token ids of a conversation, and its text, as the tokenizer's chat template renders them.

    The template writes the begin token, if there is to be one; the tokenizer adds none.

    Args:
        tokenizer: of transformers, None if there is none.
        messages: ``role`` and ``content`` of each.
        add_generation_prompt: end with the opening of an answer.

    Raises:
        ConfigError: there is no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("messages: the tokenizer has no chat template: give prompts instead")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as exc:  # of jinja, or raised by the template
        raise ConfigError(f"messages: the chat template refuses them: {first_line(exc)}") from exc
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), str(text)


def tokenize_pairs_with(tokenizer: Any, *, lower_case: bool = False) -> TokenizePair:
    """Return the function of a transformers tokenizer on pairs; types are 0 where the tokenizer gives none."""
    encode = _lowercasing(tokenizer) if lower_case else tokenizer

    def tokenize(text: str, other: str | None, most: int | None = None, /) -> tuple[list[int], list[int]]:
        limit = {"truncation": False} if most is None else {"truncation": True, "max_length": most}
        with translated_errors(f"tokenize {text[:40]!r}"):
            # in a batch, because a pair on its own loses an empty second text
            encoded = encode([text if other is None else (text, other)], verbose=False, **limit)
        ids = list(encoded["input_ids"][0])
        return ids, list(encoded["token_type_ids"][0]) if "token_type_ids" in encoded else [0] * len(ids)

    return tokenize


def prompted(tokenize: Tokenize, prompt: str) -> Tokenize:
    """Return a tokenizer that puts a prompt before each text."""

    def with_prompt(text: str, most: int | None = None, /) -> list[int]:
        return tokenize(prompt + text, most)

    return with_prompt


def chat_tokenize(tokenizer: Any, prompt: str, chat: ChatFormat) -> Tokenize:
    """Return the function of a transformers tokenizer on messages, as sentence-transformers makes them of texts.

    Args:
        tokenizer: of transformers, with a chat template.
        prompt: the message of the system; empty: there is none.
        chat: how texts become messages.
    """

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if chat.structured else text}

    def tokenize(text: str, most: int | None = None, /) -> list[int]:
        messages = [*([message("system", prompt)] if prompt else []), message("user", text)]
        with translated_errors(f"put {text[:40]!r} into the chat template of the tokenizer"):
            encoded = tokenizer.apply_chat_template(
                [messages], tokenize=True, return_dict=True, truncation=False, **chat.options
            )
        ids = list(encoded["input_ids"][0])
        if most is not None and len(ids) > most:
            raise ConfigError(
                f"{text[:40]!r} has {len(ids)} tokens in the chat template, and at most {most} are taken:"
                " sentence-transformers would cut it and put the end of the template back, which is not supported; give"
                " shorter texts"
            )
        return ids

    return tokenize


def ending_tokenize(tokenize: Tokenize, end: int) -> Tokenize:
    """Return a tokenizer of a CLIP model, whose vector of a text is that of its first end token.

    Args:
        tokenize: the tokenizer.
        end: the config's end token; 2 (of older configs) stands for the greatest id of the text.
    """

    def checked(text: str, most: int | None = None, /) -> list[int]:
        ids = tokenize(text, most)
        found = max(ids, default=None) if end == 2 else end
        if found not in ids or ids.index(found) != len(ids) - 1:
            raise ConfigError(
                f"{text[:40]!r} has the ids {ids[:8]}…, and CLIP reads a text's vector at its first end token, which is"
                " supported at the end alone: take end tokens out of the texts, and see that the tokenizer adds one"
            )
        return ids

    return checked


def join_pairs(tokenize: Tokenize) -> TokenizePair:
    """Return a function on pairs from one on texts: the second text follows without its first token, with type 1."""

    def joined(text: str, other: str | None, most: int | None = None, /) -> tuple[list[int], list[int]]:
        first = tokenize(text)
        second = [] if other is None else tokenize(other)[1:]
        while most is not None and len(first) + len(second) > max(most, 3):
            longer = first if len(first) >= len(second) else second
            del longer[-2]  # the last token ends the text
        return first + second, [0] * len(first) + [1] * len(second)

    return joined


def _lowercasing(tokenizer: Any) -> Any:
    import copy

    from tokenizers.normalizers import Lowercase, Sequence

    lowercasing = copy.deepcopy(tokenizer)
    backend = lowercasing.backend_tokenizer
    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    return lowercasing


def hashed_words(vocabulary: int, pad: int) -> tuple[Tokenize, int]:
    """Return a tokenizer that hashes words and punctuation, with a first and a last token, and the padding id.

    Raises:
        ConfigError: the vocabulary is too small.
    """
    ids = [token for token in range(vocabulary) if token != pad]
    if len(ids) < 8:
        raise ConfigError(f"vocab_size {vocabulary} is too small: at least 9 are needed")
    first, last, words = ids[0], ids[1], ids[3:]

    def tokenize(text: str, most: int | None = None, /) -> list[int]:
        pieces: Sequence[str] = re.findall(r"\w+|[^\w\s]", text)
        pieces = pieces if most is None else pieces[: max(0, most - 2)]
        return [first, *(words[zlib.crc32(word.encode()) % len(words)] for word in pieces), last]

    return tokenize, pad


def tokenizer_length(folder: Path | None) -> dict[str, Any]:
    """Return ``model_max_length`` of a directory's tokenizer; empty if it has no limit, which is stored as 1e30."""
    with suppress(ConfigError, AttributeError):
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            length = read_object(folder / "tokenizer_config.json").get("model_max_length")
            return {"model_max_length": length} if isinstance(length, int) and 0 < length < MOST_LENGTH else {}
    return {}
