"""Arguments to a plan, and the plan shown, explained or submitted; exit code 2 for a spec with faults."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import snapshot, submission
from launch.arguments import Parser, positive
from launch.cluster import SlurmError, jobs
from launch.conflicts import clashes, unfit, without_data, without_python
from launch.exits import FAILED, INTERRUPTED, NO_SLURM, OK, REFUSED, USAGE
from launch.operating.status import State
from launch.plan import EXPERIMENTS, Plan, Run, StagePlan, make, runs_folder
from launch.reader import SpecError, is_file, shown
from moe.stages import STAGES

EXAMPLES = """\
examples:
  python launch/submit.py experiments/stage3_moe.yaml --dry-run
  python launch/submit.py experiments/stage3_moe.yaml cluster=a100 train.optim.lr=1e-5
  python launch/submit.py experiments/stage3_moe.yaml 'sweep={moe.top_k: [1, 2]}'
  python launch/submit.py experiments/stage3_moe.yaml stage2_instruct:train.steps=500 --from instruct

exit codes: 0 fine, 1 a run failed or the disk is full, 2 the command or the specification is wrong,
  3 SLURM refuses or does not answer, 4 over --max-gpu-hours, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The command line of launch/submit.py."""
    one = Parser(
        prog="python launch/submit.py",
        usage="python launch/submit.py SPEC [key=value ...] [options]",
        description="Submit an experiment and the stages it still needs. Repeating the command never harms.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Without a default, argparse would tell a bare command that key=value is missing too.
    one.add_argument("spec", type=Path, nargs="?", metavar="SPEC", help="an experiment's YAML")
    one.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings for it; EXPERIMENT:key=value for one that it starts from",
    )
    one.add_argument(
        "--dry-run", action="store_true", help="print the plan and the exact sbatch scripts, submit nothing"
    )
    one.add_argument("--explain", action="store_true", help="print each setting and the line that set it")
    one.add_argument(
        "--max-gpu-hours",
        type=positive,
        default=0.0,
        metavar="H",
        help="refuse a plan that may use more GPU-hours",
    )
    one.add_argument("-y", "--yes", action="store_true", help="submit it though it is over --max-gpu-hours")
    stages = f"a stage ({', '.join(STAGES)}) or an experiment of the chain"
    one.add_argument("--only", default="", metavar="STAGE", help=f"this stage alone: {stages}")
    one.add_argument(
        "--from", default="", dest="first", metavar="STAGE", help="start the chain at this stage"
    )
    one.add_argument("--until", default="", dest="last", metavar="STAGE", help="end the chain at this stage")
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here, and submits nothing twice", file=sys.stderr)
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.only and (options.first or options.last):
        return _complain("--only says both --from and --until; give it alone")
    if options.spec is None:
        return _complain("name an experiment", _near(EXPERIMENTS / "-"))
    if not is_file(options.spec):
        words = "is a folder" if os.path.isdir(options.spec) else "no such experiment"
        return _complain(f"{shown(options.spec)}: {words}", _near(options.spec))
    try:
        first, last = options.only or options.first, options.only or options.last
        plan = make(options.spec, options.overrides, first=first, last=last)
        if options.explain:
            explain(plan)
            return OK
        faults = tuple(clashes(plan)) or tuple(unfit(plan))
        lacking, notes = without_data(plan)
        lacking += dict.fromkeys(without_python(plan))
        if faults or (lacking and not options.dry_run):
            raise SpecError((*faults, *lacking))
        for fault in (*lacking, *notes):
            print(f"note: {fault.message}; {fault.hint}", file=sys.stderr)
    except SpecError as error:
        print(error, file=sys.stderr)
        print(f"{len(error.faults)} fault(s); nothing was submitted", file=sys.stderr)
        return USAGE
    if options.dry_run:
        return dry_run(plan, 0.0 if options.yes else options.max_gpu_hours)
    if plan.stages[-1].spec.cluster.executor == "local":
        return run_here(plan)
    return submit(plan, 0.0 if options.yes else options.max_gpu_hours)


def submit(plan: Plan, limit: float = 0.0) -> int:
    """Send what is missing to SLURM, unless that may use more GPU-hours than the limit; 0 is none."""
    root = runs_folder(plan.stages[-1].spec)
    try:
        states = submission.look(plan, jobs).states
        if blocked := _blocked(plan, states):
            return _complain(*blocked)
        print(table(plan, states))
        if _over(plan, states, limit):
            return REFUSED
        code = snapshot.take(root)
        sent = 0
        for batch, job in submission.submit(plan, code):
            after = f" after {batch.dependency}" if batch.dependency else ""
            print(
                f"submitted {batch.stage.experiment.name}: job {job}, {len(batch.runs)} run(s){after}",
                flush=True,
            )
            sent += 1
    except SlurmError as error:
        print(f"error: SLURM: {error}", file=sys.stderr)
        print(f"  hint: {_way_out(str(error), plan)}", file=sys.stderr)
        return NO_SLURM
    except OSError as error:
        return _disk(error)
    if not sent:
        print("nothing to do: every run is done or on its way")
    print(f"follow: python launch/runs.py --runs {shlex.quote(str(root))} status --watch")
    return OK


def run_here(plan: Plan) -> int:
    """Run what is missing on this machine, then show what came of it."""
    from launch import local

    states = submission.look(plan, None).states
    if blocked := _blocked(plan, states):
        return _complain(*blocked)
    print(table(plan, states))
    if all(states[run.name].name == "done" for stage in plan.stages for run in stage.runs):
        print("nothing to do: every run is done")
    try:
        local.run(plan, snapshot.take(runs_folder(plan.stages[-1].spec)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved step", file=sys.stderr)
        return INTERRUPTED
    except local.LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        return _disk(error)
    from launch import report

    report.show(plan)
    return OK


def dry_run(plan: Plan, limit: float = 0.0) -> int:
    """Print the plan and every script that would be sent."""
    seen = submission.look(plan, None)
    print(table(plan, seen.states))
    if blocked := _blocked(plan, seen.states):
        print(f"note: {blocked[0]}; submitting this plan would be refused")
    code = runs_folder(plan.stages[-1].spec) / "code" / snapshot.digest()
    for batch in submission.preview(plan, seen, code):
        if batch.stage.spec.cluster.executor == "local":
            print(
                f"\n# {batch.stage.experiment.name}: {batch.stage.spec.gpus} rank(s) on this machine, no script"
            )
            continue
        print(f"\n# {batch.stage.experiment.name}: {' '.join(batch.command())}")
        print(batch.script(code), end="")
    print("\ndry run: nothing was submitted")
    return REFUSED if _over(plan, seen.states, limit) else OK


def explain(plan: Plan) -> None:
    """Print each value of the last experiment beside the line that set it."""
    experiment = plan.stages[-1].experiment
    rows = experiment.layers.explain(experiment.spec)
    for path, value, origin in rows:
        print(f"{f'{path}: {value}':60}  {origin}")


def table(plan: Plan, states: Mapping[str, State]) -> str:
    """The plan: a line a stage, a line a run where there are several."""
    lines = [
        f"{'stage':10}{'experiment':28}{'runs':>5}  {'shape':14}{'cluster':12}{'starts from':28}{'GPU-h max':>9}  state"
    ]
    for stage in plan.stages:
        spec = stage.spec
        shape = f"{spec.nodes} x {spec.ranks_per_node} {'GPUs' if spec.cluster.device == 'cuda' else 'ranks'}"
        start = spec.init_from or spec.model.backbone
        lines.append(
            f"{spec.stage:10}{stage.experiment.name:28}{len(stage.runs):>5}  {shape:14}{spec.cluster.name:12}"
            f"{start:28}{hours_text(gpu_hours(stage, states)):>9}  {_summary(stage, states)}"
        )
        if len(stage.runs) > 1:
            lines += [f"{'':10}  {run.point:26}{'':46}{'':28}{states[run.name].name}" for run in stage.runs]
    if total := sum(gpu_hours(stage, states) for stage in plan.stages):
        lines.append(
            f"at most {total:,.1f} GPU-hours: a walltime for each run; one that needs longer requeues itself"
        )
    return "\n".join(lines)


def gpu_hours(stage: StagePlan, states: Mapping[str, State]) -> float:
    """The most that the stage's runs can use before one of them has to requeue itself."""
    spec = stage.spec
    left = [run for run in stage.runs if states[run.name].name != "done"]
    return len(left) * spec.gpus * int(spec.cluster.walltime) / 3600 if spec.cluster.device == "cuda" else 0.0


