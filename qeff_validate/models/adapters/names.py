# SPDX-License-Identifier: Apache-2.0
"""Explains why the tensors of an adapter do not fit a base: by name, layer or shape. Loads no framework."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

Shapes = Mapping[str, tuple[int, ...]]

WRAPPERS = frozenset({
    "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "base_model", "default", "model", "module",
})  # fmt: skip
"""Parts of a name inserted by PEFT, torch.compile, DataParallel, FSDP or checkpointing; the default adapter name."""

MOST = 3
"""Maximum number of examples of each difference."""

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
VOCABULARY = re.compile(r"(embed\w*|wte|lm_head|word_embeddings)\.(modules_to_save\.\w+\.)?weight$")
RANKED = re.compile(r"\.lora_(embedding_)?[AB](\.|$)")
NEEDS = "the adapter has {theirs}, the config on this model gives {ours}"


def key_differences(theirs: Shapes, ours: Shapes) -> str | None:
    """Return how an adapter's tensors differ from those that its config creates on this base, None if they match.

    Args:
        theirs: shapes of the adapter's tensors by saved name.
        ours: shapes of the tensors that PEFT would save for this config on this base.
    """
    fitting = sum(ours.get(name) == shape for name, shape in theirs.items())
    if fitting == len(theirs) == len(ours):
        return None
    missing, extra = [n for n in ours if n not in theirs], [n for n in theirs if n not in ours]
    reasons = list(_shapes(theirs, ours))
    renamed = dict(_renamed(extra, missing))
    if renamed:
        reasons.append(_prefix(renamed))
    extra = [name for name in extra if name not in renamed]
    missing = [name for name in missing if name not in renamed.values()]
    reasons += _layers(extra, ours)
    beyond = set(_beyond(extra, ours))
    extra = [name for name in extra if name not in beyond]
    reasons += _modules(extra, missing, ours)
    share = str(fitting) if fitting else "none"
    return f"{share} of the {len(ours)} tensors that its config asks for on this model fit: {'; '.join(reasons)}"


def _shapes(theirs: Shapes, ours: Shapes) -> Iterator[str]:
    """Yield differences of shape, ranks first, because they show what the config should be."""
    differing = {name: (theirs[name], ours[name]) for name in ours if theirs.get(name, ours[name]) != ours[name]}
    ranks: Counter[tuple[int, int]] = Counter()
    others = []
    for name, (got, wanted) in differing.items():
        rank = _rank(name, got, wanted)
        if rank is None:
            others.append(name)
        ranks.update([rank] if rank else [])
    for pair, count in ranks.items():
        name = next(n for n, shapes in differing.items() if _rank(n, *shapes) == pair)
        yield (
            f"shape: {count} tensors have rank {pair[0]}, the config gives rank {pair[1]} (r, rank_pattern): {name}:"
            f" {NEEDS.format(theirs=list(theirs[name]), ours=list(ours[name]))}"
        )
    grown = [name for name in others if VOCABULARY.search(name) and differing[name][0][1:] == differing[name][1][1:]]
    if grown:
        got, wanted = differing[grown[0]]
        yield (
            f"vocabulary: the adapter was trained with {got[0]} tokens, the model has {wanted[0]} ({grown[0]}): resize"
            f" the base with model.resize_token_embeddings({got[0]}), save it beside the adapter's tokenizer, and name that"
            " directory as the source"
        )
    others = [name for name in others if name not in grown]
    if others:
        name = others[0]
        yield (
            f"shape: {len(others)} tensors have other sizes, so another base (or other options): {name}:"
            f" {NEEDS.format(theirs=list(theirs[name]), ours=list(ours[name]))}"
        )


def _rank(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, int] | None:
    """Return both ranks if only the rank of a LoRA factor differs."""
    if not RANKED.search(name) or len(got) != 2 or len(wanted) != 2:
        return None
    axis = 0 if re.search(r"_A(\.|$)", name) else 1
    return (got[axis], wanted[axis]) if got[1 - axis] == wanted[1 - axis] else None


def _renamed(extra: Iterable[str], missing: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of names, theirs and ours, that differ only in parts inserted by wrappers."""
    wanted = {_bare(name): name for name in missing}
    for name in extra:
        if _bare(name) in wanted:
            yield name, wanted.pop(_bare(name))


def _bare(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in WRAPPERS)


def _prefix(renamed: Mapping[str, str]) -> str:
    name, wanted = next(iter(renamed.items()))
    got, expected = Counter(name.split(".")), Counter(wanted.split("."))
    too_many, too_few = list((got - expected).elements()), list((expected - got).elements())
    parts = [f"has {_dotted(too_many)} too much"] if too_many else []
    parts += [f"lacks {_dotted(too_few)}"] if too_few else []
    said = " and ".join(parts) or "has them in another order"
    return f"prefix: the adapter {said} in {len(renamed)} names: {name!r}, and PEFT saves {wanted!r}"


def _dotted(parts: Collection[str]) -> str:
    return repr("".join(f"{part}." for part in parts))


def _layer(name: str) -> int | None:
    match = LAYER.search(name)
    return int(match[0]) if match else None


def _beyond(extra: Iterable[str], ours: Shapes) -> Iterator[str]:
    """Yield names that would fit if the model had more layers."""
    last = max((layer for name in ours if (layer := _layer(name)) is not None), default=-1)
    patterns = {_bare(LAYER.sub("N", name, count=1)) for name in ours}
    for name in extra:
        layer = _layer(name)
        if layer is not None and layer > last and _bare(LAYER.sub("N", name, count=1)) in patterns:
            yield name


def _layers(extra: Iterable[str], ours: Shapes) -> Iterator[str]:
    names = list(_beyond(extra, ours))
    if names:
        theirs, last = max(_layer(name) or 0 for name in names), max(_layer(name) or 0 for name in ours)
        yield (
            f"layers: the adapter reaches layer {theirs}, and this model's last layer with an adapter is {last}, so"
            f" {len(names)} tensors have no place, first {names[0]!r}"
        )


def _modules(extra: Collection[str], missing: Collection[str], ours: Shapes) -> Iterator[str]:
    """Yield tensors of other modules, extra tensors and missing ones."""
    known = {_module(name) for name in ours}
    strange = sorted({_module(name) for name in extra} - known)
    if strange:
        near = [f"{name!r}{_near(name, known)}" for name in strange[:MOST]]
        yield (
            f"modules: the adapter has tensors for {', '.join(near)}, and the config's target modules on this model"
            f" are {', '.join(sorted(known))}: other target_modules, or an adapter of another base"
        )
    for label, names, others in (("extra", extra, missing or [*ours]), ("missing", missing, [*extra])):
        left = [name for name in names if label == "missing" or _module(name) in known]
        if left:
            said = ", ".join(f"{name!r}{_near(name, others)}" for name in left[:MOST])
            what = "the adapter has, and the model has no place for them" if label == "extra" else "the adapter lacks"
            yield f"{label}: {len(left)} tensors that {what}: {said}"


def _module(name: str) -> str:
    """Return the name of the adapted module: ``q_proj`` of ``….q_proj.lora_A.weight``."""
    parts = [part for part in _bare(name) if not part.isdigit()]
    own = re.compile(r"(lora|ia3|hada|lokr|oft|boft|vera|randlora|trainable_tokens|ln_tuning|weight|bias)(_|$)")
    return next((parts[at - 1] for at, part in enumerate(parts) if at and own.match(part)), ".".join(parts[-2:]))


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" (nearest: {close[0]!r})" if close else ""
