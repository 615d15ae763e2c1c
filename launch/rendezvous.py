"""The ranks find each other: rank 0 takes any free port and says which in a file on the shared file system.

A port worked out from the job's id can be in use, is the same again at each restart, and may lie in the ephemeral
range. This one is bound before anyone is told.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from launch.files import read_json, write_json
from launch.job import Place


class RendezvousError(RuntimeError):
    """The ranks did not meet; the text says who was waited for."""

    verdict = "infrastructure"


def meet(place: Place, folder: Path, *, device: str, seconds: float = 600) -> None:
    """Make the process group of all ranks; raises RendezvousError."""
    if device == "cuda":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    file = folder / "rendezvous.json"
    waited = timedelta(seconds=seconds)
    if place.rank == 0:
        host = "127.0.0.1" if place.node == "localhost" else place.node
        store = TCPStore(host, 0, place.world, is_master=True, timeout=waited, wait_for_workers=False)
        write_json(file, {"host": host, "port": store.port})
    else:
        start = time.monotonic()
        while (facts := read_json(file)) is None:
            if time.monotonic() - start > seconds:
                raise RendezvousError(f"rank 0 wrote no {file} within {seconds:.0f} s")
            time.sleep(0.1)
            if place.rank % 16 == 0:
                os.scandir(folder).close()  # makes an NFS client look again
        store = TCPStore(facts["host"], facts["port"], place.world, is_master=False, timeout=waited)
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=waited)
    except dist.DistError as error:
        raise RendezvousError(f"{place.world} ranks did not meet within {seconds:.0f} s: {error}") from None
