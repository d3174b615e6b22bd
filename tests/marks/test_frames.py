"""Frames of films: which are looked at, and that a watermark in them is found."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram.identify import main as identify
from lowvram.marks import frames
from lowvram.marks.mark import Mark
from lowvram.marks.origin import Origin
from lowvram.marks.reading import look_into
from lowvram.sampling.animation import save_animation

cv2 = pytest.importorskip("cv2")
pytest.importorskip("imwatermark")


def walk(count: int = 9, size: int = 256, *, marked: bool) -> list[np.ndarray]:
    """Frames that wander over a picture: uint8 [size, size, 3]."""
    mark = Mark(origin=Origin(), watermark=marked)
    small = Image.fromarray(np.random.default_rng(0).integers(40, 216, (9, 9, 3), dtype=np.uint8))
    whole = np.asarray(small.resize((size + count, size + count), Image.Resampling.BICUBIC))
    return [mark.pixels(np.ascontiguousarray(whole[at : at + size, at : at + size])) for at in range(count)]


def written(pictures: list[np.ndarray], path: Path) -> Path:
    """As MPEG-4, part 2, which OpenCV writes without any other library."""
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 9, (width, height))
    assert writer.isOpened()
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    return path


@pytest.mark.parametrize("format", ["webp", "mp4", pytest.param("mp4v", marks=pytest.mark.slow)])
@pytest.mark.parametrize("marked", [True, False])
def test_the_watermark_of_a_film_is_found(
    tmp_path: Path, format: str, marked: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"walk.{format[:4].removesuffix('v')}"
    if format == "mp4v":
        written(walk(marked=marked), path)
    else:
        if format == "mp4":
            pytest.importorskip("imageio_ffmpeg")
        tensors = (torch.from_numpy(picture).permute(2, 0, 1) for picture in walk(marked=marked))
        save_animation(tensors, path, format=format, fps=9)
    found = look_into(path)
    assert found.notes == [] and found.watermark is not None
    assert (found.watermark.frames, found.watermark.found, found.anything) == (4, marked, marked)
    capfd.readouterr()
    assert identify([str(path)]) == 0
    said = capfd.readouterr()
    assert ("at 256x256 in 4 frames together; measured:" in said.out) == marked
    assert said.err == ""


def test_frames_are_those_of_the_film_in_their_order(tmp_path: Path) -> None:
    greys = [np.full((64, 64, 3), 10 + 20 * index, np.uint8) for index in range(10)]
    images = [Image.fromarray(grey) for grey in greys]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True)
    with Image.open(tmp_path / "a.webp") as image:
        found = frames.of_image(image)
    assert [int(frame[0, 0, 0]) for frame in found] == [10, 70, 130, 190]
    found = frames.of_mp4(written(greys, tmp_path / "a.mp4"))
    assert [round(int(frame[0, 0, 0]), -1) for frame in found] == [10, 70, 130, 190]
    with Image.open(tmp_path / "a.webp") as image:
        image.save(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert len(frames.of_image(image)) == 1


@pytest.mark.parametrize(
    ("count", "pixels", "places"),
    [
        (1, 2**18, [0]),
        (2, 2**18, [0, 1]),
        (193, 2**18, [0, 64, 128, 192]),
        (10**9, 1, [0, 2543, 5085, 7628]),  # frames of no pixels cost time too
        (10**9, 50_000_000, [0, 9]),  # as many as memory is to hold
        (50, 100_000_000, [0]),
    ],
)
def test_how_far_into_a_film_one_looks(count: int, pixels: int, places: list[int]) -> None:
    assert frames._places(count, pixels) == places


def test_a_film_that_is_broken_or_of_too_many_pixels_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(walk(marked=False), tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert "watermark: no frame can be decoded" in look_into(tmp_path / "cut.mp4").notes
    monkeypatch.setattr(frames, "MOST_PIXELS", 256 * 255)
    assert "watermark: not looked for in 256x256 pixels" in look_into(tmp_path / "a.mp4").notes
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert any("not looked for; that needs pip install" in note for note in look_into(tmp_path / "a.mp4").notes)


def test_nothing_else_is_said_of_a_broken_film(tmp_path: Path) -> None:
    """In a process of its own: libraries read how much they are to say when they are loaded."""
    whole = written(walk(marked=False), tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-m", "lowvram.identify", str(tmp_path / "cut.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no frame can be decoded" in done.stdout
    assert done.stderr == ""


def test_names_that_are_not_utf8_end_nothing(tmp_path: Path) -> None:
    film = written(walk(marked=False), tmp_path / "a.mp4")
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff.mp4"))
    try:
        film.rename(other)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert "watermark: not looked for in a film whose name is not UTF-8" in look_into(other).notes


def test_a_jpeg_with_a_smaller_picture_behind_it_is_looked_at_alone(tmp_path: Path) -> None:
    marked, small = (Image.fromarray(frame) for frame in (walk(1, 512, marked=True)[0], walk(1, 64, marked=False)[0]))
    marked.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[small], quality=95)
    found = look_into(tmp_path / "two.jpg")
    assert found.watermark is not None and found.watermark.frames == 1 and not found.notes


def test_a_broken_frame_hides_no_mark_of_the_first(tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(frame) for frame in walk(2, 512, marked=True))
    first.save(tmp_path / "a.png", save_all=True, append_images=rest)
    data = bytearray((tmp_path / "a.png").read_bytes())
    at = data.index(b"acTL")
    data[at + 4 : at + 8] = (50).to_bytes(4, "big")  # frames that are not there
    data[at + 12 : at + 16] = zlib.crc32(data[at : at + 12]).to_bytes(4, "big")
    (tmp_path / "b.png").write_bytes(data)
    found = look_into(tmp_path / "b.png").watermark
    assert found is not None and found.found
