"""Masks beside the images: aligned with them whatever is done to them, and refused where they cannot be."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lowvram.data import Loader, open_dataset
from lowvram.data.bucketed import BucketedSet
from lowvram.data.latents import LatentSet, Variants, build
from lowvram.data.masks import open_masks, to_latent_pixels
from lowvram.errors import LowVRAMError

SIZES = [(40, 24), (32, 32), (24, 48), (33, 57), (64, 31), (30, 30)]
_ORIENTATION = 0x0112


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Moments [n, 6, h, w], whose first channel is the mean of red: what the mask should be where red is the mask."""
    means = nn.functional.avg_pool2d(pixels.float() / 255, 4)
    return torch.cat([means, -means], dim=1)


def pattern(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth grey picture like no mirror image of it, uint8 [height, width]."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    a, b, c = np.random.default_rng(seed).uniform(1, 5, 3)
    return np.round(127.5 + 127.5 * np.sin(a + b * x + c * y + 2 * x * y)).astype(np.uint8)


def write(path: Path, picture: np.ndarray, *, orientation: int = 1, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    Image.fromarray(picture).save(path, exif=exif.tobytes(), **options)


def coloured(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, 255 - grey, np.full_like(grey, 60)], axis=2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images whose red is their mask, some of them turned by EXIF; masks/ beside it has the masks."""
    for index, (width, height) in enumerate(SIZES):
        grey, turn = pattern(width, height, index), (1, 6, 3, 8, 2, 5)[index]
        write(tmp_path / "images" / f"sub{index % 2}" / f"{index}.png", coloured(grey), orientation=turn)
        write(tmp_path / "masks" / f"sub{index % 2}" / f"{index}.png", grey, orientation=turn)
    return tmp_path / "images"


def built(images, masks, tmp_path: Path, **settings) -> LatentSet:
    settings = {"variants": Variants(mirror=True), "shard_images": 4, "batch": 3, "progress": False, **settings}
    return build(tmp_path / "cache", images, encode, key={"autoencoder": "00ff"}, masks=masks, **settings)


def assert_aligned(found: LatentSet) -> None:
    """Red and the mask are resized by different filters, hence a tolerance; not aligned they differ far more."""
    for index in range(len(found)):
        for mirrored in (False, True):
            for crop in range(found.crops):
                red, mask = found.moments(index, mirrored, crop)[:1], found.mask(index, mirrored, crop)
                assert mask.shape == red.shape and mask.dtype == np.float16
                assert np.abs(red - mask).max() < 0.05, (index, mirrored, crop)
        assert np.abs(found.mask(index) - found.mask(index, True)).max() > 0.2


# ---- alignment


def test_masks_follow_squares_and_their_mirror_images(pictures: Path, tmp_path: Path) -> None:
    images = open_dataset(pictures, resolution=32)
    found = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    assert found.masked and found.item_shape == (7, 8, 8) and found.moments(0).shape == (6, 8, 8)
    assert_aligned(found)
    plain = built(images, None, tmp_path)
    assert plain.folder != found.folder and not plain.masked and plain.item_shape == (6, 8, 8)
    for index in range(len(images)):
        assert np.array_equal(plain.moments(index, True), found.moments(index, True))
        assert (plain.mask(index) == 1).all() and plain.mask(index).shape == (1, 8, 8)


def test_masks_follow_crops(pictures: Path, tmp_path: Path) -> None:
    images, larger = open_dataset(pictures, resolution=16), open_dataset(pictures, resolution=24)
    masks = open_masks(images, tmp_path / "masks")
    found = built(images, masks, tmp_path, larger=larger, variants=Variants(mirror=True, crops=3))
    assert found.crops == 3
    assert_aligned(found)
    assert np.abs(found.mask(0, crop=1) - found.mask(0)).max() > 0.05


def test_masks_follow_buckets(pictures: Path, tmp_path: Path) -> None:
    images = BucketedSet(open_dataset(pictures, resolution=32), multiple=8)
    found = built(images, open_masks(images, tmp_path / "masks"), tmp_path, picture_sizes=images.picture_sizes)
    assert len({found.shape_of(index) for index in range(len(found))}) > 2
    assert_aligned(found)


def test_masks_follow_the_alpha_channel(tmp_path: Path) -> None:
    for index, (width, height) in enumerate(SIZES):
        grey = pattern(width, height, index)
        # Over white red becomes the mask's opposite: black where it counts.
        pixels = np.concatenate([np.zeros((height, width, 3), np.uint8), grey[:, :, None]], axis=2)
        write(tmp_path / "images" / f"{index}.png", pixels, orientation=(1, 6, 3, 8, 2, 5)[index])
    images = open_dataset(tmp_path / "images", resolution=32)
    found = built(images, open_masks(images, "alpha"), tmp_path)
    for index in range(len(images)):
        assert np.abs((1 - found.moments(index)[:1]) - found.mask(index)).max() < 0.05


def test_a_loader_reads_moments_and_masks(pictures: Path, tmp_path: Path) -> None:
    images = open_dataset(pictures, resolution=32)
    found = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    loader = Loader(pickle.loads(pickle.dumps(found)), batch=4, seed=1, mirror=True, workers=0, pin_memory=False)
    stream = loader.iterate(0)
    for _ in range(4):
        batch = next(stream)
        assert batch.images.shape == (4, 7, 8, 8)
        index, mirrored, _ = loader.lookup(batch.position.numpy())
        for row, (at, flip) in enumerate(zip(index.tolist(), mirrored.tolist(), strict=True)):
            assert np.array_equal(batch.images[row, :6].numpy(), found.moments(at, flip))
            assert np.array_equal(batch.images[row, 6:].numpy(), found.mask(at, flip))
    stream.close()


def test_pixels_are_averaged() -> None:
    masks = np.zeros((2, 8, 12), np.uint8)
    masks[0, 0:2, 4:8] = 255
    masks[1] = 255
    latent = to_latent_pixels(masks, (2, 3))
    assert latent.dtype == np.float32 and latent.shape == (2, 1, 2, 3)
    assert latent[0, 0].tolist() == [[0, 0.5, 0], [0, 0, 0]] and (latent[1] == 1).all()


# ---- which mask belongs to which image


def test_a_mask_may_have_another_suffix_size_and_mode(pictures: Path, tmp_path: Path) -> None:
    place = tmp_path / "others"
    for index, (width, height) in enumerate(SIZES):
        grey = pattern(width, height, index)
        turn = (1, 6, 3, 8, 2, 5)[index]
        path = place / f"sub{index % 2}" / str(index)
        if index == 0:
            write(path.with_suffix(".jpg"), coloured(grey)[:, :, [0, 0, 0]], orientation=turn, quality=95)
        elif index == 1:  # 16 bit
            write(path.with_suffix(".png"), grey.astype(np.uint16) * 257, orientation=turn)
        elif index == 2:  # white on nothing
            shown = np.concatenate([np.full((height, width, 3), 255, np.uint8), grey[:, :, None]], axis=2)
            write(path.with_suffix(".webp"), shown, orientation=turn, lossless=True)
        else:  # twice as large
            double = np.repeat(np.repeat(grey, 2, axis=0), 2, axis=1)
            write(path.with_suffix(".png"), double, orientation=turn)
    images = open_dataset(pictures, resolution=32)
    assert_aligned(built(images, open_masks(images, place), tmp_path))


@pytest.mark.parametrize("zipped", ["images", "masks"])
def test_archives_with_a_folder_that_holds_all(pictures: Path, tmp_path: Path, zipped: str) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in sorted((tmp_path / zipped).rglob("*.png")):
            archive.write(file, f"all/{file.relative_to(tmp_path / zipped)}")
    images = open_dataset(tmp_path / "packed.zip" if zipped == "images" else pictures, resolution=32)
    masks = open_masks(images, tmp_path / ("packed.zip" if zipped == "masks" else "masks"))
    assert_aligned(built(images, masks, tmp_path))


def test_images_without_a_mask_count_whole_and_are_said_once(pictures: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "masks" / "sub0" / "2.png").unlink()
    (tmp_path / "masks" / "sub0" / "0.png").rename(tmp_path / "masks" / "sub0" / "else.png")
    images = open_dataset(pictures, resolution=32)
    found = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    whole = [index for index in range(len(images)) if (found.mask(index) == 1).all()]
    assert [images.file_name(index) for index in whole] == ["sub0/0.png", "sub0/2.png"]
    assert caplog.text.count("2 of 6 images of images have no mask and count whole: sub0/0.png, sub0/2.png") == 1
    assert caplog.text.count("1 masks of masks belong to no image") == 1


def test_images_without_alpha_count_whole(pictures: Path, tmp_path: Path, caplog) -> None:
    images = open_dataset(pictures, resolution=32)
    with pytest.raises(LowVRAMError, match="no image of images has an alpha channel"):
        open_masks(images, "alpha")
    grey = pattern(20, 20, 9)
    write(pictures / "with.png", np.concatenate([coloured(grey), grey[:, :, None]], axis=2))
    (pictures / "bad.png").write_bytes(b"bad")
    images = open_dataset(pictures, resolution=32)
    found = built(images, open_masks(images, "alpha"), tmp_path)
    assert "6 of 8 images of images have no alpha channel" in caplog.text
    assert [bool((found.mask(index) == 1).all()) for index in range(1, 8)] == [True] * 6 + [False]
    assert found.resolve(0)[0] == 1  # the bad one is skipped as ever


def test_an_edited_mask_is_another_cache(pictures: Path, tmp_path: Path) -> None:
    images = open_dataset(pictures, resolution=32)
    first = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    assert built(images, open_masks(images, tmp_path / "masks"), tmp_path).folder == first.folder
    grey = 255 - pattern(*SIZES[0], 0)
    write(tmp_path / "masks" / "sub0" / "0.png", grey)
    second = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    assert second.folder != first.folder and second.fingerprint == first.fingerprint
    assert np.allclose(second.mask(0), 1 - first.mask(0), atol=0.05)


def test_a_mask_that_hides_everything_is_said(pictures: Path, tmp_path: Path, caplog) -> None:
    for index in (0, 2):
        write(tmp_path / "masks" / "sub0" / f"{index}.png", np.zeros(SIZES[index][::-1], np.uint8), orientation=1)
        shutil.copy(tmp_path / "masks" / "sub0" / f"{index}.png", pictures / "sub0" / f"{index}.png")
    images = open_dataset(pictures, resolution=32)
    found = built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    assert not found.mask(0).any() and caplog.text.count("black throughout") == 1


# ---- what cannot be used


def harmed(kind: str, path: Path) -> None:
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_bytes(b"not a picture")
    elif kind == "proportions":
        write(path, np.full((40, 24), 255, np.uint8))
    elif kind == "ones":
        write(path, np.ones((24, 40), np.uint8))
    elif kind == "bomb":
        buffer = io.BytesIO()
        Image.new("1", (20000, 12000)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut", "damaged"),
        ("text", "not a PNG"),
        ("proportions", "24x40, and its image is 40x24"),
        ("ones", "nearly black: its brightest pixel is 1 of 255"),
        ("bomb", "more than|bomb"),
    ],
)
def test_a_bad_mask_is_named(pictures: Path, tmp_path: Path, kind: str, said: str) -> None:
    harmed(kind, tmp_path / "masks" / "sub0" / "0.png")
    images = open_dataset(pictures, resolution=32)
    with pytest.raises(LowVRAMError, match=rf"a mask of masks cannot be used: sub0/0\.png: .*({said})") as caught:
        built(images, open_masks(images, tmp_path / "masks"), tmp_path)
    assert "remove it" in caught.value.remedy


def test_masks_that_cannot_be_meant_are_refused(pictures: Path, tmp_path: Path) -> None:
    images = open_dataset(pictures, resolution=32)
    with pytest.raises(LowVRAMError, match="does not exist"):
        open_masks(images, tmp_path / "nowhere")
    with pytest.raises(LowVRAMError, match="are not"):
        open_masks(open_dataset(None, resolution=32, builtin_count=4), tmp_path / "masks")
    with pytest.raises(LowVRAMError, match="would be trained on"):
        open_masks(open_dataset(tmp_path, resolution=32), tmp_path / "masks")
    write(tmp_path / "masks" / "sub0" / "0.jpg", np.zeros((24, 40), np.uint8))
    assert open_masks(images, tmp_path / "masks").files[0] == "sub0/0.png"  # the very name goes before
    (tmp_path / "masks" / "sub0" / "0.png").rename(tmp_path / "masks" / "sub0" / "0.bmp")
    with pytest.raises(LowVRAMError, match=r"several masks for sub0/0\.png: sub0/0\.bmp, sub0/0\.jpg"):
        open_masks(images, tmp_path / "masks")
    write(tmp_path / "odd" / "x.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(LowVRAMError, match=r"none of the 1 masks of .*x\.png, belongs to an image"):
        open_masks(images, tmp_path / "odd")
