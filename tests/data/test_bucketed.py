"""Images in the shape of their bucket: decoding, the set, and batches of one shape from its latents."""

import collections
import io
import itertools
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode
from PIL import Image, ImageOps
from torch import nn

from lowvram.data import Loader, open_dataset
from lowvram.data.bucketed import BucketedSet, shape_numbers
from lowvram.data.buckets import fit
from lowvram.data.dataset import BadImageError
from lowvram.data.decode import decode_square, decode_to
from lowvram.data.latents import build
from lowvram.errors import LowVRAMError

SIZES = [(96, 96), (150, 90), (90, 150), (110, 96), (300, 100)]  # the first and the fourth go to the square
SHAPES = [(48, 80), (64, 64), (80, 48)]  # of 64x64 and multiple=16


def to(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return decode_to(data, file="x.png", size=size).pixels


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- decoding


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
def test_the_picture_is_the_centred_cut_resized(width, height, to_width, to_height):
    image = Image.fromarray(noise(width, height))
    found = decode_to(encode(np.asarray(image)), file="x", size=(to_width, to_height))
    cut = image.crop(fit((width, height), (to_width, to_height)).box)
    if cut.size != (to_width, to_height):
        cut = cut.resize((to_width, to_height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    assert found.pixels.shape == (to_height, to_width, 3)
    np.testing.assert_array_equal(found.pixels, np.asarray(cut))
    assert found.enlarged == (width < to_width or height < to_height)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_squares_are_as_before(width, height, resolution):
    """The centre square, counted out here."""
    image = Image.fromarray(noise(width, height))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    if side != resolution:
        cut = cut.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3.0)
    found = decode_square(encode(np.asarray(image)), file="x", resolution=resolution)
    np.testing.assert_array_equal(found.pixels, np.asarray(cut))
    assert found.enlarged == (side < resolution)


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_turned_image_has_the_shape_it_is_seen_in(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    Image.fromarray(noise(48, 32)).save(buffer, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(to(buffer.getvalue(), upright.size), np.asarray(upright))
    assert to(buffer.getvalue(), (20, 10)).shape == (10, 20, 3)


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_a_large_jpeg_shrinks_to_the_same_picture(size):
    y, x = np.mgrid[0:600, 0:900]
    smooth = np.stack([x / 4, y / 3, (x + y) / 8], axis=-1).astype(np.uint8)
    jpeg, png = to(encode(smooth, format="JPEG"), size), to(encode(smooth), size)
    assert np.abs(jpeg.astype(int) - png).max() <= 6


# ---- the set


@pytest.fixture
def pictures(tmp_path):
    """pictures(n) -> a folder of n images of the shapes SIZES in turn, whose green says the number."""

    def make(count: int):
        place = tmp_path / "pictures"
        place.mkdir()
        for index in range(count):
            width, height = SIZES[index % len(SIZES)]
            pixels = np.full((height, width, 3), 4 * index, np.uint8)
            pixels[:, : width // 2, 0], pixels[:, width // 2 :, 0] = 0, 255  # a mirror shows
            (place / f"{index:04d}.png").write_bytes(encode(pixels))
        return place

    return make


def bucketed(path, **kwargs) -> BucketedSet:
    return BucketedSet(open_dataset(path, resolution=64), **{"multiple": 16, **kwargs})


def test_each_image_has_the_shape_of_its_bucket(pictures):
    found = bucketed(pictures(20))
    assert found.picture_sizes[:5].tolist() == [[64, 64], [80, 48], [48, 80], [64, 64], [80, 48]]
    for index in range(20):
        picture = found.load(index)
        width, height = found.picture_sizes[index]
        assert picture.pixels.shape == (height, width, 3) and not picture.enlarged
        assert (picture.pixels[..., 1] == 4 * index).all()
        assert (picture.pixels[:, 0, 0] == 0).all() and (picture.pixels[:, -1, 0] == 255).all()
    assert (found.file_name(3), found.size(4), len(found), found.name) == ("0003.png", (300, 100), 20, "pictures")
    assert len(found.times()) == 20
    with pytest.raises(LowVRAMError, match="3 shapes"):
        _ = found.item_shape


def test_what_the_user_is_told(pictures):
    said = bucketed(pictures(20)).summary()
    assert said.startswith("3 shapes (width x height) and their images: 48x80 (4), 64x64 (8), 80x48 (8); ")
    lost = [0, 0, 0, 1 - 96 / 110, 1 - (80 / 48) / 3]
    squares = [0, 0.4, 0.4, 1 - 96 / 110, 1 - 1 / 3]
    assert f"{sum(lost) / 5:.1%} of an image is cut away, by squares {sum(squares) / 5:.1%}" in said
    assert bucketed(None, multiple=16).summary().startswith("1 shape (")


def test_small_buckets_are_given_up(pictures):
    shapes = bucketed(pictures(20), min_images=5).picture_sizes
    assert set(map(tuple, shapes.tolist())) == {(64, 64), (80, 48)}


def test_an_image_without_a_header_joins_the_most(pictures):
    path = pictures(15)
    for index in (0, 2, 3, 5, 8, 13):  # most squares
        (path / f"{index:04d}.png").write_bytes(b"x")
    found = bucketed(path)
    assert found.picture_sizes[0].tolist() == [80, 48] and found.picture_sizes[10].tolist() == [64, 64]
    with pytest.raises(BadImageError, match=r"0000\.png: not a PNG"):
        found.load(0)
    for file in path.iterdir():
        file.write_bytes(b"x")
    assert set(map(tuple, bucketed(path).picture_sizes.tolist())) == {(64, 64)}


def test_a_zip_and_a_copy_for_another_process(pictures, tmp_path):
    path = pictures(10)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in sorted(path.iterdir()):
            archive.write(file, file.name)
    from_zip, plain = bucketed(tmp_path / "p.zip"), bucketed(path)
    copy = pickle.loads(pickle.dumps(from_zip))
    for index in range(10):
        assert np.array_equal(copy.load(index).pixels, plain.load(index).pixels)
    assert copy.fingerprint == from_zip.fingerprint != plain.fingerprint


def test_the_fingerprint_knows_the_shapes(pictures):
    path = pictures(20)
    plain = open_dataset(path, resolution=64)
    found = {plain.fingerprint, bucketed(path).fingerprint, bucketed(path, min_images=5).fingerprint}
    assert len(found) == 3 and bucketed(path).fingerprint in found


def test_the_built_in_faces_stay_square():
    faces = open_dataset(None, resolution=64, builtin_count=3, labels=True)
    found = BucketedSet(faces, multiple=16)
    assert np.array_equal(found.load(2).pixels, faces.load(2).pixels)
    assert found.item_shape == (3, 64, 64) and found.label(2) == 2 and found.class_names == faces.class_names


@pytest.mark.parametrize("multiple", [32, 64])
def test_a_resolution_with_no_other_shape_is_refused(multiple, pictures):
    with pytest.raises(LowVRAMError, match=f"multiples of {multiple} leave nothing but the square at resolution=64"):
        bucketed(pictures(1), multiple=multiple)


# ---- batches


def encoder(pixels: torch.Tensor) -> torch.Tensor:
    means = nn.functional.avg_pool2d(pixels.float() / 255, 4)
    return torch.cat([means, -means], dim=1)


@pytest.fixture
def latents(pictures, tmp_path):
    """The latents of 43 images: 17 of 16x16, 9 of 12x20 (width x height), 17 of 20x12."""
    images = bucketed(pictures(43))
    return build(
        tmp_path / "cache", images, encoder, key={}, picture_sizes=images.picture_sizes, shard_images=4, progress=False
    )


def loader(latents, **kwargs) -> Loader:
    return Loader(latents, **{"batch": 6, "seed": 3, "mirror": True, "workers": 0, "pin_memory": False, **kwargs})


def take(source: Loader, count: int, images_seen: int = 0) -> list:
    stream = source.iterate(images_seen)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def numbers(batch) -> list[int]:
    """Of the images in a batch, by their green."""
    return (batch.images[:, 1].float().mean(dim=(1, 2)) * 255 / 4).round().int().tolist()


def same(one, two) -> bool:
    return torch.equal(one.images, two.images) and torch.equal(one.position, two.position)


def test_each_batch_is_of_one_shape_and_every_image_comes_in_turn(latents):
    batches = take(loader(latents), 60)
    shown: collections.Counter[int] = collections.Counter()
    shapes = set()
    for batch in batches:
        assert batch.images.dtype == torch.float16 and len(batch) == 6
        shapes.add(batch.images.shape[1:])
        for image, number in zip(batch.images, numbers(batch), strict=True):
            assert tuple(image.shape) == latents.shape_of(number)
            flipped = bool(image[0, 0, 0] > 0.5)  # red is on the right
            assert np.array_equal(image.numpy(), latents.moments(number, flipped))
            shown[number] += 1
        # Two of a shape differ by one showing at most, after any batch.
        for shape in shapes:
            counts = [shown[i] for i in range(43) if latents.shape_of(i) == shape]
            assert max(counts) - min(counts) <= 1
    assert shapes == {(6, height // 4, width // 4) for width, height in SHAPES}
    # 60 batches of 6 are 8 epochs of 43 and some; n >= batch in each bucket.
    assert set(shown) == set(range(43)) and min(shown.values()) >= 7 and max(shown.values()) <= 9


def test_about_half_are_mirrored(latents):
    reds = [image[0, 0, 0] > 0.5 for batch in take(loader(latents), 40) for image in batch.images]
    assert 80 < sum(reds) < 160
    assert not any(image[0, 0, 0] > 0.5 for b in take(loader(latents, mirror=False), 9) for image in b.images)


@pytest.mark.parametrize("start", [1, 7, 30])
def test_resuming_anywhere_gives_the_same_continuation(latents, start):
    whole = take(loader(latents), start + 5)[start:]
    assert all(map(same, whole, take(loader(latents), 5, images_seen=6 * start)))
    assert not all(map(same, whole, take(loader(latents, seed=4), 5, images_seen=6 * start)))


def test_another_batch_size_goes_on_with_whole_batches(latents):
    """24 images in batches of 6, then batches of 9 from there on: 24 is no multiple of 9."""
    batches = take(loader(latents, batch=9), 8, images_seen=24)
    for number, batch in enumerate(batches):
        assert batch.position.tolist() == list(range(24 + 9 * number, 33 + 9 * number))
        assert len({latents.shape_of(index) for index in numbers(batch)}) == 1
    assert all(map(same, batches[3:], take(loader(latents, batch=9), 5, images_seen=51)))


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_share_the_one_batch(latents, group, world_size):
    kwargs = {"batch": 12, "group": group}
    whole = take(loader(latents, **kwargs), 6, 12)
    parts = [take(loader(latents, **kwargs, rank=r, world_size=world_size), 6, 12) for r in range(world_size)]
    for step in range(6):
        shares = [part[step] for part in parts]
        assert {share.images.shape[1:] for share in shares} == {whole[step].images.shape[1:]}
        place = {int(k): image for share in shares for k, image in zip(share.position, share.images, strict=True)}
        assert all(
            torch.equal(place[int(k)], image) for k, image in zip(whole[step].position, whole[step].images, strict=True)
        )
        grids = [share.position.reshape(group, -1) for share in shares]
        assert torch.equal(torch.cat(grids, dim=1).ravel(), whole[step].position)


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_change_nothing(latents, start_method):
    there = take(loader(latents, workers=2, start_method=start_method), 8, 6)
    assert all(map(same, take(loader(latents), 8, 6), there))


def test_a_bad_image_is_replaced_by_one_of_its_shape(pictures, tmp_path):
    path = pictures(43)
    bad = path / "0001.png"
    bad.write_bytes(bad.read_bytes()[:80])  # the header stays
    images = bucketed(path)
    found = build(tmp_path / "cache", images, encoder, key={}, picture_sizes=images.picture_sizes, progress=False)
    seen = collections.Counter(number for batch in take(loader(found), 60) for number in numbers(batch))
    assert seen[1] == 0 and seen[4] > 1.5 * seen[6]


def test_of_one_shape_there_are_no_buckets(pictures, tmp_path):
    plain = open_dataset(pictures(8), resolution=64)
    found = build(tmp_path / "cache", plain, encoder, key={}, progress=False)
    assert shape_numbers(plain) is None and shape_numbers(found) is None
    position = np.arange(20)
    for one, two in zip(loader(found).lookup(position), loader(plain).lookup(position), strict=True):
        assert np.array_equal(one, two)


def test_shapes_are_numbered(latents):
    numbered = shape_numbers(latents)
    pairs = {(int(number), latents.shape_of(index)) for index, number in enumerate(numbered)}
    assert len(pairs) == 3 and {number for number, _ in pairs} == {0, 1, 2}
