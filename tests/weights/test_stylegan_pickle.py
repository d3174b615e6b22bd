"""Published pickles: read whole, executed never."""

import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles import write

from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Discriminator, Generator, freeze_layers
from lowvram.weights.stylegan_pickle import read

ARGUMENTS = {"z_dim": 8, "w_dim": 12, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    g, d = Generator(16, **ARGUMENTS), Discriminator(16, channel_base=64, channel_max=8)
    freeze_layers(d, 3)  # as a run with frozen layers saves it: their weights are buffers
    kwargs = {
        "z_dim": np.int64(8),
        "img_resolution": 16,
        "mapping_kwargs": {"num_layers": 2},
        "fused": [True, None, 0.5],
    }
    return write(
        tmp_path / "a.pkl", {"G": (g, kwargs), "G_ema": (g, kwargs), "D": (d, {})}, training_set_kwargs={"x": 1}
    )


def test_every_tensor_comes_out_and_nothing_runs(published: Path) -> None:
    torch.manual_seed(0)
    expected = {"G": Generator(16, **ARGUMENTS), "D": Discriminator(16, channel_base=64, channel_max=8)}
    networks = read(published)
    assert list(networks) == ["G", "D", "G_ema"]
    for name, network in expected.items():
        state = network.state_dict()
        assert set(networks[name].state) == set(state)
        assert all(torch.equal(networks[name].state[key], value) for key, value in state.items())
    assert networks["G"].class_name == "Generator"
    assert networks["G"].arguments == {
        "z_dim": 8,
        "img_resolution": 16,
        "mapping_kwargs": {"num_layers": 2},
        "fused": [True, None, 0.5],
    }


class _Runs:
    """A pickle of it calls a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize(
    ("name", "function", "args"),
    [
        ("posix.system", os.system, ("touch RAN",)),
        ("builtins.eval", eval, ("open('RAN', 'w')",)),
        ("builtins.getattr", getattr, ("x", "upper")),
        ("torch.serialization.load", torch.load, ("RAN",)),
        ("_codecs.encode", pickle.codecs.encode, ("x", "latin1")),
    ],
)
def test_a_pickle_that_calls_something_else_is_refused_by_its_name(name, function, args, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"G": _Runs(function, *args)}))
    with pytest.raises(LowVRAMError, match=rf"evil\.pkl.* {name}.* not run"):
        read(path)
    assert not (tmp_path / "RAN").exists()


def test_a_pickle_inside_a_storage_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    nested = io.BytesIO()
    torch.save({"a": _Runs(os.system, "touch RAN")}, nested)
    path = tmp_path / "nested.pkl"
    path.write_bytes(pickle.dumps(_Runs(torch.storage._load_from_bytes, nested.getvalue())))
    with pytest.raises(LowVRAMError, match="damaged, or no pickle of networks"):
        read(path)
    assert not (tmp_path / "RAN").exists()


def test_a_truncated_file_is_damaged_wherever_it_ends(published: Path) -> None:
    whole = published.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        published.write_bytes(whole[:length])
        with pytest.raises(LowVRAMError, match=r"a\.pkl is damaged"):
            read(published)


def _rebuilt(size: object, stride: object, offset: object = 0) -> bytes:
    """A pickle of a tensor of four numbers that claims this size and these strides."""
    storage = torch.arange(4.0).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    rebuilt = _Runs(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, OrderedDict())
    return pickle.dumps({"G": rebuilt})


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 40,), (0,), 0),
        ((5,), (1,), 0),
        ((2,), (1,), 3),
        ((2,), (-1,), 1),
        ((2, 2), (1,), 0),
        ((2.0,), (1,), 0),
        (("a",), (1,), 0),
        ((True,), (1,), 0),
    ],
    ids=str,
)
def test_a_tensor_larger_than_its_numbers_is_refused(size, stride, offset, tmp_path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(_rebuilt(size, stride, offset))
    with pytest.raises(LowVRAMError, match="damaged"):
        read(path)


def test_other_contents_are_named(tmp_path) -> None:
    path = tmp_path / "a.pkl"
    for content, said in (([1, 2], "holds a list"), ({"x": 1}, "it has 'x'"), ({}, "it has nothing")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(LowVRAMError, match=said):
            read(path)
    with pytest.raises(LowVRAMError, match="can't be read"):
        read(tmp_path / "none.pkl")
    path.write_bytes(b"\x89PNG\r\n" + bytes(100))
    with pytest.raises(LowVRAMError, match="damaged"):
        read(path)


def test_values_that_are_not_finite_are_named(tmp_path) -> None:
    g = Generator(16, **ARGUMENTS)
    with torch.no_grad():
        g.synthesis.b8.conv0.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(LowVRAMError, match=r"G\.synthesis\.b8\.conv0\.weight has values that are not finite"):
        read(write(tmp_path / "a.pkl", {"G": (g, {})}))


def test_deep_nesting_ends_in_an_error(tmp_path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04" + b"(" * 100_000 + b"l" * 100_000 + b".")
    with pytest.raises(LowVRAMError, match=r"holds a list|damaged"):
        read(path)
    path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.")  # bytes that claim to be 4 EiB
    with pytest.raises(LowVRAMError, match="damaged"):
        read(path)


def test_the_writer_of_these_tests_writes_what_is_published(published: Path) -> None:
    names = {arg for op, arg, _ in pickletools.genops(published.read_bytes()) if op.name == "SHORT_BINUNICODE"}
    assert {"torch_utils.persistence", "_reconstruct_persistent_obj", "dnnlib.util", "EasyDict"} <= names
