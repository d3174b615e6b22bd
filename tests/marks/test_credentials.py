"""Signatures: made with a certificate of one's own, read back by the library, and broken by any change."""

import json
from pathlib import Path

import pytest

pytest.importorskip("c2pa")

import c2pa
import certificates
from PIL import Image
from tiny_diffusion import ldm_recipe, save_vae

from lowvram import Trainer
from lowvram.errors import LowVRAMError
from lowvram.identify import main as identify
from lowvram.marks import credentials
from lowvram.marks.origin import COMPOSITE, GENERATED, Origin
from lowvram.marks.reading import look_into
from lowvram.sample import SampleOptions
from lowvram.sample import main as sample


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.chain(tmp_path_factory.mktemp("keys"))


def signed(folder: Path, format: str, keys: tuple[Path, Path], parent: Path | None = None) -> Path:
    plain, to = folder / f"plain.{format}", folder / f"signed.{format}"
    Image.linear_gradient("L").convert("RGB").save(plain)
    origin = Origin(recipe='<&"é', seed=3, source=COMPOSITE if parent else GENERATED)
    credentials.sign(plain, to, format=format, origin=origin, certificate=keys[0], key=keys[1], parent=parent)
    assert credentials.read(plain) is None
    return to


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_signed_file_says_who_and_what_and_holds(tmp_path: Path, format: str, keys: tuple[Path, Path]) -> None:
    path = signed(tmp_path, format, keys)
    found = credentials.read(path)
    assert found is not None
    assert (found.issuer, found.source, found.faults, found.trusted) == ("A painter", GENERATED, (), False)
    assert found.actions == ("c2pa.created",)
    assert found.tool.startswith("lowvram ")
    assert path.stat().st_size < (tmp_path / f"plain.{format}").stat().st_size + 10_000  # no picture within


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_what_is_made_of_a_picture_was_opened_and_edited(tmp_path: Path, kind: str, keys: tuple[Path, Path]) -> None:
    parent = tmp_path / f"secret name.{kind}"
    Image.effect_noise((300, 300), 90).save(parent)
    path = signed(tmp_path, "png", keys, parent)
    found = credentials.read(path)
    assert found is not None
    assert (found.actions, found.source, found.faults) == (("c2pa.opened", "c2pa.edited"), COMPOSITE, ())
    assert path.stat().st_size < (tmp_path / "plain.png").stat().st_size + 10_000  # without the picture's pixels
    assert b"secret" not in path.read_bytes()


def test_the_pictures_own_manifest_goes_along(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    (tmp_path / "before").mkdir()
    parent = signed(tmp_path / "before", "jpg", keys)
    path = signed(tmp_path, "webp", keys, parent)
    found = credentials.read(path)
    assert found is not None and (found.actions[-1], found.faults) == ("c2pa.edited", ())
    with c2pa.Reader(path) as reader:
        manifests = json.loads(reader.json())["manifests"].values()
    done = [a["action"] for m in manifests for x in m["assertions"] for a in x["data"].get("actions", [])]
    assert sorted(done) == ["c2pa.created", "c2pa.edited", "c2pa.opened"]


def test_a_picture_that_cannot_be_named_is_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    whole = tmp_path / "whole.jpg"
    Image.linear_gradient("L").save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:300])
    for name in ("cut.jpg", "none.png"):
        with pytest.raises(LowVRAMError, match=rf"{name} can't be named in a signature"):
            credentials.check(*keys, tmp_path / name)
    credentials.check(*keys, whole)


def test_variations_of_a_picture_say_the_same_in_all_places(
    tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ldm_recipe(tmp_path / "run", save_vae(tmp_path / "vae"), "kimg=0.008")
    Trainer(recipe, quiet=True).fit()
    Image.effect_noise((32, 32), 90).save(tmp_path / "init.png")
    signing = {"certificate": str(keys[0]), "key": str(keys[1])}
    options = {"run": str(tmp_path / "run"), "n": 1, "device": "cpu", **signing}
    sample(SampleOptions(**options, init=str(tmp_path / "init.png"), out=str(tmp_path / "varied")))
    for name in ("seed0000_00000.png", "grid.png"):
        found = look_into(tmp_path / "varied" / name)
        assert found.credentials is not None and not found.credentials.faults
        assert found.credentials.actions == ("c2pa.opened", "c2pa.edited")
        assert found.packet["source"] == found.credentials.source == COMPOSITE
    capsys.readouterr()
    assert identify([str(tmp_path / "varied" / "grid.png")]) == 0
    assert "made by a trained model of another image (opened, edited); signed by A painter" in capsys.readouterr().out
    sample(SampleOptions(**options, out=str(tmp_path / "plain")))
    found = look_into(tmp_path / "plain" / "grid.png")
    assert found.credentials is not None and found.credentials.actions == ("c2pa.created",)
    assert found.packet["source"] == found.credentials.source == GENERATED


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
