"""A real browser for tests: headless Chromium, spoken to over its debugging pipe; it reaches no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 40.0


@dataclass
class Seen:
    """What a page did while it was loaded."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Browser:
    """One tab. The pipe carries JSON messages, each ended by a zero byte."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for found in self._messages():
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                return dict(found["result"])
        raise AssertionError("unreachable")

    def _messages(self) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(line)
                if "method" in message:
                    self.events.append(message)
                yield message
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {PATIENCE} s"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data

    def open(self, page: Path, *, width: int = 1200, dark: bool = False, media: str = "screen") -> Seen:
        """Load a file and wait until it has all it asks for."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            next(m for m in self._messages() if m.get("method") == "Page.loadEventFired")
        self.script("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen = Seen()
        for event in self.events:
            told = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                seen.requests.append(told["request"]["url"])
            elif event["method"] == "Log.entryAdded":
                seen.complaints.append(f"{told['entry']['level']}: {told['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled":
                seen.complaints.append(f"{told['type']}: {told['args']}")
            elif event["method"] == "Runtime.exceptionThrown":
                seen.complaints.append(str(told["exceptionDetails"].get("text")))
        return seen

    def script(self, text: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, file: Path) -> Path:
        """The whole page as a PNG, however long it is."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))
        return file


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in `folder`; it is gone with all its processes afterwards."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert program, f"none of {', '.join(NAMES)} is here: `make test` installs chromium on Debian, as root"
    ours, theirs = os.pipe(), os.pipe()  # (read, write) of what we hear, and of what it hears

    def pipes() -> None:
        # Chromium reads its orders from file 3 and answers in file 4; first out of the way of both.
        hears, says = os.dup(theirs[0]), os.dup(ours[1])
        while hears in (3, 4):
            hears = os.dup(hears)
        while says in (3, 4):
            says = os.dup(says)
        os.dup2(hears, 3)
        os.dup2(says, 4)

    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder / 'profile'}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            preexec_fn=pipes,
            close_fds=False,
            start_new_session=True,
        )
    try:
        os.close(theirs[0])
        os.close(ours[1])
        yield Browser(ours[0], theirs[1])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours[0])
        os.close(theirs[1])
