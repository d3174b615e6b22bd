"""The watermark is found where it is, after what files go through, and not where it is not."""

import io

import numpy as np
import pytest
from PIL import Image

from lowvram.errors import LowVRAMError
from lowvram.marks import watermark

pytest.importorskip("imwatermark")


def scene(size: int = 256, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges, as of a picture: uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 216, (8, 8, 3), dtype=np.uint8))
    picture = np.array(small.resize((size, size), Image.Resampling.BICUBIC))
    picture[size // 4 : size // 2, size // 3 : size // 2] = (60, 90, 160)
    return picture


def saved(pixels: np.ndarray, format: str, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_it_is_found_in_what_was_marked_alone() -> None:
    picture = scene()
    marked = watermark.embed(picture)
    assert marked.shape == picture.shape and marked.dtype == np.uint8
    assert 0 < np.abs(marked.astype(int) - picture).mean() < 4
    found, other = watermark.detect(marked), watermark.detect(picture)
    assert found is not None and found.found and found.size == (256, 256)
    assert other is not None and not other.found and other.score < 4


@pytest.mark.parametrize(("format", "quality"), [("JPEG", 90), ("JPEG", 75), ("WEBP", 90)])
def test_it_survives_the_save_formats(format: str, quality: int) -> None:
    assert watermark.score(saved(watermark.embed(scene()), format, quality)) > watermark.THRESHOLD


def test_it_survives_being_made_smaller() -> None:
    half = Image.fromarray(watermark.embed(scene(512))).resize((256, 256), Image.Resampling.LANCZOS)
    reading = watermark.detect(np.asarray(half))
    assert reading is not None and reading.found and reading.size == (512, 512)


def test_blank_paper_takes_nothing_from_what_is_drawn_on_it() -> None:
    picture = np.full((256, 256, 3), 255, np.uint8)
    picture[64:256, 40:216] = scene()[64:256, 40:216]
    assert watermark.score(watermark.embed(picture)) > watermark.THRESHOLD


@pytest.mark.slow
def test_frames_are_looked_at_once_together() -> None:
    """Much alike or not, they are no more likely to agree by chance; and marked ones say more than one of them does."""
    unlike = [np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8) for seed in range(4)]
    for frames in (unlike, [scene()] * 4, [np.roll(scene(), 8 * shift, axis=1) for shift in range(4)]):
        reading = watermark.detect(*frames)
        assert reading is not None and reading.frames == 4 and not reading.found and reading.score < 4
    marked = [saved(watermark.embed(scene(seed=seed)), "JPEG", 40) for seed in range(4)]
    alone = [watermark.score(frame) for frame in marked]
    assert watermark.score(*marked) > np.mean(alone) + 1
    assert watermark.score(scene(), scene()) == pytest.approx(watermark.score(scene()))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_picture_is_not_taken_for_a_marked_one(value: int) -> None:
    assert abs(watermark.score(np.full((256, 264, 3), value, np.uint8))) < watermark.THRESHOLD


def test_too_small_is_said_and_none_is_read() -> None:
    with pytest.raises(LowVRAMError, match="256x256 or more, and this one has 32x64"):
        watermark.check(32, 64)
    with pytest.raises(LowVRAMError, match="255x256"):
        watermark.embed(np.zeros((256, 255, 3), np.uint8))
    assert watermark.detect(np.zeros((32, 32, 3), np.uint8)) is None
    assert watermark.detect(np.zeros((2000, 4, 3), np.uint8)) is None


def test_chance_is_as_rare_as_the_threshold_says() -> None:
    """Of bits by chance one in 800,000 is over it, and with a threshold of 2 one in 45."""
    rng = np.random.default_rng(0)
    patterns = np.array([rng.permutation(watermark.pattern()) for _ in range(5000)])
    scores = watermark.agreement(rng.random(64 * 30).round(), patterns)
    assert (scores >= watermark.THRESHOLD).sum() <= 1
    assert 0.01 < (scores >= 2).mean() < 0.04


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imwatermark", None)
    with pytest.raises(LowVRAMError, match=r"lowvram\[watermark\]"):
        watermark.check(256, 256)
