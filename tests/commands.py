"""Run the commands as a user does: another process, an own folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**extra: str) -> dict[str, str]:
    """The environment of a fresh shell, with the package importable from anywhere."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "RANK", "WORLD_", "LOCAL_"))
    }
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def start(module: str, *words: str, cwd: Path, **extra: str) -> subprocess.Popen[str]:
    """`python -m MODULE WORDS...` in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def run(module: str, *words: str, cwd: Path, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE WORDS...` in a folder, to its end."""
    process = start(module, *words, cwd=cwd, **extra)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
