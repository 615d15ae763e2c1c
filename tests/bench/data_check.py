"""Time and memory of `prepare.py check`, by the number of records.

    python tests/bench/data_check.py [--sizes 10000 100000 1000000] [--tokenizer] [--kept FOLDER]

Each record shows a picture of its own, a small one. Without --tokenizer records and pictures are checked, with it
lengths and masks too. Memory is the peak of a fresh process less what imports took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parents[2])


def child(root: Path, with_tokenizer: bool) -> dict[str, float]:
    """Check in this process."""
    from data.catalog import resolve
    from data.checking import Options, check
    from data.report import as_json
    from tests.bench import data_corpus

    tokenizer = data_corpus.tokenizer() if with_tokenizer else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, wall = time.process_time(), time.monotonic()
    options = Options(tokenizer=tokenizer, template="phi", workers=2)
    result = check(root, [dataset for dataset, _ in resolve("mix.json")], options, lambda *_: None)
    facts = as_json(result)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "records": facts["records"],
        "lost": facts["lost"],
        "cpu_s": time.process_time() - start,
        "wall_s": time.monotonic() - wall,
        "peak_mb": (peak - before) / 1024,
    }


def main() -> int:
    """Print a row a size."""
    parser = argparse.ArgumentParser(description="Time and memory of a check.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokenizer", action="store_true")
    parser.add_argument("--kept", type=Path, help="folder in which the data are kept for the next time")
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.tokenizer)))
        return 0
    from tests.bench import data_corpus

    for size in options.sizes:
        with data_corpus.corpus(options.kept, size, distinct=True) as root:
            command = [sys.executable, __file__, "--child", str(root)]
            command += ["--tokenizer"] if options.tokenizer else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            megabytes = (root / "mix.json").stat().st_size / 1e6
            print(
                f"{size:>9,} records ({megabytes:,.0f} MB): {got['cpu_s']:.1f} CPU-s, {got['wall_s']:.1f} s, "
                f"{got['cpu_s'] / size * 1e6:.0f} CPU-us a record, peak {got['peak_mb']:.0f} MB, "
                f"{got['lost']:.0f} lost",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
