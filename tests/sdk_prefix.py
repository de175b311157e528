# SPDX-License-Identifier: Apache-2.0
"""Lays out the prefix of an installed AI 100 SDK (card-contract §1) with test doubles in it.

The bindings re-export the simulated ones with ``SIMULATED = False`` and the version files carry no mark, so that
what drives a card is driven from end to end: a double of a card for tests, and no evidence of what a card computes.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from textwrap import dedent, indent

CARD = """\
QID {qid}
	Status:{status}
	MHI ID:{qid}
	PCI Address:0000:36:00.0
	PCI Info:Processing accelerators Qualcomm Device a100
	Dev Link:/dev/accel/accel{qid} 
	HW Version:2.0.0.0
	HW Serial:0.0.0.{qid}
	Dram Total:32768 MB
	Dram Free:32768 MB
	Nsp Total:16
	Nsp Free:{free}
	Sku Type:PCIe
	Board serial:SN0{qid}
"""  # noqa: W291 (the contract says: one space behind the link)
HEAD = "LRT QC_IMAGE_VERSION:1.22.0.120\nLRT IMAGE_VARIANT:AIC100\nNumber of devices queried: {count}\n"

QAICRT = "from qeff_validate.sdk.simulated.bindings.qaicrt import *\n\nSIMULATED = False\n"
MESSAGES = "from qeff_validate.sdk.simulated.bindings.QAicApi_pb2 import *\n"

COMPILES = """
    known = {"-compile-only": [], "-aic-hw-version=2.0": ["-aic-hw-version=ai100"]}
    arguments = [new for old in sys.argv[1:] for new in known.get(old, [old])]
    os.execv(sys.executable, [sys.executable, "-m", "qeff_validate.sdk.simulated.compiler", *arguments])
"""
"""Body of a compiler that works: the simulated one, which knows the current flags only."""

HANGS = "    signal.pause()\n"


def cards(*states: str, free: tuple[int, ...] = ()) -> str:
    """What ``qaic-util -q`` prints for cards in these states."""
    records = [CARD.format(qid=qid, status=status, free=free[qid] if free else 16) for qid, status in enumerate(states)]
    return HEAD.format(count=len(records)) + "".join(records)


def prefix(
    folder: Path,
    *,
    compiler: str = COMPILES,
    name: str = "qaic-compile",
    query: str | None = None,
    qaicrt: str | None = QAICRT,
    messages: str | None = MESSAGES,
    mark: str = "",
) -> Path:
    """Lay out a prefix and return it.

    Args:
        folder: where; made if it is not there.
        compiler: Python statements, indented by four; its pid and arguments are recorded before they run.
        name: the compiler's file name.
        query: what ``qaic-util -q`` prints; default: one card that is Ready.
        qaicrt: source of the bindings; None: not installed.
        messages: source of ``QAicApi_pb2``; None: not installed.
        mark: further XML of the version files.
    """
    for sub in ("exec", "tools", "versions", "dev/python", f"dev/lib/{platform.machine()}"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    set_compiler(folder, compiler, name=name)
    set_query(folder, f"cat <<'EOF'\n{cards('Ready') if query is None else query}EOF\n")
    for image in ("apps", "platform"):
        version = f"<base_version>1.22.0.119</base_version><image>{image}</image>{mark}"
        (folder / "versions" / f"{image}.xml").write_text(f"<versions><ci_build>{version}</ci_build></versions>\n")
    if qaicrt is not None:
        (folder / "dev" / "lib" / platform.machine() / "qaicrt.py").write_text(qaicrt)
    if messages is not None:
        (folder / "dev" / "python" / "QAicApi_pb2.py").write_text(messages)
    return folder


def set_compiler(folder: Path, body: str, *, name: str = "qaic-compile") -> None:
    """Write a compiler: Python statements, indented by four."""
    head = f"""\
        #!{sys.executable}
        import json, os, signal, subprocess, sys
        from pathlib import Path

        def record(pids):
            ours = Path({str(folder)!r}) / "ran.json"
            ours.with_suffix(".new").write_text(json.dumps({{"argv": sys.argv, "pids": pids}}))
            ours.with_suffix(".new").rename(ours)

        def main():
            record([os.getpid()])
    """
    body = indent(dedent(body).strip("\n"), "    ")
    _executable(folder / "exec" / name, f"{dedent(head).rstrip()}\n{body}\n\nmain()\n")


def set_query(folder: Path, body: str) -> None:
    """Write ``qaic-util``: lines of shell."""
    _executable(folder / "tools" / "qaic-util", f"#!/bin/sh\n{body}")


def ran(folder: Path) -> dict[str, list]:
    """What the compiler recorded of itself: ``argv`` and ``pids``; empty lists before it has started."""
    path = folder / "ran.json"
    found: dict[str, list] = json.loads(path.read_text()) if path.exists() else {"argv": [], "pids": []}
    return found


def _executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
