"""The causes of which attempts end: how many attempts each is worth, after which wait, and whose fault it is.

A budget counts attempts that ended so, one after the other, without a step saved that no attempt had saved before.
What an exception means is told by its type where it is ours or Python's, and by its words where libraries raise
RuntimeError for everything. A cause's sentences for people are in launch.operating.reasons.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One verdict: what the run does after it."""

    name: str
    budget: int | None  # further attempts; None: as many as it takes
    delays: tuple[int, ...] = (
        0,
    )  # seconds before the first, second, ... of them; the last holds for the rest
    blames: int = 0  # from this fault on a node is avoided; 0: nodes have no part in it


CAUSES = {
    cause.name: cause
    for cause in (
        Cause("finished", 0),
        Cause("cancelled", 0),
        Cause("preempted", None),  # by other jobs, or on request: says nothing about the run
        Cause("timeout", 2),  # the walltime; without a new step saved the next would end alike
        Cause("infrastructure", 5, delays=(0, 60, 300, 900), blames=1),
        Cause("full disk", 5, delays=(30, 60, 300, 900)),  # others' files as well, so it may pass
        Cause("hang", 3, blames=2),  # the silent rank's node, when it was silent before
        Cause("out of memory", 1),  # fragmentation, or a neighbour on the node, may have been it
        Cause("error", 1),
        Cause("bad spec", 0),
        Cause("divergence", 0),
        Cause("fenced", 0),
        Cause("no progress", 0),
    )
}
TOGETHER = 8  # attempts of whatever mixture of causes, preemptions aside, without a new step saved

# Errors that say, in words for the user, what the same code would meet again on the next attempt.
BAD_SPEC = {
    *("DataError", "CatalogError", "ImageError", "RecordError", "BackboneError", "UpcycleError"),
    *("DispatchError", "StageError", "HandoffError", "SpecError", "InterchangeError"),
}
OUT_OF_MEMORY = re.compile(
    r"out of memory|can(?:not|'t) allocate memory|ALLOC_FAILED|std::bad_alloc|OUT_OF_MEMORY|oom.kill",
    re.IGNORECASE,
)
# What ranks raise when another one is gone: they know that, and not why.
LOST_PEER = re.compile(
    r"connection (?:closed|reset|refused)|broken pipe|remote process (?:has )?(?:exited|terminated)|gloo/transport"
    r"|socket ?timeout|(?:watchdog|collective).*time(?:d ?)?out|time(?:d ?)?out.*(?:store|rendezvous|recv|send)"
    r"|ncclRemoteError|no peer|peer (?:has )?(?:closed|gone)|recvValue|heartbeat.*(?:lost|timeout)",
    re.IGNORECASE,
)
BROKEN_NODE = re.compile(
    r"\bXid\b|ECC error|NVLink|fallen off the bus|hardware error|GPU is lost|ncclSystemError|ncclInternalError"
    r"|CUDA driver (?:initialization|version)|no CUDA-capable device|device\(s\) is/are busy|ibv_|infiniband"
    r"|stale file handle|input/output error|transport endpoint",
    re.IGNORECASE,
)
FULL_DISK = re.compile(r"no space left|quota exceeded|file too large", re.IGNORECASE)
BROKEN_FILES = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}


def kind(error: BaseException) -> str:
    """The cause that an exception on a rank stands for; "lost peer" for one that another rank's end caused."""
    types = {base.__name__ for base in type(error).__mro__}
    words = f"{type(error).__name__}: {error}"
    if types & BAD_SPEC:
        return "bad spec"
    if own := getattr(error, "verdict", ""):
        return str(own)
    if types & {"MemoryError", "OutOfMemoryError"} or (
        isinstance(error, (RuntimeError, OSError)) and OUT_OF_MEMORY.search(words)
    ):
        return "out of memory"
    if isinstance(error, (RuntimeError, OSError)) and FULL_DISK.search(words):
        return "full disk"
    if isinstance(error, ConnectionError):
        return "lost peer"
    if isinstance(error, OSError):
        return "infrastructure" if error.errno in BROKEN_FILES else "error"
    if isinstance(error, RuntimeError):  # torch.distributed's errors are of this type
        if BROKEN_NODE.search(words):
            return "infrastructure"
        if LOST_PEER.search(words):
            return "lost peer"
    return "error"
