"""Tensor files read and written one tensor at a time, and what hostile or damaged ones are refused with."""

import json
import os
import resource
import types
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from tensors_of_files import PLAIN, damage, refused, same, tensors
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.weights.tensor_file import NewTensor, TensorFile, finite, write_tensors

NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
BASE: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def new(state: Mapping[str, Tensor]) -> dict[str, NewTensor]:
    return {name: NewTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}


def raw(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    """A .safetensors file with a header of our making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


# What is read is what was written.


def test_what_is_written_reads_back_in_safetensors_and_here(path: Path) -> None:
    state = tensors(PLAIN + NARROW)
    write_tensors(path, new(state), {"format": "pt"})
    theirs = load_file(path)
    assert set(theirs) == set(state) and all(same(theirs[name], t) for name, t in state.items())
    with TensorFile.open(path) as file:
        assert set(file.names) == set(state) and file.metadata == {"format": "pt"}
        for name, tensor in state.items():
            assert name in file and same(file.read(name), tensor)
            assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        with pytest.raises(KeyError):
            file.read("nothing")
    with pytest.raises(ValueError, match="closed"):
        file.read("one")


def test_a_written_file_is_byte_for_byte_what_safetensors_writes(path: Path) -> None:
    state = {"b": torch.randn(5).half(), "a": torch.randn(3).half(), "c": torch.randn(2, 2), "empty": torch.empty(0)}
    write_tensors(path, new(state), {"format": "pt"})
    assert path.read_bytes() == save(state, {"format": "pt"})


def test_each_tensor_lies_at_a_multiple_of_its_types_size(path: Path) -> None:
    state = tensors(PLAIN + NARROW)
    write_tensors(path, new(state))
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert length % 8 == 0 and all(
        header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0 for name, tensor in state.items()
    )


def test_what_is_read_is_memory_of_its_own(path: Path, tmp_path: Path) -> None:
    ckpt = tmp_path / "a.ckpt"
    save_file({"x": torch.ones(4)}, path)
    torch.save({"x": torch.ones(4)}, ckpt)
    for place in (path, ckpt):
        before = place.read_bytes()
        with TensorFile.open(place) as file:
            first = file.read("x")
            first.mul_(3)
            second = file.read("x")
        assert first.tolist() == [3] * 4 and second.tolist() == [1] * 4
        assert place.read_bytes() == before


def test_a_safetensors_file_under_another_name_reads(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.ckpt")
    with TensorFile.open(tmp_path / "x.ckpt") as file:
        assert file.names == ("x",)


def test_shards_read_as_one_file(tmp_path: Path) -> None:
    state = tensors([torch.float32, torch.float16])
    names = sorted(state)
    parts = {"m-1.safetensors": names[:2], "m-2.safetensors": names[2:]}
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, (shard, members) in enumerate(parts.items()):
        save_file({name: state[name] for name in members}, blobs / str(number) if number else tmp_path / shard)
    (tmp_path / "m-2.safetensors").symlink_to(Path("blobs") / "1")  # as a download cache lays them out
    index = tmp_path / "m.safetensors.index.json"
    places = {name: shard for shard, members in parts.items() for name in members}
    index.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": places}))
    with TensorFile.open(index) as file:
        assert file.names == tuple(places) and all(same(file.read(name), state[name]) for name in names)
    index.write_text(json.dumps({"weight_map": {**places, "lost.weight": "m-1.safetensors"}}))
    refused(index, "lost.weight", "m-1.safetensors")
    for away in ("../m-1.safetensors", "/etc/passwd", "a/b", "..\\x", "C:x", "", "..", "m.safetensors.index.json"):
        index.write_text(json.dumps({"weight_map": {"x": away}}))
        refused(index, "no name of a file beside it", "x is in")
    for damaged in ("", "[]", "{}", '{"weight_map": {"x": 3}}', '{"weight_map": {"x": "a", "x": "b"}}', "[" * 10**5):
        index.write_text(damaged)
        refused(index, "is empty" if not damaged else "no index of shards")
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(LowVRAMError, match=r"gone\.safetensors does not exist"):
        TensorFile.open(index)


def test_one_tensor_is_in_memory_at_a_time(path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(path, {str(number): ((1000,), torch.float32, make) for number in range(5)})
    assert len(alive) == 5 and len(load_file(path)) == 5


# Hostile and damaged .safetensors.


def changed(name: str, **values: Any) -> dict[str, Any]:
    return {**BASE, name: {**BASE[name], **values}}


HEADERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "overlap": (changed("b", data_offsets=[20, 28]), ("b overlaps a",)),
    "a gap": (changed("b", data_offsets=[26, 34]), ("34", "cut off")),
    "a hole": ({"b": {**BASE["b"], "data_offsets": [24, 32]}}, ("before b",)),
    "beyond the end": (changed("b", data_offsets=[24, 40], shape=[8]), ("b would end", "cut off")),
    "far beyond the end": (changed("b", data_offsets=[24, 2**60], shape=[2**59 - 12]), ("b would end",)),
    "something behind": ({"a": BASE["a"]}, ("8 bytes behind its last tensor, a",)),
    "size and shape differ": (changed("a", shape=[2, 2]), ("a of shape [2, 2]", "16 bytes", "24")),
    "type and size differ": (changed("a", dtype="F64"), ("a of shape", "F64")),
    "a product that overflows": (changed("a", shape=[2**40, 2**40]), ("a of shape",)),
    "negative": (changed("a", shape=[-2, -3]), ("a has shape",)),
    "backwards": (changed("a", data_offsets=[24, 0]), ("a of shape",)),
    "no numbers": (changed("a", shape=["2", 3]), ("a has shape",)),
    "truth for numbers": (changed("a", shape=[True, 6]), ("a has shape",)),
    "no list": (changed("a", shape=6), ("a has shape",)),
    "fractions": (changed("a", data_offsets=[0.0, 24.0]), ("a has data_offsets",)),
    "many dimensions": (changed("a", shape=[1] * 5000 + [6]), ("a has shape",)),
    "an unknown type": (changed("a", dtype="Q4"), ("a has numbers of type 'Q4'",)),
    "no type": ({"a": {"shape": [], "data_offsets": [0, 32]}}, ("a has numbers of type None",)),
    "no tensor": ({**BASE, "c": 3}, ("c is a int",)),
    "a name twice": (json.dumps(BASE).encode()[:-1] + b', "a": ' + json.dumps(BASE["b"]).encode() + b"}", ("'a' is",)),
    "metadata of numbers": ({**BASE, "__metadata__": {"x": 1}}, ("__metadata__",)),
    "nothing": ({}, ()),
    "a list": ([1], ("list",)),
    "no JSON": (b"{abc", ("damaged",)),
    "no text": (b"\xff\xfe{}", ("damaged",)),
    "depth": (b"[" * 10**5, ("damaged",)),
    "a number without end": (b'{"a": ' + b"9" * 10**5 + b"}", ("damaged",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(path: Path, case: str) -> None:
    header, words = HEADERS[case]
    refused(raw(path, header), *words)


def test_the_header_these_cases_change_is_right(path: Path) -> None:
    with TensorFile.open(raw(path, BASE)) as file:
        assert file.read("a").tolist() == [[0.0] * 3] * 2 and file.read("b").shape == (4,)


def test_a_header_longer_than_the_file_or_than_any_is_refused(path: Path) -> None:
    refused(raw(path, BASE, length=2**63), "9,223,372,036,854,775,808 bytes long", "cut off")
    with path.open("wb") as file:  # sparse: 3 GB on no disk
        file.write((2**31).to_bytes(8, "little"))
        file.truncate(3 * 2**30)
    refused(path, "its header is 2,147,483,648 bytes long")


def test_truncated_files_are_refused(tmp_path: Path, path: Path) -> None:
    state = {"x": torch.randn(100), "y": torch.randn(50)}
    save_file(state, path)
    torch.save(state, tmp_path / "a.ckpt")
    torch.save(state, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    for place in (path, tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        whole = place.read_bytes()
        for length in (1, 5, 9, 30, len(whole) // 2, len(whole) - 5, len(whole) - 1):
            place.write_bytes(whole[:length])
            refused(place)
    path.write_bytes(save(state)[:-5])
    refused(path, "y would end at byte 600 of 595", "cut off")


def test_a_file_that_is_cut_off_while_it_is_open_is_said(path: Path) -> None:
    save_file({"x": torch.ones(10**5), "y": torch.ones(3)}, path)
    with TensorFile.open(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(LowVRAMError, match=r"weights\.safetensors: x can't be read"):
            file.read("x")


@settings(max_examples=120)
@given(st.data())
def test_a_damaged_safetensors_is_refused_or_says_the_same_thing(data: st.DataObject) -> None:
    whole = bytearray(save({"x": torch.ones(3), "y": torch.ones(2, 2).half()}, {"k": "v"}))
    damage(data, whole, len(whole))
    path = Path(os.environ["LOWVRAM_CACHE"]) / "fuzz.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole)
    try:
        with TensorFile.open(path) as file:
            assert all(file.read(n).shape == file.shape(n) for n in file.names)
    except LowVRAMError as error:
        assert str(path) in error.problem


# What is no file, or another.


def test_what_is_no_file_of_tensors_is_said(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    refused(tmp_path / "link.safetensors", "is a link to", "gone")
    os.mkfifo(tmp_path / "pipe.ckpt")
    refused(tmp_path / "pipe.ckpt", "a device or a pipe")
    contents = {
        "is empty": b"",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4265380512\n",
        "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        "archive": b"\x1f\x8b\x08" + bytes(50),
        "GGUF": b"GGUF" + bytes(50),
        "": bytes(50),
    }
    for suffix in ("safetensors", "ckpt", "pt"):
        for word, content in contents.items():
            (tmp_path / f"x.{suffix}").write_bytes(content)
            refused(tmp_path / f"x.{suffix}", word)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64,
                                   torch.float8_e5m2])  # fmt: skip
def test_what_is_not_finite_is_counted_and_named(dtype: torch.dtype) -> None:
    good = torch.linspace(-3, 3, 50).to(dtype)
    assert finite("a.ckpt", "w", good) is good
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = torch.linspace(-3, 3, 50)
        values[7] = values[20] = bad
        with pytest.raises(LowVRAMError, match=r"a\.ckpt: w has 2 of"):
            finite("a.ckpt", "w", values.to(dtype))
    assert finite("a", "b", torch.arange(3)).tolist() == [0, 1, 2] and finite("a", "b", torch.empty(0)).numel() == 0


# Writing: whole or not at all.


def test_a_failed_write_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"old": torch.ones(1)}, path)

    def check(*words: str) -> None:
        assert list(path.parent.iterdir()) == [path] and set(load_file(path)) == {"old"}

    big = new({"a": torch.ones(10), "b": torch.ones(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(LowVRAMError, match="can't be written"):
            write_tensors(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check()
    for wrong in (torch.ones(11), torch.ones(10).half()):
        with pytest.raises(ValueError, match="a was to be"):
            write_tensors(path, {**big, "a": NewTensor((10,), torch.float32, lambda wrong=wrong: wrong)})
        check()

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {**big, "z": NewTensor((1,), torch.float32, interrupted)})
    check()
    monkeypatch.setattr("shutil.disk_usage", lambda place: types.SimpleNamespace(free=1000))
    with pytest.raises(LowVRAMError, match="are free"):
        write_tensors(path, big)
    check()
    for place in (path / "below a file.safetensors", path.parent):
        with pytest.raises(LowVRAMError, match="can't be written"):
            write_tensors(place, {})


def test_a_file_can_be_replaced_by_what_is_read_from_it(path: Path) -> None:
    state = {"x": torch.randn(100), "y": torch.randn(7).half()}
    save_file(state, path)
    with TensorFile.open(path) as file:
        again = {n: NewTensor(file.shape(n), file.dtype(n), lambda n=n: file.read(n)) for n in file.names}
        write_tensors(path, again)
    assert all(same(load_file(path)[name], tensor) for name, tensor in state.items())


def test_what_can_not_be_written_is_a_mistake_of_the_caller(path: Path) -> None:
    for state, metadata in (({"__metadata__": torch.ones(1)}, {}), ({"x": torch.ones(1).to(torch.complex128)}, {}),
                            ({"x": torch.ones(1)}, {"a": 1})):  # fmt: skip
        with pytest.raises(ValueError):
            write_tensors(path, new(state), metadata)  # type: ignore[arg-type]
    assert not path.exists()
