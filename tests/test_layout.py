"""The house's rules as tests: who may import whom, where a library lives, what a login node loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "moe", "data")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# What each package may import of the others.
ARROWS = {"launch": {"launch", "moe", "data"}, "moe": {"moe"}, "data": {"data"}}
# Scripts: nobody imports them.
DOORS = {"launch.submit", "launch.runs", "data.prepare", "data.demo"}
# Each library's own rooms; the rest of the code goes through these.
HOMES = {
    "wandb": {"launch/online/session.py", "launch/online/panels.py"},
    "wandb_workspaces": {"launch/online/panels.py"},
    "submitit": {"launch/script.py", "launch/local.py"},
    "tutel": {"moe/dispatch.py"},
    "peft": {"moe/lora.py"},
    "yaml": {"launch/nodes.py"},
    "matplotlib": {"launch/report.py", "moe/pictures.py"},
}
# Read on a login node, where there may be no torch.
LIGHT = (
    "moe/spec.py",
    "moe/stages.py",
    "moe/backbones.py",
    "moe/storage.py",
    "moe/digests.py",
    "data/spec.py",
    "data/catalog.py",
)
COMPUTE = {
    "launch/stage.py",
    "launch/tracking.py",
    "launch/online/mirror.py",
    "launch/online/session.py",
    "launch/online/panels.py",
    "launch/ask.py",
    "launch/asked.py",
    "launch/questions.py",
    "launch/evaluate.py",
    "launch/routing.py",
    "launch/meter.py",
    "launch/rendezvous.py",
}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """The modules a file imports, `a.b` for `from a import b`; with `top_only` those that run at its import."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_only:
        inner = {
            child
            for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (
                isinstance(node, ast.Try) and "ImportError" in ast.dump(node)
            )  # done without where it is not there
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if node not in inner]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in PACKAGES or top in ARROWS[package], f"{name(path)} imports {module}"
        assert module not in DOORS, f"{name(path)} imports the script {module}"
        assert top != "tests", f"{name(path)} imports its tests"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_library_has_one_home(path: Path) -> None:
    for module in imports(path):
        library = module.split(".")[0]
        assert library not in HOMES or name(path) in HOMES[library], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [ROOT / file for file in LIGHT], ids=name)
def test_what_a_login_node_reads_needs_the_standard_library_alone(path: Path) -> None:
    for module in imports(path, top_only=True):
        top = module.split(".")[0]
        assert top in sys.stdlib_module_names or name(path).split("/")[0] == top, (
            f"{name(path)} imports {module}"
        )


def test_launch_has_no_module_named_as_one_of_the_standard_library() -> None:
    # launch/ is first on the path for the first two imports of launch/submit.py.
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & sys.stdlib_module_names


def test_submitting_loads_no_torch_and_no_wandb() -> None:
    code = """
import sys
import launch.cli, launch.operating.verbs, launch.local, launch.verdict, launch.job, launch.handoff
heavy = {'torch', 'transformers', 'wandb', 'deepspeed', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)
print(' '.join(sorted(heavy)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", FILES, ids=name)
def test_compute_files_are_imported_lazily_on_the_login_node(path: Path) -> None:
    if not name(path).startswith("launch/") or name(path) in COMPUTE:
        return
    heavy = {
        "launch.stage",
        "launch.tracking",
        "launch.evaluate",
        "launch.rendezvous",
        "launch.online.session",
    }
    heavy |= {"torch", "wandb"}
    assert not heavy & set(imports(path, top_only=True))


def test_every_file_says_what_it_is_for() -> None:
    assert not [name(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
