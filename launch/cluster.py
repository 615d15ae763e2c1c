"""All SLURM knowledge: a stage as an sbatch script, and what the queue says.

The script is submitit's; what follows srun is ours. submitit answers a warning by requeueing from rank 0 at the
instant it comes, which loses the steps since the last save and strands the other ranks, and its pickles are renamed
after sbatch returns, which a kill turns into an array of dead jobs. So the ranks run `launch.job`, which reads a plan
written before sbatch, and the script's last act is `launch.verdict`, which alone decides whether the run comes back.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from launch.spec import ClusterSpec, ExperimentSpec

# What sbatch may hand on from the submitting shell. Anything else (an outer job's SLURM_*, SBATCH_* that would beat the
# script's lines, keys and tokens) stays where it is.
KEPT = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TERM", "TMPDIR", "DATA_ROOT"),
    *("LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "VIRTUAL_ENV", "MODULEPATH", "MODULESHOME", "LOADEDMODULES"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"),
    *("WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_CONFIG_DIR", "NETRC", "SLURM_CONF"),
}
KEPT_PREFIXES = ("CONDA_", "CUDA_", "NCCL_", "GLOO_", "HF_", "TORCH_", "OMP_", "MKL_", "UCX_", "FI_", "TRITON_")
NOT_KEPT = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|VISIBLE_DEVICES", re.IGNORECASE)

# States of SLURM's job_state_codes in which an element still has work before it (squeue(1), JOB STATE CODES).
ACTIVE = {
    *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
    *("RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "PREEMPTED"),
}


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


class ArrayExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's SLURM executor, whose ranks run `launch.job` rather than a pickle."""

    def __init__(self, folder: Path, cluster: ClusterSpec, batch: Path) -> None:
        super().__init__(folder=folder, python=shlex.quote(cluster.python or sys.executable))
        self.batch = batch

    @classmethod
    def affinity(cls) -> int:
        return 2  # scripts are rendered where there is no srun, too

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m launch.job {shlex.quote(str(self.batch))}"

    def text(self) -> str:
        """The sbatch script."""
        return str(self._make_submission_file_text(self._submitit_command_str, uid="")) + "\n"


def script(spec: ExperimentSpec, name: str, indices: Sequence[int], batch: Path, code: Path, token: str) -> str:
    """The sbatch script of one array: `indices` are the elements, `batch` holds the plan that they read."""
    cluster = spec.cluster
    executor = ArrayExecutor(batch / "slurm", cluster, batch)
    python = shlex.quote(cluster.python or sys.executable)
    at_exit = f"rc=$?; trap - EXIT; {python} -m launch.verdict {shlex.quote(str(batch))} $rc; exit $?"
    more: dict[str, object] = {
        "array": ",".join(_ranges(indices)) + (f"%{n}" if (n := cluster.array_parallelism) else ""),
        "comment": token,
        "chdir": str(code),
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        **cluster.sbatch,
    }
    for key in ("partition", "account", "qos", "constraint", "exclude"):
        if value := getattr(cluster, key):
            more[key] = value
    if cluster.device == "cuda" and cluster.gres:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        more["gres"] = f"gpu:{kind}{spec.ranks_per_node}"
    if cluster.mem_gb_per_gpu:
        more["mem"] = f"{int(cluster.mem_gb_per_gpu * spec.ranks_per_node * 1024)}MB"
    executor.update_parameters(
        job_name=name,
        time=-(-int(cluster.walltime) // 60),
        nodes=spec.nodes,
        ntasks_per_node=spec.ranks_per_node,
        cpus_per_task=cluster.cpus_per_gpu,
        signal_delay_s=int(cluster.grace),
        stderr_to_stdout=True,
        wckey=None,  # submitit's own default is a key that a site with accounting by keys refuses
        setup=[
            "trap : TERM  # preemption signals this shell too, and the verdict below must still be spoken",
            f"trap {shlex.quote(at_exit)} EXIT",
            "set -e",
            f"cd {shlex.quote(str(code))}",
            *(f"export {key}={shlex.quote(value)}" for key, value in sorted(cluster.env.items())),
            *cluster.setup,
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun no longer takes it over by itself",
        ],
        srun_args=["--kill-on-bad-exit=1", "--wait=120", "--mpi=none", "--cpu-bind=none"],
        additional_parameters=more,
    )
    # The array line above replaces submitit's own, which would always count from 0; map_count names the logs after it.
    executor.parameters["map_count"] = len(indices)
    return executor.text()


def _ranges(indices: Sequence[int]) -> list[str]:
    """0,1,2,5 as 0-2, 5."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return [str(a) if a == b else f"{a}-{b}" for a, b in found]


def environment(shell: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a job takes over from the submitting shell: by name, and no secrets."""
    return {
        key: value
        for key, value in shell.items()
        if (key in KEPT or key.startswith(KEPT_PREFIXES)) and not NOT_KEPT.search(key)
    }


def call(*command: str, timeout: float = 60) -> str:
    """Run one SLURM command and return what it prints; raises SlurmError with its own words."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "SQUEUE_", "SCONTROL_"))}
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
    """This user's array elements in the queue, by their A_a ids; raises SlurmError."""
    user = pwd.getpwuid(os.getuid()).pw_name
    found = {}
    for line in call("squeue", "-h", "-r", "-u", user, "-o", "%i|%T|%r|%N|%k").splitlines():
        id, state, reason, nodes, comment = (*line.split("|", 4), "", "", "", "")[:5]
        found[id] = Job(id, state, reason, nodes, comment)
    return found


def show(job: str) -> dict[str, str]:
    """`scontrol show job` as a mapping; raises SlurmError."""
    text = call("scontrol", "-o", "show", "job", job, timeout=20)
    return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)


def element_id(env: Mapping[str, str] = os.environ) -> str:
    """This job's own id in the form that names one element only.

    The last element's SLURM_JOB_ID equals the array's, and a requeue by that number restarts all of them.
    """
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")
