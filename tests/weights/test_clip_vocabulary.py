"""The shipped tokenizer gives the numbers that CLIP's text encoders were trained with."""

import json
from pathlib import Path

import pytest

from lowvram.errors import LowVRAMError
from lowvram.weights import clip_vocabulary
from lowvram.weights.clip_vocabulary import END, SIZE, START, folder


def test_the_vocabulary_has_the_published_numbers() -> None:
    vocabulary = json.loads((folder() / "vocab.json").read_bytes())
    assert len(vocabulary) == SIZE and sorted(vocabulary.values()) == list(range(SIZE))
    # "Ġ" stands for the space; the bytes that print come before it, in their order.
    known = {"!": 0, "a": 64, "~": 93, "¡": 94, "ÿ": 187, "Ā": 188, "Ġ": 220, "!</w>": 256, "a</w>": 320, "in": 512}
    known |= {"cat</w>": 2368, "jekyll</w>": 49405, START: 49406, END: 49407}
    assert {token: vocabulary[token] for token in known} == known
    merges = (folder() / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(merges) == 1 + 48894 and merges[:2] == ["#version: 0.2", "i n"]


@pytest.mark.parametrize(("pad", "number"), [(END, 49407), ("!", 0)])
def test_texts_become_the_published_numbers(pad: str, number: int) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder(pad))
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.model_max_length) == (SIZE, number, 77)
    known = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "A  Photo of\na CAT": [320, 1125, 539, 320, 2368],
        "": [],
    }
    for text, middle in known.items():
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert ids == [49406, *middle, 49407] + [number] * (75 - len(middle))
    long = tokenizer("cat " * 200, truncation=True, max_length=77).input_ids
    assert long == [49406, *[2368] * 75, 49407]
    signs = "日本 Ünïcode don't 1234 \U0001f431"
    assert (
        tokenizer.decode(tokenizer(signs).input_ids, skip_special_tokens=True).replace(" ", "")
        == signs.replace(" ", "").lower()
    )


def test_the_folder_is_mended_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    where = folder("!")
    assert where.is_relative_to(tmp_path / "cache") and where != folder(END)
    whole = {file.name: file.read_bytes() for file in where.iterdir()}
    assert set(whole) == {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    (where / "vocab.json").write_bytes(whole["vocab.json"][:100])
    (where / "merges.txt").unlink()
    times = {name: (where / name).stat().st_mtime_ns for name in ("tokenizer_config.json", "special_tokens_map.json")}
    assert folder("!") == where and {file.name: file.read_bytes() for file in where.iterdir()} == whole
    assert times == {name: (where / name).stat().st_mtime_ns for name in times}


def test_what_can_not_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LowVRAMError, match="pad='nothing such'"):
        folder("nothing such")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(LowVRAMError, match=r"vocab\.json can't be kept") as caught:
        folder()
    assert "LOWVRAM_CACHE" in caught.value.remedy


def test_the_licence_lies_beside_the_merges() -> None:
    text = (Path(clip_vocabulary.__file__).parent / "clip" / "LICENSE").read_text()
    assert "Copyright (c) 2021 OpenAI" in text and "The above copyright notice and this permission notice" in text
