# SPDX-License-Identifier: Apache-2.0
"""YAML as plain data: mappings with text keys, lists, text, numbers, true, false, null, and a date where one belongs.

Whatever else a file holds is refused with file, line and column. Nesting is limited, and so is the number of values
after aliases are expanded: ten levels of ten aliases are 600 bytes and ten billion values.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from qeff_validate.errors import ConfigError

MOST_LEVELS = 64
"""Mappings and lists inside each other."""

MOST_VALUES = 200_000
"""Values of a file, with aliases expanded."""

MOST_BITS = 64
"""Of an integer."""

CORE = "tag:yaml.org,2002:"
PLAIN = frozenset(f"{CORE}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
TIMESTAMP = f"{CORE}timestamp"
MERGE = f"{CORE}merge"
TEXT = f"{CORE}str"
DATE = re.compile(r"\d{4}-\d\d?-\d\d?")

DATE_KEY, TEXTS_KEY = "until", "texts"
"""The key whose value is a date, and the one whose texts may hold any character."""

SURROGATE = re.compile("[\ud800-\udfff]")


def parse_yaml(text: str, where: str) -> Any:
    """Return the data of a YAML document.

    Args:
        text: the document.
        where: its file, or the option that it is the value of; begins each message.

    Raises:
        ConfigError: it is no YAML, or holds what is no plain data; with line and column.
    """
    try:
        loader = _Loader(text, where)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(where).visit(node)
        return loader.construct_document(node)
    except yaml.reader.ReaderError as exc:
        line, column = text.count("\n", 0, exc.position), exc.position - (text.rfind("\n", 0, exc.position) + 1)
        raise ConfigError(
            f"{where}:{line + 1}:{column + 1}: the character U+{exc.character:04X} is not allowed in YAML:"
            " write it as an escape in double quotes"
        ) from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{where} is no YAML: {exc}") from exc


def lines_by_name(text: str, key: str) -> dict[str, int]:
    """Return the first line of each mapping with a ``name`` in the list under a key of a document, from 1 on.

    The document is one that `parse_yaml` has read.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lists = [value for name, value in getattr(root, "value", ()) if name.value == key]
    lines: dict[str, int] = {}
    for item in (item for node in lists if isinstance(node, yaml.SequenceNode) for item in node.value):
        pairs = item.value if isinstance(item, yaml.MappingNode) else ()
        names = [value.value for name, value in pairs if name.value == "name"]
        lines |= dict.fromkeys(names, item.start_mark.line + 1)
    return lines


def expanded_size(value: Any) -> int:
    """Return how many values plain data holds, each as often as it stands somewhere."""
    known: dict[int, int] = {}

    def size(part: Any) -> int:
        if not isinstance(part, (dict, list)):
            return 1
        if id(part) not in known:
            known[id(part)] = 1 + sum(map(size, part.values() if isinstance(part, dict) else part))
        return known[id(part)]

    return size(value)


class _Loader(yaml.SafeLoader):
    """A loader that names its file, limits nesting, and says which value it cannot read."""

    def __init__(self, text: str, where: str) -> None:
        self._where, self._levels, self._values = where, 0, 0
        super().__init__(text)
        self.name = where

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._levels += 1
        self._values += 1
        if self._levels > MOST_LEVELS or self._values > MOST_VALUES:
            place = _place(self._where, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
            deep = self._levels > MOST_LEVELS
            raise ConfigError(
                f"{place}: more than {f'{MOST_LEVELS} levels inside each other' if deep else f'{MOST_VALUES:,} values'}"
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise OverflowError(f"{value.bit_length()} bits")
            return value
        except (yaml.YAMLError, ConfigError):
            raise
        except Exception as exc:  # its constructors raise whatever int, float and date do
            kind = node.tag.removeprefix(CORE)
            place = _place(self._where, node.start_mark)
            raise ConfigError(f"{place}: {_shown(node)} cannot be read as {kind}: correct it, or quote it") from exc


class _Check:
    """Refuses what is no plain data; each node is visited once however many aliases stand for it."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._sizes: dict[tuple[int, str], int] = {}
        self._open: set[int] = set()

    def visit(self, node: yaml.Node, key: str = "") -> int:
        """Check a node and return how many values it stands for."""
        if id(node) in self._open:
            raise self._wrong(node, "an alias stands inside what it stands for")
        context = key if key in (DATE_KEY, TEXTS_KEY) else ""
        known = self._sizes.get((id(node), context))
        if known is None:
            self._open.add(id(node))
            known = self._sizes[id(node), context] = 1 + self._inside(node, context)
            self._open.remove(id(node))
        if known > MOST_VALUES:
            raise self._wrong(node, f"more than {MOST_VALUES:,} values, with aliases expanded")
        return known

    def _inside(self, node: yaml.Node, context: str) -> int:
        if node.tag not in PLAIN and not (node.tag == TIMESTAMP and context == DATE_KEY and DATE.fullmatch(node.value)):
            kind = node.tag.removeprefix(CORE)
            raise self._wrong(node, f"{_shown(node)} is read as {kind}, which has no place here: quote it to make text")
        if isinstance(node, yaml.ScalarNode):
            self._check_text(node, context)
            return 0
        if isinstance(node, yaml.SequenceNode):
            return sum(self.visit(item, context) for item in node.value)
        return self._mapping(node) if isinstance(node, yaml.MappingNode) else 0

    def _mapping(self, node: yaml.MappingNode) -> int:
        names: set[str] = set()
        total = 0
        for key, value in node.value:
            if key.tag not in (TEXT, MERGE):
                kind = key.tag.removeprefix(CORE)
                raise self._wrong(key, f"the key {_shown(key)} is read as {kind}, and keys are text: quote it")
            self._check_text(key, "")
            if key.value in names:
                raise self._wrong(key, f"key {key.value!r} stands twice in one mapping")
            names.add(key.value)
            total += 1 + self.visit(value, key.value)
        return total

    def _check_text(self, node: yaml.ScalarNode, context: str) -> None:
        if SURROGATE.search(node.value):
            raise self._wrong(node, f"{_shown(node)} holds half of a surrogate pair, which is no character")
        if "\0" in node.value and context != TEXTS_KEY:
            raise self._wrong(node, f"{_shown(node)} holds a NUL character")

    def _wrong(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{_place(self._where, node.start_mark)}: {problem}")


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "[…]" if isinstance(node, yaml.SequenceNode) else "{…}"
    return repr(node.value if len(node.value) <= 40 else f"{node.value[:37]}...")


def _place(where: str, mark: Any) -> str:
    return f"{where}:{mark.line + 1}:{mark.column + 1}"
