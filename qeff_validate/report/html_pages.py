# SPDX-License-Identifier: Apache-2.0
"""HTML pages in one file each: a template, a style sheet and a script, which load nothing from anywhere.

Every value is escaped (Jinja's autoescape). The page's content security policy allows no request, and no style or
script but the two in this package, by their digests: a text that slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> Iterator[str]:
    """Yield a page in pieces.

    Args:
        template: file name in `TEMPLATES`.
        values: variables of the template.
    """
    return _environment().get_template(template).generate(values)


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment.globals |= {
        "style": Markup(style),  # noqa: S704 - files of this package
        "script": Markup(script),  # noqa: S704
        "style_digest": _digest(style),
        "script_digest": _digest(script),
    }
    environment.filters["number"] = shown_number
    return environment


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def shown_number(value: float | None) -> str:
    """Return a whole number as it is, another one with three digits, and a dash for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.2e}"
