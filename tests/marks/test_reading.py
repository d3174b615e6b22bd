"""Strangers' files: what is broken or hostile is named, in bounded time, and nothing in it is followed."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lowvram.marks import xmp
from lowvram.marks.mark import MP4_XMP, Mark
from lowvram.marks.origin import GENERATED, Origin
from lowvram.marks.reading import UnreadableError, look_into


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 80).save(path, **Mark(origin=Origin(recipe="r")).arguments("jpg"))
    return path


def test_a_truncated_image_still_tells_its_metadata(image: Path) -> None:
    content = image.read_bytes()
    image.write_bytes(content[: len(content) - 600])
    found = look_into(image)
    assert found.packet["recipe"] == "r"
    assert any("pixels: broken" in note for note in found.notes)
    image.write_bytes(content[:100])
    with pytest.raises(UnreadableError):
        look_into(image)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\x00\x00\x00\xffIHDR", b"RIFF"]
)
def test_what_is_no_image_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableError):
        look_into(tmp_path / "a.png")


def test_a_bomb_of_pixels_is_not_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000, pixels=zlib.compress(b"\x00" * 1000)))
    with pytest.raises(UnreadableError, match="pixels"):
        look_into(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(png(12_000, 12_000, pixels=zlib.compress(b"\x00" * 1000)))
    assert "watermark: not looked for in 12000x12000 pixels" in look_into(tmp_path / "b.png").notes


def test_a_bomb_of_text_is_not_unpacked(tmp_path: Path) -> None:
    bomb = b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + zlib.compress(b" " * 20_000_000)
    (tmp_path / "a.png").write_bytes(png(8, 8, png_chunk(b"iTXt", bomb), pixels=zlib.compress(b"\x00" * 72)))
    with pytest.raises(UnreadableError, match="too large"):
        look_into(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("packet", "note"),
    [
        ("<x>" + " " * xmp.MOST_BYTES + "</x>", "bytes, over"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>', "document type"),
        ("no xml", "no XML"),
    ],
)
def test_a_hostile_packet_is_a_note_and_no_end(tmp_path: Path, packet: str, note: str) -> None:
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", packet)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    found = look_into(tmp_path / "a.png")
    assert found.packet == {} and not found.anything
    assert any(note in said for said in found.notes)


def test_texts_after_the_pixels_count(tmp_path: Path) -> None:
    whole = png(8, 8, pixels=zlib.compress(b"\x00" * 72))
    packet = b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + xmp.write(Origin(recipe="late"))
    end = len(png_chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(whole[:-end] + png_chunk(b"iTXt", packet) + whole[-end:])
    assert look_into(tmp_path / "a.png").packet["recipe"] == "late"


def box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def test_films_are_walked_box_by_box(tmp_path: Path) -> None:
    head, ours = box(b"ftyp", b"isom0000"), box(b"uuid", MP4_XMP + xmp.write(Origin(recipe="film")))
    large = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + b"12345"
    for content, recipe in (
        (head + ours, "film"),
        (head + large + box(b"free", b"") + ours, "film"),
        (head + box(b"moov", ours), None),
        (head + ours[:-5], None),
        (head + struct.pack(">I4s", 0, b"mdat") + ours, None),
        (head + struct.pack(">I4s", 4, b"mdat"), None),
        (head + box(b"free", b"") * 2000 + ours, None),
    ):
        (tmp_path / "a.mp4").write_bytes(content)
        found = look_into(tmp_path / "a.mp4")
        assert found.packet.get("recipe") == recipe
        assert found.watermark is None and any(note.startswith("watermark: n") for note in found.notes)


def test_without_the_libraries_it_is_said_what_was_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    for name in ("imwatermark", "c2pa"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    found = look_into(tmp_path / "a.png")
    assert [note.split(":")[0] for note in found.notes] == ["watermark", "C2PA"]
    assert all("not looked for" in note for note in found.notes)


def test_another_programs_word_counts_too(tmp_path: Path) -> None:
    packet = xmp.write(Origin()).replace(b"lowvram 0", b"Other 0").replace(b"lowvram:version", b"lowvram:v")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", xmp=packet)
    found = look_into(tmp_path / "a.webp")
    assert found.anything and found.packet["source"] == GENERATED and found.packet["tool"].startswith("Other")
