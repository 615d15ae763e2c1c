"""What is saved comes back: bit for bit on the same layout, to rounding on another, and never from a bad
file.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import storage
from moe.checkpoint import Checkpoint, CheckpointError, Checkpoints, describe, load_weights
from moe.engine import Engine
from moe.parallel import Groups
from tests.moe import standin
from tests.ranks import alone, ranks


def engine_of(groups, zero=2, precision="fp32", seed=0, **changes):
    return Engine(
        standin.Model(groups, seed=seed),
        standin.spec(zero=zero, precision=precision, **changes),
        groups,
        total_steps=10,
    )


def state_of(engine):
    return {(f.name, f.kind): f.tensor.detach().float().cpu().numpy().copy() for f in engine.fragments()} | {
        (name, "weight"): p.detach().float().numpy().copy() for name, p in engine.vlm.named_parameters()
    }


def equal(one, two):
    assert one.keys() == two.keys()
    assert [key for key in one if not np.array_equal(one[key], two[key])] == []


# --- the same layout ---


def straight_and_resumed(expert_parallel, cases, folder):
    groups = Groups.create(expert_parallel)
    for zero, precision in cases:
        place = Path(folder) / f"{zero}{precision}{expert_parallel}"
        engine, loader = engine_of(groups, zero, precision), standin.Loader(groups)
        batches = loader.steps()
        for _ in range(3):
            engine.train_step(next(batches))
        torch.manual_seed(7 + groups.rank)
        Checkpoints(place, groups).save(3, engine, {"loader": loader.state_dict()})
        drawn = torch.rand(3), random.random(), np.random.rand()
        straight = [engine.train_step(next(batches)) for _ in range(3)]
        end = state_of(engine)

        # Another seed: nothing may be left of the fresh model.
        engine, loader = engine_of(groups, zero, precision, seed=99), standin.Loader(groups)
        checkpoints = Checkpoints(place, groups)
        checkpoint = checkpoints.latest()
        assert checkpoint is not None
        assert checkpoint.step == 3
        loader.load_state_dict(checkpoints.restore(checkpoint, engine)["loader"])
        assert engine.step == 3
        again = torch.rand(3), random.random(), np.random.rand()
        assert torch.equal(drawn[0], again[0])
        assert drawn[1:] == again[1:]
        batches = loader.steps()
        assert [engine.train_step(next(batches)) for _ in range(3)] == straight
        equal(end, state_of(engine))
    return True


CASES = [(0, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")]


def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(tmp_path):
    assert ranks(2)(straight_and_resumed, 2, CASES, tmp_path) == [True, True]


def test_so_it_does_under_zero_3(tmp_path):
    assert all(ranks(2)(straight_and_resumed, 1, [(3, "bf16")], tmp_path))


# --- another layout ---


def save_after_three(expert_parallel, zero, folder):
    groups = Groups.create(expert_parallel)
    engine, loader = engine_of(groups, zero), standin.Loader(groups)
    batches = loader.steps()
    for _ in range(3):
        engine.train_step(next(batches))
    Checkpoints(folder, groups).save(3, engine, {"loader": loader.state_dict()})
    return [engine.train_step(next(batches)) for _ in range(3)]


def go_on(expert_parallel, stages, folder):
    groups = Groups.create(expert_parallel)
    results = []
    for zero in stages:
        engine, loader = engine_of(groups, zero, seed=99), standin.Loader(groups)
        loader.load_state_dict(
            Checkpoints(folder, groups).restore(Checkpoint(folder / "step_00000003", 3), engine)["loader"]
        )
        batches = loader.steps()
        results.append([engine.train_step(next(batches)) for _ in range(3)])
    model = standin.Model(groups, seed=98)
    load_weights(folder / "step_00000003", model, groups)
    results.append({name: p.detach().numpy() for name, p in model.named_parameters()})
    return results


def test_four_ranks_state_goes_on_on_two_and_on_one(tmp_path):
    expected = ranks(4)(save_after_three, 4, 2, tmp_path)[0]
    results = {
        world: ranks(world)(go_on, world, stages, tmp_path) for world, stages in ((1, (0, 2, 3)), (2, (1, 0)))
    }
    for *runs, _ in (result for rank in results.values() for result in rank):
        for run in runs:
            for a, b in zip(expected, run, strict=True):
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    # Weights alone, too; a rank's experts are its slice of the whole.
    whole = results[1][0][-1]
    for rank, (*_, weights) in enumerate(results[2]):
        for name, value in weights.items():
            mine = whole[name][2 * rank : 2 * rank + 2] if ".experts." in name else whole[name]
            assert np.array_equal(value, mine), name
    record = describe(tmp_path / "step_00000003")
    assert record["step"] == 3
    assert record["world"] == 4
    assert record["layout"] == {"expert_parallel": 4, "zero": 2, "precision": "fp32"}
    # All ranks write about as much.
    sizes = [record["files"][f"state_{rank:05d}.bin"]["size"] for rank in range(4)]
    assert max(sizes) < 1.1 * min(sizes)


# --- alone ---


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: for hundreds of saves whose way to a disk is not the point."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def trained(groups):
    """An engine after two steps, and how to take more."""
    engine = engine_of(groups)
    batches = standin.Loader(groups).steps()

    def steps(number=1):
        for _ in range(number):
            engine.train_step(next(batches))

    steps(2)
    return engine, steps


@alone
def test_the_login_node_reads_what_a_checkpoint_is_without_torch(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    checkpoint = Checkpoints(tmp_path, groups).save(2, engine, {"loader": {"step": 2}})
    assert checkpoint == Checkpoint(tmp_path / "step_00000002", 2)
    code = (
        "import sys, json; from pathlib import Path; from moe.storage import describe\n"
        "print(json.dumps(describe(Path(sys.argv[1])))); assert 'torch' not in sys.modules"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint.path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    record = json.loads(said.stdout)
    assert (record["step"], record["world"], record["updates"]) == (2, 1, 2)
    assert record["extra"] == {"loader": {"step": 2}}
    for name, file in record["files"].items():
        assert (checkpoint.path / name).stat().st_size == file["size"]
    assert {"state_00000.bin", "frozen_00000.bin", "index_00000.json", "random_00000.json"} == set(
        record["files"]
    )


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "file", "words"),
    [
        (flip, "state_00000.bin", r"the contents of state_00000\.bin are not what was written"),
        (flip, "frozen_00000.bin", r"the contents of frozen_00000\.bin are not"),
        (flip, "index_00000.json", r"the contents of index_00000\.json are not"),
        (truncate, "state_00000.bin", r"state_00000\.bin has \d+ bytes where \d+ were written"),
        (Path.unlink, "random_00000.json", r"random_00000\.json is missing \(No such file"),
        (truncate, "COMPLETE", r"COMPLETE cannot be read"),
        (Path.unlink, "COMPLETE", r"has no COMPLETE file: the save did not finish"),
    ],
)
@alone
def test_a_corrupt_newest_one_falls_back_and_says_so(tmp_path, caplog, harm, file, words):
    groups = Groups.single()
    engine, steps = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups, keep=3)
    for step in (2, 3, 4):
        checkpoints.save(step, engine, {})
        steps()
    harm(tmp_path / "step_00000004" / file)
    later = Checkpoints(tmp_path, groups, keep=3)
    assert later.latest() == Checkpoint(tmp_path / "step_00000003", 3)
    assert len(later.faults) == 1
    assert re.search("step_00000004 is passed over: .*" + words, later.faults[0])
    assert later.faults[0] in caplog.text
    # The step is taken and saved again; then nothing is left of the bad one.
    later.restore(Checkpoint(tmp_path / "step_00000003", 3), engine)
    again = later.save(4, engine, {})
    assert Checkpoints(tmp_path, groups).latest() == again
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"step_{n:08d}" for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (flip, "state_00000.bin"),
        (flip, "frozen_00000.bin"),
        (flip, "index_00000.json"),
        (flip, "random_00000.json"),
        (truncate, "state_00000.bin"),
    ],
)
@alone
def test_what_is_corrupt_is_found_while_it_is_loaded_and_the_one_before_taken(tmp_path, caplog, harm, file):
    groups = Groups.single()
    engine, steps = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups, keep=3)
    states = {}
    for step in (2, 3):
        checkpoints.save(step, engine, {"of": step})
        states[step] = state_of(engine)
        steps()
    fresh = engine_of(groups, seed=4)
    assert Checkpoints(tmp_path, groups).resume(fresh) == (
        Checkpoint(tmp_path / "step_00000003", 3),
        {"of": 3},
    )
    equal(state_of(fresh), states[3])
    harm(tmp_path / "step_00000003" / file)
    later = Checkpoints(tmp_path, groups, keep=3)
    fresh = engine_of(groups, seed=5)
    assert later.resume(fresh) == (Checkpoint(tmp_path / "step_00000002", 2), {"of": 2})
    equal(state_of(fresh), states[2])
    assert (fresh.step, fresh.updates) == (2, 2)
    assert re.search(rf"step_00000003 is passed over: .*{file}", later.faults[0])
    assert later.faults[0] in caplog.text
    flip(tmp_path / "step_00000002" / "state_00000.bin")
    with pytest.raises(
        CheckpointError, match=r"cannot be restored: .*the contents of state_00000\.bin are not"
    ):
        later.restore(Checkpoint(tmp_path / "step_00000002", 2), fresh)
    assert later.resume(fresh) is None


def rows_end_before_it(folder):
    groups = Groups.create(2)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups, keep=3)
    for step in (2, 3, 4):
        checkpoints.save(step, engine, {"of": step})
    upto = 3 if groups.rank == 0 else None  # rank 0 has the say
    found = checkpoints.newest(upto), checkpoints.resume(engine, upto)
    if groups.rank == 0:
        for step in (2, 3):
            flip(folder / f"step_0000000{step}" / "state_00001.bin")
    groups.barrier()
    return (*found, checkpoints.newest(1), checkpoints.resume(engine, upto), checkpoints.latest())


def test_one_after_the_end_of_the_history_is_the_last_to_be_taken(tmp_path):
    third, fourth = (Checkpoint(tmp_path / f"step_0000000{step}", step) for step in (3, 4))
    for found in ranks(2)(rows_end_before_it, tmp_path):
        assert found == (third, (third, {"of": 3}), fourth, (fourth, {"of": 4}), fourth)


def one_rank_finds_it(folder):
    groups = Groups.create(2)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups, keep=2)
    for step in (2, 3):
        checkpoints.save(step, engine, {})
    if groups.rank == 0:
        flip(folder / "step_00000003" / "state_00001.bin")  # what the other rank alone reads
    groups.barrier()
    found = checkpoints.resume(engine)
    return found[0].step, checkpoints.faults


def test_what_one_rank_finds_corrupt_all_pass_over(tmp_path):
    for step, faults in ranks(2)(one_rank_finds_it, tmp_path):
        assert step == 2
        assert "the contents of state_00001.bin are not what was written" in faults[0]


@alone
def test_without_its_digests_pieces_a_checkpoint_is_read_unchecked(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    saved = Checkpoints(tmp_path, groups).save(2, engine, {})
    want = state_of(engine)
    file = saved.path / "index_00000.json"
    index = {key: value for key, value in json.loads(file.read_text()).items() if key != "pieces"}
    file.write_text(json.dumps(index))
    record = json.loads((saved.path / "COMPLETE").read_text())
    for name, said in record["files"].items():  # as the first checkpoints had them
        said["digest"] = f"xxh3_128:{'0' * 32}"
        said["size"] = (saved.path / name).stat().st_size
    (saved.path / "COMPLETE").write_text(json.dumps(record))
    fresh = engine_of(groups, seed=4)
    Checkpoints(tmp_path, groups).restore(saved, fresh)
    equal(state_of(fresh), want)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", r"is no record of a checkpoint"),
        (
            '{"version": 99, "files": {}}',
            r"is of version 99; this code reads version 1.*with the code that wrote it",
        ),
    ],
)
def test_a_record_that_is_not_ours_is_refused(tmp_path, text, words):
    (tmp_path / "COMPLETE").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        describe(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no folder; name a checkpoint such as .*step_00000100"):
        describe(tmp_path / "nothing")


@alone
def test_nothing_saved_is_nothing_found(tmp_path):
    groups = Groups.single()
    checkpoints = Checkpoints(tmp_path / "never", groups)
    assert checkpoints.latest() is None
    assert checkpoints.faults == []
    assert checkpoints.settle() is None


@alone
def test_the_newest_are_kept_and_frozen_files_are_written_once_a_generation(tmp_path):
    groups = Groups.single()
    engine, steps = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups, keep=2)
    inodes = []
    for step in range(2, 7):
        path = checkpoints.save(step, engine, {}).path
        inodes.append((path / "frozen_00000.bin").stat().st_ino)
        steps()
    assert [c.step for c in storage.found(tmp_path)] == [6, 5]
    assert inodes[0] != inodes[1]  # neighbours share nothing: see the fall back above
    assert inodes[2:] == [inodes[0], inodes[1], inodes[0]]
    assert Checkpoints(tmp_path, groups).latest() == Checkpoint(tmp_path / "step_00000006", 6)


@alone
def test_one_kept_is_still_never_none(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups, keep=1)
    seen = []
    for step in (2, 3, 4):
        checkpoints.save(
            step, engine, {}, guard=lambda: seen.append([c.step for c in storage.found(tmp_path)])
        )
    assert seen == [[], [2], [3]]  # when the next is written in full, the one before still stands
    assert [c.step for c in storage.found(tmp_path)] == [4]


KILLS = int(os.environ.get("KILLS", "50"))


class LostLease(Exception):
    pass


@alone
def test_a_guard_that_raises_undoes_the_save(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups)
    first = checkpoints.save(2, engine, {})

    def guard():
        assert not (tmp_path / "step_00000003").exists()
        raise LostLease("attempt 4 has taken over")

    with pytest.raises(LostLease, match="attempt 4"):
        checkpoints.save(3, engine, {}, guard=guard)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]
    assert checkpoints.latest() == first


@alone
def test_an_extra_that_is_not_json_is_refused(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    with pytest.raises(CheckpointError, match=r"step_00000002 was not saved: `extra` is not JSON"):
        Checkpoints(tmp_path, groups).save(2, engine, {"loader": object()})
    assert list(tmp_path.iterdir()) == []


@alone
def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"was not saved under .*there is no earlier one"):
        Checkpoints(tmp_path / "file", groups).save(2, engine, {})


@alone
def test_a_state_of_another_model_or_other_trained_parts_is_refused(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    checkpoints = Checkpoints(tmp_path, groups)
    saved = checkpoints.save(2, engine, {})
    deeper = Engine(standin.Model(groups, layers=3), standin.spec(), groups, total_steps=10)
    with pytest.raises(
        CheckpointError, match=r"it has no layers\.2\.experts\.bias.*and \d+ more: it is of another"
    ):
        checkpoints.restore(saved, deeper)
    thawed = standin.Model(groups)
    thawed.tower.requires_grad_(True)
    with pytest.raises(
        CheckpointError, match=r"tower\.bias, tower\.weight did not train when it was written"
    ):
        checkpoints.restore(saved, Engine(thawed, standin.spec(), groups, total_steps=10))
    wider = standin.Model(groups)
    wider.head = torch.nn.Linear(standin.WIDTH, 5, bias=False)
    with pytest.raises(CheckpointError, match=r"head\.weight is \[37, 16\] there and \[5, 16\] here"):
        load_weights(saved.path, wider, groups)


@alone
def test_what_was_trained_may_be_frozen_afterwards(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)
    saved = Checkpoints(tmp_path, groups).save(2, engine, {})
    model = standin.Model(groups, seed=5)
    model.embed.requires_grad_(False)
    later = Engine(model, standin.spec(), groups, total_steps=10)
    Checkpoints(tmp_path, groups).restore(saved, later)
    assert torch.equal(model.embed.weight, engine.vlm.embed.weight)


# --- in the background ---


@alone
def test_the_loop_goes_on_while_the_disk_is_slow(tmp_path, monkeypatch):
    groups = Groups.single()
    engine, steps = trained(groups)
    go, write = threading.Event(), storage.Writer.write

    def slow(writer, path, buffers):
        assert go.wait(30)
        return write(writer, path, buffers)

    monkeypatch.setattr(storage.Writer, "write", slow)
    at_two = state_of(engine)
    checkpoints = Checkpoints(tmp_path, groups)
    checkpoints.begin(2, engine, {"loader": 2})
    steps(3)
    assert checkpoints.saving
    assert not checkpoints.ready()
    assert storage.found(tmp_path) == []
    assert not np.array_equal(state_of(engine)["head.weight", "master"], at_two["head.weight", "master"])
    go.set()
    saved = checkpoints.settle()
    assert saved == Checkpoint(tmp_path / "step_00000002", 2)
    assert not checkpoints.saving
    fresh = engine_of(groups, seed=3)
    assert checkpoints.restore(saved, fresh) == {"loader": 2}
    equal(state_of(fresh), at_two)  # as when it was begun, not as when it was written
    assert fresh.updates == 2
    # The copy's memory is used again.
    staging = checkpoints._staging
    checkpoints.begin(5, engine, {})
    checkpoints.settle()
    assert checkpoints._staging is staging


# --- faults ---


def small_disk(folder):
    groups = Groups.create(2)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups)
    checkpoints.save(2, engine, {})
    words = []
    for background in (False, True):
        if groups.rank == 1:  # a file may not grow beyond this: the same error path as a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            if background:
                checkpoints.begin(3, engine, {})
                checkpoints.settle()
            else:
                checkpoints.save(3, engine, {})
        except CheckpointError as error:
            words.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(entry.name for entry in Path(folder).iterdir())
    groups.barrier()
    return words, left, checkpoints.save(3, engine, {}).step


def test_a_disk_too_small_for_one_rank_is_said_by_all_and_harms_nothing(tmp_path):
    for words, left, later in ranks(2)(small_disk, tmp_path):
        assert len(words) == 2
        for said in words:
            assert said.startswith(f"step_00000003 was not saved under {tmp_path} (")
            assert "rank 1: state_00001.bin: File too large" in said
            assert "step_00000002 is still the newest" in said
            assert "lower train.keep" in said
        assert left == ["step_00000002"]
        assert later == 3


def lease(folder):
    groups = Groups.create(1)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups)

    def guard():
        raise LostLease("this attempt is over")

    try:
        checkpoints.save(2, engine, {}, guard=guard)
    except (LostLease, CheckpointError) as error:
        return type(error).__name__, str(error), checkpoints.latest()


@alone
def test_a_save_whose_files_a_successor_removed_is_told_by_the_guard(tmp_path):
    groups = Groups.single()
    engine, _ = trained(groups)

    def guard():
        raise LostLease("attempt 4 has taken over")

    checkpoints = Checkpoints(tmp_path, groups)
    with pytest.MonkeyPatch.context() as patch:
        start = storage.start

        def removed(folder, step):
            partial = start(folder, step)
            storage.recover(folder)
            return partial

        patch.setattr(storage, "start", removed)
        with pytest.raises(LostLease, match="attempt 4"):
            checkpoints.save(3, engine, {}, guard=guard)


def test_an_attempt_that_wakes_between_the_guard_and_the_rename_takes_nothing_away(tmp_path):
    """A successor has removed what it wrote, as its own start asks for, and has saved the same step since."""
    old = storage.start(tmp_path, 3)
    storage.recover(tmp_path)
    new = storage.start(tmp_path, 3)
    (new / "weights").write_text("the successor's")
    storage.publish(new, 3)
    with pytest.raises(FileNotFoundError):
        storage.publish(old, 3)
    [kept] = storage.found(tmp_path)
    assert (kept.path / "weights").read_text() == "the successor's"


def test_all_ranks_learn_that_the_guard_refused(tmp_path):
    assert ranks(2)(lease, tmp_path) == [
        ("LostLease", "this attempt is over", None),
        ("CheckpointError", "this attempt is over", None),
    ]


def after(folder, groups, engine, step):
    """What a later attempt finds: a checkpoint of this step or the one before, whole; and it can save the
    next.
    """
    checkpoints = Checkpoints(folder, groups, keep=2)
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step in (step - 1, step)
    assert checkpoints.faults == []
    record = describe(newest.path)
    assert storage.faults(newest.path, record, record["files"]) == []
    checkpoints.restore(newest, engine)
    assert checkpoints.save(step, engine, {}).step == step
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def child_dies(work):
    """Run `work` in a child; whether something killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


