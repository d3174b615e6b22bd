"""Marks in files: they are there in every format, an independent reader finds them, and the picture stays as it was."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram import __version__
from lowvram.errors import LowVRAMError
from lowvram.marks.mark import Mark, make_mark
from lowvram.marks.origin import COMPOSITE, GENERATED, Origin
from lowvram.marks.reading import look_into
from lowvram.marks.runs import check_grid, data_mark, names_of, origin_of_run, origin_of_weights
from lowvram.sampling.animation import save_animation
from lowvram.sampling.grids import grid_shape, save_grid, save_image
from lowvram.settings.base import MarkSettings

NASTY = "é<&\">'— 日本 😀"
HASH = "sha256:" + "ab" * 32


def mark(**changes: object) -> Mark:
    return Mark(origin=Origin(recipe=NASTY, checkpoint=HASH, step=4, seed=11, **changes))


def gradient(channels: int = 3, size: int = 64) -> torch.Tensor:
    return (
        torch.arange(size * size, dtype=torch.int64)
        .view(1, size, size)
        .expand(channels, -1, -1)
        .div(16)
        .to(torch.uint8)
    )


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_carries_it(tmp_path: Path, format: str, channels: int) -> None:
    path = tmp_path / f"a.{format}"
    save_image(gradient(channels), path, format=format, mark=mark(index=2))
    found = look_into(path)
    assert found.packet["source"] == GENERATED and found.packet["tool"] == f"lowvram {__version__}"
    assert (found.packet["recipe"], found.packet["checkpoint"]) == (NASTY, HASH)
    assert (found.packet["seed"], found.packet["index"], found.packet["version"]) == ("11", "2", __version__)
    assert found.texts["Software"] == f"lowvram {__version__}" and HASH in found.texts["Description"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_same_command_writes_the_same_bytes_and_the_pixels_stay(tmp_path: Path) -> None:
    for format in ("png", "jpg", "webp"):
        for name, given in (("a", mark()), ("b", mark()), ("plain", None)):
            save_image(gradient(), tmp_path / f"{name}.{format}", format=format, mark=given)
        assert (tmp_path / f"a.{format}").read_bytes() == (tmp_path / f"b.{format}").read_bytes()
        with Image.open(tmp_path / f"a.{format}") as a, Image.open(tmp_path / f"plain.{format}") as plain:
            assert np.array_equal(np.asarray(a), np.asarray(plain))
        assert not look_into(tmp_path / f"plain.{format}").anything


def test_a_png_has_its_texts_for_other_programs(tmp_path: Path) -> None:
    save_grid(gradient()[None].expand(4, -1, -1, -1), tmp_path / "a.png", mark=mark(images=4))
    with Image.open(tmp_path / "a.png") as image:
        own = json.loads(image.info["lowvram"])
    assert (own["digitalSourceType"], own["recipe"], own["images"]) == (GENERATED, NASTY, "4")


@pytest.mark.parametrize("format", ["webp", "mp4"])
def test_animations_carry_it(tmp_path: Path, format: str) -> None:
    if format == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / f"walk.{format}"
    frames = (gradient() + shift for shift in range(3))
    save_animation(frames, path, format=format, fps=3, mark=mark(images=1))
    assert look_into(path).packet["recipe"] == NASTY
    if format == "webp":
        with Image.open(path) as image:
            assert image.n_frames == 3


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
@pytest.mark.parametrize("format", ["png", "jpg", "webp", "mp4"])
def test_exiftool_finds_it(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"a.{format}"
    if format == "mp4":
        pytest.importorskip("imageio_ffmpeg")
        save_animation([gradient()] * 2, path, format="mp4", fps=2, mark=mark())
    else:
        save_image(gradient(), path, format=format, mark=mark())
    done = subprocess.run(["exiftool", "-j", "-G1", str(path)], capture_output=True, text=True, check=True)
    tags = json.loads(done.stdout)[0]
    assert tags["XMP-iptcExt:DigitalSourceType"] == GENERATED
    assert tags["XMP-xmp:CreatorTool"] == f"lowvram {__version__}"
    assert (tags["XMP-lowvram:Recipe"], tags["XMP-lowvram:Checkpoint"]) == (NASTY, HASH)
    assert tags["XMP-lowvram:Seed"] == 11
    assert not any("Warning" in name for name in tags), tags
    if format == "png":
        assert tags["PNG:Software"] == f"lowvram {__version__}" and NASTY in tags["PNG:Description"]


def test_a_watermark_is_in_the_pixels(tmp_path: Path) -> None:
    pytest.importorskip("imwatermark")
    picture = Image.effect_noise((256, 256), 60)
    image = torch.from_numpy(np.array(picture))[None]  # grey, which becomes coloured
    for format in ("png", "jpg", "webp"):
        save_image(image, tmp_path / f"a.{format}", format=format, mark=Mark(origin=Origin(), watermark=True))
        found = look_into(tmp_path / f"a.{format}").watermark
        assert found is not None and found.found


def test_a_failed_signature_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("c2pa")
    broken = Mark(origin=Origin(), certificate=tmp_path / "none.pem", key=tmp_path / "none.key")
    with pytest.raises(LowVRAMError, match="can't be read"):
        broken.check(64, 64)
    with pytest.raises(LowVRAMError, match="can't be read"):
        save_image(gradient(), tmp_path / "a.png", mark=broken)
    assert list(tmp_path.iterdir()) == []


def test_settings_say_what_is_done() -> None:
    assert make_mark(MarkSettings(enabled=False), Origin()) is None
    made = make_mark(MarkSettings(watermark=True, certificate="~/a.pem", key="b.pem"), Origin())
    assert made is not None and made.watermark and made.certificate == Path("~/a.pem").expanduser()
    with pytest.raises(LowVRAMError, match="needs both"):
        MarkSettings(certificate="a.pem")
    with pytest.raises(LowVRAMError, match="stands against"):
        MarkSettings(enabled=False, watermark=True)


def test_no_path_of_the_user_is_told(tmp_path: Path) -> None:
    (tmp_path / "fog.safetensors").write_bytes(b"x")
    origin = origin_of_weights([f" {tmp_path}/fog.safetensors "], "random")
    assert origin.weights == "fog.safetensors | random" and origin.checkpoint is not None
    assert str(tmp_path) not in origin.sentence() and names_of(["/home/me/secret/a"]) == "a"


def recipe(**changes: object) -> SimpleNamespace:
    data = SimpleNamespace(path=changes.pop("path", None))
    given = {"task": "stylegan2", "recipe": "r", "weights": None, "grid": 4, "resolution": 64, "mark": MarkSettings()}
    return SimpleNamespace(data=data, **(given | changes))


def test_what_runs_and_data_are_marked_as() -> None:
    assert origin_of_run(recipe(), ["G_ema"], None).checkpoint is None
    assert origin_of_run(recipe(task="autoencoder"), ["vae"], None).source == COMPOSITE
    drawn = data_mark(recipe(), 4)
    assert drawn is not None and drawn.origin.source.endswith("/algorithmicMedia") and not drawn.watermark
    assert data_mark(recipe(path="photos"), 4) is None
    assert data_mark(recipe(mark=MarkSettings(enabled=False)), 4) is None
    with pytest.raises(LowVRAMError, match="can't be read"):
        origin_of_run(recipe(), ["G_ema"], Path("none"))


def test_a_grid_too_small_for_the_watermark_is_said_before_training() -> None:
    pytest.importorskip("imwatermark")
    assert grid_shape(4) == (2, 2)
    check_grid(recipe(grid=16, mark=MarkSettings(watermark=True)))
    with pytest.raises(LowVRAMError, match="128x128"):
        check_grid(recipe(mark=MarkSettings(watermark=True)))
