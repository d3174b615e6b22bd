"""Buckets: shapes, the cut of each image, and batches of one shape in which no image is lost."""

import collections
import io
import itertools
import math
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode
from PIL import Image

from lowvram.data import open_dataset
from lowvram.data.buckets import BucketPlan, assign, fit, make_buckets, read_sizes
from lowvram.data.dataset import BadImageError
from lowvram.errors import LowVRAMError

plans = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(lambda numbers: np.array(numbers, np.int64)),
    st.integers(1, 9),
    st.integers(0, 2**63 - 1),
)


# ---- shapes


def test_the_usual_shapes():
    assert make_buckets(512 * 512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert set(make_buckets(1024 * 1024)) >= {(1024, 1024), (1152, 896), (832, 1216), (1344, 768)}  # SDXL's
    assert make_buckets(256 * 256, max_ratio=1) == [(256, 256)]


@given(st.integers(1, 400), st.sampled_from([1, 8, 32, 64]), st.floats(1, 4))
def test_shapes_keep_within_area_and_ratio(squares, multiple, max_ratio):
    area = squares * multiple**2 + multiple - 1
    shapes = make_buckets(area, multiple=multiple, max_ratio=max_ratio)
    side = math.isqrt(squares) * multiple
    assert (side, side) in shapes and len(set(shapes)) == len(shapes)
    assert [w / h for w, h in shapes] == sorted(w / h for w, h in shapes)
    assert {(h, w) for w, h in shapes} == set(shapes)
    for width, height in shapes:
        assert width % multiple == height % multiple == 0 and width * height <= area
        assert max(width, height) <= max_ratio * min(width, height)
        if width != height:
            assert min((width + multiple) * height, width * (height + multiple)) > area


@pytest.mark.parametrize(
    "wrong", [{"area_pixels": 63 * 64}, {"multiple": 0}, {"max_ratio": 0.5}, {"max_ratio": math.nan}]
)
def test_shapes_that_cannot_be(wrong):
    with pytest.raises(LowVRAMError):
        make_buckets(**{"area_pixels": 512 * 512, **wrong})


# ---- the cut


def test_a_cut_in_full():
    cut = fit((1000, 500), (640, 384))
    assert cut.box == (83, 0, 83 + 833, 500) and cut.size == (640, 384)
    assert cut.lost == pytest.approx(0.167) and cut.scale == pytest.approx(640 / 833, abs=0.002)
    assert fit((640, 384), (640, 384)) == fit((640, 384), (640, 384))
    assert fit((640, 384), (640, 384)).box == (0, 0, 640, 384) and fit((640, 384), (640, 384)).lost == 0
    assert fit((100, 400), (512, 512)).box == (0, 150, 100, 250)
    assert fit((1, 5000), (384, 640)).box[2] == 1
    with pytest.raises(ValueError, match="0x5"):
        fit((0, 5), (64, 64))


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(make_buckets(512 * 512)))
def test_a_cut_spans_a_side_is_centred_and_hardly_distorts(width, height, bucket):
    cut = fit((width, height), bucket)
    left, top, right, bottom = cut.box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert right - left == width or bottom - top == height
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1
    off = min(
        abs((right - left) - (bottom - top) * bucket[0] / bucket[1]),
        abs((bottom - top) - (right - left) * bucket[1] / bucket[0]),
    )
    assert off <= 0.5 + 1e-9 or min(right - left, bottom - top) == 1


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20))
def test_each_image_goes_where_it_loses_least(sizes):
    buckets = make_buckets(512 * 512)
    chosen = assign(np.array(sizes, np.int64), buckets)
    for (width, height), bucket in zip(sizes, chosen.tolist(), strict=True):
        kept = [min(width / height / (w / h), w / h / (width / height)) for w, h in buckets]
        assert kept[bucket] >= max(kept) - 1e-6


def test_of_two_equals_the_larger_and_unreadable_ones_are_squares():
    chosen = assign(np.array([[100, 100], [0, 0], [0, 7]]), [(256, 256), (512, 512), (64, 128)])
    assert chosen.tolist() == [1, 1, 1] and chosen.dtype == np.int64
    with pytest.raises(LowVRAMError, match="no buckets"):
        assign(np.array([[1, 1]]), [])


def test_thin_buckets_are_given_up_for_the_next_best():
    buckets = [(384, 640), (448, 576), (512, 512), (576, 448)]
    sizes = np.array([[384, 640]] * 1 + [[448, 576]] * 4 + [[512, 512]] * 5 + [[576, 448]] * 2)
    assert assign(sizes, buckets).tolist() == [0] + [1] * 4 + [2] * 5 + [3] * 2
    assert assign(sizes, buckets, min_images=3).tolist() == [1] * 5 + [2] * 7
    assert assign(sizes, buckets, min_images=6).tolist() == [2] * 12
    assert len(set(assign(sizes, buckets, min_images=100).tolist())) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40), st.integers(1, 12))
def test_no_bucket_stays_thin(sizes, min_images):
    counts = np.bincount(assign(np.array(sizes), make_buckets(512 * 512), min_images=min_images))
    used = counts[counts > 0]
    assert used.sum() == len(sizes) and (len(used) == 1 or used.min() >= min_images)


# ---- the plan


