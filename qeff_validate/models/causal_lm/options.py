# SPDX-License-Identifier: Apache-2.0
"""Options of the model kind ``peft-causal-lm``. Loads no framework."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qeff_validate.config.case import Length
from qeff_validate.config.strict import Strict

BASE = "base"
"""What the model without an adapter is called."""


class Message(Strict):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1)] = Field(description="system, user, assistant, or what the template takes")
    content: str = Field(description="its text")


Conversation = Annotated[list[Message], Field(min_length=1)]


class PeftCausalLMOptions(Strict):
    """Options of the model kind ``peft-causal-lm``."""

    adapters: dict[str, str | dict[str, Any]] = Field(
        {},
        description="{name: directory of a saved adapter, or {peft_method: lora, r: 4, seed: 1, …} for one with seeded"
        " random weights}; all of one method, rank and target modules, because they share a graph",
    )
    peft_method: str | None = Field(
        None, description="two seeded random adapters a and b of this method, where no adapters are named"
    )
    peft: dict[str, Any] = Field({}, description="options of peft_method: {r: 4, target_modules: [q_proj, v_proj]}")
    prompts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="texts to continue; null: built in, with boundary lengths"
    )
    messages: Annotated[list[Conversation], Field(min_length=1)] | None = Field(
        None,
        description="conversations to continue, instead of prompts: [[{role: user, content: TEXT}, …], …], rendered by"
        " the tokenizer's chat template",
    )
    add_generation_prompt: bool = Field(True, description="end each conversation with the opening of an answer")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="tokens of each continuation")
    prefill_seq_len: Length | Annotated[list[Length], Field(min_length=1)] = Field(
        16,
        description="tokens of a prompt that one run takes; a list: a run takes the smallest that fits what is left",
    )
    ctx_len: Length = Field(64, description="slots for keys and values: prompt and continuation must fit")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(2, description="rows of a run")
    full_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None,
        description="continuous batching: rows of a decode run, which choose their slots by the input batch_index;"
        " prompts are prefilled one by one into slots as these become free. null: batches of batch_size rows",
    )
    kv_cache_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="slots of continuous batching, if there are more than full_batch_size"
    )
    next_tokens: bool = Field(
        False,
        description="the graph has the output next_tokens too, the greatest logits', as on-device greedy sampling",
    )
    padding_side: Literal["right", "left"] = Field("right", description="where the padding of a prompt stands")
    mixed_batch: bool = Field(
        False,
        description="one graph holds all adapters, and each row of a batch chooses its own by the input adapter_ids,"
        " 0 for the base; for LoRA",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        for name, made in value.items() if isinstance(value, dict) else ():
            if name == BASE:
                raise ValueError(f"an adapter cannot be called {BASE!r}: that is the model without one")
            if not isinstance(made, str) and not (
                isinstance(made, dict) and made.keys() & {"peft_method", "peft_type"}
            ):
                raise ValueError(
                    f"adapter {name!r}: give the directory of a saved one, or {{peft_method: lora, …}}, got {made!r}"
                )
        return value

    @model_validator(mode="after")
    def _fits(self) -> PeftCausalLMOptions:
        if self.prefill_lengths[-1] > self.ctx_len:
            raise ValueError(f"prefill_seq_len {self.prefill_lengths[-1]} exceeds ctx_len {self.ctx_len}")
        if self.full_batch_size is not None and "batch_size" in self.model_fields_set:
            raise ValueError("full_batch_size sets the rows of decode runs, and prefill runs have one: omit batch_size")
        if self.kv_cache_batch_size is not None and self.kv_cache_batch_size < (self.full_batch_size or 1 << 20):
            raise ValueError(
                f"kv_cache_batch_size {self.kv_cache_batch_size} is for continuous batching: give full_batch_size too,"
                " and no more rows than slots"
            )
        if self.max_new_tokens >= self.ctx_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in ctx_len {self.ctx_len}"
            )
        if self.messages is not None and self.prompts is not None:
            raise ValueError("give prompts or messages, not both")
        if self.peft and self.peft_method is None:
            raise ValueError("peft holds the options of peft_method, which is missing")
        if self.adapters and self.peft_method is not None:
            raise ValueError("give adapters, or peft_method for two random ones, not both")
        if self.mixed_batch and self.rows < 2:
            name = "batch_size" if self.full_batch_size is None else "full_batch_size"
            raise ValueError(f"mixed_batch serves several adapters in one batch: {name} must be 2 or more")
        return self

    @property
    def prefill_lengths(self) -> tuple[int, ...]:
        """Tokens of a row in prefill runs, ascending."""
        lengths = self.prefill_seq_len if isinstance(self.prefill_seq_len, list) else [self.prefill_seq_len]
        return tuple(sorted(set(lengths)))

    @property
    def rows(self) -> int:
        """Rows of a decode run."""
        return self.batch_size if self.full_batch_size is None else self.full_batch_size

    @property
    def slots(self) -> int:
        """Texts whose state the graph keeps."""
        return self.rows if self.kv_cache_batch_size is None else self.kv_cache_batch_size

    def named(self) -> dict[str, str | dict[str, Any]]:
        """Return the adapters by name, the two random ones of ``peft_method`` among them."""
        if self.peft_method is None:
            return dict(self.adapters)
        return {
            name: {"peft_method": self.peft_method, "init": "random", "seed": seed, **self.peft}
            for seed, name in enumerate(("a", "b"), start=1)
        }
