# SPDX-License-Identifier: Apache-2.0
"""Several devices: the partition file is checked, and says how many devices and cores there are (§6.5).

One partition with several devices slices tensors; several partitions are a pipeline, each with a list of its nodes.
Nothing of this changes a number, so the simulator partitions nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CompileError

MOST_DEVICES = 16
_KINDS = ("p2p", "host")


def read(path: Path, graph: Any) -> tuple[int, int, list[str]]:
    """Returns the number of devices, the most cores that one of them needs, and warnings.

    Raises:
        CompileError: The file is missing, not of the form of card-contract §6.5, or does not fit the graph.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = [(str(part.get("name")), _cores(part), list(part.get("nodeList", ()))) for part in config["partitions"]]
        links = [(list(map(int, link["devices"])), link["type"]) for link in config.get("connections") or ()]
    except FileNotFoundError as error:
        raise CompileError(f"Failed to open file{path}: partition config is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompileError(f"{path} has no partitions of devices with deviceId and numCores: {error!r}") from error
    cores: dict[int, int] = {}
    for name, own, _ in parts:
        if not own or min(own.values()) < 1:
            raise CompileError(f"{path}: partition {name} names no device, or one without cores")
        if shared := cores.keys() & own.keys():
            raise CompileError(f"{path}: device {min(shared)} is in two partitions")
        cores |= own
    if not cores or len(cores) > MOST_DEVICES:
        raise CompileError(f"{path} names {len(cores)} devices; there must be 1 to {MOST_DEVICES}")
    for problem in (*_bad_names(parts), *_bad_links(links, cores)):
        raise CompileError(f"{path}: {problem}")
    return len(cores), max(cores.values()), list(_nodes(path, parts, graph))


def dump(path: Path, graph: Any, *, cores: int) -> None:
    """Writes a config that changes nothing: one partition, on one device, of all nodes that have a name."""
    devices = [{"deviceId": 0, "numCores": cores}]
    nodes = [node.name for node in graph.node if node.name]
    config = {"connections": [], "partitions": [{"name": "Partition0", "devices": devices, "nodeList": nodes}]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _cores(part: Mapping[str, Any]) -> dict[int, int]:
    devices = [(int(entry["deviceId"]), int(entry["numCores"])) for entry in part["devices"]]
    if len(dict(devices)) != len(devices):
        raise ValueError("a deviceId is there twice in one partition")
    return dict(devices)


def _bad_names(parts: Sequence[tuple[str, Mapping[int, int], Sequence[str]]]) -> Iterator[str]:
    names = [name for name, _, _ in parts]
    if len(set(names)) != len(names):
        yield f"two partitions are named alike: {', '.join(names)}"
    nodes = Counter(node for _, _, listed in parts for node in listed)
    if repeated := [node for node, count in nodes.items() if count > 1]:
        yield f"node {min(repeated)} is listed twice"


def _bad_links(links: Sequence[tuple[Sequence[int], Any]], cores: Mapping[int, int]) -> Iterator[str]:
    for devices, kind in links:
        if kind not in _KINDS:
            yield f"a connection is of type {' or '.join(_KINDS)}, not {kind!r}"
        if unknown := set(devices) - cores.keys():
            yield f"a connection names device {min(unknown)}, which is in no partition"
        if len(devices) < 2:
            yield "a connection is between two devices or more"


def _nodes(path: Path, parts: Sequence[tuple[str, Mapping[int, int], Sequence[str]]], graph: Any) -> Iterator[str]:
    """Yields a warning for names that no node has; a pipeline must be in the order of the nodes."""
    known = {node.name for node in graph.node if node.name}
    if unknown := sorted({str(name) for _, _, listed in parts for name in listed} - known):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        yield f"{path}: no node is named {', '.join(unknown[:5])}{more}; ignored"
    place = {node: at for at, (_, _, listed) in enumerate(parts) for node in listed}
    made_in = {name: place[node.name] for node in graph.node if node.name in place for name in node.output}
    for node in graph.node:
        late = [name for name in node.input if made_in.get(name, 0) > place.get(node.name, len(parts))]
        if late:
            name = parts[made_in[late[0]]][0]
            raise CompileError(
                f"{path}: node {node.name} of partition {parts[place[node.name]][0]} reads '{late[0]}' of the later"
                f" partition {name}; list partitions in topological order"
            )
