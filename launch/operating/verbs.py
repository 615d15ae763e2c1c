"""The second door's verbs and their arguments. What a verb does is in its own module, loaded when it is
asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import Parser, positive, whole
from launch.exits import INTERRUPTED, USAGE
from launch.operating.address import HELP, choose
from launch.record import find_runs
from launch.snapshot import REPOSITORY

# Verbs that change runs: a part of a name must mean one run, not many.
CHANGING = ("cancel", "requeue", "resubmit", "throttle", "explain", "diff", "logs")


EXAMPLES = """\
examples:
  python launch/runs.py status --watch
  python launch/runs.py explain stage3_moe
  python launch/runs.py logs 4242_3 -f
  python launch/runs.py cancel '*/lr=1e-5'

exit codes: 0 fine, 1 a run failed, 2 the command is wrong, 3 SLURM refuses or does not answer,
  4 over a limit, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The command line of launch/runs.py."""
    one = Parser(
        prog="python launch/runs.py",
        description="Look at runs, explain and change them. VERB --help tells more of one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "--runs",
        type=Path,
        default=REPOSITORY / "runs",
        metavar="FOLDER",
        help="the folder of run folders; default: this repository's runs/",
    )
    verbs = one.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, runs: str = "") -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if runs:
            found.add_argument("run", nargs=None if runs == "1" else runs, help=HELP)
        found.add_argument("--json", action="store_true", help="print JSON")
        found.add_argument("--runs", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return found

    def changes(found: argparse.ArgumentParser) -> None:
        found.add_argument("-y", "--yes", action="store_true", help="do not ask")

    verb("list", "name the runs, one a line", "*")
    found = verb("status", "the state of each run: step, loss, attempts, where and why", "*")
    found.add_argument("--watch", action="store_true", help="again and again, until no run is open")
    found.add_argument(
        "--every", type=positive, default=15.0, metavar="SECONDS", help="how often with --watch; default 15"
    )
    found.add_argument("--cost", action="store_true", help="GPU-hours so far, and where the time went")
    found.add_argument("--exit-code", action="store_true", help="exit with 1 unless all are done")
    verb("explain", "why a run waits, was restarted, has failed or is held; in sentences with times", "1")
    found = verb("logs", "a run's log: that of the rank that failed first, else rank 0's", "?")
    found.add_argument("-f", "--follow", action="store_true", help="print what is added, until the run ends")
    found.add_argument("--attempt", default="", help="its name, or its number from 0; default: the newest")
    found.add_argument("--rank", type=whole(0), default=None, metavar="N", help="this rank's, from 0")
    found.add_argument("--grep", default="", metavar="PATTERN", help="lines that match a regular expression")
    found = verb(
        "diff", "how a run differs from an experiment or another run, and what that means for it", "1"
    )
    found.add_argument("other", help="an experiment's YAML, or a run")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the YAML's")
    changes(verb("cancel", "end runs for good: they save if they can, and are not requeued", "+"))
    found = verb("requeue", "have runs save and start another attempt; let go those that are held", "+")
    found.add_argument("--now", action="store_true", help="without waiting for a save of our own asking")
    changes(found)
    found = verb(
        "resubmit", "submit runs anew that failed, stopped or were blocked, and those below them", "*"
    )
    found.add_argument(
        "--only", default="", choices=("failed", "stopped", "blocked", "cancelled"), help="only those"
    )
    found.add_argument("--same-code", action="store_true", help="with the code they had, not this checkout's")
    changes(found)
    found = verb("throttle", "limit how many runs of an array run at a time", "+")
    found.add_argument("limit", type=whole(0), help="the number; 0 for no limit")
    found = verb("wait", "wait until no run is open; exit code 1 when one is not done then", "*")
    found.add_argument("--every", type=positive, default=15.0, metavar="SECONDS", help="how often to ask")
    found.add_argument("--timeout", type=float, default=0.0, metavar="SECONDS", help="0: for ever")
    found = verb("sync", "send W&B what nodes without a network recorded; on the login node", "*")
    found.add_argument("--watch", action="store_true", help="again and again, running runs' rows included")
    found.add_argument(
        "--every", type=positive, default=60.0, metavar="SECONDS", help="how often with --watch"
    )
    found = verb("report", "a page to read and to mail: curves, router balance, time, attempts, answers", "+")
    found.add_argument("--out", type=Path, metavar="FILE", help="default: report.html beside the runs")
    verb("dashboard", "make or update the runs' saved workspace and report on W&B", "+")
    found = verb("drill", "rehearse: train an experiment apart, do to it what clusters do, and keep score")
    found.add_argument("spec", type=Path, help="the experiment's YAML")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the YAML's")
    found.add_argument("--kinds", default="", metavar="A,B", help="only these faults; default: all")
    found.add_argument("--save-every", type=whole(1), default=10, metavar="STEPS", help="default 10")
    found.add_argument("--compare", action="store_true", help="train it undisturbed too; compare the weights")
    found.add_argument("--seed", type=whole(0), default=0, metavar="N", help="which ranks are struck")
    found = verb("doctor", "read the cluster's settings, and say what each means for these runs")
    found.add_argument("--write", default="", metavar="NAME", help="write experiments/clusters/NAME.yaml")
    found.add_argument("--partition", default="", help="the partition for the preset; default: most GPUs")
    found.add_argument("--force", action="store_true", help="replace a preset that is there")
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command = parser()
    options, more = command.parse_known_args(arguments)
    _take(command, options, more)
    try:
        return _run(options)
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _take(command: argparse.ArgumentParser, options: argparse.Namespace, more: Sequence[str]) -> None:
    """Words after an option belong to those before it; argparse itself stops at the option."""
    words = getattr(options, "overrides", getattr(options, "run", None))
    if more and (not isinstance(words, list) or any(word.startswith("-") for word in more)):
        command.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        words += more  # type: ignore[operator]


def _run(options: argparse.Namespace) -> int:
    if options.verb == "doctor":
        from launch.operating import doctor

        return doctor.main(options)
    options.runs = Path(os.path.abspath(options.runs))
    if options.runs != REPOSITORY / "runs" and not options.runs.is_dir():
        raise LookupError(f"--runs: there is no folder {options.runs}")
    if options.verb == "drill":
        from launch.recovery import drill

        return drill.drill(options)
    words = [options.run] if isinstance(options.run, str) else options.run or []
    chosen = choose(find_runs(options.runs), options.runs, words, parts=options.verb not in CHANGING)
    if options.verb == "logs":
        from launch.operating import logs

        return logs.logs(chosen, options)
    if options.verb in ("list", "status", "wait"):
        from launch.operating import show

        return {"list": show.list_, "status": show.status, "wait": show.wait}[options.verb](chosen, options)
    if options.verb in ("explain", "diff"):
        if len(chosen) > 1:
            names = ", ".join(str(folder.path.relative_to(options.runs)) for folder in chosen[:6])
            raise LookupError(f"{options.run} means {len(chosen)} runs ({names}); name one")
        from launch.operating import compare, explain

        return (explain.explain if options.verb == "explain" else compare.diff)(chosen, options)
    if options.verb == "sync":
        from launch.online import send

        return send.sync(chosen, options)
    if options.verb == "report":
        from launch.page import write

        return write.report(chosen, options)
    if options.verb == "dashboard":
        from launch.online import dashboard

        return dashboard.dashboard(chosen, options)
    if options.verb == "resubmit":
        from launch.operating import again

        return again.resubmit(chosen, options)
    from launch.operating import act

    return {"cancel": act.cancel, "requeue": act.requeue, "throttle": act.throttle}[options.verb](
        chosen, options
    )
