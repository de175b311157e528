# SPDX-License-Identifier: Apache-2.0
"""Damage to good files, drawn with a seed: what the disk, a download, an editor or an attacker may do to them."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
"""Does something to a file or folder in place."""

LONG_NAME = "n" * 300
DEEP = "[" * 100_000 + "]" * 100_000

VALUES: Mapping[str, Any] = {
    "null": None, "true": True, "minus one": -1, "zero": 0, "ten million": 10**7, "2^63": 2**63, "1e308": 1e308,
    "infinity": float("inf"), "NaN": float("nan"), "5,000 digits": 10**4999, "text": "abc", "empty text": "",
    "NUL": "a\0b", "surrogate": "\ud800", "parent": "../../../../etc/passwd", "home of nobody": "~nosuchuser/x",
    "300 characters": LONG_NAME, "device": "/dev/zero", "list": [], "mapping": {}, "nested": [[[[1]]]],
    "nested star": "(a*)*" * 8 + "$",
}  # fmt: skip
"""What takes the place of a value in JSON."""


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


THINGS: Mapping[str, Change] = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /proc": lambda path: path.symlink_to("/proc"),
    "directory": Path.mkdir,
    "socket": _socket,
    "empty file": Path.touch,
    "file of a terabyte": _huge,
    "nothing": lambda path: None,
}
"""What may stand where a file is wanted."""


def replaced_by(thing: str) -> Change:
    """Put a thing in the place of a file or folder."""

    def change(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        THINGS[thing](path)

    return change


def things() -> Iterator[tuple[str, Change]]:
    """Yield each thing with its name."""
    for name in THINGS:
        yield name, replaced_by(name)


def byte_changes(seed: str, count: int) -> Iterator[tuple[str, Change]]:
    """Yield changes of single bits, and of stretches of bytes, at random places."""
    for number in range(count):
        chance = random.Random(f"{seed}{number}")
        kind = chance.choice(["bit", "bit", "bit", "cut", "zeros", "garbage", "inserted", "twice"])
        yield f"{kind} {number}", _byte_change(kind, chance)


def _byte_change(kind: str, chance: random.Random) -> Change:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        # one half of the places is near the start, where formats keep their structure
        at = chance.randrange(min(len(data), 512) if chance.random() < 0.5 else len(data))
        length = chance.choice([1, 4, 8, 64, 1000])
        if kind == "bit":
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "zeros":
            data[at : at + length] = bytes(length)
        elif kind == "garbage":
            data[at : at + length] = chance.randbytes(length)
        elif kind == "inserted":
            data[at:at] = chance.randbytes(length)
        else:
            data += data[at:]
        path.write_bytes(data)

    return change


def json_changes(data: Any, seed: str, count: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield texts of JSON in which one value is another, missing, or too deep, with what was done."""
    yield "deep", lambda: DEEP
    yield "no JSON", lambda: "{"
    yield "no mapping", lambda: "[1]"
    for number in range(count):
        chance = random.Random(f"{seed}{number}")
        places = [place for place in _places(data) if place]
        place, name = chance.choice(places), chance.choice([*VALUES, "missing"])
        yield f"{'.'.join(map(str, place))[:60]}: {name}", lambda place=place, name=name: edited(data, place, name)


def edited(data: Any, place: tuple[Any, ...], name: str) -> str:
    """Return JSON with the value at a place replaced by one of `VALUES`, or ``missing``."""
    data = copy.deepcopy(data)
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    if name == "missing":
        del parent[place[-1]]
    elif name == "5,000 digits":  # json.dumps refuses to write it
        parent[place[-1]] = "DIGITS"
        return json.dumps(data).replace('"DIGITS"', "9" * 5000)
    else:
        parent[place[-1]] = VALUES[name]
    return json.dumps(data)


def _places(data: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield start
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*start, key))
    elif isinstance(data, list):
        for number, value in enumerate(data[:5]):
            yield from _places(value, (*start, number))
