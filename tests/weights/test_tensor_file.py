"""Tensor files read and written one tensor at a time, and what hostile or damaged ones are refused with."""

import io
import json
import os
import pickle
import resource
import sys
import types
import weakref
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.weights import torch_file
from lowvram.weights.tensor_file import NewTensor, TensorFile, finite, write_tensors

PLAIN = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
PLAIN += [torch.int8, torch.uint8, torch.bool, torch.complex64]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
BASE: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def tensors(dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = {
        f"layer.{number}.weight": (torch.rand(3, number + 1, generator=generator) * 100).to(dtype)
        for number, dtype in enumerate(dtypes)
    }
    return out | {"none": torch.empty(0, 4), "one": torch.tensor(3.5), "a very long name ü": torch.arange(5)}


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def new(state: Mapping[str, Tensor]) -> dict[str, NewTensor]:
    return {name: NewTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}


def raw(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    """A .safetensors file with a header of our making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, *words: str) -> str:
    """What opening says; it names the file and these words."""
    with pytest.raises(LowVRAMError) as caught, TensorFile.open(path) as file:
        for name in file.names:
            file.read(name)
    said = caught.value.problem
    assert str(path) in said, said
    for word in words:
        assert word in said, said
    assert caught.value.remedy and "weights_only" not in str(caught.value)
    return said


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


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_reads_back(tmp_path: Path, nested: bool, zipped: bool) -> None:
    state = tensors(PLAIN)
    shared = torch.randn(4, 6)
    state |= {"turned": shared.T, "tied": shared, "part": shared[1:3], "weight": torch.nn.Parameter(torch.ones(2))}
    content: dict[Any, Any] = {**state, "step": 3, 7: torch.ones(1), "note": "x", "optimizer": {"t": torch.ones(9)}}
    if nested:
        content = {"state_dict": content, "global_step": 110000, "epoch": 3, "other": [1]}
    for suffix in ("ckpt", "bin"):
        place = tmp_path / f"model.{suffix}"
        torch.save(content, place, _use_new_zipfile_serialization=zipped)
        with TensorFile.open(place) as file:
            assert set(file.names) == set(state)
            assert file.metadata == ({"global_step": "110000", "epoch": "3"} if nested else {})
            for name, tensor in state.items():
                found = file.read(name)
                assert same(found, tensor.detach()) and found.is_contiguous() and not found.requires_grad


def test_a_training_checkpoint_with_the_trainers_own_objects_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published Stable Diffusion checkpoints name a class of the trainer that made them, and numpy's numbers."""
    import numpy as np

    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__init__": lambda self: pytest.fail("it was made")})
    callback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    sys.modules[callback.__module__].ModelCheckpoint = callback  # type: ignore[attr-defined]
    noted = callback.__new__(callback)
    noted.best = np.float64(0.5)  # type: ignore[attr-defined]
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {"x": torch.ones(2)}, "callbacks": {callback: {"best": np.float32(1)}, "b": noted}}, path)
    monkeypatch.undo()
    allowed = set(torch.serialization.get_safe_globals())
    with TensorFile.open(path) as file:
        assert file.names == ("x",) and same(file.read("x"), torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == allowed  # the exception was for this one file


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


@settings(max_examples=120)
@given(st.data())
def test_a_damaged_pickle_is_refused_or_read(data: st.DataObject) -> None:
    path = Path(os.environ["LOWVRAM_CACHE"]) / "fuzz.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"x": torch.ones(3), "y": torch.ones(2, 2).half()}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: bytearray(archive.read(info)) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    damage(data, members[name], len(members[name]))
    archived(path, members)
    try:
        with TensorFile.open(path) as file:
            assert all(file.read(n).shape == file.shape(n) for n in file.names)
    except LowVRAMError as error:
        assert str(path) in error.problem


def damage(data: st.DataObject, content: bytearray, length: int) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))


# Hostile and damaged pickles.


def archived(
    path: Path, members: Mapping[str, bytes | bytearray], packed: Callable[[str], bool] = lambda name: False
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if packed(name) else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), bytes(content), kind)
    return path


