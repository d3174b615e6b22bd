"""Animations loop, last as long as they should, and what can't be written is refused before it is made."""

import builtins
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowvram.errors import LowVRAMError
from lowvram.sampling import animation


def frames(count: int) -> list[torch.Tensor]:
    return [torch.full((3, 32, 48), 255 * i // (count - 1), dtype=torch.uint8) for i in range(count)]


def test_webp_loops_for_ever_at_its_speed(tmp_path: Path) -> None:
    path = tmp_path / "walk.webp"
    animation.save_animation(iter(frames(7)), path, format="webp", fps=24)
    durations = []
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (7, (48, 32), 0)
        for i in range(7):
            image.seek(i)
            image.load()
            durations.append(image.info["duration"])
            assert abs(image.convert("RGB").getpixel((20, 20))[0] - 255 * i // 6) <= 6
    assert abs(sum(durations) - 7000 / 24) <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["walk.webp"]


def test_mp4_holds_every_frame(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "walk.mp4"
    animation.save_animation(iter(frames(9)), path, format="mp4", fps=12)
    with imageio.get_reader(path) as video:
        assert video.count_frames() == 9
        assert video.get_meta_data()["size"] == (48, 32) and video.get_meta_data()["fps"] == 12


def test_mp4_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("imageio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="imageio")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(LowVRAMError, match=r"imageio.*\n.*lowvram\[video\]"):
        animation.check_animation("mp4", 10, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("gif", 10, 64, 64), "format=gif"), (("webp", 2, 64, 20000), "20000x64"), (("webp", 1000, 2048, 2048), "GiB")],
)
def test_what_cannot_be_written_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(LowVRAMError, match=message):
        animation.check_animation(*arguments)


def test_a_failed_animation_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield from frames(2)
        raise LowVRAMError("the generator gives NaN")

    with pytest.raises(LowVRAMError):
        animation.save_animation(broken(), tmp_path / "walk.webp", format="webp", fps=10)
    assert list(tmp_path.iterdir()) == []
