"""What signals do to a training: nothing that was finished is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from commands import start
from tiny import TINY

from lowvram import LowVRAMError, Trainer, checkpoint, signals
from lowvram.receipt.ledger import Receipt
from lowvram.signals import StopRequest

Make = Callable[..., object]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_sigterm_never_ends_at_once() -> None:
    said: list[str] = []
    stop = StopRequest(said.append)
    with stop.listening():
        for _ in range(3):
            send(signal.SIGTERM)
    assert stop.asked and len(said) == 1 and "unsaved" not in said[0]


def test_ctrl_c_twice_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_SECONDS", 0.05)
    stop = StopRequest(lambda _: None)
    with stop.listening():
        send(signal.SIGINT)
        send(signal.SIGINT)  # the same, passed on by a launcher
        assert stop.asked
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_while_saving_it_takes_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_SECONDS", -1.0)
    said: list[str] = []
    stop = StopRequest(said.append)
    with stop.listening():
        send(signal.SIGINT)
        with stop.saving():
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    assert len(said) == 2 and "a moment" in said[1]


def test_a_signal_within_a_print_does_not_end_training() -> None:
    def refuse(_: str) -> None:
        raise RuntimeError("reentrant call")

    stop = StopRequest(refuse)
    with stop.listening():
        send(signal.SIGTERM)
    assert stop.asked


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("first step", signal.SIGTERM),
        ("logging", signal.SIGTERM),
        ("saving", signal.SIGTERM),
        ("saving", signal.SIGINT),
        ("last save", signal.SIGTERM),
    ],
)
def test_no_step_is_lost_at_any_moment(tiny: Make, monkeypatch: pytest.MonkeyPatch, moment: str, number: int) -> None:
    monkeypatch.setattr(signals, "_SAME_SECONDS", -1.0)  # any second one is of the user's own
    trainer = Trainer(tiny("kimg=0.064", "snapshot_kimg=0.032", "keep=9"), quiet=True)
    sent = []

    def sending(inner: Callable[..., object], at_step: int) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if trainer.step == at_step and len(sent) < 2:
                twice = moment in ("saving", "last save")
                for _ in range(1 + twice):
                    sent.append(number)
                    send(number)
            return inner(*arguments, **named)

        return call

    if moment == "first step":
        monkeypatch.setattr(trainer, "train_step", sending(trainer.train_step, 0))
    elif moment == "logging":
        monkeypatch.setattr(trainer.run, "log", sending(trainer.run.log, 2))
    else:
        at = 4 if moment == "saving" else 8
        monkeypatch.setattr(checkpoint, "_save_tensors", sending(checkpoint._save_tensors, at))
    trainer.fit()
    assert sent
    newest = checkpoint.latest_good(trainer.run.checkpoints)
    assert newest is not None and newest.name == f"step-{trainer.step:08d}"
    ended = {"first step": 1, "logging": 3, "saving": 5, "last save": 8}[moment]
    assert trainer.step == ended
    if ended < 8:
        Trainer(tiny("kimg=0.064", "resume=auto"), quiet=True).fit()
    check_whole(trainer.run.folder, 8)


def check_whole(run: Path, steps: int, batch: int = 8) -> None:
    """Every step was taken once: in the metrics, which grow, and in the receipt."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = [line["step"] for line in lines]
    assert taken == sorted(set(taken)) and taken[-1] == steps
    assert all(a["kwh"] <= b["kwh"] and a["seconds"] < b["seconds"] for a, b in pairwise(lines))
    receipt = Receipt.read(run)
    ends = [(s.first_image, s.last_image) for s in receipt.sessions]
    assert ends[0][0] == 0 and ends[-1][1] == steps * batch
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    assert receipt.totals().images == steps * batch
    assert receipt.totals().kwh >= lines[-1]["kwh"]


@pytest.mark.slow
def test_sigterm_to_the_command_at_several_moments(tmp_path: Path) -> None:
    run, steps = tmp_path / "run", 24
    words = ["recipe=faces32", *TINY, "out=run", "resume=auto", f"kimg={steps * 8 / 1000}", "snapshot_kimg=0.016"]

    def one(wait: Callable[[], bool], signals_: int) -> tuple[int, str, str]:
        process = start("lowvram.train", *words, "data.workers=1", cwd=tmp_path)
        _until(wait, process)
        for _ in range(signals_):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        out, err = process.communicate(timeout=240)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    code, _, _ = one(lambda: (run / "reals.png").exists(), 1)  # in the greeting, or the first step after it
    assert code in (0, -signal.SIGTERM)
    begun = _steps(run)
    code, out, _ = one(lambda: _steps(run) >= begun + 4, 1)
    assert code == 0 and "stopped and saved" in out
    code, out, _ = one(lambda: any((run / "checkpoints").glob("*.partial")), 3)
    assert code == 0
    before = _steps(run)
    assert checkpoint.candidates(run / "checkpoints")[0].name == f"step-{before:08d}"
    process = start("lowvram.train", *words, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    check_whole(run, steps)


def _steps(run: Path) -> int:
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def _until(ready: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    for _ in range(60_000):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.002)
    raise TimeoutError


@pytest.mark.slow
def test_ctrl_c_before_training_is_no_traceback(tmp_path: Path) -> None:
    process = start("lowvram.train", "recipe=faces32", *TINY, "out=run", "kimg=10", cwd=tmp_path)
    _until(lambda: (tmp_path / "run" / "recipe.yaml").exists(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 130)  # 0 where the first step had begun
    assert "Traceback" not in err


def test_a_failure_is_counted_too(tiny: Make) -> None:
    trainer = Trainer(tiny("kimg=10"), quiet=True)
    phase = trainer.task.phases[0]
    plain = phase.loss

    def broken(micro: object) -> object:
        if trainer.step == 3:
            raise LowVRAMError("lost", "find it")
        return plain(micro)

    phase.loss = broken
    with pytest.raises(LowVRAMError, match="lost"):
        trainer.fit()
    (kept,) = Receipt.read(trainer.run.folder).sessions
    assert kept.last_image == 24 and kept.joules > 0
