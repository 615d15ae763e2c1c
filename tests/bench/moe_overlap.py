"""Tokens that travel in pieces (moe.overlap) beside tokens that travel at once: two gloo ranks, forward and backward.

    python tests/bench/moe_overlap.py                    # between processes of this machine
    python tests/bench/moe_overlap.py --link 1gbit       # over a loopback of its own of that speed (Linux, root)

What can be gained is the time spent waiting for the exchange. Between processes of one machine the exchange is
copying, which costs the cores that compute; over a link it is waiting. The link is the kernel's own token bucket in
a network namespace that nothing else sees; both directions share it. Times are of the slower rank, on the wall.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from moe.dispatch import exchange
from moe.experts import Experts, mark
from moe.layer import MoELayer
from moe.parallel import Groups
from tests.bench.moe_layer_peers import TOP_K, Weights, ours
from tests.bench.moe_layer_verdicts import ratio
from tests.ranks import ranks

SHAPES = {"narrow": (256, 512, 4), "wide": (1024, 512, 4)}  # width, inner width, experts
LINKED = "MOE_OVERLAP_LINK"  # set once this process is behind its link


def spent(shape: str, tokens: int, pieces: tuple[int, ...], rounds: int) -> dict[str, list[float]]:
    """On a rank: seconds of each round, by pieces; and of the four exchanges alone."""
    groups = Groups.create(2)
    weights = Weights.draw(*SHAPES[shape], 0.0, "cpu", torch.float32)
    held = len(weights.router) // 2
    mine = slice(groups.rank * held, (groups.rank + 1) * held)
    stacked = {name: getattr(weights, name)[mine].clone() for name in ("gate", "up", "down")}
    experts = Experts(stacked, torch.nn.functional.silu)
    for parameter in experts.parameters():
        mark(parameter, len(weights.router), groups.rank * held)
    whole = ours(weights)
    layer = MoELayer(0, whole.router, experts, type(whole.dispatcher)(groups))
    layer.groups = groups
    width = SHAPES[shape][0]
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(groups.rank)).requires_grad_()
    rows = torch.randn(tokens * TOP_K, width)
    half = [len(rows) // 2] * 2
    ways = [*map(str, pieces), "exchange alone"]
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for place in range(len(ways)):
            way = ways[(place + turn) % len(ways)]
            x.grad = None
            layer.zero_grad(set_to_none=True)
            dist.barrier()
            start = time.perf_counter()
            if way == "exchange alone":
                for _ in range(4):
                    exchange(rows, half, half, groups.expert_group)
            else:
                layer.pieces = int(way)
                y = layer(x)
                y.backward(torch.ones_like(y))
            if turn:  # the first round warms up
                found[way].append(time.perf_counter() - start)
    return found


def behind(link: str) -> int:
    """This script again, in a network namespace whose loopback has that speed; its exit status."""
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        what = f"without {' and '.join(missing)}" if missing else "by one who is not root"
        print(f"moe_overlap.py: --link makes a network of its own, which cannot be done {what}; leave it out")
        return 2
    script = 'ip link set lo up && tc qdisc add dev lo root tbf rate "$1" burst 256kb latency 200ms && shift && "$@"'
    again = [sys.executable, *sys.argv]
    return subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", link, *again],
        env=os.environ | {LINKED: link, "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=False,
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, action="append", help="a rank's; default 1k, 4k, 16k")
    parser.add_argument("--pieces", type=int, action="append", help="default 2, 4, 8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--link", help="the link's speed, as tc writes it: 1gbit")
    given = parser.parse_args()
    if given.link and LINKED not in os.environ:
        return behind(given.link)
    pieces = (1, *(given.pieces or (2, 4, 8)))
    print(
        f"torch {torch.__version__}, two gloo ranks, {given.link or 'this machine'}; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':24}{'at once':>9}{'exchange':>10}" + "".join(f"{f'{n} pieces':>22}" for n in pieces[1:]))
    for shape in given.shape or SHAPES:
        for tokens in given.tokens or (1024, 4096, 16384):
            each = ranks(2, timeout=500)(spent, shape, tokens, pieces, given.rounds)
            slower = {
                way: [max(pair) for pair in zip(*(r[way] for r in each), strict=True)] for way in each[0]
            }
            once = statistics.median(slower["1"])
            share = statistics.median(slower["exchange alone"]) / once
            line = f"{shape + f', {tokens} tokens':24}{1e3 * once:7.0f}ms{share:10.0%}"
            for n in pieces[1:]:
                median, low, high = ratio(slower[str(n)], slower["1"])
                line += f"{f'x {median:.2f} [{low:.2f}, {high:.2f}]':>22}"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
