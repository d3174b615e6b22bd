"""`python -m lowvram.data`: what it writes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encode, number_of, numbered

from lowvram.data import open_dataset, prepare
from lowvram.data.prepare import PrepareOptions, PrepareReport
from lowvram.errors import LowVRAMError


def run(source: Path | str, dest: Path, **settings) -> PrepareReport:
    return prepare.main(
        PrepareOptions(**{"source": str(source), "dest": str(dest), "resolution": 16, "workers": 0, **settings})
    )


def leftovers(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if "partial" in file.name]


def test_layout_and_pixels(folder, tmp_path, capsys):
    dest = tmp_path / "new" / "out.zip"
    assert run(folder(5), dest).written == 5
    with zipfile.ZipFile(dest) as archive:
        assert archive.namelist() == [f"00000/img{i:08d}.png" for i in range(5)]
    again = open_dataset(dest, resolution=16)
    assert [number_of(again[i].numpy()) for i in range(5)] == [0, 1, 2, 3, 4]
    assert "5 images of 16x16" in capsys.readouterr().out


def test_crops_and_resizes(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wide.png").write_bytes(encode(wide))
    run(tmp_path / "in", tmp_path / "out.zip")
    image = open_dataset(tmp_path / "out.zip", resolution=16)[0]
    assert image.shape == (3, 16, 16) and (image == 255).all()


def test_labels_come_along(tmp_path):
    for name in ("dog/0.png", "cat/0.png", "cat/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(numbered(0))
    run(tmp_path / "in", tmp_path / "out.zip", labels=True)
    again = open_dataset(tmp_path / "out.zip", resolution=16, labels=True)
    assert again.labels.tolist() == [0, 0, 1] and again.class_names == ["cat", "dog"]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["labels"][2] == ["00000/img00000002.png", 1]


@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_formats(folder, tmp_path, format):
    run(folder(2), tmp_path / "out.zip", format=format)
    again = open_dataset(tmp_path / "out.zip", resolution=16)
    assert again.file_name(0) == f"00000/img00000000.{format}"
    assert abs(number_of(again[1].numpy()) - 1) <= (12 if format == "jpg" else 0)


def test_bad_files_are_left_out_and_listed(folder, tmp_path, capsys):
    source = folder(4)
    (source / "0001.png").write_bytes(b"x")
    (source / "0002.png").write_bytes((source / "0002.png").read_bytes()[:-40])
    report = run(source, tmp_path / "out.zip")
    assert report.written == 2 and [line.split(":")[0] for line in report.bad] == ["0001.png", "0002.png"]
    said = capsys.readouterr().err
    assert "left out 0001.png: not a PNG" in said and "2 bad files were left out" in said
    again = open_dataset(tmp_path / "out.zip", resolution=16)
    assert [number_of(again[i].numpy()) for i in range(2)] == [0, 3]
    with pytest.raises(LowVRAMError, match=r"0001\.png"):
        run(source, tmp_path / "other.zip", on_bad_file="error")
    assert not (tmp_path / "other.zip").exists() and not leftovers(tmp_path)


def test_enlarged_images_are_counted(folder, tmp_path, capsys):
    assert run(folder(3), tmp_path / "out.zip", resolution=32).enlarged == 3
    assert "3 images were smaller than 32x32" in capsys.readouterr().out


def test_processes_change_nothing(folder, tmp_path):
    source = folder(100)
    run(source, tmp_path / "one.zip", workers=0)
    run(source, tmp_path / "two.zip", workers=2)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_builtin_and_max_images(tmp_path):
    assert run("builtin", tmp_path / "out.zip", max_images=7, labels=True).written == 7
    assert open_dataset(tmp_path / "out.zip", resolution=16, labels=True).class_names[0] == "blue"


def test_existing_dest(folder, tmp_path):
    source = folder(2)
    dest = tmp_path / "out.zip"
    dest.write_bytes(b"precious")
    with pytest.raises(LowVRAMError, match="exists"):
        run(source, dest)
    assert dest.read_bytes() == b"precious"
    run(source, dest, overwrite=True)
    assert len(open_dataset(dest, resolution=16)) == 2
    with pytest.raises(LowVRAMError, match="is the source itself"):
        run(dest, dest, overwrite=True)


def test_all_bad(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"x")
    with pytest.raises(LowVRAMError, match="none of the 1 images"):
        run(tmp_path / "in", tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists() and not leftovers(tmp_path)


def test_full_disk_leaves_the_old_zip(folder, tmp_path, monkeypatch):
    dest = tmp_path / "out.zip"
    dest.write_bytes(b"precious")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(LowVRAMError, match=r"out.zip cannot be written: No space left"):
        run(folder(3), dest, overwrite=True)
    assert dest.read_bytes() == b"precious" and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"format": "gif"}, "format=gif"),
        ({"workers": -1}, "workers=-1"),
        ({"on_bad_file": "ask"}, "on_bad_file=ask"),
        ({"dest": "out"}, "does not end in .zip"),
        ({"resolution": 0}, "resolution=0"),
        ({"source": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_wrong_options(folder, tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowVRAMError) as caught:
        run(**{"source": folder(1), "dest": Path("out.zip"), **wrong})
    assert said in caught.value.problem and caught.value.remedy


def command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lowvram.data", *words], capture_output=True, text=True, cwd=cwd)


def test_command(folder, tmp_path):
    source = folder(3)
    done = command(f"source={source}", f"dest={tmp_path}/out.zip", "resolution=16")
    assert done.returncode == 0, done.stderr
    assert len(open_dataset(tmp_path / "out.zip", resolution=16)) == 3
    again = command(f"source={source}", f"dest={tmp_path}/out.zip", "resolution=16")
    assert again.returncode == 2 and "overwrite=true" in again.stderr and "Traceback" not in again.stderr
    typo = command("sorce=x", "dest=y.zip", "resolution=16")
    assert typo.returncode == 2 and "source" in typo.stderr


def test_help_lists_every_option():
    said = command("--help")
    assert said.returncode == 0
    assert all(name + "=" in said.stdout for name in PrepareOptions.__dataclass_fields__)


def test_help_needs_no_torch():
    code = "import sys, lowvram.data.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interrupt_leaves_nothing(tmp_path):
    words = ["source=builtin", f"dest={tmp_path}/out.zip", "resolution=128", "workers=2"]
    job = subprocess.Popen(
        [sys.executable, "-m", "lowvram.data", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not leftovers(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(job.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
        _, said = job.communicate(timeout=20)
    finally:
        job.kill()
    assert job.returncode == 130 and "nothing was written" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