def hours_text(hours: float) -> str:
    """1,536 or 0.5; a dash for none."""
    return "-" if not hours else f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"


def _summary(stage: StagePlan, states: Mapping[str, State]) -> str:
    names = [states[run.name].name for run in stage.runs]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _blocked(plan: Plan, states: Mapping[str, State]) -> tuple[str, str] | None:
    """Why the plan cannot start: a stage left out of it has neither finished nor will."""
    first = plan.stages[0]
    for run in first.runs:
        if isinstance(run.parent, Run) and states[run.parent.name].name not in (
            "done",
            "running",
            "queued",
            "waiting",
        ):
            state = states[run.parent.name].name
            return (
                f"{run.name} starts from {run.parent.name}, which is {state}",
                "leave out --only and --from",
            )
    return None


def _over(plan: Plan, states: Mapping[str, State], limit: float) -> bool:
    """Whether the plan may use more GPU-hours than the limit, 0 for none; says so."""
    hours = sum(gpu_hours(stage, states) for stage in plan.stages)
    if not limit or hours <= limit:
        return False
    print(f"error: the plan may use {hours:,.1f} GPU-hours, and the limit is {limit:,.1f}", file=sys.stderr)
    print("  nothing was submitted; -y submits it all the same", file=sys.stderr)
    return True


