"""Captions: the built-in faces in words, and texts beside images, whatever their files hold."""

import itertools
import json
import re
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import numbered

from lowvram.data import captions as captions_file
from lowvram.data import face_words, open_dataset, peeps
from lowvram.data.caption_variants import CaptionOptions, tags_of, variants_of
from lowvram.data.captions import MAX_CAPTION_BYTES, Captions, caption, read_captions
from lowvram.errors import LowVRAMError
from lowvram.models.text import WordTokenizer

STYLE = json.loads(files("dicebear_styles").joinpath("open-peeps.json").read_text())
TABLES = {
    "head": face_words.HEAD,
    "expression": face_words.EXPRESSION,
    "facialHair": face_words.FACIAL_HAIR,
    "accessories": face_words.ACCESSORIES,
    "mask": face_words.MASK,
}


@pytest.fixture(params=["folder", "zip"])
def store(request, tmp_path):
    """open(entries) -> a set of a folder or a zip with these files."""

    def make(entries: dict[str, bytes | str]):
        place = tmp_path / ("set.zip" if request.param == "zip" else "set")
        if request.param == "zip":
            with zipfile.ZipFile(place, "w") as archive:
                for name, data in entries.items():
                    archive.writestr(name, data)
        else:
            for name, data in entries.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return open_dataset(place, resolution=16)

    return make


def lines(*entries: object) -> str:
    return "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)


def entry(name: str, text: object) -> dict[str, object]:
    return {"file_name": name, "text": text}


# ---- the built-in faces


@pytest.mark.parametrize("part", TABLES)
def test_every_variant_of_the_style_has_words_of_its_own(part):
    assert set(TABLES[part]) == set(STYLE["components"][part]["variants"])
    assert len({str(words) for words in TABLES[part].values()}) >= len(TABLES[part]) - 1


def test_every_colour_of_the_style_has_a_name():
    assert set(face_words.SKIN) == set(STYLE["colors"]["skin"]["values"])
    assert set(face_words.HAIR) == set(STYLE["colors"]["headContrast"]["values"])
    assert set(peeps.CLOTHING.values()) == set(STYLE["colors"]["clothing"]["values"])


def test_heads_name_the_colours_that_are_drawn():
    for name, variant in STYLE["components"]["head"]["variants"].items():
        drawn = json.dumps(variant)
        assert ("{hair}" in face_words.HEAD[name]) == ('"headContrast"' in drawn), name
        if "{cloth}" in face_words.HEAD[name]:
            assert '"clothing"' in drawn, name
    for name, variant in STYLE["components"]["facialHair"]["variants"].items():
        assert ("{hair}" in face_words.FACIAL_HAIR[name]) == ('"headContrast"' in json.dumps(variant)), name


def test_a_caption_in_full():
    face = {
        "skinColor": "#d08b5b",
        "headVariant": "long",
        "expressionVariant": "smile",
        "accessoriesVariant": "sunglasses",
        "clothingName": "red",
    }
    assert caption(face) == "a person with tan skin, long black hair and sunglasses, smiling, in a red shirt"
    ginger = face | {"headVariant": "mohawk", "headContrastColor": "#a55728", "clothingName": "orange"}
    assert caption(ginger) == "a person with tan skin, an auburn mohawk and sunglasses, smiling, in an orange shirt"
    assert caption({}) == "a person"


def test_only_what_is_seen_is_named():
    face = {"headVariant": "afro", "expressionVariant": "lovingGrin1", "facialHairVariant": "full2"}
    assert caption(face) == "a person with a black afro and a black beard, heart eyes, laughing"
    assert (
        caption(face | {"maskVariant": "medicalMask"}) == "a person with a black afro and a white face mask, heart eyes"
    )
    dark = caption(face | {"accessoriesVariant": "sunglasses2"})
    assert "heart" not in dark and "laughing" in dark


def test_what_a_later_style_may_bring_is_named_by_its_own_words():
    new = {"headVariant": "spaceHelmet2", "expressionVariant": "veryBored", "skinColor": "#ffdbb5"}
    assert caption(new) == "a person with pale skin and space helmet, very bored"
    assert caption({"skinColor": "rebeccaPurple"}) == "a person with rebecca purple skin"


