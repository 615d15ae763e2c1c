"""The ranks meet on a port that nobody chose beforehand, at the name that rank 0 gives of itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.files import read_json, write_json
from launch.job import Place
from launch.rendezvous import RendezvousError, meet
from tests.ranks import ranks


def both_meet(folder: Path) -> float:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    meet(Place(rank, rank, 2, "localhost", "a"), folder, device="cpu", seconds=60)
    found = torch.tensor([rank + 1.0])
    dist.all_reduce(found)
    return float(found)


def test_each_attempt_meets_on_a_port_of_its_own(tmp_path: Path) -> None:
    ports = set()
    for attempt in ("7_0-0", "7_0-1"):
        assert ranks(2)(both_meet, tmp_path / attempt) == [3.0, 3.0]
        told = read_json(tmp_path / attempt / "rendezvous.json") or {}
        assert told["host"] == "127.0.0.1"
        ports.add(told["port"])
    assert len(ports) == 2


def test_a_rank_that_waits_in_vain_says_for_whom(tmp_path: Path) -> None:
    place = Place(1, 1, 2, "n2", "a")
    with pytest.raises(RendezvousError, match=r"rank 0 wrote no .*/rendezvous\.json within 0 s"):
        meet(place, tmp_path, device="cpu", seconds=0.2)
    write_json(tmp_path / "rendezvous.json", {"host": "127.0.0.1", "port": 1})
    with pytest.raises(Exception, match=r"(?i)connect|timed out|timeout"):
        meet(place, tmp_path, device="cpu", seconds=1)
