"""What `scontrol -o show job` says, as Job records: one an array element, also where SLURM folds them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """One job or array element as slurmctld knows it now."""

    id: str  # A_a for an array element, else the plain number
    raw: str  # SLURM_JOB_ID; not to requeue an array element by: the last one's is the whole array's
    name: str
    state: str
    reason: str
    restarts: int
    partition: str
    exit_code: str  # "0:15": exit status, signal
    nodes: tuple[str, ...] = ()
    fields: dict[str, str] = field(default_factory=dict, repr=False)  # everything, by scontrol's names

    @property
    def over(self) -> bool:
        going = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"}
        return self.state not in going


def numbers(text: str) -> list[int]:
    """The numbers in an index list as SLURM writes it: `0-2,7%4`, `0-8:2`."""
    found: list[int] = []
    for part in text.split("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def names(hosts: str) -> tuple[str, ...]:
    """The node names in a host list of this fixture's own names: `n3`, `n[1-2,4]`; nothing for `(null)`."""
    if match := re.fullmatch(r"n\[([\d,-]+)\]", hosts):
        return tuple(f"n{i}" for i in numbers(match[1]))
    return (hosts,) if re.fullmatch(r"n\d+", hosts) else ()


def parse(text: str) -> list[Job]:
    """The jobs in the output of `scontrol -o show job`, oldest first."""
    found: list[Job] = []
    for line in text.splitlines():
        # A value may hold spaces (a name, a command), so a field starts where a capitalised key does.
        pairs = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", line)[1:]
        fields = dict(zip(pairs[::2], (value.strip() for value in pairs[1::2]), strict=True))
        if "JobId" not in fields:
            continue
        ids = [fields["JobId"]]
        if "ArrayTaskId" in fields:
            ids = [f"{fields['ArrayJobId']}_{i}" for i in numbers(fields["ArrayTaskId"])]
        found += [
            Job(
                id=name,
                raw=fields["JobId"],
                name=fields["JobName"],
                state=fields["JobState"],
                reason=fields["Reason"],
                restarts=int(fields["Restarts"]),
                partition=fields["Partition"],
                exit_code=fields["ExitCode"],
                nodes=names(fields.get("NodeList", "")),
                fields=fields,
            )
            for name in ids
        ]
    return sorted(found, key=lambda job: [int(part) for part in job.id.split("_")])
