# SPDX-License-Identifier: Apache-2.0
"""Runs the original model in several legitimate variants of one precision: the ensemble that bounds are measured with.

A run is as right as an artifact can be in that precision, and independent of every artifact, exporter, compiler and
simulator.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn

from qeff_validate.memory import trim_memory
from qeff_validate.models.emulation.precision import ComputationVariant, Compute, RoundedWeights, emulate_precision
from qeff_validate.models.framework_calls import base_of, quiet_transformers
from qeff_validate.models.sources.exportable_experts import exportable_experts

T = TypeVar("T")

ENSEMBLE = (
    ComputationVariant("eager, rows of equal length"),
    ComputationVariant("sdpa, padded batches of 8", "sdpa", batch=8),
    ComputationVariant("eager, sums in 2 parts, padded batches of 16", parts=2, batch=16, fused=False),
    ComputationVariant("eager, sums in 4 parts, padded batches of 3", parts=4, batch=3, block=16, fused=False),
    ComputationVariant("sdpa, sums in 8 parts, padded batches of 12", "sdpa", parts=8, batch=12, block=64),
    ComputationVariant("eager, random rounding, padded batches of 5", seed=1, batch=5, fused=False),
    ComputationVariant("eager, random rounding, rows of equal length", seed=2),
    ComputationVariant(
        "sdpa, random rounding, sums in 2 parts, padded batches of 6", "sdpa", parts=2, seed=3, batch=6, fused=False
    ),
)
"""They differ in attention kernel, summation order, batch size, padding, rounding, and layout of compressed blocks.

Each variant computes on one thread; ``parts`` stands for the partial sums that the threads of an operation would give.
"""


def run_ensemble(
    model: Any,
    compute: Compute,
    run: Callable[[Any, ComputationVariant], T],
    *,
    weights: RoundedWeights,
    compressed: Mapping[int, AbstractContextManager[Any]] | None = None,
    variants: Sequence[ComputationVariant] = ENSEMBLE,
) -> list[T]:
    """Run a float32 transformers model in every variant, as many in parallel as torch has threads.

    Many operations of a small model are too short to be split over threads, which then wait for each other and for
    other load on the machine; whole variants are independent.

    Args:
        model: left unchanged; its copies share the weights. There are as many of each attention as run in parallel.
        compute: the precision.
        run: called with a copy of the model and its variant, while the precision is emulated.
        weights: the rounded weights, shared by all variants.
        compressed: by block size, the context in which products read compressed weights.
        variants: the ensemble.

    Returns:
        The results of ``run``, in the order of the variants.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(variants))
    replicas: dict[str, SimpleQueue[Any]] = {variant.attention: SimpleQueue() for variant in variants}

    def run_variant(variant: ComputationVariant) -> T:
        torch.set_num_threads(1)
        free = replicas[variant.attention]
        replica = free.get()
        try:
            with (
                (compressed or {}).get(variant.block, nullcontext()),
                emulate_precision(replica, compute, variant, weights),
            ):
                return run(replica, variant)
        finally:
            free.put(replica)

    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        for attention, count in Counter(variant.attention for variant in variants).items():
            for _ in range(min(workers, count)):  # none waits for one
                replica = copy_sharing_weights(model)
                stack.enter_context(attention_implementation(replica, attention))
                stack.enter_context(exportable_experts(replica))
                replicas[attention].put(replica)
        if weights.beyond_range:  # what is beyond the range for any input stays in float32 for all
            run_variant(variants[0])
        if workers == 1:
            return [run_variant(variant) for variant in variants]
        torch.set_num_threads(1)
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(run_variant, variants))
        trim_memory()  # the C library keeps what each thread has freed
        return results


def copy_sharing_weights(model: T) -> T:
    """Return a deep copy of a model that shares its parameters and buffers."""
    assert isinstance(model, nn.Module)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Set the attention implementation of a model until the context ends; no effect where it is not supported."""
    model = base_of(model)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (AttributeError, ValueError, ImportError):  # no transformers model, or this implementation is not supported
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)
