"""`python -m lowvram.identify`, and that what train and sample write can be identified."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import run as command
from PIL import Image
from tiny import TINY
from tiny_pipelines import make_pipeline

from lowvram import Trainer, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.identify import NOTHING, describe, main
from lowvram.marks import digests
from lowvram.marks.credentials import Credentials
from lowvram.marks.origin import COMPOSITE, GENERATED
from lowvram.marks.reading import Found, look_into
from lowvram.marks.watermark import Reading
from lowvram.run import Run
from lowvram.sample import SampleOptions
from lowvram.sample import main as sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which no test changes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(load_recipe("faces32", [*TINY, f"out={folder}", "kimg=0.016"]), quiet=True).fit()
    return folder


def test_each_image_of_a_run_names_the_checkpoint_that_made_it(trained: Path, tmp_path: Path) -> None:
    checkpoint = Run.open(trained).find_checkpoint()
    weights = digests.of_files([("G_ema", checkpoint / "G_ema.safetensors")])
    assert digests.of_checkpoint(checkpoint, ["G_ema"]) == weights
    grids = {path.name: look_into(path).packet for path in trained.glob("fakes_*.png")}
    assert any(packet.get("checkpoint") == weights for packet in grids.values())
    assert all(packet["source"] == GENERATED and packet["recipe"] == "faces32" for packet in grids.values())
    assert look_into(trained / "reals.png").packet["source"].endswith("/algorithmicMedia")

    for format in ("png", "jpg", "webp"):
        out = tmp_path / format
        sample(SampleOptions(run=str(trained), n=2, seed=5, out=str(out), format=format))
        names = sorted(p.name for p in out.iterdir())
        assert names == [f"grid.{format}", f"seed0005_00000.{format}", f"seed0005_00001.{format}"]
        packet = look_into(out / f"seed0005_00001.{format}").packet
        assert (packet["checkpoint"], packet["seed"], packet["index"]) == (weights, "5", "1")
        assert packet["step"] == str(int(checkpoint.name.removeprefix("step-")))
        assert look_into(out / f"grid.{format}").packet["images"] == "2"


@pytest.mark.parametrize("hub", [False, True])
def test_of_a_folder_the_files_that_were_read_are_named_and_hashed(tmp_path: Path, hub: bool) -> None:
    folder = make_pipeline(tmp_path / "tiny", "sd1")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    read = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    done = subprocess.run(["sha256sum", *read], cwd=folder, capture_output=True, check=True)
    expected = f"sha256:{hashlib.sha256(done.stdout).hexdigest()}"
    (folder / "safety_checker").mkdir()
    for beside in ("vae/diffusion_pytorch_model.fp16.safetensors", "unet/x.bin", "safety_checker/model.safetensors"):
        (folder / beside).write_bytes(b"never read")
    if hub:
        (tmp_path / "models--tiny" / "snapshots").mkdir(parents=True)
        folder.rename(tmp_path / "models--tiny" / "snapshots" / "abc")
        folder = tmp_path / "models--tiny"
    sample(SampleOptions(weights=str(folder), n=1, steps=1, device="cpu", out=str(tmp_path / "out")))
    packet = look_into(tmp_path / "out" / "grid.png").packet
    assert packet["checkpoint"] == expected
    assert packet["weights"] == f"{folder.name} ({', '.join(read)})" and "unet/diffusion_pytorch_model.fp16" in read[1]


def test_marks_are_off_by_one_setting(tiny: Callable[..., object], tmp_path: Path) -> None:
    Trainer(tiny("kimg=0.008", "mark.enabled=false"), quiet=True).fit()
    sample(SampleOptions(run=str(tmp_path / "run"), n=1, out=str(tmp_path / "as_the_run")))
    sample(SampleOptions(run=str(tmp_path / "run"), n=1, out=str(tmp_path / "named"), mark=True))
    sample(SampleOptions(run=str(tmp_path / "run"), n=1, out=str(tmp_path / "off"), mark=False))
    for path in (*tmp_path.glob("run/*.png"), *tmp_path.glob("as_the_run/*"), *tmp_path.glob("off/*")):
        assert not look_into(path).anything, path
        with Image.open(path) as image:
            assert not image.info, path
    assert look_into(tmp_path / "named" / "grid.png").anything


def test_a_run_from_before_there_were_marks_is_sampled_with_them(trained: Path, tmp_path: Path) -> None:
    recipe = Path(shutil.copytree(trained, tmp_path / "run")) / "recipe.yaml"
    lines = recipe.read_text().splitlines()
    at = lines.index("mark:")
    rest = next(i for i in range(at + 1, len(lines)) if not lines[i].startswith(" "))
    recipe.write_text("\n".join(lines[:at] + lines[rest:]))
    sample(SampleOptions(run=str(recipe.parent), n=1, out=str(tmp_path / "out")))
    assert look_into(tmp_path / "out" / "grid.png").packet["recipe"] == "faces32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "mp4"}, "format=mp4 is not known"),
        ({"format": "png", "interpolate": True}, "format=png with interpolate=true"),
        ({"quality": 90}, "quality=90 is for jpg and webp"),
        ({"quality": 0, "format": "jpg"}, "quality=0"),
        ({"certificate": "a.pem"}, "needs both"),
        ({"mark": False, "watermark": True}, "stands against"),
    ],
)
def test_wrong_options_of_sample_are_named(options: dict, message: str) -> None:
    with pytest.raises(LowVRAMError, match=message):
        SampleOptions(run="none", **options)


def test_a_watermark_that_has_no_room_is_said_before_sampling(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("imwatermark")
    with pytest.raises(LowVRAMError, match="this one has 16x16"):
        sample(SampleOptions(run=str(trained), n=1, out=str(tmp_path / "out"), watermark=True))
    assert not (tmp_path / "out").exists()


def test_what_is_found_is_told_with_its_certainty() -> None:
    assert describe(Found(notes=["watermark: x"])) == [NOTHING, "watermark: x"]
    claim = Found(packet={"source": COMPOSITE, "tool": "Other 1", "recipe": "r", "images_seen": "9"})
    assert describe(claim) == [
        "metadata: made by a trained model of another image, says Other 1; a claim, not a proof",
        "  recipe r, images seen 9",
    ]
    assert describe(Found(watermark=Reading(score=2.0, size=(256, 256)))) == [NOTHING]
    (line,) = describe(Found(watermark=Reading(score=7.5, size=(512, 256))))
    assert "7.5 of 8 standard deviations at 512x256" in line and "no false alarm in" in line
    (line,) = describe(Found(watermark=Reading(score=7.5, size=(512, 256), frames=4)))
    assert "at 512x256 in 4 frames together; measured: no false alarm in 80 MP4s" in line
    signed = Credentials(issuer="A painter", tool="lowvram 1", source=GENERATED, faults=(), trusted=False)
    (line,) = describe(Found(credentials=signed))
    assert "signed by A painter" in line and "hold, the issuer is checked against no trust list" in line
    edited = replace(signed, source=COMPOSITE, actions=("c2pa.opened", "c2pa.edited"))
    (line,) = describe(Found(credentials=edited))
    assert line.startswith("C2PA: by lowvram 1, made by a trained model of another image (opened, edited); signed by A")
    broken = Credentials(issuer="A", tool="", source=None, faults=("assertion.dataHash.mismatch",), trusted=False)
    (line,) = describe(Found(credentials=broken))
    assert "does NOT hold: assertion.dataHash.mismatch" in line


def test_files_and_folders_json_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "json=1.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert main([str(tmp_path), "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(entry["file"]).name for entry in told] == ["a.png", "json=1.png"]
    assert not any(entry["anything"] for entry in told)
    assert main([str(tmp_path / "notes.txt"), str(tmp_path / "json=1.png")]) == 2
    out = capsys.readouterr().out
    assert "can't be read" in out and NOTHING in out


def test_wrong_words_are_named(tmp_path: Path) -> None:
    for words, message in (
        ([], "No file was given"),
        (["json=true"], "No file was given"),
        ([str(tmp_path)], "holds no image"),
        ([str(tmp_path / "none.png")], "is not there"),
        (["json=maybe", "x"], "json=maybe"),
    ):
        with pytest.raises(LowVRAMError, match=message):
            main(words)


def test_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a\x1b[2J.png").write_bytes(b"")
    assert main([str(tmp_path)]) == 2
    assert "\x1b" not in capsys.readouterr().out


def test_the_command_as_a_user_calls_it(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = command("lowvram.identify", "a.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and NOTHING in done.stdout
    done = command("lowvram.identify", "none.png", cwd=tmp_path)
    assert done.returncode == 2 and "none.png is not there" in done.stderr and "Traceback" not in done.stderr
