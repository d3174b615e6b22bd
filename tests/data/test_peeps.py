"""The built-in faces: the same everywhere, kept on disk, whatever happens to the disk."""

import multiprocessing
import os

import numpy as np
import pytest

from lowvram.data import image_cache, open_dataset, peeps


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def drawings(monkeypatch):
    """Counts what is drawn, rather than read from the cache."""
    drawn = []
    real = peeps.render_png

    def counted(index, resolution):
        drawn.append(index)
        return real(index, resolution)

    monkeypatch.setattr(peeps, "render_png", counted)
    return drawn


def test_a_face(empty_cache):
    """White paper at the top corners, black hair or lines, and a good part that is neither."""
    images = open_dataset(None, resolution=64)
    assert len(images) == 10_000 and images.name == "the built-in faces"
    for index in range(20):
        face = images[index].numpy()  # [3, 64, 64]
        assert face.shape == (3, 64, 64) and face.dtype == np.uint8
        assert (face[:, 0, [0, -1]] == 255).all()
        assert (face.max(axis=0) < 40).mean() > 0.01
        assert ((face.max(axis=0) - face.min(axis=0)) > 30).mean() > 0.1


def test_the_same_index_is_the_same_face_at_any_size_and_others_differ(empty_cache):
    small, large = open_dataset(None, resolution=32), open_dataset(None, resolution=128)
    shrunk = large[5].numpy().reshape(3, 32, 4, 32, 4).mean(axis=(2, 4))
    assert np.abs(shrunk - small[5].numpy()).mean() < 6
    assert len({small[i].numpy().tobytes() for i in range(50)}) == 50


def test_labels_are_balanced_and_to_be_seen(empty_cache):
    images = open_dataset(None, resolution=64, labels=True, builtin_count=700)
    assert images.num_classes == len(images.class_names) == 7
    assert np.bincount(images.labels).tolist() == [100] * 7
    for index in range(14):
        colour = peeps.CLOTHING[images.class_names[images.label(index)]]
        rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
        near = np.abs(images[index].numpy().astype(int) - rgb[:, None, None]).max(axis=0) < 8  # [64, 64]
        assert near[50:].sum() > 10, (index, colour)
    unlabelled = open_dataset(None, resolution=64)
    assert unlabelled.num_classes == 0 and unlabelled.labels is None
    assert (unlabelled[3] == images[3]).all()


def test_attributes_read_as_captions():
    drawn = [peeps.attributes(index) for index in range(60)]
    assert all({"headVariant", "expressionVariant", "skinColor", "clothingColor"} <= set(d) for d in drawn)
    assert any("accessoriesVariant" in d for d in drawn) and not all("accessoriesVariant" in d for d in drawn)
    assert drawn[3]["clothingName"] == "pink" and drawn[3]["clothingColor"] == peeps.CLOTHING["pink"]


def test_count(empty_cache):
    assert len(open_dataset(None, resolution=32, max_images=5)) == 5
    assert len(open_dataset(None, resolution=32, builtin_count=20_000)) == 20_000


@pytest.mark.parametrize("resolution", [32, 128])
def test_drawn_once(empty_cache, drawings, resolution):
    images = open_dataset(None, resolution=resolution)
    first = [images[i] for i in range(4)]
    again = open_dataset(None, resolution=resolution)
    assert all((again[i] == first[i]).all() for i in range(4))
    assert drawings == [0, 1, 2, 3]


@pytest.mark.parametrize("resolution", [32, 128])
def test_damaged_entries_are_drawn_again(empty_cache, drawings, resolution):
    images = open_dataset(None, resolution=resolution)
    first = [images[i] for i in range(3)]
    for file in [f for f in empty_cache.rglob("*") if f.is_file()]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data[:-10])
    again = open_dataset(None, resolution=resolution)
    assert all((again[i] == first[i]).all() for i in range(3))
    assert len(drawings) > 3
    count = len(drawings)
    assert all((open_dataset(None, resolution=resolution)[i] == first[i]).all() for i in range(3))
    assert len(drawings) == count  # mended


@pytest.mark.parametrize("where", ["a file", "nowhere"])
def test_unwritable_cache_warns_once_and_goes_on(tmp_path, monkeypatch, caplog, where):
    place = tmp_path / "file"
    place.write_text("x")
    monkeypatch.setenv("LOWVRAM_CACHE", str(place / "below") if where == "a file" else "/proc/none")
    for _ in range(2):
        assert open_dataset(None, resolution=32)[0].shape == (3, 32, 32)
    assert len(caplog.records) == 1 and "LOWVRAM_CACHE" in caplog.text


def test_disk_that_fills_warns_once_and_goes_on(empty_cache, monkeypatch, caplog):
    images = open_dataset(None, resolution=32)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.RawCache, "_write", full)
    assert images[0].shape == images[1].shape
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def _draw_all(start: int, resolution: int, wanted: list[bytes]) -> None:
    images = open_dataset(None, resolution=resolution)
    for step in range(len(wanted)):
        index = (start + step) % len(wanted)
        if images[index].numpy().tobytes() != wanted[index]:
            os._exit(1)


@pytest.mark.parametrize("resolution", [32, 128])
def test_many_processes_draw_at_once(empty_cache, resolution, monkeypatch):
    images = open_dataset(None, resolution=resolution)
    wanted = [images[i].numpy().tobytes() for i in range(12)]
    monkeypatch.setenv("LOWVRAM_CACHE", str(empty_cache / "second"))
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_draw_all, args=(at * 3, resolution, wanted)) for at in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    _draw_all(0, resolution, wanted)


def test_forked_copies_read_on(empty_cache, monkeypatch):
    """A child shares its parent's file positions: with one handle for both, reads would land in other records."""
    images = open_dataset(None, resolution=32, builtin_count=12)
    wanted = [images.fetch(i).pixels.tobytes() for i in range(12)]
    monkeypatch.setattr(peeps, "render_png", None)  # all is on disk: a draw would be a misread
    readers = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                right = all([images.fetch(i).pixels.tobytes() for i in range(12)] == wanted for _ in range(300))
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        readers.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in readers] == [0, 0, 0]


def test_other_versions_draw_into_another_folder(monkeypatch):
    before = peeps.drawing_key()
    monkeypatch.setattr(peeps.importlib.metadata, "version", lambda name: "99.0")
    assert peeps.drawing_key() != before


def test_import_draws_nothing():
    """The style takes half a second to parse: not before a face is asked for."""
    import subprocess
    import sys

    code = "import sys, lowvram.data.peeps; assert not {'dicebear', 'resvg_py', 'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
