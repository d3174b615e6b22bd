"""Images shown several times in an epoch, and two sets as one: which item is where, with its name, label and mask."""

import collections
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, number_of, numbered
from torch import nn

from lowvram.data import Loader, open_dataset
from lowvram.data.bucketed import BucketedSet, shape_numbers
from lowvram.data.captions import read_captions
from lowvram.data.latents import LatentSet, Variants, build
from lowvram.data.peeps import PeepsSet
from lowvram.data.repeated import JoinedSet, RepeatedSet, repeats_of_folders
from lowvram.errors import LowVRAMError


def encoder(pixels: torch.Tensor) -> torch.Tensor:
    """Moments [n, 6, h, w] of [n, 3, 4h, 4w]: the first channels are the picture's means."""
    means = nn.functional.avg_pool2d(pixels.float() / 255, 4)
    return torch.cat([means, -(means**2)], dim=1)


def latents(images, cache: Path, **settings) -> LatentSet:
    return build(cache, images, encoder, key={"of": "test"}, progress=False, **settings)


def images_of(folder: Path, names: dict[str, bytes], **settings):
    for name, content in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return open_dataset(folder, resolution=16, **settings)


def some(folder: Path, count: int, first: int = 0):
    return images_of(folder, {f"{i}.png": numbered(first + i) for i in range(count)})


def number(item: np.ndarray) -> int:
    """The number of a picture made by `numbered`, or of its latent."""
    if item.dtype == np.uint8:
        return number_of(item)
    return round(float(item[1, 0, 0]) * 255) - 100


def batches(found, *, count: int, batch: int, **settings):
    stream = Loader(found, **{"batch": batch, "seed": 3, "mirror": False, "workers": 0, **settings}).iterate(0)
    out = list(itertools.islice(stream, count))
    stream.close()
    return out


# ---- the numbers of folders


def test_the_folder_says_how_often(tmp_path):
    names = [
        "10_cat/1.png",
        "10_cat/2.png",
        "3_dog/sub/1.png",
        "3_dog/5_close/1.png",
        "plain/1.png",
        "x.png",
        "007_b/1.png",
    ]
    names += ["12a_x/1.png", "7/1.png", "_3/1.png"]
    images = images_of(tmp_path / "a", {name: numbered(i) for i, name in enumerate(names)})
    found = dict(zip(images.files, repeats_of_folders(images), strict=True))
    wanted = {"10_cat/1.png": 10, "10_cat/2.png": 10, "3_dog/sub/1.png": 3, "3_dog/5_close/1.png": 5, "007_b/1.png": 7}
    assert found == {name: wanted.get(name, 1) for name in names}
    assert repeats_of_folders(latents(images, tmp_path / "cache")) == list(found.values())
    assert repeats_of_folders(PeepsSet(resolution=16, count=3)) == [1, 1, 1]


@pytest.mark.parametrize("folder", ["20240131_trip", "0_none", "00_x", "9" * 5000 + "_x"])
def test_a_number_that_is_no_count_is_refused(tmp_path, folder):
    images = images_of(tmp_path / "a", {"1.png": numbered(1)})
    images.files = [f"{folder}/1.png"]
    with pytest.raises(LowVRAMError, match="asks for its images"):
        repeats_of_folders(images)


