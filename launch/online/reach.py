"""Whether W&B can be had from here now: an account, a server that answers, nobody else at the run."""

from __future__ import annotations

import netrc
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

ORDERS = frozenset({"stop-after-save", "requeue"})  # tags by which a run is steered from its W&B page
PROBE_SECONDS = 10.0
BEAT_SECONDS = 5.0


def reachable(url: str) -> bool:
    """Whether a server answers, through the proxies of the environment, and does not say it is broken."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        return answer.code < 500
    except (OSError, ValueError):
        return False
    return True


def account(url: str) -> bool:
    """Whether there is a login for the server: WANDB_API_KEY, an identity token, or a line in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    names = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        try:
            if netrc.netrc(path).authenticators(
                urlparse(url).netloc
            ):  # with the port: so writes `wandb login`
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


class Lock:
    """One syncer a run, and no mirror online meanwhile. Held by a file that is touched again and again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "wandb" / "sync.lock"
        self._done = threading.Event()

    @classmethod
    def held(cls, folder: Path) -> bool:
        try:
            return time.time() - (folder / "wandb" / "sync.lock").stat().st_mtime < 4 * BEAT_SECONDS
        except FileNotFoundError:
            return False

    def __enter__(self) -> Lock:
        """Raises FileExistsError where another syncer is alive."""
        if not self.held(self.path.parents[1]):
            self.path.unlink(missing_ok=True)
        with os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def _touch(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            if self.path.exists():
                os.utime(self.path)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self.path.unlink(missing_ok=True)
