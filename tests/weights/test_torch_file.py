"""What torch.save wrote: read as it was, and refused where it is hostile or damaged. Nothing in it is executed."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors_of_files import PLAIN, damage, refused, same, tensors

from lowvram.errors import LowVRAMError
from lowvram.weights import torch_file
from lowvram.weights.tensor_file import TensorFile


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

    def stranger(module: str, name: str, *bases: type) -> Any:
        """A class of a package that is not installed."""
        for parent in [module.rsplit(".", number)[0] for number in range(module.count("."), -1, -1)]:
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        kind = type(name, bases, {"__module__": module, "__init__": lambda self: pytest.fail("it was made")})
        monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
        return kind

    callback = stranger("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    settings = stranger("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    config = stranger("omegaconf.listconfig", "ListConfig")
    noted, chosen, listed = (kind.__new__(kind) for kind in (callback, settings, config))
    noted.best = np.float64(0.5)
    chosen |= {"lr": 1e-4, "sizes": listed}
    listed.content = [1, int, Any]
    others = {"callbacks": {callback: {"best": np.float32(1)}, "b": noted}, "hyper_parameters": chosen}
    others |= {"loops": collections.defaultdict(list, {"a": [1]})}
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {"x": torch.ones(2)}, **others}, path)
    monkeypatch.undo()
    allowed = set(torch.serialization.get_safe_globals())
    with TensorFile.open(path) as file:
        assert file.names == ("x",) and same(file.read("x"), torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == allowed  # the exception was for this one file


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


def shaped(tensor: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Runs:
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
