"""A stage as an sbatch script.

The script is submitit's; what follows srun is ours. submitit answers a warning by requeueing from rank 0 at
the instant it comes, which loses the steps since the last save and strands the other ranks, and its pickles
are renamed after sbatch returns, which a kill turns into an array of dead jobs. So the ranks run
`launch.job`, which reads a plan written before sbatch, and the script's last act is `launch.verdict`, which
alone decides whether the run comes back. It stands apart from launch.cluster because importing submitit takes
half a second, which no look at the runs should wait for.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import submitit

from launch.spec import ClusterSpec, ExperimentSpec
from launch.verdict import SPOKEN


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


def script(
    spec: ExperimentSpec, name: str, indices: Sequence[int], batch: Path, code: Path, token: str
) -> str:
    """The sbatch script of one array: `indices` are the elements, `batch` holds the plan that they read."""
    cluster = spec.cluster
    executor = ArrayExecutor(batch / "slurm", cluster, batch)
    python = shlex.quote(cluster.python or sys.executable)
    # SLURM signals what this shell starts as well, a Python that is still importing included.
    verdict = f"(trap '' TERM USR2; exec {python} -m launch.verdict {shlex.quote(str(batch))} $rc)"
    # Where it is killed, for want of memory, say, or cannot start for a file server that is away, it is tried again.
    tries = f"for n in 5 30 0; do {verdict} && exit 0; [ $? != {SPOKEN} ] || exit 1; sleep $n || :; done"
    at_exit = f"rc=$?; trap - EXIT; kill $watch 2>/dev/null || :; {tries}; exit 1"
    attempt = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID-${SLURM_RESTART_COUNT:-0}"
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
            f'echo "attempt {attempt}"',
            "trap : TERM  # preemption signals this shell too, and the verdict below must still be spoken",
            f"trap {shlex.quote(at_exit)} EXIT",
            "set -e",
            f"cd {shlex.quote(str(code))}",
            *(f"export {key}={shlex.quote(value)}" for key, value in sorted(cluster.env.items())),
            *cluster.setup,
            f"{python} -m launch.recovery.watch {shlex.quote(str(batch))} & watch=$!",
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun no longer takes it over by itself",
        ],
        srun_args=["--kill-on-bad-exit=1", "--wait=120", "--mpi=none", "--cpu-bind=none"],
        additional_parameters=more,
    )
    # The array line above replaces submitit's own, which would always count from 0; map_count names the logs
    # after it.
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