def test_a_model_reads_each_caption_whole():
    """The longest of each part together, and 32 words and marks, what the trained text encoder takes."""
    words = WordTokenizer().words

    def length(part: str, name: str) -> int:
        found = TABLES[part][name]
        return len(words(found if isinstance(found, str) else ", ".join(found)))

    longest = {part: max(table, key=lambda name, part=part: length(part, name)) for part, table in TABLES.items()}
    for head, beard in itertools.product(face_words.HEAD, face_words.FACIAL_HAIR):
        face = {
            "skinColor": "#694d3d",
            "headVariant": head,
            "facialHairVariant": beard,
            "headContrastColor": "#4a312c",  # dark brown, the one of two words
            "expressionVariant": longest["expression"],
            "accessoriesVariant": longest["accessories"],
            "clothingName": "orange",
        }
        for text in (caption(face), caption(face | {"maskVariant": longest["mask"]})):
            assert len(words(text)) <= 32, text
            assert "{" not in text and "  " not in text and text.isascii()


def test_faces_are_described_as_drawn_and_the_words_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    images = open_dataset(None, resolution=16, builtin_count=40)
    made = []
    real = captions_file.attributes
    monkeypatch.setattr(captions_file, "attributes", lambda index: made.append(index) or real(index))
    texts = read_captions(images)
    assert len(texts) == 40 and not texts.missing and len(made) == 40
    for index in range(40):
        assert f"{peeps.attributes(index)['clothingName']} shirt" in texts[index]
    made.clear()
    again = read_captions(open_dataset(None, resolution=16, builtin_count=30))
    assert again.texts == texts.texts[:30] and len(made) <= 32
    kept = next(tmp_path.rglob("captions.json"))
    for wrong in (json.dumps(["a cat"] * 40), "[1, 2]", "{", ""):  # of another version, or damaged
        kept.write_text(wrong)
        assert read_captions(images).texts == texts.texts
    assert json.loads(kept.read_text()) == list(texts.texts)


def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    assert len(read_captions(open_dataset(None, resolution=16, builtin_count=3))) == 3


# ---- texts of one's own


def test_texts_beside_images(store):
    images = store(
        {
            "a/1.png": numbered(1),
            "a/1.txt": "  a red\n\tcat \r\n",
            "b.c.png": numbered(2),
            "b.c.TXT": "\ufeffÉtude № 1",
            "b.txt": "of nothing",
            "__MACOSX/._c.txt": "junk",
        }
    )
    texts = read_captions(images)
    assert images.files == ["a/1.png", "b.c.png"]
    assert list(texts) == ["a red cat", "Étude № 1"] and texts[0:1] == ("a red cat",)
    assert (texts.missing, texts.bad, texts.outside, texts.unused) == (0, [], 0, 0)


@pytest.mark.parametrize("root", ["", "faces/"])
def test_metadata_and_texts_together(store, root, caplog):
    images = store(
        {
            f"{root}a/1.png": numbered(1),
            f"{root}a/2.png": numbered(2),
            f"{root}a/2.txt": "from the file",
            f"{root}a/1.txt": "not this one",
            f"{root}metadata.jsonl": "\ufeff"
            + lines(
                entry("a/1.png", "first"),
                "",
                entry("./a\\1.png", "from the list"),
                entry("a/9.png", "x"),
                entry("../a/2.png", "x"),
                entry("/etc/passwd", "x"),
                entry("C:\\a\\1.png", "x"),
                entry("", "x"),
            ),
        }
    )
    texts = read_captions(images, missing="error")
    assert list(texts) == ["from the list", "from the file"]
    assert (texts.outside, texts.unused) == (4, 1)
    assert "4 files outside the set and 1 " in caplog.text


def test_missing_and_empty_ones_train_unconditionally_and_are_counted(store, caplog):
    images = store({"1.png": numbered(1), "1.txt": "one", "2.png": numbered(2), "2.txt": " \n", "3.png": numbered(3)})
    texts = read_captions(images)
    assert list(texts) == ["one", "", ""] and texts.missing == 2
    assert "2 of 3 images" in caplog.text
    with pytest.raises(LowVRAMError, match=r"2 of 3 images of set\S* have no caption, 2.png first") as caught:
        read_captions(images, missing="error")
    assert "unconditional" in caught.value.remedy


