# SPDX-License-Identifier: Apache-2.0
"""Likely causes of a failed verdict on continuations: another adapter's outputs, or what failing rows share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qeff_validate.comparison.logit_metrics import Text, log_softmax
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import finite_rows
from qeff_validate.tensors import Array, Tensors

NEARER = 0.2
"""Outputs count as another adapter's if their distance to it is less than this share of that to their own reference."""


STRONGER = 0.1
"""Relative difference in strength beyond which an adapter has another scale than in the reference."""

ALIGNED = 0.99
"""Minimum cosine of an adapter's change with the reference's for the same direction (`verdict.DELTAS`)."""


STRANGE = "tensors that are another module's or adapter's, transposed, or not zero where they are padded"
"""What else changes the direction of an adapter's effect."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How texts and adapters are served, as far as a fault shows it.

    Attributes:
        places: rows of a decode run; the first so many texts find them unused. 0: not known.
        slotted: rows choose their slots by ``batch_index``.
        virtual: adapters consist of virtual tokens.
        activated: adapters act from their invocation on.
    """

    places: int = 0
    slotted: bool = False
    virtual: bool = False
    activated: bool = False

    @property
    def causes(self) -> str:
        """What makes an adapter act otherwise than in the reference."""
        if self.virtual:
            return "its virtual tokens have other positions, or other content"
        causes = "another scale (alpha / r, or alpha / √r with rsLoRA), merged and fed, or a part of it missing"
        return f"it acts from another token on than its invocation's first; {causes}" if self.activated else causes


SERVED_ALONE = Serving()
"""Texts and adapters of which nothing is known."""


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Log-probabilities of the first token after each prompt, where all adapters have read the same text.

    Attributes:
        adapters: ``base`` and the adapters' names.
        rows: index of the row of the first prompt with each adapter.
        labels: labels of these rows.
        wanted: those of the reference, float64 ``[adapters, prompts, vocab]``.
        got: those of the runtime, of the same shape.
        again: those of the runtime's second visits to the first adapters, ``[visits, prompts, vocab]``.
        moved: for each second visit the maximum difference of any logit from the first visit.
        at: indices of the rows, int64 ``[adapters, prompts]``.
    """

    adapters: Sequence[str]
    rows: Sequence[int]
    labels: Sequence[str]
    wanted: Floats
    got: Floats
    again: Floats
    revisit_errors: Sequence[float]
    at: Array

    @classmethod
    def of(cls, reference: Array, actual: Tensors, texts: Sequence[Text], adapters: Sequence[str]) -> FirstTokens:
        """Select the first tokens; prompts whose row is not finite with any adapter are left out."""
        at = np.array([text.rows.start for text in texts]).reshape(len(adapters), -1)
        starts, labels = at[:, 0], [texts[int(i * at.shape[1])].label for i in range(len(adapters))]
        finite = finite_rows(reference) & finite_rows(actual["logits"])
        at = at[:, finite[at].all(axis=0)]
        with np.errstate(invalid="ignore"):  # second visits may hold anything
            again = log_softmax(actual["again"][at[:2]])
            second, usual = actual["again"], actual["logits"][: len(actual["again"])]
            apart = np.abs(second.astype(np.float64) - usual.astype(np.float64))
            apart[(second == usual) | (np.isnan(second) & np.isnan(usual))] = 0  # equal infinities too
        revisit_errors = [float(part.max()) for part in np.split(apart.max(axis=1), starts[1:2])]
        wanted, got = log_softmax(reference[at]), log_softmax(actual["logits"][at])
        return cls(adapters, [int(row) for row in starts], labels, wanted, got, again, revisit_errors, at)

    def apart(self, one: int, other: int) -> float:
        """Return the root mean square difference of two adapters in the reference."""
        return _rms_difference(self.wanted[one], self.wanted[other])

    def change(self, adapter: int) -> tuple[float, float]:
        """Return 1 − cosine and |ratio of norms − 1| of an adapter's change of the base against the reference's."""
        wanted, got = self.wanted[adapter] - self.wanted[0], self.got[adapter] - self.got[0]
        norms = float(np.linalg.norm(wanted)), float(np.linalg.norm(got))
        with np.errstate(all="ignore"):  # an adapter without effect gives NaN
            cosine = np.sum(wanted * got) / np.float64(norms[0] * norms[1])
            ratio = np.float64(norms[1]) / norms[0]
        return float(1 - cosine), float(abs(ratio - 1))

    def change_error(self, adapter: int) -> float:
        """Return the root mean square error of an adapter's change of the base."""
        return _rms_difference(self.got[adapter] - self.got[0], self.wanted[adapter] - self.wanted[0])

    def explanations(self, beyond: NDArray[np.bool_], serving: Serving = SERVED_ALONE) -> Iterator[str]:
        """Yield likely causes of failures in first tokens.

        Args:
            beyond: rows beyond a bound, bool ``[n]``.
            serving: how adapters are served.
        """
        if not self.at.size:
            return
        for i, name in enumerate(self.adapters):
            if not beyond[self.at[i]].any():
                continue
            twin = self._nearer_adapter(self.got[i], i)
            strangers = self._swapped_with(i)
            if twin is not None:
                yield _swap_message(name, twin)
            elif strangers:
                yield f"some prompts with {name!r} give the outputs of {' or '.join(map(repr, strangers))}"
            elif i and self.apart(0, i) > 0 and not beyond[self.at[0]].any():
                yield from self._weakened(i, serving)
        for visit, revisit_errors in enumerate(self.revisit_errors):
            if revisit_errors != 0:
                yield self._left_over(visit)

    def _swapped_with(self, own: int) -> list[str]:
        """Return the adapters whose outputs some prompts give instead of their own."""
        prompts = range(self.at.shape[1])
        twins = {self._nearer_adapter(self.got[own, prompt], own, prompt) for prompt in prompts}
        return [name for name in self.adapters if name in twins]

    def _nearer_adapter(self, found: Floats, own: int, prompt: int | slice = slice(None)) -> str | None:
        """Return the name of another adapter that these outputs are nearer to; None if there is none."""
        far = [_rms_difference(found, wanted) for wanted in self.wanted[:, prompt]]
        nearest = int(np.argmin(far))
        return self.adapters[nearest] if far[nearest] < NEARER * far[own] else None

    def _weakened(self, adapter: int, serving: Serving) -> Iterator[str]:
        wanted, got = self.wanted[adapter] - self.wanted[0], self.got[adapter] - self.got[0]
        cosine, strength = 1 - self.change(adapter)[0], float(np.sum(wanted * got) / np.sum(wanted * wanted))
        name, strange = self.adapters[adapter], "" if serving.virtual or cosine >= ALIGNED else f"; or {STRANGE}"
        if abs(strength - 1) > STRONGER:
            yield (
                f"adapter {name!r} acts {strength:.2g} times as strongly as in the reference (cosine {cosine:.2g}):"
                f" {serving.causes}{strange}"
            )
        elif not cosine >= ALIGNED:
            causes = serving.causes if serving.virtual or serving.activated else STRANGE
            yield f"adapter {name!r} changes other things than in the reference (cosine {cosine:.2g}): {causes}"
        else:
            yield (
                f"adapter {name!r} changes what it should, as strongly as in the reference (cosine {cosine:.4g}):"
                " the error is small, as that of rounding is"
            )

    def _left_over(self, visit: int) -> str:
        name, before = self.adapters[visit], self.adapters[0 if visit else -1]
        twin = self._nearer_adapter(self.again[visit], visit)
        if twin is not None:
            return f"the second visit to {name} gives the outputs of {twin!r}: an adapter stays on"
        said = f"the second visit to {name} differs from the first by up to {self.revisit_errors[visit]:.1e}"
        return f"{said}: what came between, {before} last, is still seen, or runs are not repeatable"


