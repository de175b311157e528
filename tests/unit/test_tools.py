# SPDX-License-Identifier: Apache-2.0
"""The scripts in tools/: the drawing of the layers, the check of the built site."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawing_is_read_from_the_rule_and_is_xml(tmp_path: Path) -> None:
    layers_svg = tool("layers_svg")
    (tmp_path / "top.py").write_text('"""Meets `all` <others>. And more.\n\nDetails.\n"""\n')
    layers = layers_svg.order('ORDER = ({"top", "side"}, "low")\n')
    assert layers == [["side", "top"], ["low"]]
    root = ET.fromstring(layers_svg.drawing(layers, tmp_path))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["side", None, "top", "Meets all <others>", "low", None, "may import"]


def test_rule_without_an_order_is_an_error() -> None:
    with pytest.raises(ValueError, match="ORDER"):
        tool("layers_svg").order("RANK = {}\n")


def test_site_with_a_missing_page_or_something_from_a_network_is_found(tmp_path: Path) -> None:
    check_site = tool("check_site")
    assert len(check_site.problems(tmp_path)) == 1
    (tmp_path / "a b.html").write_text(
        "<img src='https://elsewhere/x.png'><a href='gone.html'>not on the start page</a>"
    )
    (tmp_path / "index.html").write_text(
        "<a href='a%20b.html#part'>a</a><a href='#own'>b</a><a href='https://elsewhere/'>c</a>"
        "<a href='gone/x.html'>d</a>"
        "<link href='//fonts/x.css'><script src='own.js'></script>"
    )
    assert check_site.problems(tmp_path) == [
        "index.html links to gone/x.html, which is missing",
        "a b.html loads https://elsewhere/x.png",
        "index.html loads //fonts/x.css",
    ]
