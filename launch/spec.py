"""The experiment spec: one YAML, all its sections, and what only sections together can know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.spec import DataSpec
from launch.redact import PLANTED, planted
from moe.spec import ModelSpec, MoESpec, TrainSpec
from moe.stages import STAGES

Complaint = tuple[str, str, str]
NAME = re.compile(
    r"\w[\w.+-]*(/\w[\w.+-]*)*"
)  # of an experiment: a folder, a part of a job's name, a word in squeue


class Duration(int):
    """Seconds, written with a unit: 90s, 10m, 24h, 2d, or SLURM's [D-]HH:MM:SS."""

    UNITS: ClassVar = {"s": 1, "m": 60, "h": 3600, "d": 86400}

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read a duration; ValueError says what is wrong."""
        if match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([smhd])", text):
            return cls(round(float(match[1]) * cls.UNITS[match[2]]))
        if match := re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9}):(\d\d):(\d\d)", text):
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            return cls(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        raise ValueError(f"expected a duration such as 10m, 24h or 1-00:00:00, got {text!r}")

    def __str__(self) -> str:
        for unit in "dhm":
            if self and self % self.UNITS[unit] == 0:
                return f"{int(self) // self.UNITS[unit]}{unit}"
        return f"{int(self)}s"


DAY, HALF_HOUR = Duration(24 * 3600), Duration(1800)
TEN_MINUTES, FIVE_MINUTES = Duration(600), Duration(300)


@dataclass(frozen=True)
class ClusterSpec:
    """One cluster, or one partition of it; `experiments/clusters/NAME.yaml`."""

    name: str = ""  # the preset's file name; set by the reader
    executor: Literal["slurm", "local"] = "slurm"
    device: Literal["cuda", "cpu"] = "cuda"
    gpus_per_node: int = 8  # ranks a node; on device: cpu a rank is a process without a GPU
    gpu_type: str = ""  # as in --gres=gpu:TYPE:N
    gres: bool = True  # ask for GPUs; off where the cluster has none to count
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    cpus_per_gpu: int = 8
    mem_gb_per_gpu: float = 0.0  # 0: the partition's default
    walltime: Duration = DAY
    grace: Duration = TEN_MINUTES  # warning before the walltime; a run whose saves take longer leaves earlier
    hang_after: Duration = FIVE_MINUTES  # a step silent so long, and 10 x the slowest, is a hang; 0s: never
    load_within: Duration = HALF_HOUR  # as long may loading, a save or an evaluation be silent; 0s: for ever
    spare: bool = (
        False  # a second job waits to go on, where jobs are neither requeued nor given time to do so
    )
    lifeline: Duration = (
        HALF_HOUR  # after so long without a run that runs, a job of one CPU frees held ones; 0s: none
    )
    array_parallelism: int = 0  # elements of an array that run at a time; 0: all
    setup: tuple[str, ...] = ()  # shell lines before the ranks start
    python: str = ""  # the interpreter on the nodes; empty: the one that submits
    env: Mapping[str, str] = field(default_factory=dict)  # exported to the ranks
    sbatch: Mapping[str, str] = field(default_factory=dict)  # further sbatch options, by their long names

    def check(self) -> Iterator[Complaint]:
        if self.gpus_per_node < 1:
            yield "gpus_per_node", f"{self.gpus_per_node}: a node needs at least one rank", ""
        if self.walltime < 60 and self.executor == "slurm":
            yield "walltime", f"{self.walltime} is under a minute, SLURM's least", ""
        if self.grace * 2 > self.walltime:
            yield "grace", f"grace ({self.grace}) is more than half of walltime ({self.walltime})", ""
        if 0 < self.hang_after < 60 and self.executor == "slurm":
            yield (
                "hang_after",
                f"{self.hang_after} is under a minute: SLURM takes as long to end the ranks that outlive a lost one",
                "say 5m, or 0s for no watch",
            )
        if 0 < self.lifeline < 60 and self.executor == "slurm":
            yield (
                "lifeline",
                f"{self.lifeline} is under a minute, as long as SLURM takes to start it",
                "say 30m, or 0s",
            )
        if self.cpus_per_gpu < 1:
            yield "cpus_per_gpu", f"{self.cpus_per_gpu}: a rank needs at least one CPU", ""
        if self.mem_gb_per_gpu < 0:
            yield "mem_gb_per_gpu", f"{self.mem_gb_per_gpu} is below 0", "say 0 for the partition's default"
        if self.array_parallelism < 0:
            yield "array_parallelism", f"{self.array_parallelism} is below 0", "say 0 for no limit"
        for key in ("partition", "account", "qos", "constraint", "exclude", "gpu_type"):
            if re.search(r"[\s'\"\\;$`]", getattr(self, key)):
                yield key, f"{getattr(self, key)!r} has characters that no SLURM name has", ""
        for line in self.setup:
            if "\n" in line:
                yield "setup", "a setup line has a line break in it", "write one list item a line"


@dataclass(frozen=True)
class WandbSpec:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with an account
    entity: str = ""
    project: str = "moe-vlm"
    tags: tuple[str, ...] = ()
    system: Literal["rank0", "node"] = "rank0"  # whose load is recorded: the node of rank 0, or every node


@dataclass(frozen=True)
class ExperimentSpec:
    """One experiment: one stage, trained at each point of its sweep."""

    stage: Literal["align", "instruct", "moe"]
    name: str = ""  # the experiment's name; empty: its file's
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    gpus: int = 8  # ranks of one run, over all its nodes
    init_from: str = ""  # the experiment, or experiment/run, that this one starts from; or wandb:..., hub:...
    runs: str = "runs"  # the folder of run folders, on the shared file system
    seed: int = 0
    model: ModelSpec = field(default_factory=ModelSpec)
    moe: MoESpec = field(default_factory=MoESpec)
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    wandb: WandbSpec = field(default_factory=WandbSpec)

    @property
    def nodes(self) -> int:
        """Nodes of one run."""
        return -(-self.gpus // self.cluster.gpus_per_node)

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node of one run."""
        return min(self.gpus, self.cluster.gpus_per_node)

    @property
    def micro_batch(self) -> int:
        """Samples of one rank in a forward pass: the most that divide its share, up to train.micro_batch."""
        share = self.train.global_batch // self.gpus
        most = min(self.train.micro_batch, share)
        return next(size for size in range(most, 0, -1) if share % size == 0)

    @property
    def accumulation(self) -> int:
        """Forward passes of one rank in an optimizer step."""
        return self.train.global_batch // (self.micro_batch * self.gpus)

    def check(self) -> Iterator[Complaint]:
        """Faults that only the sections together show; `field` is a path from the top."""
        for path in dict.fromkeys(planted(self)):
            yield (
                path,
                f"{path} {PLANTED}: it would stand in job scripts and run folders for others to read",
                "keep it in a file that you alone can read, and let cluster.setup source that",
            )
        if self.name and not NAME.fullmatch(self.name):
            yield "name", f"{self.name!r} cannot name a folder of runs", "use letters, digits and _ . + -"
        if not 0 <= self.seed < 2**32:
            yield "seed", f"{self.seed}: NumPy takes seeds from 0 to 4294967295", ""
        if not self.runs:
            yield "runs", "names no folder", "leave it out for runs/ of this repository"
        per_node = self.cluster.gpus_per_node
        if self.gpus < 1:
            yield "gpus", f"{self.gpus}: a run needs at least one rank", ""
            return
        below = self.gpus // per_node * per_node
        if self.gpus > per_node and self.gpus % per_node:
            yield (
                "gpus",
                f"gpus ({self.gpus}) does not fill nodes of {per_node} ({self.cluster.name})",
                f"say {below} or {below + per_node}",
            )
        if self.cluster.executor == "local" and self.gpus > per_node:
            yield (
                "gpus",
                f"gpus ({self.gpus}) is more than the {per_node} ranks of this one machine",
                "raise cluster.gpus_per_node, or choose a SLURM cluster",
            )
        if over := self.train.global_batch % self.gpus:
            whole = self.train.global_batch - over
            yield (
                "train.global_batch",
                f"train.global_batch ({self.train.global_batch}) is no multiple of gpus ({self.gpus})",
                f"say {f'{whole} or ' * bool(whole)}{whole + self.gpus}",
            )
        stage = STAGES[self.stage]
        if self.model.attention == "flash" and self.train.precision != "bf16":
            yield (
                "model.attention",
                f"flash attention takes bf16, and train.precision is {self.train.precision}",
                "say model.attention=auto, or train.precision=bf16",
            )
        if stage.sparse:
            if self.model.attention == "flash" and self.moe.rules == "moe_llava":
                yield (  # moe.vlm says why
                    "model.attention",
                    "flash attention makes zeros of padding, which moe.rules=moe_llava routes to experts",
                    "say model.attention=auto, or moe.rules=default",
                )
            if self.gpus % self.moe.expert_parallel:
                yield (
                    "moe.expert_parallel",
                    f"expert_parallel ({self.moe.expert_parallel}) must divide gpus ({self.gpus})",
                    f"it may be {', '.join(map(str, self.moe.expert_parallel_choices(self.gpus)))}",
                )
            if self.train.zero == 3 and self.moe.expert_parallel > 1:
                yield (
                    "train.zero",
                    "DeepSpeed's ZeRO-3 has no expert parallelism",
                    "say zero: 2, or expert_parallel: 1",
                )
        if stage.after and not self.init_from:
            yield (
                "init_from",
                f"stage {self.stage} starts from the handoff of stage {stage.after}",
                "name its experiment",
            )
        if not stage.after and self.init_from:
            yield (
                "init_from",
                f"stage {self.stage} starts from the backbone's own weights",
                "leave init_from out",
            )
        if self.train.lora.rank and not stage.adapts:
            yield (
                "train.lora.rank",
                f"stage {self.stage} trains {', '.join(stage.trains)} alone: there is nothing to adapt",
                "leave train.lora to the stages after it",
            )
        if stage.template and self.data.template != stage.template:
            yield "data.template", f"stage {self.stage} is trained with the template {stage.template}", ""
        if self.train.offload and self.train.zero == 0:
            yield "train.offload", "the optimizer is offloaded by ZeRO 1 to 3; zero is 0", ""
