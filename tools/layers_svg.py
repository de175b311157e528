# SPDX-License-Identifier: Apache-2.0
"""Draw the import rule as docs/assets/layers.svg (``make docs`` runs this).

The order comes from ``ORDER`` in tests/unit/test_layers.py, which is the rule that is tested; what a part does is the
first sentence of its module's docstring. Neither is written down a second time.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qeff_validate"
RULE = ROOT / "tests" / "unit" / "test_layers.py"
DRAWING = ROOT / "docs" / "assets" / "layers.svg"

WIDTH, LEFT, ROW, GAP = 940, 60, 34, 8
NAMES_WIDTH = 220
MOST_CHARACTERS = 92


def order(source: str) -> list[list[str]]:
    """Return the layers from the one that may import everything to the one that imports nothing, names sorted.

    Args:
        source: of the test of the rule; it assigns a literal to ``ORDER``.

    Raises:
        ValueError: there is no such assignment.
    """
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "ORDER" for target in targets):
            layers = ast.literal_eval(node.value)
            return [[layer] if isinstance(layer, str) else sorted(layer) for layer in layers]
    raise ValueError(f"{RULE} assigns no ORDER")


def purpose(name: str, package: Path = PACKAGE) -> str:
    """Return the first sentence of the docstring of a module or package; an empty text if it has none."""
    for path in (package / f"{name}.py", package / name / "__init__.py"):
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            text = " ".join(text.split("\n\n")[0].replace("`", "").split()).partition(". ")[0].removesuffix(".")
            if len(text) <= MOST_CHARACTERS:
                return text
            return text[:MOST_CHARACTERS].rsplit(" ", 1)[0] + " …"
    return ""


def drawing(layers: list[list[str]], package: Path = PACKAGE) -> str:
    """Return an SVG with one row for each module or package; those of one layer share a frame."""
    parts: list[str] = []
    top = 30
    for layer in layers:
        height = ROW * len(layer)
        parts.append(f'<rect class="layer" x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 10}" height="{height}" rx="5"/>')
        for place, name in enumerate(layer):
            y = top + ROW * place + ROW // 2 + 5
            parts.append(f'<text class="name" x="{LEFT + 14}" y="{y}">{escape(name)}</text>')
            parts.append(f'<text class="what" x="{LEFT + NAMES_WIDTH}" y="{y}">{escape(purpose(name, package))}</text>')
        top += height + GAP
    bottom = top - GAP
    label = "may import"
    arrow = (
        f'<path class="arrow" d="M 30 34 V {bottom - 10}"/><path class="head" d="M 24 {bottom - 12} h 12 l -6 12 z"/>'
        f'<text class="label" transform="translate(20 {bottom // 2}) rotate(-90)">{label}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 20}" role="img"'
        ' aria-label="The layers of the package; each imports only from those below it">\n'
        "<style>\n"
        ".page { fill: #ffffff } .layer { fill: #eef2ff; stroke: #4051b5; stroke-width: 1 }\n"
        "text { font-family: sans-serif; fill: #222 } .name { font-size: 15px; font-weight: bold }\n"
        ".what { font-size: 13px } .label { font-size: 13px; text-anchor: middle }\n"
        ".arrow { stroke: #4051b5; stroke-width: 2 } .head { fill: #4051b5 }\n"
        "</style>\n"
        f'<rect class="page" width="{WIDTH}" height="{bottom + 20}"/>\n' + "\n".join([*parts, arrow]) + "\n</svg>\n"
    )


if __name__ == "__main__":
    DRAWING.parent.mkdir(parents=True, exist_ok=True)
    DRAWING.write_text(drawing(order(RULE.read_text(encoding="utf-8"))), encoding="utf-8")
