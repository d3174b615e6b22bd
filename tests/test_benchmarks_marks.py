"""The benchmark of the watermark, in small; and that what is stated of it is what was measured."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import marks, record
from lowvram.errors import LowVRAMError
from lowvram.marks import watermark

pytest.importorskip("imwatermark")


def test_the_command_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "SIZES", (256,))
    monkeypatch.setattr(marks, "CHANGES", {name: marks.CHANGES[name] for name in ("png", "jpeg_90")})
    monkeypatch.setattr(watermark, "_SIZES", (256,))
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((300, 280), 50).resize((600, 560)).save(photos / "a.png")
    options = {"out": str(tmp_path / "out"), "photos": str(photos), "unmarked": 1, "many": 2, "marked": 1}
    marks.main(marks.Options(**options, parts="unmarked,many"))
    marks.main(marks.Options(**options, parts="marked"))
    points = {point["name"]: point["details"] for point in record.read(tmp_path / "out" / "marks.json")["points"]}
    assert {name.rsplit("_", 1)[0] for name in points} == {"unmarked", "many_unmarked", "marked_faces", "marked_photos"}
    assert points["many_unmarked_faces"]["pictures"] == 2 and points["unmarked_noise"]["found"] == 0
    assert points["marked_photos_256"]["png"]["found"] == 1.0 and points["marked_photos_256"]["psnr_db"] > 30


def test_films_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(marks, "SIZES", (256,))
    monkeypatch.setattr(marks, "_FRAMES", 4)
    monkeypatch.setattr(watermark, "_SIZES", (256,))
    Image.effect_noise((300, 280), 50).resize((600, 560)).save(tmp_path / "a.png")
    out = str(tmp_path / "out")
    marks.main(marks.Options(out=out, photos=str(tmp_path), parts="films", unmarked=1, marked=1))
    points = {point["name"]: point["details"] for point in record.read(tmp_path / "out" / "marks.json")["points"]}
    kinds = ("unmarked_films_faces", "unmarked_films_photos", "marked_films_faces_256", "marked_films_photos_256")
    assert points.keys() == set(kinds)
    assert points["unmarked_films_photos"]["found"] == 0 and points["unmarked_films_photos"]["random_patterns"] == 20000
    assert points["marked_films_photos_256"]["webp"]["found"] == 1.0
    assert {"mp4", "crf_23", "crf_23_half"} < points["marked_films_faces_256"].keys()


def test_changes_are_changes() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shapes = {name: change(picture).shape[0] for name, change in marks.CHANGES.items()}
    assert (shapes["half"], shapes["three_quarters"], shapes["cut"], shapes["png"]) == (32, 48, 58, 64)
    assert all((marks.CHANGES[n](picture) != picture).any() for n in ("jpeg_90", "webp_75", "drawn_over"))


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match="parts=x"):
        marks.main(marks.Options(parts="x", photos=str(Path(__file__).parent.parent / "docs")))
    with pytest.raises(LowVRAMError, match="no photograph"):
        marks.main(marks.Options(photos=str(tmp_path)))


def test_what_identify_states_is_what_was_measured() -> None:
    points = {p["name"]: p["details"] for p in record.read(record.RESULTS / "marks.json")["points"]}
    films = [points.pop(f"unmarked_films_{kind}") for kind in ("faces", "photos")]
    alone = [details for name, details in points.items() if name.startswith("unmarked_")]
    many = [details for name, details in points.items() if name.startswith("many_unmarked_")]
    assert {details["threshold"] for details in (*alone, *many, *films)} == {watermark.THRESHOLD}
    assert sum(details["found"] for details in (*alone, *many, *films)) == 0
    pictures = sum(details["pictures"] for details in many)  # those in five sizes are the first of them
    sizes = sum(details["pictures"] for details in alone)
    chance = sum(details["random_found"] for details in alone)
    patterns = sum(details["random_patterns"] for details in alone)
    assert f"no false alarm in {pictures:,} pictures ({sizes} of them in five sizes)" in watermark.MEASURED
    assert f"{chance} in {patterns:,} by chance" in watermark.MEASURED
    number = sum(details["pictures"] for details in films)
    assert f"no false alarm in {number} MP4s of 256 pixels in four sizes" in watermark.MEASURED_FILMS
    chance = sum(details["random_found"] for details in films)
    patterns = sum(details["random_patterns"] for details in films)
    assert f"{chance} in {patterns:,} by chance" in watermark.MEASURED_FILMS
