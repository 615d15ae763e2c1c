"""What SLURM is asked and told: its commands, this user's queue, and what a job takes from the shell."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What sbatch may hand on from the submitting shell. Anything else (an outer job's SLURM_*, SBATCH_* that beat
# the script's lines, keys and tokens) stays where it is.
KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TERM", "TMPDIR", "DATA_ROOT"),
    *(
        "LD_LIBRARY_PATH",
        "LIBRARY_PATH",
        "CPATH",
        "VIRTUAL_ENV",
        "MODULEPATH",
        "MODULESHOME",
        "LOADEDMODULES",
    ),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"),
    *("WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_CONFIG_DIR", "NETRC", "SLURM_CONF"),
}
KEPT_PREFIXES = (
    "CONDA_",
    "CUDA_",
    "NCCL_",
    "GLOO_",
    "HF_",
    "TORCH_",
    "OMP_",
    "MKL_",
    "UCX_",
    "FI_",
    "TRITON_",
)
NOT_KEPT = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|VISIBLE_DEVICES", re.IGNORECASE)

# States of SLURM's job_state_codes in which an element still has work before it (squeue(1), JOB STATE CODES).
ACTIVE = {
    *(
        "PENDING",
        "RUNNING",
        "CONFIGURING",
        "COMPLETING",
        "SUSPENDED",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
    ),
    *("RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED"),
}


# What a command says where slurmctld did not answer, rather than refuse.
UNSURE = re.compile(
    r"timed out|no answer|unable to contact|zero bytes|connection (refused|reset)", re.IGNORECASE
)


class SlurmError(Exception):
    """SLURM refused or did not answer; the text is what it said."""


@dataclass(frozen=True)
class Job:
    """One array element, as squeue shows it."""

    id: str  # A_a
    state: str
    reason: str
    nodes: str
    comment: str  # the submission's token
    start: float = 0.0  # when it started, or is expected to; seconds since 1970, 0 where SLURM does not say


def environment(shell: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a job takes over from the submitting shell: by name, and no secrets."""
    return {
        key: value
        for key, value in shell.items()
        if (key in KEPT or key.startswith(KEPT_PREFIXES)) and not NOT_KEPT.search(key)
    }


def call(*command: str, timeout: float = 60, env: Mapping[str, str] = os.environ) -> str:
    """Run one SLURM command and return what it prints; raises SlurmError with its own words.

    Times are printed in seconds since 1970, whatever format the site or the shell prefers; what is in a hidden
    partition is shown as well: squeue keeps even one's own jobs there to itself.
    """
    env = {
        key: value
        for key, value in env.items()
        if not key.startswith(("SBATCH_", "SQUEUE_", "SCONTROL_", "SACCT_", "SINFO_"))
    }
    env |= {"SLURM_TIME_FORMAT": "%s", "SQUEUE_ALL": "1", "SINFO_ALL": "1", "SCONTROL_ALL": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found; is this a SLURM login node?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {timeout:.0f} s") from None
    if done.returncode:
        raise SlurmError(done.stderr.strip() or f"{command[0]}: exit code {done.returncode}")
    return done.stdout


def jobs() -> dict[str, Job]:
    """This user's array elements by A_a, also those whose end SLURM still remembers; raises SlurmError."""
    user = pwd.getpwuid(os.getuid()).pw_name
    found = {}
    for line in call("squeue", "-h", "-r", "-t", "all", "-u", user, "-o", "%i|%T|%r|%N|%k|%S").splitlines():
        id, state, reason, nodes, comment, start = (*line.split("|"), "", "", "", "", "")[:6]
        found[id] = Job(id, state, reason, nodes, comment, float(start) if start.isdigit() else 0.0)
    return found


def array_of(token: str, queue: Mapping[str, Job]) -> str:
    """The array whose comment is a batch's token, by which it is known where sbatch's answer was lost; or empty."""
    return next((job.id.partition("_")[0] for job in queue.values() if token and job.comment == token), "")


def show(job: str) -> dict[str, str]:
    """`scontrol show job` as a mapping; raises SlurmError."""
    return fields(call("scontrol", "-o", "show", "job", job, timeout=20))


def fields(line: str) -> dict[str, str]:
    """The `Key=value` pairs of one of scontrol's lines. Values may hold spaces: a key starts a new pair."""
    parts = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", line.strip())[1:]
    return dict(zip(parts[::2], (value.strip() for value in parts[1::2]), strict=True))


@dataclass(frozen=True)
class Past:
    """One execution of an array element, as accounting has it; times in seconds since 1970, 0 for not yet."""

    id: str  # A_a
    state: str  # without "by UID"
    by: str  # the UID that cancelled it
    exit_code: str  # "1:0": exit status, signal
    submitted: float
    started: float
    ended: float
    nodes: str


def past(elements: Sequence[str]) -> dict[str, list[Past]]:
    """Every execution of the elements, oldest first, with one call; nothing where there is no accounting."""
    if not elements:
        return {}
    wanted = "JobID,State,ExitCode,Submit,Start,End,NodeList"
    many = len(elements) > 100  # then whole arrays are shorter to name
    ids = ",".join(dict.fromkeys(e.partition("_")[0] if many else e for e in elements))
    try:
        text = call("sacct", "-n", "-P", "-X", "-D", "-S", "1970-01-02", "-j", ids, "-o", wanted, timeout=30)
    except SlurmError:
        return {}
    found: dict[str, list[Past]] = {}
    for line in text.splitlines():
        if len(parts := line.split("|")) == 7:
            state, _, by = parts[1].partition(" by ")
            times = [float(part) if part.isdigit() else 0.0 for part in parts[3:6]]
            row = Past(parts[0], state, by, parts[2], times[0], times[1], times[2], parts[6])
            found.setdefault(row.id, []).append(row)
    return {id: sorted(rows, key=lambda row: row.started or 1e12) for id, rows in found.items()}


def element_id(env: Mapping[str, str] = os.environ) -> str:
    """This job's own id in the form that names one element only.

    The last element's SLURM_JOB_ID equals the array's, and a requeue by that number restarts all of them.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")