def _near(path: Path) -> str:
    """An experiment of a like name beside the path, or of this repository; or what there is."""
    for folder in dict.fromkeys((path if os.path.isdir(path) else path.parent, EXPERIMENTS)):
        files = [file for file in sorted(folder.glob("*.yaml")) if is_file(file) and file.stem != "base"]
        names = {name: file for file in files for name in (file.name, file.stem)}
        if close := difflib.get_close_matches(path.name, names, 1, 0.6):
            return f"did you mean {shown(names[close[0]])}?"
        if files:
            break
    return f"{shown(folder)}/ has {', '.join(file.name for file in files)}"


def _way_out(said: str, plan: Plan) -> str:
    """What to do about SLURM's answer."""
    name = plan.stages[-1].spec.cluster.name
    if re.search(r"not found|configuration source|fetch.config", said):
        return "submit from a login node of the cluster; cluster=local trains on this machine"
    wrong = r"account|partition|qos|reservation|constraint|gres|node configuration"
    if re.search(wrong, said, re.IGNORECASE) and "limit" not in said.casefold():
        where = f"experiments/clusters/{name}.yaml" if name else "the setting cluster"
        return f"mend {where} (`python launch/runs.py doctor` shows what there is), and repeat the command"
    return "what was submitted before stays; repeat the command to go on from there"


def _complain(message: str, hint: str = "") -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
    return USAGE


def _disk(error: OSError) -> int:
    if isinstance(error, submission.NoLockError):
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    where = error.filename2 or error.filename or "a file"  # of a copy, what is written
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    do = "make room" if full else "say runs=FOLDER with one that you may write to"
    print(f"error: {where} cannot be written: {error.strerror}", file=sys.stderr)
    print(f"  {do}, and repeat the command; nothing is left half done", file=sys.stderr)
    return FAILED
