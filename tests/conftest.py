"""Options and fixtures of the whole suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files anew; read the diff"
    )


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's DATA_ROOT, with a dozen held-out questions: for tests that say nothing about what a model learns."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    subprocess.run([sys.executable, str(ROOT / "data" / "demo.py"), str(folder)], check=True, timeout=120)
    file = folder / "held_out.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:12]))
    return folder
