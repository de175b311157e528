# SPDX-License-Identifier: Apache-2.0
"""Locates the AI 100 SDK: the installed one at its prefix, or the simulated one of this package.

Paths and texts: card-contract §1. Platform SDK (bindings, tools) and Apps SDK (compiler) have separate installers, so
each part is located separately. Nothing is imported and no process is started before a method needs it.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from qeff_validate.artifact import digest_tree, fingerprint
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.files import expand_user

DEFAULT_PREFIX = "/opt/qti-aic"
SIMULATED = Path(__file__).resolve().parent / "simulated"
_PACKAGE = "qeff_validate.sdk.simulated"
_BINDINGS = f"{_PACKAGE}.bindings"
QUERY_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Card:
    """One card in the output of ``qaic-util -q`` (card-contract §1.4).

    Attributes:
        qid: id of the card.
        values: the other keys and their values as text.
    """

    qid: int
    values: Mapping[str, str]

    @property
    def ready(self) -> bool:
        """True if the card can load a program."""
        return self.values.get("Status") == "Ready"

    @property
    def free_cores(self) -> int:
        """Number of NSPs (neural signal processors) that no program uses; 0 if unknown."""
        free = self.values.get("Nsp Free", "")
        return int(free) if free.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Sdk:
    """An SDK: its bindings, compiler and tools; `installed` and `simulated` return one.

    Attributes:
        prefix: directory of the installation.
        built_in: True for the simulated SDK of this package.
    """

    prefix: Path
    built_in: bool = False

    @property
    def simulated(self) -> bool:
        """True if the version file says that the SDK is simulated; its bindings say so as well."""
        root = _version_file(self.prefix / "versions" / "apps.xml")
        return root is not None and (root.findtext(".//simulated") or "").strip() == "true"

    def versions(self) -> dict[str, str | None]:
        """Return the versions of ``apps`` and ``platform``; None for one that is not installed."""
        versions: dict[str, str | None] = {}
        for name in ("apps", "platform"):
            root = _version_file(self.prefix / "versions" / f"{name}.xml")
            versions[name] = (root.findtext(".//base_version") or "").strip() or None if root is not None else None
        return versions

    def fingerprint(self) -> Mapping[str, Any]:
        """Return plain data that changes with everything that a compiled artifact takes from the SDK."""
        source = fingerprint(digest_tree(self.prefix, suffixes=(".py",))) if self.built_in else None
        return {**self.versions(), "simulated": self.simulated, "source": source}

    def compiler(self) -> tuple[list[str], bool]:
        """Return the compiler's command, and True if it is the old ``qaic-exec`` (card-contract §1.2).

        Raises:
            Unavailable: no compiler is installed.
        """
        if self.built_in:
            return [sys.executable, "-m", f"{_PACKAGE}.compiler"], False
        for name in ("qaic-compile", "qaic-exec"):
            path = self.prefix / "exec" / name
            if os.access(path, os.X_OK) and path.is_file():
                return [str(path)], name == "qaic-exec"
        raise Unavailable(
            f"no AI 100 compiler: {self.prefix}/exec holds neither qaic-compile nor qaic-exec;"
            " install the Apps SDK (x86-64 only), or point --sdk or QEFF_VALIDATE_SDK at another prefix"
        )

    def query(self) -> list[Card]:
        """Return the cards that ``qaic-util -q`` lists.

        Raises:
            Unavailable: the tool lists no card, is missing, fails, or exceeds `QUERY_SECONDS`.
        """
        tool = f"{self.prefix}/tools/qaic-util"
        command = [tool]
        if self.built_in:
            tool, command = "the simulated qaic-util", [sys.executable, "-m", f"{_PACKAGE}.tools", "qaic-util"]
        try:
            result = subprocess.run(
                [*command, "-q"], capture_output=True, text=True, timeout=QUERY_SECONDS, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired as exc:
            raise Unavailable(f"{tool} -q did not answer within {QUERY_SECONDS} s: is the driver stuck?") from exc
        except OSError as exc:
            raise Unavailable(f"{tool} cannot be started ({exc.strerror}): install the Platform SDK") from exc
        if result.returncode:
            output = (result.stderr or result.stdout).strip() or "it printed nothing"
            raise Unavailable(f"{tool} -q failed with exit code {result.returncode}: {output[-500:]}")
        cards = parse_cards(result.stdout)
        if not cards:
            raise Unavailable(f"{tool} lists no card: is one fitted, and is the driver loaded?")
        return cards

    def ready(self) -> list[Card]:
        """Return the cards that are Ready, the one with the most free cores first.

        Raises:
            Unavailable: no card is Ready; the message lists the states.
        """
        cards = self.query()
        ready = sorted((card for card in cards if card.ready), key=lambda card: -card.free_cores)
        if not ready:
            states = ", ".join(f"QID {card.qid} {card.values.get('Status')}" for card in cards)
            raise Unavailable(
                f"no card is Ready ({states}): wait for one that is Initializing; for one in Error, join the group"
                " qaic, or reset it with qaic-util -s"
            )
        return ready

    def cards(self) -> list[Card]:
        """Return the cards that ``qaic-util -q`` lists; empty if `query` fails."""
        try:
            return self.query()
        except Unavailable:
            return []

    def why_not(self) -> str | None:
        """Return None if programs can be run, else the reason and a remedy. Imports nothing."""
        if self.built_in:
            return None
        if not self.prefix.is_dir():
            return (
                f"no AI 100 SDK at {self.prefix}: install the Platform SDK,"
                " or point --sdk or QEFF_VALIDATE_SDK at its prefix"
            )
        if self.simulated:
            return f"the SDK at {self.prefix} is simulated, and ai100 means a real card: ask for the runtime sim"
        if not self._library().is_dir():
            return f"no qaicrt at {self._library()}: install the Platform SDK for {platform.machine()}"
        try:
            self.ready()
        except Unavailable as exc:
            return str(exc)
        return None

    def bindings(self) -> tuple[Any, Any]:
        """Import and return the modules ``qaicrt`` and ``QAicApi_pb2``.

        Raises:
            Unavailable: a module cannot be imported, or this process has already imported that of another SDK.
        """
        if self.built_in:
            qaicrt, messages = (importlib.import_module(f"{_BINDINGS}.{name}") for name in ("qaicrt", "QAicApi_pb2"))
            return qaicrt, messages
        modules = []
        # qaicrt must be imported before the folder of QAicApi_pb2 is on the path (design §5)
        for module, folder in (("qaicrt", self._library()), ("QAicApi_pb2", self.prefix / "dev" / "python")):
            with _on_path(folder):
                try:
                    modules.append(importlib.import_module(module))
                except (ImportError, OSError) as exc:  # OSError: a shared library is missing
                    raise Unavailable(
                        f"cannot import {module} from {folder} with Python {platform.python_version()}: {exc};"
                        " the SDK's extension is built for one Python version, and libQAic.so must be found"
                        " (LD_LIBRARY_PATH, or QAIC_LIB)"
                    ) from exc
            origin = Path(str(getattr(modules[-1], "__file__", folder))).resolve()
            if folder.resolve() not in origin.parents:
                raise Unavailable(f"{module} is already loaded from {origin}, not from {folder}: use another process")
        return modules[0], modules[1]

    def _library(self) -> Path:
        return self.prefix / "dev" / "lib" / platform.machine()


def installed(prefix: str | None = None) -> Sdk:
    """Return the installed SDK; whether it exists is checked later.

    Args:
        prefix: its directory; None: ``QEFF_VALIDATE_SDK``, else ``/opt/qti-aic``.

    Raises:
        ConfigError: the prefix is not a valid path, such as one with a name of 300 characters.
    """
    path = expand_user(prefix or os.environ.get("QEFF_VALIDATE_SDK") or DEFAULT_PREFIX)
    try:
        path.is_dir()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"the prefix of the SDK, {str(path)[:200]!r}, is no path: {reason}") from exc
    return Sdk(path)


@lru_cache(maxsize=1)
def simulated() -> Sdk:
    """Return the simulated SDK of this package."""
    return Sdk(SIMULATED, built_in=True)


def parse_cards(text: str) -> list[Card]:
    """Parse the output of ``qaic-util -q``: ``QID n`` at column 0, then tab-indented ``Key:Value`` lines."""
    cards = []
    for record in re.split(r"^(?=QID \d+\s*$)", text, flags=re.MULTILINE):
        head, _, body = record.partition("\n")
        qid = re.fullmatch(r"QID (\d+)\s*", head)
        if qid is None:
            continue
        pairs = (line.strip().partition(":") for line in body.splitlines() if line[:1].isspace())
        cards.append(Card(int(qid[1]), {key.strip(): value.strip() for key, _, value in pairs}))
    return cards


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _version_file(path: Path) -> ET.Element | None:
    try:
        return ET.parse(path).getroot()  # noqa: S314 (a file of the SDK, whose programs are executed anyway)
    except (OSError, ET.ParseError):
        return None
