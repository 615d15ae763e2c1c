"""The process that brings a run to W&B while it trains: python -m launch.online.mirror FOLDER ATTEMPT [LEASE]

It reads metrics.jsonl and wandb/wanted.jsonl as they grow. Its input says how the attempt ended; where the
input ends without a word the trainer was killed, and what it wrote is still sent. Where the run's lease is no longer
LEASE, the run is another attempt's, and so is its page: nothing more is sent, and no end is told.

It is a process and not a thread: a client that hangs, crashes or exits takes no training along, and its environment
has no secrets.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch import sampler
from launch.files import read_json, read_lines, write_json
from launch.metrics import Reader
from launch.online import orders
from launch.online import session as client
from launch.online.reach import Lock, account, reachable
from launch.online.sync import delivered
from launch.operating import ledger
from launch.operating.status import State, children
from launch.record import RunFolder

TICK_SECONDS = 1.0
BEAT_SECONDS = 5.0
RETRY_SECONDS = 300.0  # between looks whether the server is back
ORDERS_SECONDS = 60.0  # between looks at the run's tags
CHECK_SECONDS = 600.0  # between looks whether the server takes the rows
LEDGER_SECONDS = 300.0  # between counts of where the time went
NODES_SECONDS = 15.0  # between looks at the nodes' samples


class Mirror:
    """One attempt's rows and wishes on their way to W&B."""

    def __init__(self, folder: Path, attempt: int, lease: str = "") -> None:
        self.folder, self.attempt, self.lease = folder, attempt, lease
        job = read_json(folder / "wandb" / f"attempt_{attempt}.json")
        if job is None:
            raise SystemExit(
                f"{folder}/wandb/attempt_{attempt}.json is missing: nothing says which run this is"
            )
        self.job: dict[str, Any] = job
        self.session: client.Session | None = None
        self.reader = Reader(folder / "metrics.jsonl")
        self.state: dict[str, Any] = {"attempt": attempt, "pid": os.getpid(), "host": socket.gethostname()}
        self.state |= {"segments": [], "held": sorted(delivered(folder)), "outcome": "", "closed": False}
        self._seen: set[str] = set()  # keys of wanted.jsonl that this session has dealt with
        self._sent: list[str] = []  # and those that count when the session has ended well
        self._next_try = self._next_check = self._next_beat = self._next_orders = 0.0
        self._next_ledger = time.monotonic() + LEDGER_SECONDS
        self._next_nodes = 0.0
        self._reached = -1  # the step the server should have by the next check

    def live(self) -> None:
        """Follow the trainer until it ends."""
        self.wait_for_predecessor()
        self.tell(orders.kept(RunFolder(self.folder)))
        while not self.fenced():
            self.work()
            outcome = listen(TICK_SECONDS)
            if outcome and not self.fenced():
                self.work()
                self.end(outcome)
                return
        self.withdraw()

    def fenced(self) -> bool:
        """Whether a later execution has taken the run over."""
        holder = read_json(RunFolder(self.folder).lease_file) if self.lease else None
        return holder is not None and holder.get("token") != self.lease

    def withdraw(self) -> None:
        """End without a word to the server: wandb's own process would tell it, however it is asked to end."""
        for child in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.say("another attempt has taken the run over")
        self.state |= {"closed": True, "outcome": "fenced"}
        self.beat(now=True)

    def work(self) -> None:
        try:
            if self.session is None:
                self.open()
            elif not self.session.online and self.may_be_online() and time.monotonic() > self._next_try:
                self._next_try = time.monotonic() + RETRY_SECONDS
                if not Lock.held(self.folder) and reachable(client.base_url()):
                    self.say("the server is back")
                    self.leave()
                    self.open()
            self.send()
            self.check()
            self.ask_orders()
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}")
            self.leave()
        self.beat()

    def open(self) -> None:
        """Open the run online where that is possible, offline else."""
        online = self.may_be_online()
        if online:
            # Say so before looking at the syncer's lock, as the syncer locks before it looks here.
            self.state["mode"] = "online"
            self.beat(now=True)
            online = not Lock.held(self.folder) and reachable(client.base_url())
        self._next_try = time.monotonic() + RETRY_SECONDS
        try:
            job = self.job
            if online:  # tags that people have given the run stay
                job = job | {"tags": sorted({*job["tags"], *client.ask(job).tags})}
            self.session = client.Session(job, self.folder, online=online)
        except Exception as error:
            if not online:
                raise
            self.say(f"not online: {type(error).__name__}: {error}")
            client.close()
            self.session = client.Session(self.job, self.folder, online=False)
        self.reader = Reader(self.folder / "metrics.jsonl", after=self.session.step)
        self._seen, self._sent = set(), []
        self._next_orders = time.monotonic() + ORDERS_SECONDS
        self._next_check, self._reached = time.monotonic() + CHECK_SECONDS, -1
        self.state["segments"].append(self.session.segment)
        self._next_beat = 0.0
        self.state |= {
            "mode": "online" if self.session.online else "offline",
            "url": self.session.run.url or "",
        }
        self.say(f"{self.state['mode']} in {self.session.segment}, after step {self.session.step}")

    def send(self) -> None:
        """Bring W&B up to the files."""
        session = self.session
        assert session is not None
        for row in self.reader:
            session.log(row | self.beside())
        for item in read_lines(self.folder / "wandb" / "wanted.jsonl"):
            key = item["key"]
            if key in self._seen or key in self.state["held"]:
                continue
            if not session.online and item["kind"] != "summary":
                continue  # artifacts need the server's word for who owns them: the syncer's work
            self._seen.add(key)
            try:
                if session.hold(item):
                    self.state["held"].append(key)
                elif item["kind"] == "table":
                    self._sent.append(key)
            except Exception as error:
                # Lineage is completed afterwards: by the next attempt or the syncer.
                self.say(f"{item['kind']} {item['name']}: {type(error).__name__}: {error}")

    def beside(self) -> dict[str, float]:
        """What goes along with the next row now and then: where the time went, and the load of the nodes."""
        found: dict[str, float] = {}
        if time.monotonic() > self._next_ledger:
            self._next_ledger = time.monotonic() + LEDGER_SECONDS
            found |= self.spent()
        if time.monotonic() > self._next_nodes:
            self._next_nodes = time.monotonic() + NODES_SECONDS
            for node, sample in sampler.newest(self.folder, time.time()).items():
                found |= {f"system/{node}/{key}": value for key, value in sample.items() if key != "time"}
        return found

    def spent(self) -> dict[str, float]:
        """The run's time by what it went into, in seconds, and the share that went into steps that are kept."""
        try:
            cost = ledger.of(RunFolder(self.folder), State("running"))
        except Exception as error:  # a journal by hand, say: no reason to keep rows back
            self.say(f"goodput cannot be counted: {type(error).__name__}: {error}")
            return {}
        found = {f"goodput/{part}_seconds": round(seconds, 1) for part, seconds in cost.seconds.items()}
        return found if cost.goodput is None else found | {"goodput/share": round(cost.goodput, 4)}

    def ask_orders(self) -> None:
        """Pass on to the trainer what people ask for by tags."""
        if self.session is None or not self.session.online or time.monotonic() < self._next_orders:
            return
        self._next_orders = time.monotonic() + ORDERS_SECONDS
        try:
            self.tell(client.take_orders(self.job, lambda found: orders.keep(RunFolder(self.folder), found)))
        except Exception as error:
            self.say(f"no answer about tags: {type(error).__name__}: {error}")

    def tell(self, asked: Iterable[str]) -> None:
        """Pass orders on to the trainer."""
        for order in asked:
            self.say(f"asked to {order}")
            print(order, flush=True)

    def check(self) -> None:
        """Open the run anew when the server has stopped taking rows, which the client says nowhere."""
        if self.session is None or not self.session.online or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_SECONDS
        expected, self._reached = self._reached, self.session.step
        try:
            there = client.ask(self.job).step
        except Exception as error:
            self.say(f"no answer to a check: {type(error).__name__}: {error}")
            return
        if there < expected:
            raise RuntimeError(f"the server has step {there} and was sent {expected} long ago; sending again")

    def end(self, outcome: str) -> None:
        try:
            for last in (False, False, True):
                try:
                    if self.session is None:
                        self.open()
                        self.send()
                    assert self.session is not None
                    session, self.session = self.session, None
                    session.hold({"kind": "summary", "values": self.spent()})
                    session.finish(outcome)
                except Exception as error:
                    # It dies of a signal to all of the step, now and then.
                    if last or not client.died(error):
                        raise
                    self.say(f"{type(error).__name__}; once more")
                    self.leave()
                    continue
                # A preempted attempt is in a hurry, and the next one sends what is missing.
                if not session.online or outcome == "preempted" or self.taken(session.step):
                    self.state["delivered"] = session.online
                    self.state["held"] += self._sent
                    break
                self.say("the server has not taken all rows; sending them again")
                client.close()
        except Exception as error:
            self.say(f"at the end: {type(error).__name__}: {error}")
        self.state |= {"closed": True, "outcome": outcome}
        self.beat(now=True)

    def taken(self, step: int) -> bool:
        return client.ask(self.job, step).step >= step

    def leave(self) -> None:
        """Give up the present session; what it holds is on disk, or is read again."""
        session, self.session = self.session, None
        try:
            if session is not None and not session.online:
                session.finish("failed")
            client.close()
        except Exception as error:
            self.say(f"{type(error).__name__}: {error}")

    def may_be_online(self) -> bool:
        mode = self.job["mode"]
        if mode == "auto" and os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
            return False
        return mode == "online" or (mode == "auto" and account(client.base_url()))

    def wait_for_predecessor(self) -> None:
        """A run has one writer at a time: the last attempt's mirror may still be sending."""
        others = (self.folder / "wandb").glob("mirror_*.json")
        earlier = [path for path in others if path.stem != f"mirror_{self.attempt}"]
        for path in earlier:
            seen, changed = None, time.monotonic()
            while (state := read_json(path)) and not state.get("closed") and time.monotonic() - changed < 12:
                if state.get("host") == self.state["host"] and not alive(state["pid"]):
                    break
                if state.get("beat") != seen:
                    seen, changed = state.get("beat"), time.monotonic()
                time.sleep(0.2)

    def beat(self, now: bool = False) -> None:
        if now or time.monotonic() > self._next_beat:
            self._next_beat = time.monotonic() + BEAT_SECONDS
            self.state |= {"beat": time.time(), "step": self.reader.step}
            write_json(self.folder / "wandb" / f"mirror_{self.attempt}.json", self.state)

    def say(self, text: str) -> None:
        self.state["note"] = text
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


def listen(seconds: float) -> str:
    """How the attempt ended, where the trainer has said so within `seconds`; `lost` where it is gone."""
    ready, _, _ = select.select([0], [], [], seconds)
    if not ready:
        return ""
    return os.read(0, 100).decode().strip() or "lost"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> None:
    # SLURM signals every process of a step; what a warning means, the trainer says on the input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Mirror(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]).live()
    # Without this, wandb's exit handlers wait once more for a server that has just been given up.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
