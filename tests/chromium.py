# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven by its DevTools protocol over two pipes: no port, no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser on this machine, or None."""

ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)

LIMIT_S = 120
"""Time without an answer after which a browser is given up."""


class Page:
    """A tab: what it logged, what it asked for, and the means to use it."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._count, self._session = to, back, b"", 0, ""
        self.events: list[Mapping[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result; events that come before it are kept."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, file: Path) -> None:
        """Open a file and wait for the event ``load``."""
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """Return the value of an expression; its events are handled and its timers have run."""
        wait = f"new Promise((done) => {{ const value = ({expression}); setTimeout(() => done(value)); }})"
        answer = self.call("Runtime.evaluate", expression=wait, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key; its events are handled and their timers have run."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.value("null")

    def complaints(self) -> list[str]:
        """Return what the page logged, threw or asked for beside itself."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        logged = [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]
        requests = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return logged + [item["request"]["url"] for item in requests if item.get("type") != "Document"]

    def screenshot(self, file: Path, *, width: int, height: int | None = None, dark: bool = False) -> None:
        """Write a picture of the whole page, or of its upper part of a height."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height or 900, deviceScaleFactor=1, mobile=False
        )
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=height is None)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._back], [], [], LIMIT_S)[0], f"the browser gives no answer for {LIMIT_S} s"
            part = os.read(self._back, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)


@contextmanager
def page(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty profile, and end it."""
    assert PROGRAM is not None
    ends = [os.pipe(), os.pipe()]
    # the browser's own are 3 and 4; ours must not be among these
    (child_in, to), (back, child_out) = [[fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pair] for pair in ends]
    for fd in (fd for pair in ends for fd in pair):
        os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, 2), (os.POSIX_SPAWN_DUP2, child_in, 3), (os.POSIX_SPAWN_DUP2, child_out, 4)]
    pid = os.posix_spawn(
        PROGRAM, [PROGRAM, *ARGUMENTS, f"--user-data-dir={profile}"], dict(os.environ), file_actions=actions
    )
    for fd in (null, child_in, child_out):
        os.close(fd)
    try:
        tab = Page(to, back)
        yield tab
        tab._session = ""
        os.write(to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(to)
        os.close(back)
        os.waitpid(pid, 0)
