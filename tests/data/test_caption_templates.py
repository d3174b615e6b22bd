"""Sentences round a new word: those that are built in, and a user's own."""

from pathlib import Path

import pytest

from lowvram.data.caption_templates import OBJECT, STYLE, read_templates
from lowvram.data.caption_variants import TEMPLATED, CaptionOptions, variants_of
from lowvram.errors import LowVRAMError


@pytest.mark.parametrize(("name", "lines"), [("object", OBJECT), ("style", STYLE)])
def test_built_in_sentences_have_the_word(name: str, lines: tuple[str, ...]) -> None:
    found = read_templates(name, "<my {cat}>")
    assert len(set(found)) == len(lines) == 20
    assert all(sentence.count("<my {cat}>") == 1 and "{}" not in sentence for sentence in found)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff  a   {} hat\n\n{} and {}\n", encoding="utf-8")
    assert read_templates(str(path), "<x>") == ("a <x> hat", "<x> and <x>")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a {}\na hat\n", "line 2 has no {}: 'a hat'"),
        (b"\n\n", "0 sentences"),
        (b"{}\n" * 2001, "2,001 sentences"),
        (b"\xff\xfe{}", "can't be read"),
        (b"{} " * 2**18, "more than 262,144 bytes"),
        (None, "neither known nor a file"),
    ],
)
def test_what_is_no_file_of_sentences(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LowVRAMError) as error:
        read_templates(str(path), "<x>")
    assert says in str(error.value) and str(path) in str(error.value)


def test_templates_are_the_variants_of_their_caption_alone() -> None:
    options = CaptionOptions(prefix="the", templates=("a <x>", "one <x>"), variants=3, shuffle=True)
    assert variants_of(TEMPLATED, options) == ["the a <x>", "the one <x>"]
    assert variants_of("", options) == ["", "", ""]
    assert len(variants_of("a, b", options)) == 3
