# SPDX-License-Identifier: Apache-2.0
"""What the adapter needs round its calls: a lock on the cards, and errors that say what happened and what to do.

Failure texts and advice: card-contract §8. Nothing of ``qaicrt`` is imported here; the adapter hands it in.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ConfigError, RunError

T = TypeVar("T")
LOG = logging.getLogger(__name__)
NOTICE_SECONDS = 60
"""How often a process that waits for a card says so; less than `isolated.OPEN_SECONDS`, which each notice restarts."""

ADVICE = {
    "Context": "qaic-util -q lists the cards that exist; without --device-ids the one with most free cores is taken",
    "Qpc": "it must be the directory that holds a whole programqpc.bin, made by the compiler of this SDK: one that was"
    " cut short, or that comes from another SDK or for another card, must be compiled again",
    "load QS_UNSUPPORTED": "the QPC is for another generation of cards: compile it with the aic_hw_version of this one",
    "load": "each card must be Ready (qaic-util -q; qaic-util -s resets one), of the hardware version that the QPC was"
    " compiled for, and as many must be named by --device-ids as it was compiled for",
    "activate": "the card has too few free cores or too little memory for this QPC: see 'Nsp Free' and 'Dram Free' in"
    " qaic-util -q, stop other programs, or compile with fewer num_cores",
    "deactivate": "the card may be held until this process ends: 'Nsp Free' in qaic-util -q tells",
    "waitForCompletion QS_TIMEDOUT": "the card did not answer within the data path time-out: if qaic-util -q shows it"
    " Ready and the network is that slow, raise the limits in /sys/module/qaic/parameters; else reset it with"
    " qaic-util -s",
    "waitForCompletion QS_DEV_ERROR": "the card was lost: qaic-util -q shows its state, the kernel log why;"
    " qaic-util -s resets it, then run again",
    "waitForCompletion QS_DATA_CRC_ERROR": "data were damaged on their way to or from the card: run again; if it comes"
    " back, look for PCIe errors in the kernel log and at how the card is seated",
    "waitForCompletion": "dims that match no specialization end up here: the runtime's own log says which;"
    " qaic-util -q shows the card's state",
}
"""By step and status, else by step."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Translates constructors that raise and methods that return a status.

    Attributes:
        rt: the bindings.
        artifact: the QPC.
        qids: the cards.
    """

    rt: Any
    artifact: Artifact
    qids: tuple[int, ...]

    def make(self, what: str, build: Callable[[], T]) -> T:
        """Construct something."""
        try:
            return build()
        except Exception as exc:  # which type the extension raises is not documented (§11, question 1)
            raise RunError(f"qaicrt.{what} failed for {self}: {exc}{_advice(what)}") from exc

    def ok(self, what: str, method: Callable[..., Any], *args: Any, when: str = "", facts: bool = False) -> None:
        """Call a method that returns a status.

        Args:
            what: its name.
            method: a bound method of the bindings.
            args: what it takes.
            when: such as `` in run 3``.
            facts: if it fails, say what the QPC needs and what the cards have free.
        """
        status, problem = self._called(method, args)
        del method, args  # a traceback that holds an ExecObj keeps its card from being released
        self._expect(what, status, problem, when, facts=facts)

    def value(self, what: str, method: Callable[..., Any], *args: Any, when: str = "") -> Any:
        """Call a method that returns a status and a value, and return the value."""
        result, problem = self._called(method, args)
        del method, args
        self._expect(what, problem or result[0], problem, when)
        return result[1]

    def _called(self, method: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, str]:
        """Return what a call returns, or the text of what it raises instead of a status."""
        try:
            return method(*args), ""
        except Exception as exc:
            return None, str(exc) or type(exc).__name__

    def _expect(self, what: str, status: Any, problem: str, when: str, *, facts: bool = False) -> None:
        if problem:
            raise RunError(f"{what} failed{when} for {self}: {problem}{_advice(what)}")
        if status == self.rt.QStatus.QS_SUCCESS:
            return
        name = getattr(status, "name", str(status))
        known = f": {needs(self.artifact)}, {', '.join(map(self._state, self.qids))}" if facts else ""
        raise RunError(f"{what} failed with {name}{when} for {self}{known}{_advice(what, name)}")

    def _state(self, qid: int) -> str:
        """Say what a card says of itself, as far as it says anything."""
        try:
            _, info = self.rt.Util().getDeviceInfo(qid)
            text = f"card {qid} is {info.devStatus.name.removeprefix('QDS_').capitalize()}"
            free = info.devData and info.devData.resourceInfo
            if free:
                text += f" with {free.nspFree} of {free.nspTotal} cores and {free.dramFree} of {free.dramTotal} MB free"
        except Exception:  # it is about to be an error's text, and must not become an error of its own
            return f"card {qid} gives no information"
        return text

    def __str__(self) -> str:
        return f"{self.artifact.path} on card{'s'[: len(self.qids) - 1]} {', '.join(map(str, self.qids))}"


def needs(artifact: Artifact) -> str:
    """Say what a QPC needs of a card, as far as it is known: cores if we compiled it, and the size of its file."""
    assert artifact.path is not None
    file = artifact.path / "programqpc.bin"
    size = f"{-(-file.stat().st_size // 2**20)} MB for its file alone" if file.is_file() else "an unknown size"
    cores = _compiled(artifact).get("num_cores")
    return f"the QPC needs {cores or 'an unknown number of'} cores and {size}"


def devices(artifact: Artifact) -> int | None:
    """Return how many cards a QPC was compiled for; None if nothing tells."""
    options = _compiled(artifact)
    given = any(flag.lstrip("-").replace("_", "-") == "mdp-load-partition-config" for flag in options.get("flags", {}))
    return None if given else options.get("num_devices")


def _compiled(artifact: Artifact) -> Any:
    """Return the compile options that the store has kept; nothing for a QPC that somebody brings."""
    return artifact.provenance.get("key", {}).get("compile", {}).get("options", {})


def check_count(artifact: Artifact, qids: Sequence[int]) -> None:
    """Raise ConfigError unless the ids that were asked for are as many as the QPC was compiled for, each once."""
    wanted = devices(artifact)
    if len(set(qids)) != len(qids):
        raise ConfigError(f"--device-ids {','.join(map(str, qids))}: a card is named twice")
    if wanted is not None and len(qids) != wanted:
        raise ConfigError(
            f"{artifact.path} is compiled for {wanted} card{'s'[: wanted - 1]}, and --device-ids names {len(qids)}"
            f" ({', '.join(map(str, qids))}): name as many, or compile with another num_devices"
        )


_SHARED: ContextVar[set[int] | None] = ContextVar("_SHARED", default=None)
"""Cards that programs of this process share (`shared_cards`)."""


@contextmanager
def shared_cards() -> Iterator[None]:
    """Let programs that are opened within the context hold the same cards, as when their times are compared."""
    token = _SHARED.set(set())
    try:
        yield
    finally:
        _SHARED.reset(token)


@contextmanager
def held(qids: Sequence[int]) -> Iterator[None]:
    """Hold cards for this process alone; others wait. The locks die with their holder."""
    from filelock import FileLock, Timeout

    with ExitStack() as locks:
        shared = _SHARED.get()
        for qid in sorted(set(qids) - (shared or set())):  # in one order everywhere, so that nobody waits in a ring
            lock = FileLock(Path(tempfile.gettempdir()) / f"qeff-validate-card-{qid}.lock", mode=0o666)
            while True:
                try:
                    locks.enter_context(lock.acquire(timeout=NOTICE_SECONDS))
                    if shared is not None:
                        shared.add(qid)
                        locks.callback(shared.discard, qid)
                    break
                except Timeout:
                    LOG.warning("waiting for card %d, which another process holds", qid)
        yield


def _advice(what: str, status: str = "") -> str:
    text = ADVICE.get(f"{what} {status}") or ADVICE.get(what)
    return f"; {text}" if text else ""