@settings(deadline=None)
@given(plans)
def test_every_batch_is_full_and_of_one_bucket_and_no_image_is_lost_or_preferred(plan):
    """The guarantee, after every single batch of some epochs."""
    bucket_of, batch, seed = plan
    counts = np.zeros(len(bucket_of), np.int64)
    members = {bucket: np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of).tolist()}
    rows = collections.defaultdict(list)
    for epoch in range(5):
        for images in BucketPlan(bucket_of, batch=batch, seed=seed).epoch(epoch):
            assert images.shape == (batch,) and images.dtype == np.int64
            (bucket,) = set(bucket_of[images].tolist())
            rows[bucket] += images.tolist()
            np.add.at(counts, images, 1)
            shown = counts[members[bucket]]
            assert shown.max() - shown.min() <= 1
        for of in members.values():
            left_over = (epoch + 1) * len(of) - counts[of].sum()
            assert 0 <= left_over < batch
            if len(of) >= batch:
                assert set(counts[of].tolist()) <= {epoch, epoch + 1}
    for bucket, row in rows.items():  # each pass of a bucket's row is all of it, once
        size = len(members[bucket])
        for start in range(0, len(row) - size + 1, size):
            assert sorted(row[start : start + size]) == members[bucket].tolist()


@settings(deadline=None)
@given(plans, st.integers(0, 400))
def test_any_batch_follows_from_its_number_alone(plan, number):
    bucket_of, batch, seed = plan
    fresh = BucketPlan(bucket_of, batch=batch, seed=seed)
    epoch = fresh.epoch_of(number)
    first = fresh.first_batch(epoch)
    assert first <= number < fresh.first_batch(epoch + 1)
    expected = BucketPlan(bucket_of, batch=batch, seed=seed).epoch(epoch)[number - first]
    assert fresh.images_of(number).tolist() == expected.tolist()
    positions = np.arange(number * batch, (number + 2) * batch)
    found = pickle.loads(pickle.dumps(fresh)).lookup(positions)
    assert found.tolist() == [*expected.tolist(), *fresh.images_of(number + 1).tolist()]
    assert fresh.lookup(positions.reshape(2, -1)).shape == (2, batch)


@settings(deadline=None)
@given(plans)
def test_a_whole_number_of_batches_is_an_exact_epoch(plan):
    """Where every bucket is a multiple of the batch, each epoch shows each image exactly once."""
    bucket_of, batch, seed = plan
    exact = np.repeat(bucket_of, batch)
    for epoch in (0, 1, 7):
        assert sorted(np.concatenate(BucketPlan(exact, batch=batch, seed=seed).epoch(epoch)).tolist()) == list(
            range(len(exact))
        )


def test_orders_differ_by_seed_and_epoch_and_mix_buckets():
    bucket_of = np.arange(400) % 4

    def order(seed, epoch):
        return np.concatenate(BucketPlan(bucket_of, batch=8, seed=seed).epoch(epoch)).tolist()

    orders = [order(0, 0), order(1, 0), order(2**40, 0), order(0, 1)]
    assert order(0, 0) == orders[0] and len({tuple(o) for o in orders}) == 4
    turns = [int(bucket_of[images[0]]) for images in BucketPlan(bucket_of, batch=8, seed=0).epoch(0)]
    assert len(turns) == 48 and sum(a != b for a, b in itertools.pairwise(turns)) > 20


def test_the_order_stays_from_version_to_version():
    """Golden: a change here breaks the resume of every saved run."""
    plan = BucketPlan(np.array([0, 1, 0, 1, 1, 0, 1]), batch=2, seed=7)
    assert [plan.images_of(n).tolist() for n in range(5)] == [[1, 4], [2, 0], [3, 6], [5, 2], [6, 1]]


def test_plans_that_cannot_be():
    with pytest.raises(LowVRAMError, match="batch=0"):
        BucketPlan(np.array([0]), batch=0, seed=0)
    with pytest.raises(LowVRAMError, match="no images"):
        BucketPlan(np.array([], np.int64), batch=1, seed=0)
    with pytest.raises(ValueError, match="-1"):
        BucketPlan(np.array([0]), batch=1, seed=0).epoch_of(-1)


# ---- sizes


def turned(format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, format, exif=exif)
    return buffer.getvalue()


FILES = {
    "a.png": encode((1, 2, 3), (30, 20)),
    "b.jpg": encode((1, 2, 3), (50, 20), "JPEG"),
    "c.webp": encode((1, 2, 3), (20, 70), "WEBP"),
    "d.bmp": encode((1, 2, 3), (5, 6), "BMP"),
    "e.jpg": turned("JPEG"),
    "f.png": turned("PNG"),
    "g.webp": turned("WEBP"),
    "h.png": b"nothing of the kind",
    "i.png": b"",
    "j.png": encode(np.random.default_rng(0).integers(0, 255, (64, 32, 3), np.uint8))[:2000],  # cut off: header whole
}
SIZES = [[30, 20], [50, 20], [20, 70], [5, 6], [20, 40], [20, 40], [20, 40], [0, 0], [0, 0], [32, 64]]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_sizes_come_from_headers(tmp_path, kind, monkeypatch):
    place = tmp_path / "set.zip" if kind == "zip" else tmp_path
    if kind == "zip":
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in FILES.items():
                archive.writestr(name, data)
    else:
        for name, data in FILES.items():
            (place / name).write_bytes(data)
    images = open_dataset(place, resolution=16)

    def never(*_):
        raise AssertionError("an image was decoded")

    for plugin in (Image.Image, *(type(Image.open(io.BytesIO(FILES[n]))) for n in ("a.png", "b.jpg", "c.webp"))):
        monkeypatch.setattr(plugin, "load", never)
    assert read_sizes(images).tolist() == SIZES
    with pytest.raises(BadImageError, match=r"h.png: not a PNG"):
        images.size(7)


def test_sizes_of_files_that_went_away_and_of_drawn_faces(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES["a.png"])
    images = open_dataset(tmp_path, resolution=16)
    (tmp_path / "a.png").unlink()
    assert read_sizes(images).tolist() == [[0, 0]]
    assert read_sizes(open_dataset(None, resolution=24, builtin_count=2)).tolist() == [[24, 24]] * 2
