"""The origin's words: what is known and nothing else, in characters that every format holds."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lowvram import __version__
from lowvram.marks.origin import DRAWN, GENERATED, Origin, plain


def test_only_what_is_known_is_said() -> None:
    origin = Origin(recipe="faces32", seed=0, index=3)
    assert origin.values() == {"recipe": "faces32", "seed": "0", "index": "3", "version": __version__}
    assert origin.sentence() == f"lowvram {__version__}: made by a trained model, recipe faces32, seed 0, index 3"
    assert origin.source == GENERATED
    assert "drawn by a program" in Origin(source=DRAWN).sentence()


@given(text=st.text())
def test_texts_lose_only_what_xml_cannot_hold(text: str) -> None:
    kept = plain(text)
    assert len(kept) == len(text)
    for before, after in zip(text, kept, strict=True):
        assert after in (before, "\ufffd")
        assert after == before or unicodedata.category(before) in ("Cc", "Cs", "Cn")


def test_long_texts_are_cut_and_say_so() -> None:
    assert plain("x" * 2000) == "x" * 2000
    cut = plain("x" * 10_000)
    assert len(cut) == 2000 and cut.endswith("x…")
