"""Sizes and cuts of images as SDXL is told them, against pictures that say where each pixel comes from."""

import io

import numpy as np
import pytest
from PIL import Image

from lowvram.data import open_dataset
from lowvram.data import size_ids as size_ids_file
from lowvram.data.bucketed import BucketedSet
from lowvram.data.latents import Variants, build
from lowvram.data.size_ids import original_sizes, size_ids

PLAIN = Variants(mirror=False, crops=1)


def ramp(width, height, orientation=None):
    """A PNG whose red tells the column and whose green the row, each as a share of 255."""
    columns = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    pixels = np.stack([columns, rows, np.zeros_like(rows)], axis=2).round().astype(np.uint8)
    out, options = io.BytesIO(), {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    for name, data in {
        "a.png": ramp(300, 100),  # wide
        "b.png": ramp(100, 200),  # tall
        "c.png": ramp(64, 64),
        "d.png": ramp(20, 30),  # smaller than the resolution
        "e.png": ramp(100, 300, orientation=6),  # upright it is 300 wide
        "f.png": b"no image",
    }.items():
        (place / name).write_bytes(data)
    return place


def test_squares_are_cut_from_the_middle_of_the_resized_image(folder):
    images = open_dataset(folder, resolution=64)
    ids = size_ids(images, variants=PLAIN)
    assert ids.shape == (6, 1, 6) and ids.dtype == np.int64
    assert ids[:, 0].tolist() == [
        [100, 300, 0, 64, 64, 64],  # resized to 192x64, of which columns 64 to 127 are left
        [200, 100, 32, 0, 64, 64],
        [64, 64, 0, 0, 64, 64],
        [30, 20, 16, 0, 64, 64],  # 64x96
        [100, 300, 0, 64, 64, 64],
        [64, 64, 0, 0, 64, 64],  # nothing is known of it
    ]


def columns_and_rows(picture, size):
    """Left and top of a picture [h, w, 3] of a `ramp` within the image of `size` (width, height) as it was resized."""
    shares = picture[:, :, :2].astype(float).mean(axis=(0, 1)) / 255  # of its middle
    width, height = size
    return shares[0] * width - picture.shape[1] / 2, shares[1] * height - picture.shape[0] / 2


@pytest.mark.parametrize("bucketed", [False, True])
def test_they_are_where_the_pixels_say(folder, bucketed):
    (folder / "f.png").unlink()
    (folder / "e.png").unlink()  # its ramp is turned with it
    images = open_dataset(folder, resolution=64)
    source = BucketedSet(images, multiple=16) if bucketed else images
    ids = size_ids(source, variants=Variants(mirror=True, crops=1))
    for index in range(len(images)):
        picture = source.load(index).pixels
        for variant, pixels in enumerate((picture, picture[:, ::-1])):
            height, width, top, left, *size = ids[index, variant].tolist()
            assert size == list(pixels.shape[:2])
            scale = max(size[0] / height, size[1] / width)
            if variant == 1:
                pixels = pixels.copy()
                pixels[:, :, 0] = 255 - pixels[:, :, 0]  # the mirrored image's own columns
            at = columns_and_rows(pixels, (width * scale, height * scale))
            assert abs(at[0] - left) <= 1.5 and abs(at[1] - top) <= 1.5, (index, variant)
    if bucketed:
        assert len(np.unique(ids[:, 0, 4:], axis=0)) > 1


def test_further_crops_are_where_the_latents_are_cut(folder):
    """Each picture is its own latents, so that what is kept can be read back."""
    (folder / "f.png").unlink()
    (folder / "e.png").unlink()
    images, wide = open_dataset(folder, resolution=32), open_dataset(folder, resolution=48)
    variants = Variants(mirror=True, crops=3)
    kept = build(
        folder.parent / "latents", images, lambda x: x.float(), key={}, variants=variants, larger=wide, progress=False
    )
    ids = size_ids(kept, variants=variants, larger=48)
    assert ids.shape == (4, 6, 6)
    for index in range(len(images)):
        for crop in range(3):
            for mirrored in (False, True):
                pixels = kept.moments(index, mirrored, crop).transpose(1, 2, 0).astype(np.uint8)
                height, width, top, left, *size = ids[index, variants.number(mirrored, crop)].tolist()
                assert size == [32, 32]
                scale = (48 if crop else 32) / min(height, width)
                if mirrored:
                    pixels[:, :, 0] = 255 - pixels[:, :, 0]
                at = columns_and_rows(pixels, (width * scale, height * scale))
                assert abs(at[0] - left) <= 1.5 and abs(at[1] - top) <= 1.5, (index, crop, mirrored)
    assert len({tuple(ids[0, v, 2:4].tolist()) for v in range(6)}) > 3


def test_headers_are_read_once(folder, cache, monkeypatch):
    images = open_dataset(folder, resolution=64)
    sizes = original_sizes(images)
    assert sizes.tolist() == [[300, 100], [100, 200], [64, 64], [20, 30], [300, 100], [0, 0]]
    monkeypatch.setattr(size_ids_file, "read_sizes", lambda images: pytest.fail("they were read again"))
    assert np.array_equal(original_sizes(open_dataset(folder, resolution=64)), sizes)
    monkeypatch.undo()
    monkeypatch.setenv("LOWVRAM_CACHE", str(cache))
    (folder / "c.png").write_bytes(ramp(65, 64))
    assert original_sizes(open_dataset(folder, resolution=64))[2].tolist() == [65, 64]
    for file in cache.rglob("*.npy"):
        file.write_bytes(b"damaged")
    assert original_sizes(open_dataset(folder, resolution=64))[2].tolist() == [65, 64]


def test_a_cache_that_cannot_be_written_costs_only_time(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    assert len(original_sizes(open_dataset(folder, resolution=64))) == 6


def test_the_built_in_faces_are_whole():
    images = open_dataset(None, resolution=32, builtin_count=3)
    assert size_ids(images, variants=PLAIN)[:, 0].tolist() == [[32, 32, 0, 0, 32, 32]] * 3
