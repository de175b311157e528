# SPDX-License-Identifier: Apache-2.0
"""Options of each model kind, and the kinds that are built in. Loads no framework."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qeff_validate.case import Case, Strict
from qeff_validate.compare import MOST
from qeff_validate.errors import ConfigError, suggest
from qeff_validate.logits import MOST as LOGIT_MOST
from qeff_validate.protocols import Model, ModelKind

Bucket = Annotated[int, Field(ge=1, le=1 << 20)]


POOLINGS = ("avg", "cls", "last", "max", "mean", "none", "weighted_mean")
"""Names that `models.pooling` and `models.oracle` implement; a test compares the three."""


BASE = "base"
"""What the model without an adapter is called."""


class EmbeddingOptions(Strict):
    """Options of the model kind ``embedding``."""

    pooling: Any = Field(
        "mean",
        description=f"{', '.join(POOLINGS)}; auto: as sentence-transformers' files beside the weights say;"
        " or package.module:function, or a callable, that takes (hidden_states, attention_mask)",
    )
    normalize: bool | None = Field(
        None, description="scale each vector to length 1; null: no, or as pooling: auto finds"
    )
    truncate_dim: Annotated[int, Field(ge=1)] | None = Field(
        None, description="keep the first so many elements (Matryoshka), before normalizing"
    )
    prompt: str = Field("", description="put before every text, e.g. 'query: '")
    padding_side: Literal["right", "left"] = Field("right", description="where padding stands")
    token_type_ids: bool = Field(False, description="make token_type_ids an input of the graph (fed with zeros)")
    seq_len: list[Bucket] = Field([32, 64], min_length=1, description="lengths to compile for, in tokens")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    truncate: bool = Field(False, description="cut texts that are longer than every bucket; else they are an error")

    @field_validator("pooling")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if callable(value) or (isinstance(value, str) and (value in (*POOLINGS, "auto") or ":" in value)):
            return value
        hint = suggest(str(value), (*POOLINGS, "auto"))
        raise ValueError(f"no pooling is called {value!r}.{hint} Or name your own: package.module:function")

    @field_validator("seq_len", mode="before")
    @classmethod
    def _one_bucket(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("seq_len")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError(f"a length is named twice in {value}")
        return sorted(value)


def _embedding(case: Case, options: EmbeddingOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.embedding import PooledEmbedding

    if given is not None:
        from qeff_validate.models.pooling import PooledModel

        if isinstance(given, PooledModel):
            theirs = (given.pooling, given.normalize, given.truncate_dim)
            ours = (options.pooling, bool(options.normalize), options.truncate_dim)
            if theirs != ours:
                raise ConfigError(
                    f"(pooling, normalize, truncate_dim) of the model are {theirs}, of the case {ours}: make them agree"
                )
            given = given.base_model
    return PooledEmbedding(case, options, given=given, tokenizer=tokenizer)


EMBEDDING = ModelKind(options=EmbeddingOptions, create=_embedding, suite="embedding", bounds=MOST)


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
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="tokens of each continuation")
    prefill_seq_len: Bucket = Field(16, description="tokens of a prompt that one run takes")
    ctx_len: Bucket = Field(64, description="slots for keys and values: prompt and continuation must fit")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(2, description="rows of a run")
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
        if self.prefill_seq_len > self.ctx_len:
            raise ValueError(f"prefill_seq_len {self.prefill_seq_len} exceeds ctx_len {self.ctx_len}")
        if self.max_new_tokens >= self.ctx_len:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt in ctx_len {self.ctx_len}"
            )
        if self.peft and self.peft_method is None:
            raise ValueError("peft holds the options of peft_method, which is missing")
        if self.adapters and self.peft_method is not None:
            raise ValueError("give adapters, or peft_method for two random ones, not both")
        if self.mixed_batch and self.batch_size < 2:
            raise ValueError("mixed_batch serves several adapters in one batch: batch_size must be 2 or more")
        return self

    def named(self) -> dict[str, str | dict[str, Any]]:
        """Return the adapters by name, the two random ones of ``peft_method`` among them."""
        if self.peft_method is None:
            return dict(self.adapters)
        return {
            name: {"peft_method": self.peft_method, "init": "random", "seed": seed, **self.peft}
            for seed, name in enumerate(("a", "b"), start=1)
        }


def _causal(case: Case, options: PeftCausalLMOptions, given: Any = None, tokenizer: Any = None) -> Model:
    from qeff_validate.models.causal_lm import PeftCausalLM

    if options.mixed_batch and not options.named() and not hasattr(given, "peft_config"):
        raise ConfigError(
            f"case {case.name!r}: mixed_batch: each row of a batch chooses an adapter, and there is none: give adapters"
            " ({name: directory}) or peft_method: lora, or leave mixed_batch out"
        )
    if case.exporter == "torchscript":
        raise ConfigError(
            f"case {case.name!r}: exporter torchscript cannot trace weights that are inputs: leave exporter out, or"
            " say dynamo"
        )
    return PeftCausalLM(case, options, given=given, tokenizer=tokenizer)


PEFT_CAUSAL_LM = ModelKind(options=PeftCausalLMOptions, create=_causal, suite="peft", bounds=LOGIT_MOST)
