"""The benchmarks run as their pages say."""

import json
from pathlib import Path

from commands import ROOT, run
from tiny import TINY


def test_train_step_times_every_phase(tmp_path: Path) -> None:
    words = ["recipe=faces32", *TINY, "--steps", "1", "--warmup", "0", "--json", str(tmp_path / "result.json")]
    done = run("benchmarks.train_step", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["phases"]) == ["G", "path_length", "D", "R1"]
    assert all(phase["seconds"] > 0 for phase in result["phases"].values())
    assert result["peak_bytes"] > 0