def members_of(content: Any) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, zipped: bool, nested: bool) -> None:
    from torch.storage import _load_from_bytes

    path, mark = tmp_path / "bad.ckpt", tmp_path / "was run"
    inner = io.BytesIO()
    torch.save(Runs(os.system, f"touch '{mark}'"), inner)
    calls = {
        f"{os.system.__module__}.system": Runs(os.system, f"touch '{mark}'"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "torch.storage._load_from_bytes": Runs(_load_from_bytes, inner.getvalue()),
    }
    for named, call in calls.items():
        content = {"state_dict": {"x": torch.ones(2), "y": call}} if nested else {"y": call, "x": torch.ones(2)}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(path, named, "was not run")
        assert not mark.exists()
    path.write_bytes(pickle.dumps(calls["eval"]))
    refused(path)
    assert not mark.exists()


def test_archives_that_torch_would_not_write_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    members = members_of({"x": torch.ones(1000)})
    assert "archive/data/0" in members
    with TensorFile.open(archived(path, members)) as file:  # the very same, packed by zipfile, can be taken
        assert file.read("x").sum() == 1000
    archived(path, members, packed=lambda name: name.endswith("data/0"))
    refused(path, "archive/data/0 is packed", "for 4,000")
    bomb = {**members, "archive/data.pkl": members["archive/data.pkl"] + bytes(10**7)}
    archived(path, bomb, packed=lambda name: name.endswith(".pkl"))
    assert path.stat().st_size < 10**5
    refused(path, "archive/data.pkl is packed", "for 10,000,")
    with monkeypatch.context() as patched:
        patched.setattr(torch_file, "_MOST_PICKLE_BYTES", 1000)
        archived(path, {**members, "archive/data.pkl": bytes(1001)})
        refused(path, "archive/data.pkl is 1,001 bytes long")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archived(path, members), "a") as archive:
        archive.writestr("archive/data.pkl", members["archive/data.pkl"])
    refused(path, "archive/data.pkl twice")
    path.write_bytes(archived(path, members).read_bytes() + b"PK\x05\x06")
    refused(path, "its end is missing")


def test_members_that_lie_over_one_another_are_refused(tmp_path: Path) -> None:
    """A bomb that packs nothing: many members of the list are the same bytes of the file."""
    path = archived(tmp_path / "a.ckpt", members_of({"x": torch.ones(5000)}))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
    end = whole.rindex(b"PK\x05\x06")
    entries = whole[place:end]
    count = len(archive.infolist())
    copies = [entries.replace(b"archive/", b"rchive" + str(number).encode() + b"/") for number in range(5)]
    directory = b"".join([entries, *copies])
    counts = (count * 6).to_bytes(2, "little")
    tail = whole[end : end + 8] + counts * 2 + len(directory).to_bytes(4, "little") + whole[end + 16 :]
    path.write_bytes(whole[:place] + directory + tail)
    refused(path, f"unpacks {count * 6} members to")


def shaped(tensor: Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Runs:
    return Runs(torch._utils._rebuild_tensor_v2, tensor.storage(), offset, size, stride, False, {})


STRIDED: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((10**12,), (0,), 0),
    ((2, 10**9), (1, 0), 0),
    ((9,), (1,), 0),
    ((4,), (1,), 7),
    ((4,), (-1,), 3),
    ((2,), (1,), -1),
    ((-1,), (1,), 0),
    ((2,) * 40, (0,) * 40, 0),
]


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(("size", "stride", "offset"), STRIDED)
def test_shapes_that_a_tensors_numbers_do_not_bear_out_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    path = tmp_path / "a.ckpt"
    for zipped in (True, False):
        numbers = torch.arange(8.0)
        torch.save({"y": numbers, "x": shaped(numbers, size, stride, offset)}, path,
                   _use_new_zipfile_serialization=zipped)  # fmt: skip
        try:
            with TensorFile.open(path) as file:
                # The old format may bring a tensor's numbers as long as its shape needs; never more than were asked.
                assert not zipped and offset + size[0] < 20
                assert file.read("x").numel() < 20
        except LowVRAMError as error:
            assert str(path) in error.problem


def test_numbers_that_are_longer_than_their_member_are_refused(tmp_path: Path) -> None:
    members = members_of({"x": torch.ones(8), "y": torch.ones(100)})
    pickled = members["archive/data.pkl"]
    assert pickled.count(b"K\x08") == 2  # the length of the numbers, and the shape
    path = archived(tmp_path / "a.ckpt", {**members, "archive/data.pkl": pickled.replace(b"K\x08", b"K\x20")})
    refused(path, "x has 128 bytes of numbers")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_holds_no_plain_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, word in (([torch.ones(1)], "list"), ({"a": 3}, "'a'"), ({}, "nothing"), ({5: torch.ones(1)}, "5")):
        torch.save(content, path)
        refused(path, word)
    torch.save({"x": torch.ones(2).to_sparse()}, path)
    refused(path, "x is a torch.sparse_coo")
    torch.save({"x": torch.ones(2, device="meta")}, path)
    refused(path, "x ")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path)


@pytest.mark.parametrize("kind", [dict, torch.nn.ParameterDict])
def test_nested_tensors_are_loaded_as_they_were(tmp_path: Path, kind: Any) -> None:
    """As files of textual inversion have them."""
    vectors = torch.nn.Parameter(torch.randn(2, 8))
    torch.save({"string_to_token": {"*": 265}, "string_to_param": kind({"*": vectors}), "step": 9}, tmp_path / "e.pt")
    content = torch_file.load(tmp_path / "e.pt")
    assert content["string_to_token"] == {"*": 265} and isinstance(content["string_to_param"], dict)
    assert same(content["string_to_param"]["*"].detach(), vectors.detach())


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