def test_no_captions_at_all(store):
    with pytest.raises(LowVRAMError, match="none of the 1 images") as caught:
        read_captions(store({"1.png": numbered(1)}))
    assert ".txt" in caught.value.remedy


def test_hostile_texts_are_named_and_none_is_used(store, caplog):
    images = store(
        {
            **{f"{i}.png": numbered(i) for i in range(5)},
            "0.txt": "x" * (MAX_CAPTION_BYTES + 1),
            "1.txt": b"caf\xe9 au lait",
            "2.txt": "y" * MAX_CAPTION_BYTES,
            "3.txt": "nul\0, bell\7, right-to-left\u202e",
            "4.txt": b"",
        }
    )
    texts = read_captions(images)
    assert texts[0] == texts[1] == texts[4] == ""
    assert len(texts[2]) == MAX_CAPTION_BYTES and texts[3] == "nul , bell , right-to-left"
    assert len(texts.bad) == 2 and "0.txt: " in texts.bad[0] and "65,536" in texts.bad[0]
    assert texts.bad[1] == "1.txt: not UTF-8 (invalid continuation byte at byte 3)"
    assert "1.txt: not UTF-8" in caplog.text


BAD_LINES = {
    "{": "not valid JSON",
    "[" * 100_000: "not valid JSON",
    '{"file_name": "0.png", "text": ' + "9" * 10_000 + "}": "not valid JSON",
    '["0.png", "x"]': "a list, not an object",
    '{"text": "x"}': 'no "file_name"',
    '{"file_name": "0.png"}': 'no "text"',
    '{"file_name": "0.png", "text": 3}': '"text" is not a string',
    json.dumps(entry("0.png", "é" * (MAX_CAPTION_BYTES // 2 + 1))): "a text larger than 65,536 bytes",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines_are_named_by_their_number(store, line):
    images = store({"0.png": numbered(0), "1.png": numbered(1), "metadata.jsonl": lines(entry("1.png", "ok"), line)})
    texts = read_captions(images)
    assert list(texts) == ["", "ok"]
    assert (
        len(texts.bad) == 1 and texts.bad[0].startswith("metadata.jsonl line 2: ") and BAD_LINES[line] in texts.bad[0]
    )
    with pytest.raises(LowVRAMError, match=r"metadata.jsonl line 2"):
        read_captions(images, missing="error")


def test_bad_bytes_in_a_line_leave_the_others(store):
    content = b'{"file_name": "0.png", "text": "caf\xe9"}\r\n{"file_name": "1.png", "text": "half \\ud83d of two"}\r\n'
    texts = read_captions(store({"0.png": numbered(0), "1.png": numbered(1), "metadata.jsonl": content}))
    assert texts[0] == "" and texts[1].encode() and re.fullmatch("half .? ?of two", texts[1])
    assert texts.bad[0].startswith("metadata.jsonl line 1: not UTF-8")


def test_a_zip_bomb_of_a_text_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", numbered(0))
        archive.writestr("0.txt", b" " * 2**26)
        archive.writestr("1.png", numbered(1))
        archive.writestr("1.txt", "one")
    texts = read_captions(open_dataset(tmp_path / "set.zip", resolution=16))
    assert list(texts) == ["", "one"] and "unpacks to 67,108,864 bytes" in texts.bad[0]


def test_a_chosen_few_keep_their_own(store, tmp_path):
    entries = {f"{i}.png": numbered(i) for i in range(8)} | {f"{i}.txt": f"number {i}" for i in range(8)}
    place = store(entries).path
    few = open_dataset(place, resolution=16, max_images=3)
    assert list(read_captions(few)) == [f"number {Path(file).stem}" for file in few.files]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_get_through(tmp_path_factory, contents):
    place = tmp_path_factory.mktemp("set")
    (place / "0.png").write_bytes(numbered(0))
    (place / "0.txt").write_text("a caption")
    (place / "metadata.jsonl").write_bytes(b"\n".join(contents))
    for index, content in enumerate(contents):
        (place / f"x{index}.png").write_bytes(numbered(0))
        (place / f"x{index}.txt").write_bytes(content)
    texts = read_captions(open_dataset(place, resolution=16))
    assert texts[0] == "a caption" and all(text == " ".join(text.split()) for text in texts)
    assert len(texts.fingerprint) == 16


def test_unknown_sources_and_settings():
    with pytest.raises(LowVRAMError, match="missing='none'"):
        read_captions(open_dataset(None, resolution=16, builtin_count=1), missing="none")


# ---- a prompt for what has no caption


def test_a_prompt_serves_the_images_that_have_no_caption(store, caplog):
    alone = store({"1.png": numbered(1), "2.png": numbered(2)})
    assert list(read_captions(alone, missing="error", prompt="a photo of sks dog")) == ["a photo of sks dog"] * 2
    assert not caplog.text
    images = store({"1.png": numbered(1), "1.txt": "one", "2.png": numbered(2), "3.png": numbered(3), "3.txt": b"\xff"})
    texts = read_captions(images, prompt=" a photo  of sks dog ")
    assert list(texts) == ["one", "a photo of sks dog", "a photo of sks dog"] and not texts.missing
    assert "3.txt" in texts.bad[0] and "1 captions of" in caplog.text and "unconditionally" not in caplog.text


def test_a_prompt_may_name_the_folder(store):
    images = store({"10_sks dog/1.png": numbered(1), "cats/x/2.png": numbered(2), "3.png": numbered(3)})
    texts = read_captions(images, prompt="a photo of {folder}")
    assert dict(zip(images.files, texts, strict=True)) == {
        "10_sks dog/1.png": "a photo of sks dog",
        "3.png": "a photo of",
        "cats/x/2.png": "a photo of x",
    }


def test_caption_files_count_where_there_is_no_txt(store):
    files = {"1.png": numbered(1), "1.caption": "one", "2.png": numbered(2), "2.caption": "no", "2.txt": "two"}
    assert list(read_captions(store(files))) == ["one", "two"]


def test_sets_of_captions_join(store):
    first = read_captions(store({"1.png": numbered(1), "1.txt": b"\xff", "2.png": numbered(2), "2.txt": "two"}))
    both = Captions.joined(first, Captions(texts=("of the class",) * 2))
    assert list(both) == ["", "two", "of the class", "of the class"] and both.bad == first.bad and both.missing == 1


# ---- variants


def test_captions_stay_as_they_are_unless_asked():
    assert CaptionOptions().count == 1 and variants_of("a,b ,c", CaptionOptions()) == ["a,b ,c"]


@pytest.mark.parametrize(
    "prefix, suffix, expected",
    [
        ("photo of", "", "photo of a, b"),
        ("sks,", "high quality", "sks, a, b high quality"),
        (" x ", ", y", "x a, b, y"),
    ],
)
def test_words_before_and_after(prefix, suffix, expected):
    options = CaptionOptions(prefix=prefix, suffix=suffix)
    assert variants_of("a, b", options) == [expected] and variants_of("", options) == [""]


def test_tags_are_shuffled_behind_those_that_stay():
    options = CaptionOptions(shuffle=True, keep=2, variants=20, prefix="p,")
    drawn = variants_of("one, two ,three,,four, five six", options)
    assert drawn == variants_of("one, two ,three,,four, five six", options) and len(drawn) == 20
    assert all(text.startswith("p, one, two, ") for text in drawn)
    assert all(sorted(tags_of(text)) == sorted(["p", "one", "two", "three", "four", "five six"]) for text in drawn)
    assert len(set(drawn)) == 6  # 3! orders
    assert variants_of("", options) == [""] * 20
    assert len(variants_of("one", CaptionOptions(shuffle=True))) == 8


def test_tags_are_dropped_as_often_as_asked():
    options = CaptionOptions(tag_dropout=0.3, keep=1, variants=400)
    drawn = [tags_of(text) for text in variants_of("a, b, c, d, e", options)]
    assert all(tags[0] == "a" and tags == sorted(tags) for tags in drawn)
    left = sum(len(tags) - 1 for tags in drawn) / (400 * 4)
    assert 0.66 < left < 0.74


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tag_dropout": 1.5}, "tag_dropout=1.5 is not within 0 to 1"),
        ({"keep": -1}, "keep=-1 is below 0"),
        ({"variants": 0}, "variants=0 is below 1"),
        ({"shuffle": True, "variants": 1}, "variants=1 of captions whose tags are shuffled"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(LowVRAMError, match=message):
        CaptionOptions(**options)
