"""`python -m lowvram.evaluate` on a run, as a user types it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.evaluate import EvaluateOptions, _more, main


def evaluate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowvram.evaluate", *words]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


def test_no_evaluation_takes_the_place_of_another() -> None:
    choices: tuple[dict, ...] = (
        {},
        {"metrics": "swd"},
        {"guidance": 3.0},
        {"backbone": "random_conv"},
        {"backbone": "efficientnet_lite0,random_conv"},
        {"floor": False},
        {"inception": "weights.pth"},
        {"inception": "other.pth"},
    )
    names = [_more(EvaluateOptions(run="x", **asked)) for asked in choices]
    assert names[0] == "" and len(set(names)) == len(choices)


def test_the_order_of_names_makes_no_other_evaluation() -> None:
    def name(**asked: str) -> str:
        return _more(EvaluateOptions(run="x", **asked))

    assert name(backbone="random_conv, efficientnet_lite0") == name(backbone="efficientnet_lite0,random_conv")
    assert name(metrics="fid,swd,precision_recall,frechet") == name() == name(backbone="efficientnet_lite0,")


def test_a_run_is_evaluated_and_the_numbers_are_kept(
    tiny: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram import Trainer

    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    run = tmp_path / "run"
    done = evaluate(f"run={run}", "n=30", "metrics=frechet,swd", "feature_size=64", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "frechet_efficientnet_lite0_64px" in done.stdout and "30 generated images" in done.stdout
    assert "generated images" in done.stderr  # the bar
    (file,) = (run / "metrics").iterdir()
    record = json.loads(file.read_text())
    assert record["step"] == 2 and record["values"].keys() == {"frechet_efficientnet_lite0_64px", "swd_16", "swd_mean"}
    metric = "frechet_efficientnet_lite0_64px"
    assert record["values"][metric] > record["floor"][metric] > 0

    main(EvaluateOptions(run=str(run), n=30, metrics="frechet", backbone="random_conv", device="cpu"))
    said = capsys.readouterr().out
    assert "frechet_random_conv" in said and "efficientnet" not in said and len(list((run / "metrics").iterdir())) == 2

    wrong = evaluate(f"run={run}", "metrics=kid")
    assert wrong.returncode == 2 and "metrics=kid is not known" in wrong.stderr and "Traceback" not in wrong.stderr
