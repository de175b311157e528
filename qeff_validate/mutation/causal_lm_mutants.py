# SPDX-License-Identifier: Apache-2.0
"""Mutants of language models with adapters: faults of adapters' tensors, and of a session's inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.adapter_schedule import stack_adapters
from qeff_validate.models.causal_lm.decoder_interface import RECURRENT
from qeff_validate.models.causal_lm.virtual_tokens import TENSOR
from qeff_validate.mutation import feed_faults as feed
from qeff_validate.mutation import logit_faults as logits
from qeff_validate.mutation.adapter_mutants import ADAPTER_MUTANTS
from qeff_validate.mutation.mutant import AdapterMutant, FaultySession, Inapplicable, SessionMutant
from qeff_validate.mutation.tracking_session import DecodeTrackingSession, Feed, Feeds, Numbers
from qeff_validate.protocols import Session
from qeff_validate.tensors import Tensors

_LIST, _OWN = "validation-methods §12.6", "this project"
_SINGLE, _MULTI = "upstream §2.3", "upstream §2.4"


def _out(change: Callable[..., Numbers] | None) -> Feed | None:
    if change is None:
        return None
    return lambda session, outputs: {
        name: change(session, array) if name == "logits" else array for name, array in outputs.items()
    }


def _session(
    feed: Feed | None = None,
    out: Callable[[DecodeTrackingSession, Numbers], Numbers] | None = None,
    *,
    zeroed: bool = False,
    rows: int = 1,
    mixed: bool | None = None,
    adapted: bool = False,
    slotted: bool | None = None,
    takes: str | tuple[str, ...] = "",
) -> Callable[[Session], DecodeTrackingSession]:
    """Return the change of a session mutant.

    Args:
        feed: changes the feeds.
        out: changes the logits.
        zeroed: see `DecodeTrackingSession`.
        rows: the least number of rows in a batch.
        mixed: True: rows must choose their adapters; False: they must not; None: either.
        adapted: there must be an adapter.
        slotted: True: rows must choose their slots (continuous batching); False: they must not; None: either.
        takes: how the name of an input begins that the graph must have; one of several.
    """

    def change(session: Session) -> DecodeTrackingSession:
        faulty = DecodeTrackingSession(session, feed, _out(out), zeroed=zeroed, rows=rows)
        if mixed is not None and mixed != faulty.mixed:
            raise Inapplicable("one adapter serves all rows" if mixed else "each row has its own adapter")
        if adapted and not faulty.weights:
            raise Inapplicable("there is no adapter")
        if slotted is not None and slotted != faulty.slotted:
            raise Inapplicable("each row chooses its slot" if faulty.slotted else "rows choose no slots")
        if takes and not any(spec.name.startswith(takes) for spec in faulty.inputs):
            raise Inapplicable(f"the graph has no input {takes if isinstance(takes, str) else ' or '.join(takes)}")
        return faulty

    return change


def _logits(out: Callable[[FaultySession, Numbers], Numbers]) -> Callable[[Session], FaultySession]:
    """Return the change of a session mutant that does not depend on the decode loop."""
    return lambda session: FaultySession(session, out=_out(out))


def _mutant(
    name: str,
    family: str,
    change: Callable[[Session], FaultySession],
    source: str = _LIST,
    *,
    gross: bool = False,
    ceiling: bool = False,
) -> SessionMutant:
    return SessionMutant(name, family, change, source, gross, ceiling)


_VIRTUAL_LATE = _session(feed.virtual_one_late, zeroed=True, takes=TENSOR)
_NAN_OF_ONE = _session(out=logits.not_a_number_of_one, adapted=True)

DECODE_MUTANTS: tuple[SessionMutant, ...] = (
    _mutant("an adapter stays on", "adapters", _session(feed.stays_on, mixed=False, adapted=True)),
    _mutant("adapter of the first prompt for all", "adapters", _session(feed.of_the_first_prompt, mixed=True), _MULTI),
    _mutant("adapter of the next row", "adapters", _session(feed.of_the_next_row, rows=2, mixed=True)),
    _mutant("a row sees its neighbour's slot", "state", _session(feed.leaks, rows=2)),
    _mutant("keys and values not reset", "state", _session(feed.goes_on, slotted=False)),
    _mutant("recurrent state carried over", "state", _session(feed.state_goes_on, takes=RECURRENT), _OWN),
    _mutant(
        "a prompt written into the next slot", "state", _session(feed.into_the_next_slot, rows=2, slotted=True), _OWN
    ),
    _mutant("rows decode in each other's slots", "state", _session(feed.of_each_other, rows=2, slotted=True), _OWN),
    _mutant("stale tail of a former occupant", "state", _session(feed.behind_the_former, slotted=True), _OWN),
    _mutant("logits of the run before", "state", _logits(logits.one_run_late), _OWN),
    _mutant("one bit at a second visit", "state", _session(out=logits.one_bit), _OWN),
    _mutant("later chunks at the first one's positions", "positions", _session(feed.starts_again, zeroed=True), _OWN),
    _mutant("position + 1 at decode", "positions", _session(feed.one_further, zeroed=True)),
    _mutant("position + 1 at decode, into undefined memory", "positions", _session(feed.one_further)),
    _mutant("padding on the left read as text", "positions", _session(feed.padding_is_text, slotted=False), _SINGLE),
    _mutant("invocation one token late", "positions", _session(feed.invoked_late, takes="adapter_start"), _OWN),
    _mutant("virtual tokens one position late", "positions", _VIRTUAL_LATE, _OWN),
    _mutant("prompts cut to 8 tokens", "tokens", _session(feed.cut)),
    _mutant("last token of each prompt dropped", "tokens", _session(feed.one_short, logits.before_last), _OWN),
    _mutant("first token from the token before the last", "tokens", _session(out=logits.before_last), _OWN),
    _mutant("first token from padding in the last chunk", "tokens", _session(out=logits.of_the_last_chunk), _SINGLE),
    _mutant("tokens of two prompts exchanged", "tokens", _session(feed.exchanged, rows=2, slotted=False), _OWN),
    _mutant("rows of the batch shifted by one", "rows", _logits(logits.shifted_rows), gross=True, ceiling=True),
    _mutant("NaN in one row", "values", _logits(logits.not_a_number), gross=True, ceiling=True),
    _mutant("NaN with one adapter at decode", "values", _NAN_OF_ONE, gross=True),
    _mutant("zeros", "values", _logits(lambda _, logits: np.zeros_like(logits)), _OWN, gross=True),
    _mutant("one column + 1e-3", "numbers", _logits(logits.column(1e-3)), _OWN),
    _mutant("one column + 0.05", "numbers", _logits(logits.column(0.05)), _OWN, ceiling=True),
    _mutant("temperature 1.01", "numbers", _logits(logits.warmer(1.01)), _OWN, ceiling=True),
    _mutant("temperature 1.001", "numbers", _logits(logits.warmer(1.001)), _OWN),
    _mutant("noise 0.004", "numbers", _logits(logits.noise(0.004)), _OWN),
    _mutant("noise 0.05", "numbers", _logits(logits.noise(0.05)), _OWN, ceiling=True),
    _mutant("logits clipped at the 99.9th percentile", "numbers", _logits(logits.clipped), _OWN),
    _mutant("two columns exchanged", "choices", _logits(logits.swapped_columns)),
    _mutant("padding of the vocabulary unmasked", "choices", _logits(logits.unmasked)),
    _mutant("early end", "choices", _session(out=logits.ends_early)),
)

CAUSAL_LM_MUTANTS: tuple[AdapterMutant | SessionMutant, ...] = (*ADAPTER_MUTANTS, *DECODE_MUTANTS)


def served(mutant: AdapterMutant, adapters: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return the tensors that a mutant serves for ``base`` and for each adapter.

    Raises:
        Inapplicable: there is nothing to change.
    """
    return {name: mutant.change(name, adapters) for name in adapters}