# ---- repeats


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_an_epoch_shows_each_image_as_often_as_asked(repeats, data):
    images = PeepsSet(resolution=8, count=len(repeats))
    images.labels = np.arange(len(repeats)) * 10
    found = RepeatedSet(images, repeats)
    total = sum(repeats)
    assert len(found) == total and found.sources.tolist() == [i for i, n in enumerate(repeats) for _ in range(n)]
    assert found.labels is not None and found.labels.tolist() == (found.sources * 10).tolist()
    loader = Loader(found, batch=1, seed=data.draw(st.integers(0, 9)), mirror=False, workers=0)
    for epoch in range(2):
        index, _, _ = loader.lookup(np.arange(epoch * total, (epoch + 1) * total))
        assert collections.Counter(found.sources[index].tolist()) == dict(enumerate(repeats))


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_items_are_the_plain_ones_with_their_names_and_labels(tmp_path, kind):
    plain = some(tmp_path / "a", 4)
    if kind == "latents":
        plain = latents(plain, tmp_path / "cache")
    plain.labels = np.array([5, 6, 7, 8])
    found = RepeatedSet(plain, [2, 1, 3, 1])
    assert isinstance(found, LatentSet) == (kind == "latents")
    assert found.item_dtype == plain.item_dtype and found.item_shape == plain.item_shape and found.crops == plain.crops
    for item, source in enumerate([0, 0, 1, 2, 2, 2, 3]):
        for mirrored in (False, True):
            ours, theirs = found.read(item, mirrored=mirrored), plain.read(source, mirrored=mirrored)
            assert np.array_equal(ours.array, theirs.array) and ours[1:] == theirs[1:]
        assert found.file_name(item) == plain.file_name(source) and found.size(item) == plain.size(source)
        assert found.label(item) == plain.label(source) == 5 + source
        assert torch.equal(found[item], plain[source])
        assert np.array_equal(found.load(item).pixels, plain.load(source).pixels)
        if kind == "latents":
            assert np.array_equal(found.moments(item), plain.moments(source))
            assert found.resolve(item) == ([0, 0, 2, 3, 3, 3, 6][item], []) and found.shape_of(item) == (6, 4, 4)
    shown = batches(found, count=2, batch=7)
    for batch in shown:
        assert collections.Counter(map(number, batch.images.numpy())) == {0: 2, 1: 1, 2: 3, 3: 1}
        assert [number(image) + 5 for image in batch.images.numpy()] == batch.labels.tolist()


def test_the_latents_are_made_once_and_serve_any_repeats(tmp_path):
    images, made = some(tmp_path / "a", 3), []

    def counted(pixels):
        made.append(len(pixels))
        return encoder(pixels)

    sets = []
    for repeats in ([1, 1, 1], [5, 1, 2]):
        plain = build(tmp_path / "cache", images, counted, key={}, progress=False)
        sets.append(RepeatedSet(plain, repeats))
    assert sum(made) == 1 + 2 * 3  # one to learn the size, and each with its mirror image
    assert sets[0].images.folder == sets[1].folder
    assert len({sets[0].fingerprint, sets[1].fingerprint, sets[0].images.fingerprint}) == 3
    assert RepeatedSet(sets[0].images, [5, 1, 2]).fingerprint == sets[1].fingerprint


def test_repeats_of_images_of_several_shapes(tmp_path):
    sizes = [(64, 64), (80, 48), (48, 80), (64, 64)]
    names = {f"{i}.png": encode((i, i, i), size) for i, size in enumerate(sizes)}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    bucketed = BucketedSet(open_dataset(tmp_path, resolution=64), multiple=16)
    plain = latents(bucketed, tmp_path / "cache", picture_sizes=bucketed.picture_sizes)
    found = RepeatedSet(plain, [1, 4, 2, 3])
    numbers = shape_numbers(found)
    assert numbers is not None and collections.Counter(numbers.tolist()) == {0: 4, 1: 4, 2: 2}
    with pytest.raises(LowVRAMError, match="of 3 shapes"):
        _ = found.item_shape
    seen = collections.Counter(
        round(float(image[0, 0, 0]) * 255) for b in batches(found, count=20, batch=2) for image in b.images
    )
    assert seen == {0: 4, 1: 16, 2: 8, 3: 12}  # four epochs


