"""What a run costs, as a training writes it: in metrics, checkpoints and receipt.json, and across resumes."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import environment, run
from PIL import Image
from test_equivalence import CALM, REORDERED, largest_difference
from test_policy_resume import saved
from tiny import TINY

from lowvram import LowVRAMError, Trainer, checkpoint
from lowvram.receipt.ledger import NAME, Receipt

Make = Callable[..., object]


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def forget(folder: Path) -> None:
    """Make a run as versions left it that kept no costs."""
    (folder / NAME).unlink()
    for path in checkpoint.candidates(folder / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        del state["receipt"]
        state["dataset"] = {"name": "x", "fingerprint": "y"}
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = {"bytes": (path / "state.json").stat().st_size, "sha256": ""}
        manifest["state.json"]["sha256"] = checkpoint._hash(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))


def test_costs_are_in_the_metrics_the_receipt_and_the_last_line(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(tiny("kimg=0.032", "price=$36/h", "contributor=Ann", "carbon=100g/kWh"))
    time.sleep(2)  # a notebook waits, which takes nothing
    made = trainer.account.seconds()
    begun = time.perf_counter()
    trainer.fit()
    took = time.perf_counter() - begun
    (kept,) = Receipt.read(trainer.run.folder).sessions
    assert made + took - 0.5 < kept.seconds < made + took
    assert (kept.contributor, kept.first_image, kept.last_image, kept.cards) == ("Ann", 0, 32, 1)
    first, last = lines_of(trainer.run.folder)
    assert 0 < first["kwh"] < last["kwh"] <= kept.kwh
    assert last["card_hours"] <= kept.card_hours and last["cost"] == pytest.approx(last["card_hours"] * 36)
    assert last["co2_g"] == pytest.approx(last["kwh"] * 100) and last["currency"] == "$"
    assert last["images_per_kwh"] == pytest.approx(32 / last["kwh"])
    assert 0 < last["watts"] < 5000
    said = capsys.readouterr().out
    assert "Wh est., cost $0." in said and "took " in said and "(estimated)" in said


def test_the_page_tells_what_the_receipt_tells(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=0.016"), quiet=True)
    trainer.fit()
    page = (trainer.run.folder / "report.html").read_text()
    assert f"{Receipt.read(trainer.run.folder).sessions[-1].seconds:.0f} seconds" in page


def test_a_grid_that_can_not_be_marked_stops_nothing(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(tiny("kimg=0.032", "snapshot_kimg=0.016"))

    def refused(*_: object, **__: object) -> None:
        raise LowVRAMError("the key is gone.", "Bring it back.")

    monkeypatch.setattr("lowvram.trainer.save_grid", lambda *_, **__: None)
    steps = iter(trainer)
    next(steps)
    monkeypatch.setattr("lowvram.trainer.save_grid", refused)
    for _ in steps:
        pass
    assert trainer.images_seen == 32 and len(checkpoint.candidates(trainer.run.checkpoints)) == 2
    assert "fakes_000000.png is not written: the key is gone. Bring it back." in capsys.readouterr().out


def test_a_grid_of_ones_own_says_how_far_training_is(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=0.016"), quiet=True)
    trainer.fit()
    trainer.save_samples()
    with Image.open(trainer.run.grid_path(16)) as grid:
        assert json.loads(grid.info["lowvram"])["images_seen"] == "16"


def test_rates_of_the_session_before_are_named(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny("kimg=0.016", "price=$36/h"), quiet=True).fit()
    Trainer(tiny("kimg=0.032", "resume=auto")).fit()
    said = capsys.readouterr().out
    assert "price=$36/h was of the session before; name it again" in said
    assert "0.30/kWh, 400 g" not in said  # the sessions' rates differ, so that no one of them is told


def test_quiet_is_quiet(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    assert capsys.readouterr().out == ""


def test_sums_across_resumes_are_exact_and_lost_work_counts_once(tiny: Make) -> None:
    first = Trainer(tiny("kimg=0.064", "snapshot_kimg=0.016", "keep=9"), quiet=True)
    for result in first:
        if result.step == 5:  # a checkpoint at 4; what came after is lost to the run, and has been paid
            break
    lost = Receipt.read(first.run.folder)
    assert [s.last_image for s in lost.sessions] == [40]
    second = Trainer(tiny("kimg=0.064", "resume=auto"), quiet=True)
    second.fit()
    third = Trainer(tiny("kimg=0.08", "resume=auto"), quiet=True)
    third.fit()
    receipt = Receipt.read(first.run.folder)
    assert [(s.first_image, s.last_image) for s in receipt.sessions] == [(0, 40), (32, 64), (64, 80)]
    assert receipt.sessions[0] == lost.sessions[0]
    last = lines_of(first.run.folder)[-1]
    sums = receipt.totals()
    assert sums.images == 88 and last["images_per_kwh"] * last["kwh"] == pytest.approx(88)
    before = sum(s.kwh for s in receipt.sessions[:2])
    assert before < last["kwh"] <= sums.kwh
    state = json.loads((checkpoint.candidates(third.run.checkpoints)[0] / "state.json").read_text())
    assert [s["id"] for s in state["receipt"]] == [s.id for s in receipt.sessions]

    older = first.run.checkpoints / "step-00000004"
    branch = Trainer(tiny("kimg=0.04", f"resume={older}", f"out={first.run.folder}-branch"), quiet=True)
    branch.fit()
    known = Receipt.read(branch.run.folder)
    assert [(s.first_image, s.last_image) for s in known.sessions] == [(0, 32), (32, 40)]
    assert known.joined(receipt.sessions).totals().images == 88 + 8  # what both share counts once


def test_an_older_run_goes_on_and_its_costs_count_from_there(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = Trainer(tiny("kimg=0.016"), quiet=True)
    first.fit()
    forget(first.run.folder)
    again = Trainer(tiny("kimg=0.032", "resume=auto"))
    again.fit()
    said = capsys.readouterr().out
    assert "up to 0.016 kimg is not known" in said and "since 0.016 kimg" in said
    sums = Receipt.read(again.run.folder).totals()
    assert (sums.images, sums.first_image) == (16, 16)


def test_a_spoilt_receipt_does_not_stop_a_training(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = Trainer(tiny("kimg=0.016"), quiet=True)
    first.fit()
    (first.run.folder / NAME).write_text('{"version": 1, "sessions": [5]}')
    again = Trainer(tiny("kimg=0.032", "resume=auto"))
    again.fit()
    assert "receipt.json.bad" in capsys.readouterr().out
    assert Receipt.read(again.run.folder).totals().images == 32  # the checkpoint knew
    assert (first.run.folder / "receipt.json.bad").is_file()


def test_what_is_tracked_are_numbers(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny("kimg=0.016", "price=$1/h"), quiet=True)
    seen: list[dict[str, float]] = []

    class Tracker:
        def log(self, values: dict[str, float], step: int) -> None:
            seen.append(values)

        def finish(self) -> None:
            pass

    assert trainer.trackers is not None
    monkeypatch.setattr(trainer.trackers, "_tracker", Tracker())
    trainer.fit()
    assert {"kwh", "cost", "co2_g", "watts"} <= seen[0].keys()
    assert all(isinstance(value, int | float) for value in seen[0].values())


def photos(folder: Path, count: int = 12) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_a_run_moves_to_another_machine(tmp_path: Path, tiny: Make) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    data = photos(here / "photos")
    words = [*CALM, f"data.path={data}", "data.mirror=true"]
    whole = Trainer(tiny("kimg=0.064", *words, f"out={tmp_path / 'whole'}"), quiet=True)
    whole.fit()
    Trainer(tiny("kimg=0.032", *words, f"out={here / 'run'}", "contributor=Ann"), quiet=True).fit()
    shutil.copytree(here, there)
    shutil.rmtree(here)

    with pytest.raises(LowVRAMError, match=str(data)) as lost:
        Trainer(tiny("kimg=0.064", f"resume={there / 'run'}", f"out={there / 'run'}"), quiet=True)
    assert "data.path=" in lost.value.remedy
    newest = checkpoint.candidates(there / "run" / "checkpoints")[0]
    other = ["micro_batch.D=4", "memory.state.G=host", "memory.activations.G=recompute", "contributor=Bob"]
    words = [f"resume={newest}", "kimg=0.064", f"data.path={there / 'photos'}", *other]
    done = run("lowvram.train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is not the one the run was begun with" not in done.stdout
    assert "; by Ann" in done.stdout and "Bob" in done.stdout
    assert largest_difference(saved(there / "run"), saved(tmp_path / "whole")) <= REORDERED
    assert not here.exists()
    assert Receipt.read(there / "run").totals().images == 64


def test_other_data_are_noticed(tmp_path: Path, tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    data = photos(tmp_path / "photos")
    first = Trainer(tiny("kimg=0.016", f"data.path={data}"), quiet=True)
    first.fit()
    data.rename(tmp_path / "moved")
    Trainer(tiny("resume=auto", f"data.path={tmp_path / 'moved'}"))
    assert "begun with" not in capsys.readouterr().out
    (tmp_path / "moved" / "3.png").unlink()
    Trainer(tiny("resume=auto", f"data.path={tmp_path / 'moved'}"))
    assert "begun with" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_processes_both_count(tmp_path: Path) -> None:
    import subprocess

    words = ["recipe=faces32", *TINY, "kimg=0.032", "out=run"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "lowvram.train", *words]
    done = subprocess.run(
        [sys.executable, *launch], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (kept,) = Receipt.read(tmp_path / "run").sessions
    assert kept.cards == 2 and kept.card_hours == pytest.approx(kept.seconds * 2 / 3600)
    assert lines_of(tmp_path / "run")[-1]["kwh"] <= kept.kwh
