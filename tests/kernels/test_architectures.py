"""Every kernel compiled for every architecture, which takes some minutes: pytest -m slow tests/kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import ALL


@pytest.mark.slow
def test_every_kernel_compiles_for_all_of_them() -> None:
    folder = Path(__file__).parent
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", "compiles_for_every_card", str(folder)]
    environment = {**os.environ, "LOWVRAM_ALL_ARCHITECTURES": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and len(ALL) == 4
