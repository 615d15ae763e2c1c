"""The reference's data path on the versions it pins, in an interpreter of its own, round by round.

    python -m venv pins && pins/bin/pip install transformers==4.37.0 tokenizers==0.15.1 torch pillow

As a script it is the process that such an interpreter runs: it reads one JSON line a round and answers with the
processor seconds that the round took. `Pins` starts it and asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WANTED = {"transformers": "4.37.0", "tokenizers": "0.15.1"}
ROOT = Path(__file__).resolve().parents[2]


class Pins:
    """The other process; `versions` are those of its libraries."""

    def __init__(self, python: str, annotation: Path, root: Path, tokenizer: Any) -> None:
        words = root / "slow-tokenizer"
        words.mkdir()
        tokenizer.backend_tokenizer.model.save(str(words))  # vocab.json and merges.txt
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [python, "-W", "ignore", __file__, str(annotation), str(root), str(words)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions: dict[str, str] = self._answer()
        for name, version in WANTED.items():
            if self.versions[name] != version:
                self.close()
                raise SystemExit(f"--pins {python}: it has {name} {self.versions[name]}, not {version}")

    def seconds(self, batches: list[list[int]]) -> float:
        """Processor seconds that these batches took."""
        return float(self._ask({"batches": batches})["seconds"])

    def batch(self, numbers: list[int], path: Path) -> dict[str, Any]:
        """A batch, by way of a file."""
        import torch

        self._ask({"batches": [numbers], "keep": str(path)})
        loaded: dict[str, Any] = torch.load(path)
        return loaded

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"--pins {self._process.args[0]}: it ended, see above")  # type: ignore[index]
        answer: dict[str, Any] = json.loads(line)
        return answer


def child(annotation: Path, root: Path, words: Path) -> None:
    """Answer until there are no more questions."""
    import tokenizers
    import torch
    import transformers
    from PIL import __version__ as pillow

    from data.images import ImageFormat
    from tests.bench.data_reference import Reference, collated

    torch.set_num_threads(1)
    tokenizer = transformers.CodeGenTokenizer(str(words / "vocab.json"), str(words / "merges.txt"))
    tokenizer.add_special_tokens({"unk_token": "<|pad|>"})
    tokenizer.pad_token = tokenizer.unk_token
    side = 336
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    data = Reference(annotation, root, tokenizer, ImageFormat(side, mean, std, "crop"), processor)
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    print(json.dumps({**versions, "torch": torch.__version__, "Pillow": pillow}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.process_time()
        for numbers in asked["batches"]:
            batch = collated([data[number] for number in numbers], tokenizer.pad_token_id)
        seconds = time.process_time() - start
        if "keep" in asked:
            torch.save(batch, asked["keep"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    child(*map(Path, sys.argv[1:]))
