# SPDX-License-Identifier: Apache-2.0
"""The cards of a QPC: how many it was compiled for, which to use, and the lock that keeps other processes off them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Artifact
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.sdk.locate import Sdk

LOG = logging.getLogger(__name__)
NOTICE_SECONDS = 60
"""Interval of the notices of a process that waits for a card; less than `isolation.parent.OPEN_SECONDS`, which each
notice restarts."""


def select_cards(artifact: Artifact, device_ids: Sequence[int], sdk: Sdk) -> tuple[int, ...]:
    """Return the ids of the cards to use.

    Args:
        artifact: a QPC.
        device_ids: the cards that the user named; empty: as many as needed of the Ready cards, most free cores first.
        sdk: lists the cards.

    Raises:
        ConfigError: the user named a card twice, or another number of cards than the QPC was compiled for.
        Unavailable: too few cards are Ready.
    """
    count = num_devices(artifact)
    if device_ids:
        check_device_ids(artifact, device_ids)
        return tuple(device_ids)
    needed, ready = count or 1, sdk.ready()
    if len(ready) < needed:
        raise Unavailable(f"{artifact.path} is compiled for {needed} cards, and {len(ready)} are Ready: qaic-util -q")
    return tuple(card.qid for card in ready[:needed])


def check_device_ids(artifact: Artifact, device_ids: Sequence[int]) -> None:
    """Check the cards that the user named.

    Raises:
        ConfigError: a card is named twice, or their number is not the one that the QPC was compiled for.
    """
    count = num_devices(artifact)
    if len(set(device_ids)) != len(device_ids):
        raise ConfigError(f"--device-ids {','.join(map(str, device_ids))}: a card is named twice")
    if count is not None and len(device_ids) != count:
        raise ConfigError(
            f"{artifact.path} is compiled for {count} card{'s'[: count - 1]}, and --device-ids names {len(device_ids)}"
            f" ({', '.join(map(str, device_ids))}): name as many, or compile with another num_devices"
        )


def num_devices(artifact: Artifact) -> int | None:
    """Return the number of cards that a QPC was compiled for; None if it is unknown."""
    options = _compile_options(artifact)
    flags = (flag.lstrip("-").replace("_", "-") for flag in options.get("flags", {}))
    return None if "mdp-load-partition-config" in flags else options.get("num_devices")


def required_resources(artifact: Artifact) -> str:
    """Describe what a QPC needs of a card, as far as it is known: cores if we compiled it, and the size of its file."""
    assert artifact.path is not None
    file = artifact.path / "programqpc.bin"
    size = f"{-(-file.stat().st_size // 2**20)} MB for its file alone" if file.is_file() else "an unknown size"
    cores = _compile_options(artifact).get("num_cores")
    return f"the QPC needs {cores or 'an unknown number of'} cores and {size}"


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
def exclusive_cards(qids: Sequence[int]) -> Iterator[None]:
    """Lock cards for this process; other processes of this library wait. The locks end with their process."""
    from filelock import FileLock, Timeout

    with ExitStack() as locks:
        shared = _SHARED.get()
        for qid in sorted(set(qids) - (shared or set())):  # the same order in every process prevents deadlocks
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


def _compile_options(artifact: Artifact) -> Any:
    """Return the compile options in the provenance of a QPC; empty for a user's QPC."""
    return artifact.provenance.get("key", {}).get("compile", {}).get("options", {})