def test_a_bad_image_is_replaced_and_said_once(tmp_path, caplog):
    images = images_of(tmp_path / "a", {"0.png": numbered(0), "1.png": b"no image", "2.png": numbered(2)})
    for plain in (images, latents(open_dataset(tmp_path / "a", resolution=16), tmp_path / "cache")):
        caplog.clear()
        plain.labels = np.arange(3)
        found = RepeatedSet(plain, [1, 3, 1])
        shown = batches(found, count=2, batch=5)
        for batch in shown:
            assert collections.Counter(map(number, batch.images.numpy())) == {0: 1, 2: 4}
            assert sorted(batch.labels.tolist()) == [0, 2, 2, 2, 2]
            assert len(batch.skipped) == 1 and "1.png" in batch.skipped[0]
        assert len([r for r in caplog.records if "skipped 1.png" in r.message]) <= 1
        assert found.skip_log is plain.skip_log and len(plain.skip_log.lines) == 1


def test_what_does_not_fit_is_refused(tmp_path):
    images = some(tmp_path / "a", 3)
    with pytest.raises(LowVRAMError, match="2 repeats for the 3 images"):
        RepeatedSet(images, [1, 2])
    with pytest.raises(LowVRAMError, match=r"1\.png of a is to be shown 0 times"):
        RepeatedSet(images, [1, 0, 2])


# ---- two sets


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_both_have_the_same_share_of_an_epoch(ours, theirs, balance):
    found = JoinedSet(PeepsSet(resolution=8, count=ours), PeepsSet(resolution=8, count=theirs), balance)
    labels = found.labels
    assert labels is not None and found.own == ours
    assert set(labels.tolist()) == set(range(ours + theirs))
    counts = np.bincount(labels)
    if balance:
        assert (labels < ours).sum() == (labels >= ours).sum() == max(ours, theirs)
        assert np.ptp(counts[:ours]) <= 1 and np.ptp(counts[ours:]) <= 1
    else:
        assert len(found) == ours + theirs and (counts == 1).all()


@pytest.mark.parametrize("kind", ["pictures", "latents"])
@pytest.mark.parametrize("repeated", [False, True])
def test_labels_tell_images_of_two_sets_apart(tmp_path, kind, repeated):
    """The number that a picture shows says which it is: 0 to 2 of the first set, 20 to 23 of the second."""
    first, second = some(tmp_path / "a", 3), some(tmp_path / "b", 4, first=20)
    if kind == "latents":
        first, second = latents(first, tmp_path / "cache"), latents(second, tmp_path / "cache")
    first.labels = np.array([9, 9, 9])  # of no account
    found = JoinedSet(RepeatedSet(first, [1, 3, 2]) if repeated else first, second)
    assert isinstance(found, LatentSet) == (kind == "latents")
    shows = {0: 0, 1: 1, 2: 2, 3: 20, 4: 21, 5: 22, 6: 23}
    for item in range(len(found)):
        read = found.read(item)
        assert shows[read.label] == number(read.array) and read.label == found.label(item)
        assert found.file_name(item) == f"{read.label - 3 * (read.label >= 3)}.png"
    epoch = batches(found, count=len(found) // 4, batch=4)
    of_first = [label < 3 for batch in epoch for label in batch.labels.tolist()]
    assert of_first.count(True) == of_first.count(False) == (6 if repeated else 4)
    assert found.own == 3 and found.name == "a and b" and first.labels.tolist() == [9, 9, 9]
    assert found.fingerprint != JoinedSet(first, second, balance=False).fingerprint


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_a_bad_image_is_replaced_by_one_of_its_own_set(tmp_path, kind, caplog):
    first = images_of(tmp_path / "a", {"0.png": numbered(0), "1.png": b"no image"})
    second = images_of(tmp_path / "b", {"0.png": numbered(20), "1.png": numbered(21), "2.png": b"nor this"})
    if kind == "latents":
        first, second = latents(first, tmp_path / "cache"), latents(second, tmp_path / "cache")
    found = JoinedSet(first, second)
    shown = batches(found, count=4, batch=6)
    for batch in shown:
        seen = list(zip(map(number, batch.images.numpy()), batch.labels.tolist(), strict=True))
        assert collections.Counter(seen) == {(0, 0): 3, (20, 2): 2, (21, 3): 1}
    assert len([r for r in caplog.records if r.message.startswith("skipped")]) == 2
    if kind == "latents":
        assert [found.resolve(item)[0] for item in range(6)] == [0, 0, 0, 3, 4, 3]


def test_masks_of_one_set_make_the_other_count_whole(tmp_path):
    from lowvram.data.masks import open_masks

    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:, :8, 3] = 0
    pixels[:, 8:, 3] = 255
    first = images_of(tmp_path / "a", {"0.png": encode(pixels)})
    second = some(tmp_path / "b", 2)
    masked = latents(first, tmp_path / "cache", masks=open_masks(first, "alpha"))
    plain = latents(second, tmp_path / "cache")
    for found, order in ((JoinedSet(masked, plain), (0, 0, 1, 1)), (JoinedSet(plain, masked), (1, 1, 0, 0))):
        assert found.masked and found.item_shape == (7, 4, 4)
        for item, of_second in enumerate(order):
            array = found.read(item).array
            whole = np.ones((1, 4, 4)) if of_second else np.array([[[0, 0, 1, 1]] * 4])
            assert array.dtype == np.float16 and np.array_equal(array[6:], whole)
            assert np.array_equal(found.mask(item), whole) and np.array_equal(found.moments(item), array[:6])
    (batch,) = batches(JoinedSet(masked, plain), count=1, batch=4)
    assert batch.images.shape == (4, 7, 4, 4)


