"""Hashes of weights are those that sha256sum gives."""

import hashlib
import json
from pathlib import Path

import pytest

from lowvram.marks import digests


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_one_file_has_its_own_hash_and_several_that_of_their_list(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("b.safetensors", "a.safetensors")}
    for name, path in files.items():
        path.write_bytes(name[:1].encode())
    assert digests.of_files([("b.safetensors", files["b.safetensors"])]) == "sha256:" + sha(b"b")
    listed = f"{sha(b'a')}  a.safetensors\n{sha(b'b')}  b.safetensors\n"
    assert digests.of_files(files.items()) == "sha256:" + sha(listed.encode())
    listed = f"{sha(b'b')}  unet/b.safetensors\n{sha(b'a')}  vae/a.safetensors\n"
    within = [("vae/a.safetensors", files["a.safetensors"]), ("unet/b.safetensors", files["b.safetensors"])]
    assert digests.of_files(within) == "sha256:" + sha(listed.encode())
    with pytest.raises(OSError):
        digests.of_files([("none", tmp_path / "none")])


def test_files_of_one_name_both_count(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lora.safetensors").write_bytes(folder.encode())
    one, two = (("lora.safetensors", tmp_path / folder / "lora.safetensors") for folder in ("one", "two"))
    hashes = {digests.of_files(files) for files in ([one], [two], [one, two])}
    assert len(hashes) == 3 and digests.of_files([two, one]) in hashes


def test_a_checkpoint_is_hashed_by_what_samples(tmp_path: Path) -> None:
    manifest = {f"{name}.safetensors": {"bytes": 1, "sha256": sha(name.encode())} for name in ("G_ema", "G", "D")}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "images_seen": 48}))
    assert digests.of_checkpoint(tmp_path, ["G_ema"]) == "sha256:" + sha(b"G_ema")
    assert digests.of_checkpoint(tmp_path, ["G", "D"]) == digests.of_checkpoint(tmp_path, ["D", "G"])
    assert digests.progress_of(tmp_path) == (3, 48)
    with pytest.raises(OSError):
        digests.of_checkpoint(tmp_path / "none", ["G"])