def serving(
    mutant: AdapterMutant | SessionMutant, adapters: Mapping[str, Tensors]
) -> Callable[[Session], FaultySession]:
    """Return a function that adds a mutant's fault to a session.

    Args:
        mutant: of `CAUSAL_LM_MUTANTS`.
        adapters: tensors of ``base`` and of each adapter, as the caller of the session feeds them.

    Raises:
        Inapplicable: there is nothing to change; a session mutant raises it when the function is called, or in a run.
        IncomparableError: in a run, because the tensors that are fed are none of the adapters.
    """
    if isinstance(mutant, SessionMutant):
        return mutant.change
    replacements = served(mutant, adapters)

    def feed(session: DecodeTrackingSession, feeds: Feeds) -> Mapping[str, Numbers]:
        types = {name: feeds[name].dtype for name in feeds.keys() & session.weights}
        if not types:
            return feeds
        if session.mixed:
            stacks = stack_adapters(replacements)
            return {**feeds, **{name: stacks[name].astype(dtype) for name, dtype in types.items()}}
        for adapter, tensors in adapters.items():  # a device may take another dtype
            if all(np.array_equal(feeds[name], tensors[name].astype(dtype)) for name, dtype in types.items()):
                return {**feeds, **{name: replacements[adapter][name].astype(dtype) for name, dtype in types.items()}}
        raise IncomparableError(
            "the fed tensors are none of the adapters: it is not known what to serve in place of them"
        )

    return _session(feed)
