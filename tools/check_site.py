# SPDX-License-Identifier: Apache-2.0
"""Check a built site: each page that the start page links to is there, and no page loads anything from a network.

``python tools/check_site.py build/site`` (``make docs`` runs it). Broken links are errors of mkdocs already.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class References(HTMLParser):
    """Collects what a page links to, and what a browser loads with it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the targets of links, scripts, styles, images and frames."""
        values = dict(attrs)
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        for name in ("src", "href" if tag == "link" else "src"):
            if tag in ("script", "link", "img", "iframe", "source") and values.get(name):
                self.loaded.append(str(values[name]))


def references(page: Path) -> References:
    """Read the references of an HTML file."""
    found = References()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def problems(site: Path) -> list[str]:
    """Return what is wrong with a site; an empty list if nothing is."""
    start = site / "index.html"
    if not start.is_file():
        return [f"{start} is missing"]
    wrong = []
    for link in references(start).links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc and parts.path and not (site / unquote(parts.path)).exists():
            wrong.append(f"index.html links to {link}, which is missing")
    for page in sorted(site.rglob("*.html")):
        loaded = {target for target in references(page).loaded if urlsplit(target).netloc}
        wrong += [f"{page.relative_to(site)} loads {target}" for target in sorted(loaded)]
    return wrong


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    sys.exit("\n".join(found) if found else 0)