def test_variants_are_those_that_both_sets_have(tmp_path):
    first, second = some(tmp_path / "a", 2), some(tmp_path / "b", 2)
    both = latents(first, tmp_path / "cache")
    one = latents(second, tmp_path / "cache", variants=Variants(mirror=False))
    assert not JoinedSet(both, one).variants.mirror and JoinedSet(both, both).variants.mirror


def test_sets_that_do_not_go_together_are_refused(tmp_path):
    first, second = some(tmp_path / "a", 2), some(tmp_path / "b", 2)
    with pytest.raises(LowVRAMError, match="one has latents"):
        JoinedSet(latents(first, tmp_path / "cache"), second)
    with pytest.raises(LowVRAMError, match="16 pixels, the other of 32"):
        JoinedSet(first, open_dataset(tmp_path / "b", resolution=32))
    other = build(tmp_path / "cache", second, lambda pixels: encoder(pixels)[:, :4], key={}, progress=False)
    with pytest.raises(LowVRAMError, match="6 channels of latents, the other 4"):
        JoinedSet(latents(first, tmp_path / "cache"), other)


# ---- processes


@pytest.mark.parametrize("kind", ["pictures", "latents"])
def test_views_travel_to_workers(tmp_path, kind):
    first, second = some(tmp_path / "a", 3), some(tmp_path / "b", 2, first=20)
    if kind == "latents":
        first, second = latents(first, tmp_path / "cache"), latents(second, tmp_path / "cache")
    found = JoinedSet(RepeatedSet(first, [1, 2, 1]), second)
    for view in (found, found.images):
        view.read(0)  # files are open now
        again = pickle.loads(pickle.dumps(view))
        assert type(again) is type(view) and again.fingerprint == view.fingerprint
        for item in range(len(view)):
            assert np.array_equal(again.read(item).array, view.read(item).array)
    here, there = (batches(found, count=3, batch=4, workers=workers) for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_captions_go_by_the_plain_images(tmp_path):
    images = some(tmp_path / "a", 2)
    for index in range(2):
        (tmp_path / "a" / f"{index}.txt").write_text(f"text {index}")
    plain = latents(images, tmp_path / "cache")
    plain.labels = np.arange(2)
    found = RepeatedSet(plain, [3, 2])
    texts = read_captions(plain)
    assert [texts[found.read(item).label] for item in range(5)] == ["text 0"] * 3 + ["text 1"] * 2
