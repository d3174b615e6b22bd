"""`python -m lowvram.train` as a user types it, in an empty folder."""

import json
from pathlib import Path

import pytest
from commands import run
from tiny import TINY

SHORT = [*TINY, "kimg=0.016"]


def test_help_lists_recipes_and_settings(tmp_path: Path) -> None:
    done = run("lowvram.train", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in ("faces32", "faces1024", "classes32", "data.path", "vram", "snapshot_kimg", "--multirun"):
        assert text in done.stdout


def test_cfg_job_prints_the_settings_and_trains_nothing(tmp_path: Path) -> None:
    done = run("lowvram.train", "recipe=faces256", "batch=16", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recipe: faces256" in done.stdout
    assert "batch: 16" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [faces32, _self_]\nkimg: 0.016\n")
    done = run("lowvram.train", "recipe=./mine.yaml", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mine" / "fakes_000000.png").is_file()
    assert "No data.path given: training on the built-in drawn faces" in done.stdout
    assert "no GPU: about" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "outputs"]  # no litter of Hydra's


@pytest.mark.slow
def test_multirun_gives_each_job_its_own_folder(tmp_path: Path) -> None:
    done = run("lowvram.train", "recipe=faces32", *SHORT, "seed=0,1", "--multirun", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipes = sorted((tmp_path / "outputs").glob("*/recipe.yaml"))
    assert [("seed: 0" in r.read_text(), "seed: 1" in r.read_text()) for r in recipes] == [(True, False), (False, True)]
    done = run("lowvram.train", "recipe=faces32", *SHORT, "seed=0,1", "out=sweep", "-m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=face32"], ["recipe=face32 is not known", "faces32"]),
        pytest.param([], ["No recipe was given", "faces256", "resume=FOLDER"], marks=pytest.mark.slow),
        (["resume=nowhere"], ["resume=nowhere is not a folder"]),
        pytest.param(["resume=."], ["resume=. is neither a run nor a checkpoint"], marks=pytest.mark.slow),
        pytest.param(["resume=auto", "out=nowhere"], ["No recipe was given"], marks=pytest.mark.slow),
        (["recipe=faces32", "batc=8"], ["no setting batc", "batch"]),
        pytest.param(
            ["recipe=faces32", "--batch=8"], ["--batch=8 is not understood", "name=value"], marks=pytest.mark.slow
        ),
        (["recipe=faces32", "data.path=nowhere.zip"], ["nowhere.zip"]),
        (["recipe=faces32", "vram=6"], ["vram=6 has no unit", "vram=6GB"]),
        pytest.param(["recipe=faces32", "resume=nowhere"], ["nowhere"], marks=pytest.mark.slow),
        pytest.param(["recipe=faces32", "device=cuda:7"], ["cuda:7"], marks=pytest.mark.slow),
    ],
)
def test_mistakes_end_in_two_lines_and_status_2(tmp_path: Path, words: list[str], said: list[str]) -> None:
    done = run("lowvram.train", *words, cwd=tmp_path)
    assert done.returncode == 2
    for text in said:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("lowvram.train", "recipe=faces32", "vram=6", "debug=true", cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert done.returncode != 0


@pytest.mark.slow
def test_vram_is_kept_with_the_recipe_and_said_to_do_nothing_yet(tmp_path: Path) -> None:
    done = run("lowvram.train", "recipe=faces32", *SHORT, "vram=6GB", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vram=6GB" in done.stdout
    assert "vram: 6GB" in (tmp_path / "outputs" / "faces32" / "recipe.yaml").read_text()


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = run("lowvram.train", "recipe=faces32", *SHORT, "logger=wandb", cwd=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_metrics_are_plain_json(tmp_path: Path) -> None:
    done = run("lowvram.train", "recipe=faces32", *SHORT, "out=r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all("kimg" in json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
