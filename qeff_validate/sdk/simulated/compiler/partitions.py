# SPDX-License-Identifier: Apache-2.0
"""The partition config for several devices: it is checked, and gives the number of devices and cores (§6.5).

One partition with several devices slices tensors; several partitions are a pipeline, each with a list of its nodes.
Partitioning changes no results, so the simulator does not partition the graph.
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
    """Read a partition config.

    Returns:
        The number of devices, the greatest number of cores of a device, and warnings.

    Raises:
        CompileError: the file is missing, not of the form of card-contract §6.5, or does not fit the graph.
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
    for name, devices, _ in parts:
        if not devices or min(devices.values()) < 1:
            raise CompileError(f"{path}: partition {name} names no device, or one without cores")
        if shared := cores.keys() & devices.keys():
            raise CompileError(f"{path}: device {min(shared)} is in two partitions")
        cores |= devices
    if not cores or len(cores) > MOST_DEVICES:
        raise CompileError(f"{path} names {len(cores)} devices; there must be 1 to {MOST_DEVICES}")
    for problem in (*_bad_names(parts), *_bad_links(links, cores)):
        raise CompileError(f"{path}: {problem}")
    return len(cores), max(cores.values()), list(_nodes(path, parts, graph))


def dump(path: Path, graph: Any, *, cores: int) -> None:
    """Write a config that changes nothing: one partition of all nodes with a name, on one device."""
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
    """Yield a warning for names that no node has.

    Raises:
        CompileError: a node reads a value of a later partition.
    """
    known = {node.name for node in graph.node if node.name}
    if unknown := sorted({str(name) for _, _, listed in parts for name in listed} - known):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        yield f"{path}: no node is named {', '.join(unknown[:5])}{more}; ignored"
    partition = {node: index for index, (_, _, listed) in enumerate(parts) for node in listed}
    source = {name: partition[node.name] for node in graph.node if node.name in partition for name in node.output}
    for node in graph.node:
        late = [name for name in node.input if source.get(name, 0) > partition.get(node.name, len(parts))]
        if late:
            name = parts[source[late[0]]][0]
            raise CompileError(
                f"{path}: node {node.name} of partition {parts[partition[node.name]][0]} reads '{late[0]}' of the later"
                f" partition {name}; list partitions in topological order"
            )
