"""The groups ranks are split into, and the words said when they cannot be."""

import os

import pytest
import torch
import torch.distributed as dist

from moe.parallel import RENDEZVOUS, Groups, ParallelError, device, start
from tests.ranks import ranks


def members(expert_parallel):
    groups = Groups.create(expert_parallel)
    seen = {}
    for name in ("expert_group", "expert_data_group", "data_group", "control"):
        group = getattr(groups, name)
        seen[name] = None if group is None else dist.get_process_group_ranks(group)
        if group is not None:
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert total.item() == len(seen[name])
    seen["place"] = (groups.rank, groups.world, groups.expert_rank, groups.local_experts(8))
    seen["agreed"] = groups.agree(groups.rank == 3, False)
    seen["maximum"] = groups.maximum(groups.rank, -groups.rank)
    seen["total"] = groups.total(groups.rank, 0.5)
    groups.barrier()
    return seen


def test_neighbours_share_experts_and_strides_hold_the_same():
    seen = ranks(4)(members, 2)
    assert [s["expert_group"] for s in seen] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [s["expert_data_group"] for s in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(s["data_group"] == s["control"] == [0, 1, 2, 3] for s in seen)
    assert [s["place"] for s in seen] == [(r, 4, r % 2, slice(r % 2 * 4, r % 2 * 4 + 4)) for r in range(4)]
    assert all(s["agreed"] == [True, False] and s["maximum"] == [3, 0] for s in seen)
    assert all(s["total"] == [6.0, 2.0] for s in seen)


def test_one_set_of_experts_a_rank_needs_no_expert_group():
    for s in ranks(2)(members, 1):
        assert s["expert_group"] is None
        assert s["expert_data_group"] == [0, 1]
        assert s["place"][3] == slice(0, 8)


def test_a_world_that_cannot_be_split_is_refused_in_words():
    with pytest.raises(
        AssertionError, match=r"expert_parallel is 3, but there are 4 ranks.*one of 1, 2, 4\."
    ):
        ranks(4)(members, 3)


def half_a_launcher():
    del os.environ["MASTER_PORT"]
    with pytest.raises(ParallelError, match="but not MASTER_PORT") as said:
        start()
    return str(said.value)


def test_half_a_launcher_is_told_what_is_missing():
    assert "SLURM_PROCID" in ranks(1)(half_a_launcher)[0]


def alone():
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
    groups = Groups.create(1)
    assert dist.get_world_size() == 1
    assert groups.agree(True, False) == [True, False]
    assert groups.total(2) == [2.0]
    groups.barrier()
    return groups == Groups.single()


def test_without_a_launcher_it_is_a_world_of_one():
    assert ranks(1)(alone) == [True]


def test_the_cpu_stands_in_where_there_is_no_gpu():
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def raises_on_one():
    groups = Groups.create(1)
    if groups.rank == 1:
        raise ValueError("rank one is unwell")
    groups.barrier()


def test_ranks_shows_the_failing_rank_and_does_not_wait_for_the_rest():
    with pytest.raises(AssertionError, match=r"rank 1 of 2(?s:.)*rank one is unwell"):
        ranks(2)(raises_on_one)


def waits_forever():
    if int(os.environ["RANK"]) == 1:
        import time

        time.sleep(60)


def test_ranks_ends_a_rank_that_hangs():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 were still running|ranks \[1\] of 2"):
        ranks(2, timeout=1.5)(waits_forever)
