"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

PACKAGE = Path(__file__).parent.parent / "lowvram"

# For each room: the rooms and files of lowvram that it must never import, at the top or within a function.
NEVER = {
    "models": ("memory", "planner", "tasks", "trainer", "objectives", "data", "sampling", "metrics"),
    "kernels": (
        "models",
        "memory",
        "planner",
        "tasks",
        "trainer",
        "objectives",
        "data",
        "sampling",
        "metrics",
        "config",
        "run",
    ),
    "memory": ("planner", "models", "objectives", "tasks", "trainer"),
    "objectives": ("models", "memory", "planner", "tasks", "trainer"),
    "planner": ("models", "objectives", "sampling", "metrics", "trainer", "run", "resume"),
    "data": ("tasks", "trainer", "memory", "planner", "models", "objectives"),
    "metrics": ("tasks", "trainer", "memory", "planner", "objectives"),
    "sampling": ("tasks", "trainer", "memory", "planner", "objectives"),
    "weights": ("tasks", "trainer", "memory", "planner", "models", "objectives"),
    "adapters": ("tasks", "trainer", "memory", "planner", "models", "objectives", "data"),
    "tasks": ("trainer", "memory", "planner"),
    "trainer": ("models", "objectives"),
    "receipt": ("tasks", "trainer", "memory", "models", "objectives", "data", "run", "config"),
    "marks": ("tasks", "trainer", "planner", "memory", "models", "objectives", "data"),
    "pages": (
        *("tasks", "trainer", "memory", "models", "objectives"),
        *("data", "sampling", "metrics", "run", "checkpoint", "resume"),
    ),
    "phase": ("models", "objectives", "tasks", "memory", "planner"),
}
COMMANDS = ("train", "plan", "sample", "evaluate", "report", "convert", "identify")


def imports_of(path: Path) -> set[str]:
    """Names below lowvram that a file imports: {"models.stylegan2", ...}; type-checking blocks don't count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name.removeprefix("lowvram.") for name in found if name.startswith("lowvram")}


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", NEVER)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = files_of(room)
    assert files
    for path in files:
        wrong = [name for name in imports_of(path) if name.split(".")[0] in NEVER[room]]
        assert not wrong, f"{path.name} imports {wrong}"


def test_kernels_stand_on_torch_alone() -> None:
    for path in files_of("kernels"):
        assert all(name.split(".")[0] in ("kernels", "errors") for name in imports_of(path)), path


def test_nothing_imports_a_command() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not imports_of(path) & set(COMMANDS), path


def test_the_checker_sees_imports(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from lowvram.models import unet\n    import lowvram.tasks.stylegan2\n")
    assert imports_of(file) == {"models.unet", "tasks.stylegan2"}


def test_importing_the_package_brings_in_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, lowvram; print([m for m in ('torch', 'hydra', 'accelerate', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command: str, tmp_path: Path) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('lowvram.{command}', run_name='__main__')\n"
        f"except SystemExit as e: assert not e.code\n"
        f"print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False"), done.stdout[-300:]


def test_unknown_names_are_attribute_errors() -> None:
    import lowvram

    with pytest.raises(AttributeError, match="nothing_such"):
        _ = lowvram.nothing_such
    assert set(lowvram.__all__) <= set(dir(lowvram))
    assert all(getattr(lowvram, name) is not None for name in lowvram.__all__)
