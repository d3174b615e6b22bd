"""Folders and zips: what is found, in which order, with which labels, and what is refused."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, number_of, numbered

from lowvram.data import open_dataset
from lowvram.errors import LowVRAMError


def write_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def write_tree(path: Path, entries: dict[str, bytes]) -> Path:
    for name, data in entries.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["folder", "zip"])
def store(request, tmp_path):
    """make(entries) -> a folder or a zip with these files."""
    if request.param == "zip":
        return lambda entries: write_zip(tmp_path / "set.zip", entries)
    return lambda entries: write_tree(tmp_path / "set", entries)


def numbers(images) -> list[int]:
    return [number_of(images[i].numpy()) for i in range(len(images))]


def refused(path, **settings) -> str:
    """The message of the error that opening gives; it must say what to do."""
    with pytest.raises(LowVRAMError) as caught:
        open_dataset(path, resolution=16, **settings)
    assert caught.value.remedy
    return caught.value.problem


JUNK = {
    "__MACOSX/a/._1.png": b"x",
    ".DS_Store": b"x",
    "a/.DS_Store": b"x",
    "a/._1.png": b"x",
    ".cache/5.png": b"x",
    "notes.txt": b"x",
    "Thumbs.db": b"x",
}


def test_found_at_any_depth_in_order_of_name_and_junk_ignored(store, caplog):
    images = open_dataset(
        store({"b/2.png": numbered(2), "a/x/1.JPG": numbered(1), "a/0.png": numbered(0), "c.png": numbered(3), **JUNK}),
        resolution=16,
    )
    assert (len(images), images.channels, images.num_classes, images.labels) == (4, 3, 0, None)
    assert numbers(images) == [0, 1, 2, 3]
    assert images[0].dtype == torch.uint8 and images[0].shape == (3, 16, 16)
    assert images.label(0) == -1
    assert not caplog.records


def test_labels_from_dataset_json(store):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    content = {"labels": [[name, label] for name, label in zip(names, [3, 0, 0, 1], strict=True)]}
    entries = {name: numbered(i) for i, name in enumerate(names)} | {"dataset.json": json.dumps(content).encode()}
    path = store(entries)
    images = open_dataset(path, resolution=16, labels=True)
    assert images.labels.tolist() == [3, 0, 0, 1] and images.labels.dtype == np.int64
    assert images.num_classes == 4 and images.class_names == ["0", "1", "2", "3"]
    assert images.label(0) == 3
    assert open_dataset(path, resolution=16).num_classes == 0  # labels=False leaves them


def test_labels_from_folder_names(store):
    path = store({"dog/0.png": numbered(1), "cat/deep/0.png": numbered(0), "dog/1.png": numbered(2)})
    images = open_dataset(path, resolution=16, labels=True)
    assert images.class_names == ["cat", "dog"] and images.labels.tolist() == [0, 1, 1]


def test_labels_below_one_outer_folder(store):
    """A zip of a folder holds that folder; the classes are within."""
    path = store({"pets/dog/0.png": numbered(1), "pets/cat/0.png": numbered(0)})
    assert open_dataset(path, resolution=16, labels=True).class_names == ["cat", "dog"]


def test_max_images_is_a_fixed_choice_over_all_classes(folder):
    whole = folder(40)
    few = open_dataset(whole, resolution=16, max_images=10)
    chosen = numbers(few)
    assert chosen == numbers(open_dataset(whole, resolution=16, max_images=10)) == sorted(set(chosen))
    assert len(few) == 10 and max(chosen) > 20
    assert len(open_dataset(whole, resolution=16, max_images=1000)) == 40


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["0.png", 1]], "no label for 1.png"),
        ([["0.png", 1], ["1.png", 0], ["9.png", 0]], "labels 9.png, an image that is not there"),
        ([["0.png", 1.5], ["1.png", 0]], "gives 0.png the label 1.5, which is not a class number"),
        ([["0.png", 1], ["1.png", True]], "gives 1.png the label True"),
        ([["0.png", -1], ["1.png", 0]], "gives 0.png the label -1"),
        ([["0.png", 10**9], ["1.png", 0]], "gives 0.png the label 1000000000"),
        ([["0.png", [0, 1]], ["1.png", 0]], r"gives 0.png the label [0, 1]"),
        ([["0.png"], ["1.png", 0]], "where a pair [file, label] should be"),
        (7, '"labels" in dataset.json of'),
    ],
)
def test_labels_that_do_not_fit(store, labels, said):
    content = json.dumps({"labels": labels}).encode()
    path = store({"0.png": numbered(0), "1.png": numbered(1), "dataset.json": content})
    assert said in refused(path, labels=True)
    assert len(open_dataset(path, resolution=16, labels=False)) == 2


def test_labels_that_miss_images_say_how_many(store):
    content = json.dumps({"labels": [["0.png", 0], ["8.png", 0], ["9.png", 0]]}).encode()
    path = store({"0.png": numbered(0), "1.png": numbered(1), "dataset.json": content})
    said = refused(path, labels=True)
    assert "2 of 3 labels have no image" in said and "1 of 2 images have no label" in said


def test_dataset_json_that_is_no_json(store):
    path = store({"0.png": numbered(0), "dataset.json": b"{"})
    assert "not valid JSON" in refused(path, labels=True)
    assert "not an object" in refused(store({"0.png": numbered(0), "dataset.json": b"[]"}), labels=True)


def test_no_labels_to_be_found(store):
    assert "0.png first" in refused(store({"0.png": numbered(0), "a/1.png": numbered(1)}), labels=True)


def test_folders_of_a_prepared_zip_are_no_classes(store):
    path = store({"00000/img00000000.png": numbered(0), "00001/img00001000.png": numbered(1)})
    assert "prepared without labels" in refused(path, labels=True)


def test_missing_path():
    assert "data.path=nowhere/at-all does not exist" in refused("nowhere/at-all")


def test_path_that_cannot_be():
    assert "data.path is empty" in refused("")
    assert "cannot be looked at" in refused("x" * 300)


def test_no_images(store, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images: no files" in refused(tmp_path / "empty")
    assert "holds no images: 1 files, such as readme.txt" in refused(store({"readme.txt": b"x", ".0.png": b"x"}))


def test_a_file_that_is_no_zip(tmp_path):
    (tmp_path / "images.tar").write_bytes(b"x" * 2000)
    assert "is a file, but not a zip" in refused(tmp_path / "images.tar")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_corrupt_zip(tmp_path, keep):
    path = write_zip(tmp_path / "cut.zip", {f"{i}.png": numbered(i) for i in range(5)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "cut.zip is not a zip archive that can be read" in refused(path)


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "C:\\evil.png", "..\\evil.png"])
def test_zip_with_entries_outside_is_refused_by_name(tmp_path, name):
    path = write_zip(tmp_path / "evil.zip", {"0.png": numbered(0), name: numbered(1)})
    assert repr(name) in refused(path)


def test_zip_entry_of_absurd_size_is_a_bad_file(tmp_path):
    """A directory that says 3 GB: refused before anything is unpacked."""
    path = write_zip(tmp_path / "big.zip", {"0.png": numbered(0), "1.png": numbered(1)})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 3_000_000_000)
    path.write_bytes(data)
    fetched = open_dataset(path, resolution=16).fetch(0)
    assert fetched.skipped == ["0.png: unpacks to 3,000,000,000 bytes, more than 1,073,741,824"]


def test_damaged_and_encrypted_zip_entries_are_bad_files(tmp_path):
    path = write_zip(tmp_path / "bad.zip", {f"{i}.png": numbered(i) for i in range(3)})
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF  # within the first image: its CRC no longer fits
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[second + 8] |= 1  # the second: "encrypted"
    path.write_bytes(data)
    skipped = open_dataset(path, resolution=16).fetch(0).skipped
    assert [line.split(" (")[0] for line in skipped] == ["0.png: cannot be unpacked", "1.png: cannot be unpacked"]


BAD = {"not an image": b"hello", "truncated": encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))}
BAD["truncated"] = BAD["truncated"][:3000]


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_skipped_or_error(store, kind, caplog):
    path = store({"0.png": numbered(0), "1.png": BAD[kind], "2.png": BAD[kind], "3.png": numbered(3)})
    images = open_dataset(path, resolution=16)
    assert numbers(images) == [0, 3, 3, 3]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["skipped 1.png", "skipped 2.png"]
    strict = open_dataset(path, resolution=16, on_bad_file="error")
    assert number_of(strict[0].numpy()) == 0
    with pytest.raises(LowVRAMError, match=r"1\.png of set.* cannot be used"):
        strict[1]


def test_the_label_goes_with_the_replacement(store):
    path = store({"a/0.png": b"x", "b/1.png": numbered(1)})
    fetched = open_dataset(path, resolution=16, labels=True).fetch(0)
    assert fetched.label == 1 and len(fetched.skipped) == 1


def test_bad_file_limit(store):
    entries = {f"{i}.png": numbered(i) if i % 2 else b"x" for i in range(10)}
    images = open_dataset(store(entries), resolution=16, bad_file_limit=2)
    for index in (0, 2, 0):
        images[index]
    with pytest.raises(LowVRAMError, match=r"3 files of set.* more than bad_file_limit=2"):
        images[4]


def test_a_bad_file_is_tried_once(store, monkeypatch):
    images = open_dataset(store({"0.png": b"x", "1.png": numbered(1)}), resolution=16)
    tried = []
    real = images.load
    monkeypatch.setattr(images, "load", lambda index: tried.append(index) or real(index))
    for _ in range(3):
        images.fetch(0)
    assert tried == [0, 1, 1, 1]


def test_all_bad(store):
    with pytest.raises(LowVRAMError, match="none of the 3 images"):
        open_dataset(store({f"{i}.png": b"x" for i in range(3)}), resolution=16)[0]


def test_a_file_that_vanishes_or_may_not_be_read_is_a_bad_file(folder):
    path = folder(2)
    images = open_dataset(path, resolution=16)
    (path / "0000.png").unlink()
    assert "cannot be read" in images.fetch(0).skipped[0]


def test_smaller_images_are_enlarged_with_one_warning(folder, caplog):
    images = open_dataset(folder(3), resolution=32)
    assert images[0].shape == (3, 32, 32)
    images[1]
    assert len(caplog.records) == 1 and "0000.png is smaller than 32x32" in caplog.text


def test_a_link_that_leads_back_ends(folder):
    path = folder(2)
    (path / "again").symlink_to(path)
    assert len(open_dataset(path, resolution=16)) == 2


def test_fingerprint(store):
    entries = {"0.png": numbered(0), "1.png": numbered(1)}
    path = store(entries)
    fingerprint = open_dataset(path, resolution=16).fingerprint
    assert fingerprint == open_dataset(path, resolution=16, labels=False).fingerprint
    assert fingerprint != open_dataset(path, resolution=32).fingerprint
    assert fingerprint != open_dataset(path, resolution=16, max_images=1).fingerprint
    store({**entries, "1.png": encode(np.zeros((20, 30, 3), np.uint8))})
    assert fingerprint != open_dataset(path, resolution=16).fingerprint


def test_pickled_and_forked_copies_read_on(store):
    # Large enough that reading one moves the position of the file, which a forked child shares.
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    noise[:, 0, 0, 1] = 100 + np.arange(8)
    images = open_dataset(store({f"{i}.png": encode(noise[i]) for i in range(8)}), resolution=64, bad_file_limit=0)
    images[0]  # the handle is open
    assert numbers(pickle.loads(pickle.dumps(images))) == list(range(8))
    readers = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(0 if all(numbers(images) == list(range(8)) for _ in range(20)) else 1)
            finally:
                os._exit(2)
        readers.append(pid)
    assert all(numbers(images) == list(range(8)) for _ in range(20))
    assert [os.waitpid(pid, 0)[1] for pid in readers] == [0, 0, 0]


@pytest.mark.parametrize(
    "settings", [{"max_images": 0}, {"on_bad_file": "ignore"}, {"bad_file_limit": -1}, {"builtin_count": 0}]
)
def test_wrong_settings(settings):
    assert f"{next(iter(settings))}={next(iter(settings.values()))}" in refused(None, **settings)