def _rms_difference(one: Floats, other: Floats) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2))) if one.size else float("nan")


def _swap_message(name: str, twin: str) -> str:
    if twin == "base":
        return f"adapter {name!r} behaves as base: its tensors have no effect"
    if name == "base":
        return f"base gives the outputs of adapter {twin!r}: an adapter is on where none should be"
    return f"adapter {name!r} gives the outputs of {twin!r}"


def describe_rows(
    bad: NDArray[np.bool_],
    texts: Sequence[Text],
    adapters: Sequence[str],
    lengths: Sequence[int],
    serving: Serving = SERVED_ALONE,
) -> str:
    """Describe how many rows fail, and what they have in common: adapter, phase, position in the text, or prompts.

    Args:
        bad: rows that fail, bool ``[n]``.
        texts: the continuations, in the order adapter, prompt.
        adapters: ``base`` and the adapters' names.
        lengths: tokens of each prompt.
        serving: how they are served.
    """
    if not bad.any():
        return ""
    count = len(lengths)
    owner = np.array([i for i, text in enumerate(texts) for _ in text.rows])
    step = np.array([step for text in texts for step in range(len(text.rows))])
    prompt = owner % count
    place = np.array(lengths)[prompt] + step
    parts = [f"{int(bad.sum())} of {len(bad)} rows fail"]
    if bad.all():
        return parts[0]
    affected = {adapters[i] for i in owner[bad] // count}
    if len(affected) < len(adapters):
        parts.append(f"with {', '.join(name for name in adapters if name in affected)} only")
    if not step[bad].any():
        parts.append("first tokens only, which the prefill gives")
    elif step[bad].all() and (step == 0).any():
        parts.append("no first token, so decode steps only")
        if serving.slotted:
            parts[-1] += " (batch_index must name the slot of the prefill)"
    of_base = owner < count
    if 0 < serving.places < count and (bad & of_base).any() and not bad[owner < serving.places].any():
        parts.append(f"not the first {serving.places} texts, which found unused state: what former texts left is seen")
    if place[bad].min() > place[~bad].max():
        parts.append(f"only where {place[bad].min()} tokens or more are read")
    else:
        parts += _prompts(sorted(set(prompt[bad].tolist())), lengths)
    return ", ".join(parts)


def _prompts(affected: Sequence[int], lengths: Sequence[int]) -> Iterator[str]:
    unaffected = [length for at, length in enumerate(lengths) if at not in affected]
    if not unaffected:
        return
    sizes = [lengths[at] for at in affected]
    if min(sizes) > max(unaffected):
        yield f"only prompts of {min(sizes)} tokens and more"
    elif max(sizes) < min(unaffected):
        yield f"only prompts of up to {max(sizes)} tokens"
    else:
        yield f"only prompts {', '.join(str(at + 1) for at in affected)} of {len(lengths)}"
