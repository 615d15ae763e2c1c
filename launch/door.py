"""How each command is entered, so that none ends in a traceback for what its user can mend.

The standard library alone, in words that an old Python reads too: it runs where nothing is installed yet.
"""

import errno
import importlib
import io
import os
import signal
import sys
from typing import Any, NoReturn

from launch.exits import FAILED, INTERRUPTED, OK, USAGE

OLDEST = (3, 11)
INSTALL = "source .venv/bin/activate, or install as README.md says"


def enter(name: str) -> NoReturn:
    """Run the `main` of a module as this process's command, and exit with its code."""
    if sys.version_info < OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        _end(USAGE, f"{sys.executable} is Python {version}; 3.11 is the oldest that will do", INSTALL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in letters that the terminal lacks
    try:
        try:
            code = _main(name)()
        except SystemExit as end:
            code = end.code
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:  # before there was anything to stop
        code = INTERRUPTED
    except BrokenPipeError:  # `| head` has closed it
        _drop_output()
        code = OK
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("launch", "moe", "data"):
            raise
        _end(USAGE, f"{sys.executable} has no package {error.name}", INSTALL)
    except UnicodeEncodeError as error:
        letter = error.object[error.start : error.end]
        _end(USAGE, f"this shell's encoding, {error.encoding}, lacks {letter!a}", "export PYTHONUTF8=1")
    except OSError as error:
        if not _here():
            _end(USAGE, "the folder that this shell is in is gone", "cd to one that is there")
        if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        _end(FAILED, f"the output cannot be written: {error.strerror}", "make room, or send it elsewhere")
    sys.exit(code)


def _main(name: str) -> Any:
    """The command. Ctrl-C while torch is imported ends in silence; Python's own handler would make it fail."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return importlib.import_module(name).main
    finally:
        signal.signal(signal.SIGINT, before)


def _here() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def _drop_output() -> None:
    """Let nobody write to an output that is closed or full; Python would complain at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _end(code: int, message: str, hint: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n  hint: {hint}\n")
    sys.exit(code)
