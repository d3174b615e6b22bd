"""Signatures: made with a certificate of one's own, read back by the library, and broken by any change."""

from pathlib import Path

import pytest

pytest.importorskip("c2pa")

import certificates
from PIL import Image

from lowvram.errors import LowVRAMError
from lowvram.marks import credentials
from lowvram.marks.origin import COMPOSITE, Origin


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.chain(tmp_path_factory.mktemp("keys"))


def signed(folder: Path, format: str, keys: tuple[Path, Path]) -> Path:
    plain, to = folder / f"plain.{format}", folder / f"signed.{format}"
    Image.linear_gradient("L").convert("RGB").save(plain)
    origin = Origin(recipe='<&"é', seed=3, source=COMPOSITE)
    credentials.sign(plain, to, format=format, origin=origin, certificate=keys[0], key=keys[1])
    assert credentials.read(plain) is None
    return to


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_signed_file_says_who_and_what_and_holds(tmp_path: Path, format: str, keys: tuple[Path, Path]) -> None:
    path = signed(tmp_path, format, keys)
    found = credentials.read(path)
    assert found is not None
    assert (found.issuer, found.source, found.faults, found.trusted) == ("A painter", COMPOSITE, (), False)
    assert found.tool.startswith("lowvram ")
    assert path.stat().st_size < (tmp_path / f"plain.{format}").stat().st_size + 10_000  # no picture within


def test_one_changed_byte_of_the_image_is_noticed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    path = signed(tmp_path, "jpg", keys)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    found = credentials.read(path)
    assert found is not None and "assertion.dataHash.mismatch" in found.faults


def test_what_cannot_sign_is_named(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    credentials.check(*keys)
    with pytest.raises(LowVRAMError, match="can't be read"):
        credentials.check(tmp_path / "none.pem", keys[1])
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(LowVRAMError, match="can't be signed with"):
        credentials.check(tmp_path / "bad.pem", keys[1])
    with pytest.raises(LowVRAMError, match="can't be signed with"):
        credentials.check(keys[0], tmp_path / "bad.pem")


def test_files_of_another_kind_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    assert credentials.read(tmp_path / "a.txt") is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, keys: tuple[Path, Path]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(LowVRAMError, match=r"lowvram\[c2pa\]"):
        credentials.check(*keys)
