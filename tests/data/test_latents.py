"""The latent cache: encoded once, never stale, and whole after whatever happens to the process or the disk."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import numbered
from torch import nn

from lowvram.data import Loader, latent_files, latents, open_dataset
from lowvram.data.captions import read_captions
from lowvram.data.latents import Variants, build, hash_weights
from lowvram.errors import LowVRAMError

KEY = {"autoencoder": "00ff"}


class Encoder:
    """Moments [n, 6, 4, 4] of [n, 3, 16, 16]: block means, and their squares; counts the images it is given."""

    def __init__(self):
        self.images = 0
        self.batches = []

    def __call__(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.device.type == "cpu"
        self.images += len(pixels)
        self.batches.append(len(pixels))
        means = nn.functional.avg_pool2d(pixels.float() / 255, 4)
        return torch.cat([means, -(means**2)], dim=1)


@pytest.fixture
def images(folder):
    return open_dataset(folder(10), resolution=16)


@pytest.fixture
def make(images, tmp_path):
    """make(**settings) -> the latent set, in shards of 4, and the encoder used."""

    def built(encoder=None, of=None, key=KEY, **settings):
        encoder = encoder or Encoder()
        settings = {"shard_images": 4, "batch": 3, "progress": False, **settings}
        return build(tmp_path / "cache", of or images, encoder, key=key, **settings), encoder

    return built


def expected(images, index, mirrored=False):
    pixels = images[index][None]
    return Encoder()(pixels.flip(3) if mirrored else pixels)[0].half().numpy()


def check(found, images):
    for index in range(len(images)):
        for mirrored in (False, True):
            assert np.array_equal(found.moments(index, mirrored), expected(images, index, mirrored)), (index, mirrored)


def shards(found) -> list[Path]:
    return sorted(found.folder.glob("*.safetensors"))


def leftovers(found) -> list[str]:
    return [path.name for path in found.folder.iterdir() if path.suffix not in (".safetensors", ".json", ".lock")]


# ---- what is kept


def test_each_image_and_its_mirror_image_in_shards(make, images):
    found, encoder = make()
    check(found, images)
    assert not np.array_equal(found.moments(0), found.moments(0, True))
    assert found.moments(3).dtype == np.float16 and found.moments(3).flags.writeable
    assert [path.name for path in shards(found)] == [f"0000{i}.safetensors" for i in range(3)]
    assert encoder.images == 2 * 10 + 1  # one of them twice, to learn the size
    assert max(encoder.batches) == 3 and found.item_shape == found.shape_of(9) == (6, 4, 4)
    assert leftovers(found) == [".lock"]


def test_the_second_time_nothing_is_encoded(make, images):
    make()
    found, encoder = make(batch=1, shard_images=7)
    assert encoder.images == 0
    check(found, images)


def test_any_cut_into_batches_and_shards_is_the_same(make, images, tmp_path):
    first, _ = make()
    shutil.move(tmp_path / "cache", tmp_path / "other")
    second, _ = make(batch=100, shard_images=100)
    assert len(shards(second)) == 1 and second.fingerprint == first.fingerprint
    check(second, images)


def test_shards_are_small_enough_for_memory(make, monkeypatch):
    monkeypatch.setattr(latents, "_SHARD_BYTES", 2 * 2 * 6 * 16 * 2)
    assert len(shards(make(shard_images=1000)[0])) == 5


def test_other_encoders_images_and_variants_are_other_caches(make, images):
    found, _ = make()
    for settings in ({"key": {"autoencoder": "00fe"}}, {"variants": Variants(mirror=False)}):
        other, encoder = make(**settings)
        assert other.folder != found.folder and encoder.images and other.fingerprint != found.fingerprint
    few = open_dataset(images.path, resolution=16, max_images=5)
    assert make(of=few)[0].folder != found.folder
    wide = open_dataset(images.path, resolution=32)
    assert make(of=wide)[0].folder != found.folder


def test_an_image_edited_in_place_is_encoded_again(make, images):
    """The same name and the same size: only its time of change tells."""
    before, _ = make()
    path = images.path / "0003.png"
    size = path.stat().st_size
    path.write_bytes(next(data for data in map(numbered, range(20, 99)) if len(data) == size))
    after, encoder = make()
    assert encoder.images == 21 and after.folder != before.folder
    check(after, open_dataset(images.path, resolution=16))
    assert after.fingerprint == before.fingerprint  # of the run: no reason to refuse a resume


def test_a_key_of_another_content_under_the_same_name_is_not_used(make):
    found, _ = make()
    index = found.folder / "index.json"
    content = json.loads(index.read_text())
    content["key"]["key"]["autoencoder"] = "else"
    index.write_text(json.dumps(content))
    assert make()[1].images == 21


def test_crops(make, tmp_path):
    place = tmp_path / "larger"
    place.mkdir()
    rng = np.random.default_rng(0)
    from PIL import Image

    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(place / f"{index}.png")
    small, large = open_dataset(place, resolution=16), open_dataset(place, resolution=24)
    found, encoder = make(of=small, larger=large, variants=Variants(mirror=True, crops=3))
    assert encoder.images == 5 * 6 + 1 and found.crops == 3
    places = set()
    for index in range(5):
        assert np.array_equal(found.moments(index), expected(small, index))
        for crop in (1, 2):
            cuts = {(t, x): large[index][:, t : t + 16, x : x + 16] for t in range(9) for x in range(9)}
            for mirrored in (False, True):
                kept = found.moments(index, mirrored, crop)
                turned = {at: cut.flip(2) if mirrored else cut for at, cut in cuts.items()}
                here = [at for at, cut in turned.items() if np.array_equal(Encoder()(cut[None])[0].half(), kept)]
                assert len(here) == 1
                places.add((index, crop, here[0]))
    assert len(places) == 10 and len({at for _, _, at in places}) > 5  # a mirror image is of the same cut
    with pytest.raises(LowVRAMError, match="crop 3"):
        found.moments(0, crop=3)


def test_crops_need_the_same_images_larger(make, images, tmp_path):
    crops = Variants(crops=2)
    for larger in (None, images):
        with pytest.raises(LowVRAMError, match="crops=2 needs"):
            make(variants=crops, larger=larger)
    with pytest.raises(LowVRAMError, match="other images"):
        make(variants=crops, larger=open_dataset(None, resolution=18, builtin_count=10))
    with pytest.raises(LowVRAMError, match="crops=0"):
        Variants(crops=0)


def test_pictures_of_several_shapes(make, images):
    """As aspect-ratio buckets make them: shards of one shape, and a bad image is replaced by one of its own shape."""
    sizes = np.array([[16, 16], [16, 32], [32, 16], [16, 32], [16, 16]] * 2)
    real = images.load

    def load(index):
        picture = real(index)
        width, height = sizes[index].tolist()
        return picture._replace(pixels=np.tile(picture.pixels, (height // 16, width // 16, 1)))

    images.load = load
    (images.path / "0001.png").write_bytes(b"bad")
    found, _ = make(picture_sizes=sizes)
    for index in range(10):
        assert found.shape_of(index) == (6, sizes[index][1] // 4, sizes[index][0] // 4) == found.moments(index).shape
        if index != 1:
            assert np.array_equal(found.moments(index)[:, :4, :4], expected(images, index)[:, :4, :4])
    assert found.resolve(1)[0] == 3
    with pytest.raises(LowVRAMError, match="3 shapes"):
        _ = found.item_shape


# ---- as a data set


def test_a_loader_reads_latents(make, images):
    for index in range(10):
        (images.path / f"c{index % 2}").mkdir(exist_ok=True)
        (images.path / f"{index:04d}.png").rename(images.path / f"c{index % 2}" / f"{index:04d}.png")
    labelled = open_dataset(images.path, resolution=16, labels=True)
    found, _ = make(of=labelled)
    assert (found.name, found.num_classes, len(found)) == (labelled.name, 2, 10)
    loader = Loader(found, batch=6, seed=1, mirror=True, workers=0, pin_memory=False)
    stream = loader.iterate(0)
    mirrors = set()
    for _ in range(4):
        batch = next(stream)
        assert batch.images.dtype == torch.float16 and batch.images.shape == (6, 6, 4, 4)
        index, mirrored, _ = loader.lookup(batch.position.numpy())
        for row, (at, flip) in enumerate(zip(index.tolist(), mirrored.tolist(), strict=True)):
            assert np.array_equal(batch.images[row].numpy(), found.moments(at, flip))
            assert batch.labels[row] == labelled.label(at)
            mirrors.add(flip)
    stream.close()
    assert mirrors == {False, True}
    assert torch.equal(found[3], labelled[3])  # the picture itself


def test_workers_read_what_this_process_reads(make):
    found, _ = make()
    here = Loader(found, batch=5, seed=1, mirror=True, workers=0, pin_memory=False).iterate(0)
    there = Loader(found, batch=5, seed=1, mirror=True, workers=2, pin_memory=False, start_method="fork").iterate(0)
    for _ in range(5):
        assert torch.equal(next(here).images, next(there).images)
    here.close()
    there.close()


def _sum_of(found) -> float:
    return float(sum(found.moments(index, True).astype(np.float64).sum() for index in range(len(found))))


def test_it_can_be_forked_and_pickled_while_open(make):
    found, _ = make()
    total = _sum_of(found)
    assert _sum_of(pickle.loads(pickle.dumps(found))) == total
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_sum_of, [found])[0] == total
    assert _sum_of(found) == total


def test_few_files_are_open_at_a_time(make, images, monkeypatch):
    monkeypatch.setattr(latents, "_OPEN_SHARDS", 2)
    found, _ = make(shard_images=1)
    check(found, images)
    assert len(found._open) == 2


def test_captions_are_those_of_the_images(make, images):
    (images.path / "0002.txt").write_text("two")
    assert read_captions(make()[0])[2] == "two"


def test_unkept_variants_are_refused(make):
    found, _ = make(variants=Variants(mirror=False))
    assert found.moments(0).shape == (6, 4, 4)
    with pytest.raises(LowVRAMError, match="mirrored"):
        found.moments(0, True)
    with pytest.raises(LowVRAMError, match="mirrored"):
        found.read(0, mirrored=True)


# ---- bad images and bad moments


def test_a_bad_image_gives_its_place_to_the_next_good_one(make, images, caplog):
    for name in ("0004.png", "0005.png", "0009.png"):
        (images.path / name).write_bytes(b"nothing")
    found, _ = make()
    for bad, good in ((4, 6), (5, 6), (9, 0)):
        assert found.resolve(bad)[0] == good
        assert np.array_equal(found.moments(bad), expected(images, good))
    item = found.read(4)
    assert [line.split(":")[0] for line in item.skipped] == ["0004.png", "0005.png"]
    assert caplog.text.count("skipped 0004.png") == 1
    again, encoder = make(of=open_dataset(images.path, resolution=16))
    assert encoder.images == 0 and again.resolve(4)[0] == 6
    assert np.array_equal(again.fetch(4).pixels, images.fetch(6).pixels)


def test_bad_images_stop_a_build_where_they_should(make, images):
    for name in ("0000.png", "0005.png"):
        (images.path / name).write_bytes(b"nothing")
    with pytest.raises(LowVRAMError, match=r"0000.png: not a PNG") as caught:
        make(of=open_dataset(images.path, resolution=16, on_bad_file="error"))
    assert "skip" in caught.value.remedy
    with pytest.raises(LowVRAMError, match="bad_file_limit=1"):
        make(of=open_dataset(images.path, resolution=16, bad_file_limit=1))
    assert make(of=open_dataset(images.path, resolution=16, bad_file_limit=2))[1].images
    with pytest.raises(LowVRAMError, match=r"0000.png"):  # kept by now, and still bad
        make(of=open_dataset(images.path, resolution=16, on_bad_file="error"))


@pytest.mark.parametrize(("value", "words"), [(np.nan, "no finite"), (-np.inf, "no finite"), (1e5, "float16")])
def test_moments_that_are_not_finite_name_the_image(make, value, words):
    class Overflowing(Encoder):
        def __call__(self, pixels):
            moments = super().__call__(pixels)
            moments[pixels[:, 1, 0, 0] == 106, 2, 1, 1] = value
            return moments

    with pytest.raises(LowVRAMError, match=rf"{words}.*0006\.png") as caught:
        make(Overflowing())
    assert "float32" in caught.value.remedy
    found, encoder = make()
    assert encoder.images == 2 * 6  # the first shard is kept
    assert np.isfinite(found.moments(6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moments_of_any_float_type(make, images, dtype):
    found, _ = make(lambda pixels: Encoder()(pixels).to(dtype).requires_grad_())
    assert np.allclose(found.moments(2), expected(images, 2), atol=0.01)


def test_an_encoder_that_gives_another_shape_is_a_mistake(make):
    with pytest.raises(ValueError, match="not"):
        make(lambda pixels: torch.zeros(len(pixels), 8, 5, 5))
    with pytest.raises(ValueError, match="moments of"):
        make(lambda pixels: torch.zeros(len(pixels) + 1, 8, 4, 4))
    count = iter(range(100))
    with pytest.raises(ValueError, match="is due"):
        make(lambda pixels: torch.zeros(len(pixels), 8 if next(count) < 3 else 6, 4, 4))


# ---- damage, interrupts, full disks


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip_a_bit, empty, Path.unlink])
def test_a_damaged_shard_is_made_again_alone(make, images, harm, caplog):
    found, _ = make()
    harm(shards(found)[1])
    kept = [shards(found)[0].stat().st_mtime_ns, shards(found)[-1].stat().st_mtime_ns]
    again, encoder = make()
    assert encoder.images == 2 * 4 and "00001.safetensors are made again" in caplog.text
    assert [shards(again)[at].stat().st_mtime_ns for at in (0, -1)] == kept
    check(again, images)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 1}', "replace"])
def test_a_damaged_index_costs_the_work_and_nothing_else(make, images, content):
    index = make()[0].folder / "index.json"
    if content == "replace":
        content = index.read_text().replace('"ranges": [[', '"ranges": [["x"], [', 1)
    index.write_text(content)
    found, encoder = make()
    assert encoder.images == 21
    check(found, images)


def test_files_that_go_away_during_training(make):
    found, _ = make()
    found.moments(0)
    cut(shards(found)[2])
    shards(found)[1].unlink()
    for index in (4, 8):
        with pytest.raises(LowVRAMError, match="cannot be read") as caught:
            found.moments(index)
        assert "made anew" in caught.value.remedy


class Interrupting(Encoder):
    def __call__(self, pixels):
        if len(self.batches) >= 6:
            raise KeyboardInterrupt
        return super().__call__(pixels)


def test_a_build_goes_on_where_it_was_interrupted(make, images):
    with pytest.raises(KeyboardInterrupt):
        make(Interrupting())  # the probe, 2 x 2 batches of the first shard, and the first batch of the second
    found, encoder = make()
    assert encoder.images == 2 * 6
    check(found, images)
    assert leftovers(found) == [".lock"]


def _slow_build(path, cache, counter):
    def encode(pixels):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.02)
        return torch.zeros(len(pixels), 6, 4, 4)

    build(cache, open_dataset(path, resolution=16), encode, key={}, shard_images=1, batch=1, progress=False)


@pytest.fixture
def start(images, tmp_path):
    """start() -> a process that builds slowly; start.counter: how often it encoded, all processes together."""
    context = multiprocessing.get_context("fork")

    def started():
        process = context.Process(target=_slow_build, args=(images.path, tmp_path / "cache", started.counter))
        process.start()
        return process

    started.counter = context.Value("i", 0)
    return started


def test_a_build_goes_on_where_it_was_killed_and_the_lock_is_gone(start):
    process = start()
    while start.counter.value < 8 and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = start()
    process.join(60)
    assert process.exitcode == 0 and 21 <= start.counter.value <= 24  # a shard is two, and was cut off once
    process = start()
    process.join(60)
    assert process.exitcode == 0 and start.counter.value <= 24


def test_two_processes_at_once_make_each_latent_once(start):
    both = [start(), start()]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert start.counter.value == 21


def test_a_process_that_waits_says_so(make, caplog, monkeypatch):
    folder = make()[0].folder
    with latent_files.locked(folder, "images"):
        monkeypatch.setattr(latent_files.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make()
    assert "another process encodes images" in caplog.text
    assert make()[1].images == 0


class FullDisk:
    """A disk that takes so many bytes more, in the place of os.fsync, where a full disk often tells."""

    def __init__(self, writes):
        self.writes = writes

    def __call__(self, descriptor):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("writes", "kept"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_a_full_disk_loses_nothing(make, images, monkeypatch, writes, kept):
    """Wherever it fills up: at the plan, a shard, or the index after it."""
    with monkeypatch.context() as patched:
        patched.setattr(latent_files.os, "fsync", FullDisk(writes))
        with pytest.raises(LowVRAMError, match="No space left") as caught:
            make()
    assert "goes on from here" in caught.value.remedy
    found, encoder = make()
    assert encoder.images == 2 * (10 - 4 * kept) + (writes == 0)
    check(found, images)
    assert leftovers(found) == [".lock"]


def test_a_disk_that_is_too_small_is_told_before_the_work(make, monkeypatch):
    monkeypatch.setattr(latent_files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    encoder = Encoder()
    with pytest.raises(LowVRAMError, match=r"need 0\.\d\d GiB .* 0\.00 GiB are free"):
        make(encoder)
    assert encoder.images == 1


def test_a_folder_that_cannot_be_made(make, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(LowVRAMError, match="cannot be written"):
        make()


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"shard_images": 0}])
def test_settings_that_cannot_be(make, wrong):
    with pytest.raises(LowVRAMError, match=next(iter(wrong))):
        make(**wrong)


# ---- the rest


def test_an_error_of_the_encoder_stays_itself(make):
    def broken(pixels):
        raise OSError("a driver")

    with pytest.raises(OSError, match="a driver"):
        make(broken)


def test_the_next_image_is_decoded_while_one_is_encoded(make, images, monkeypatch):
    real = type(images).load
    loads, calls = [], []

    def load(self, index):
        loads.append(index)
        return real(self, index)

    monkeypatch.setattr(type(images), "load", load)

    def encode(pixels):
        """Call 0 learns the size; call n encodes image n - 1, and waits until image n is decoded."""
        calls.append(len(pixels))
        end = time.monotonic() + 20
        while 1 < len(calls) < 11 and len(loads) <= len(calls):
            assert time.monotonic() < end, "nothing is decoded meanwhile"
            time.sleep(0.001)
        return Encoder()(pixels)

    make(encode, batch=1, shard_images=10, variants=Variants(mirror=False))
    assert len(calls) == 11 and loads == [0, *range(10)]


def test_progress_is_shown(make, capfd):
    make(progress=True)
    assert "latents of images: 100%" in capfd.readouterr().err


def test_weights_are_told_apart():
    torch.manual_seed(0)
    state = nn.Linear(3, 2).state_dict()
    known = hash_weights(state)
    assert hash_weights(dict(reversed(list(state.items())))) == known and len(known) == 16
    for name in state:
        changed = {key: value.clone() for key, value in state.items()}
        changed[name].view(-1)[-1] += 1e-6
        assert hash_weights(changed) != known
    assert hash_weights({key: value.bfloat16() for key, value in state.items()}) != known
    assert hash_weights({"weight": state["weight"].T, "bias": state["bias"]}) != known
    assert hash_weights({"steps": torch.tensor(3)}) != hash_weights({"steps": torch.tensor(4)})