@alone
def test_a_save_killed_at_each_of_its_steps_leaves_a_whole_one(memory):
    groups = Groups.single()
    engine, _ = trained(groups)
    Checkpoints(memory, groups).save(2, engine, {})
    Checkpoints(memory, groups).save(3, engine, {})
    step, points = 3, 0
    while True:
        points += 1
        # Every other time the step is saved again, over one that is there.
        step += points % 2

        def work(step=step, points=points):
            seen = 0

            def count(frame, event, _):
                nonlocal seen
                if event == "c_call" and frame.f_code.co_filename.endswith("storage.py"):
                    seen += 1
                    if seen == points:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(count)
            Checkpoints(memory, groups, keep=2).save(step, engine, {})

        _, status = os.waitpid(child_dies(work), 0)
        after(memory, groups, engine, step)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert points > 100


@alone
def test_saves_killed_at_random_moments_leave_a_whole_one(memory):
    groups = Groups.single()
    engine, _ = trained(groups)
    checkpoints = Checkpoints(memory, groups)
    checkpoints.save(2, engine, {})
    started = time.perf_counter()
    checkpoints.save(3, engine, {})
    lasts = time.perf_counter() - started
    dice, killed = random.Random(0), 0
    for step in range(4, 4 + KILLS):

        def work(step=step):
            own = Checkpoints(memory, groups)
            if step % 2:
                own.save(step, engine, {})
            else:
                own.begin(step, engine, {})
                own.settle()
            time.sleep(30)

        child = child_dies(work)
        time.sleep(dice.uniform(0, 2 * lasts))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += not (memory / storage.folder_name(step)).exists()
        after(memory, groups, engine, step)
    assert killed > KILLS // 10
