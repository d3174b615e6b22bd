import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from networks import copied, states_equal
from tiny_clip import save_encoder, save_tokenizer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lowvram.adapters.textual_inversion import Embeddings, Word
from lowvram.errors import LowVRAMError

CAT = Word(token="<cat-toy>", vectors=3, begin="cat")
RED = Word(token="<Red>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_tokenizer(path / "tokenizer")
    save_encoder(path / "first", 32)
    save_encoder(path / "second", 48, projection=16, seed=1)
    return path


@pytest.fixture
def encoders(folder: Path) -> list[nn.Module]:
    second = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "second")
    return [transformers.CLIPTextModel.from_pretrained(folder / "first").eval(), second.eval()]


@pytest.fixture
def tokenizers(folder: Path) -> list[Any]:
    return [transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer") for _ in range(2)]


def ids_of(tokenizer: Any, *prompts: str) -> Tensor:
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    ids: Tensor = tokenizer(list(prompts), **options)["input_ids"]
    return ids


def context(encoder: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = encoder(input_ids=ids).last_hidden_state
    return out


def test_only_the_new_rows_learn(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    states = [copied(encoder.state_dict()) for encoder in encoders]
    embeddings = Embeddings(encoders, tokenizers, [CAT, RED])
    shapes = {name: list(p.shape) for name, p in embeddings.named_parameters()}
    assert shapes == {"rows.0.0": [3, 32], "rows.0.1": [3, 48], "rows.1.0": [1, 32], "rows.1.1": [1, 48]}
    for encoder, tokenizer in zip(encoders, embeddings.tokenizers, strict=True):
        context(encoder, ids_of(tokenizer, "a <cat-toy> cat", "red")).square().mean().backward()
    grads = [p.grad for p in embeddings.parameters()]
    assert all(g is not None for g in grads)
    assert [bool(g.abs().sum() > 0) for g in grads if g is not None] == [True, True, False, False]
    assert not any(p.grad is not None or p.requires_grad for encoder in encoders for p in encoder.parameters())
    torch.optim.AdamW(embeddings.parameters(), lr=0.1, weight_decay=0.0).step()
    assert all(states_equal(e.state_dict(), state) for e, state in zip(encoders, states, strict=True))


def test_it_is_what_a_larger_table_would_give(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    encoder, larger = encoders[0], copy.deepcopy(encoders[0])
    embeddings = Embeddings([encoder], tokenizers[:1], [CAT, RED])
    (tokenizer,) = embeddings.tokenizers
    larger.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # type: ignore[operator]
    rows = torch.cat([embeddings.vectors(word.token)[0] for word in (CAT, RED)])
    with torch.no_grad():
        larger.get_input_embeddings().weight[-4:] = rows  # type: ignore[operator]
    ids = ids_of(tokenizer, "a red <cat-toy>, <red>", "<Red> cat <cat-toy><cat-toy>")
    assert ids.max() == len(tokenizer) - 1
    assert torch.equal(context(encoder, ids), context(larger, ids))
    old = ids_of(tokenizers[0], "a red cat")
    before = context(larger, old)
    assert torch.equal(context(encoder, old), before)
    embeddings.remove()
    assert torch.equal(context(encoder, old), before)
    with pytest.raises(IndexError):
        context(encoder, ids)


def test_words_are_spelled_out(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    words = [CAT, Word(token="<cat-toy>s", vectors=2, begin="red cat")]
    tokenizer = Embeddings(encoders, tokenizers, words).tokenizers[0]
    cat = "<cat-toy> <cat-toy>_1 <cat-toy>_2"
    assert tokenizer.spelled("a <cat-toy>.") == f"a {cat}."
    assert tokenizer.spelled("a <CAT-toy>") == f"a {cat}"
    assert tokenizer.spelled("<cat-toy>s") == "<cat-toy>s <cat-toy>s_1"
    assert tokenizer.spelled("<cat-toy>_1 alone") == "<cat-toy>_1 alone"
    known = len(tokenizers[0])
    assert len(tokenizer) == known + 5
    assert len(tokenizers[0]) == known == 194  # as it was
    assert tokenizer("<cat-toy>")["input_ids"] == [192, 194, 195, 196, 193]
    assert tokenizer.model_max_length == 77
    assert copy.deepcopy(tokenizer)("<cat-toy>")["input_ids"] == [192, 194, 195, 196, 193]


def test_first_values(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    words = [CAT, Word(token="<two>", vectors=2, begin="red cat"), Word(token="<any>", vectors=400)]
    embeddings = Embeddings(encoders, tokenizers, words)
    for index, encoder in enumerate(encoders):
        weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
        cat, red = (weight[tokenizers[0](word)["input_ids"][1]] for word in ("cat", "red"))
        assert torch.equal(embeddings.vectors("<cat-toy>")[index], torch.stack([cat] * 3))
        assert torch.equal(embeddings.vectors("<two>")[index], torch.stack([red, cat]))
        drawn = embeddings.vectors("<any>")[index]
        assert (drawn.std(dim=0) / weight.std(dim=0)).mean().item() == pytest.approx(1, abs=0.1)
        assert (drawn.mean(dim=0) - weight.mean(dim=0)).abs().mean() < 0.1 * weight.std()


def test_a_twin_and_a_state_dict(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    embeddings = Embeddings(encoders, tokenizers, [CAT])
    ids = ids_of(embeddings.tokenizers[0], "a <cat-toy>")
    own, twin = context(encoders[0], ids), embeddings.twin()
    with torch.no_grad():
        for row in twin.parameters():
            row.add_(1)
    with twin.active():
        lent = context(encoders[0], ids)
    assert not torch.equal(lent, own) and torch.equal(context(encoders[0], ids), own)
    embeddings.load_state_dict(twin.state_dict())
    assert torch.equal(context(encoders[0], ids), lent)


def test_narrow_encoders_and_fake_tensors(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    encoder = encoders[0].to(torch.bfloat16)
    embeddings = Embeddings([encoder], tokenizers[:1], [CAT])
    out = context(encoder, ids_of(embeddings.tokenizers[0], "<cat-toy>"))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad is not None for p in embeddings.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = transformers.CLIPTextModel(encoder.config)
        embeddings = Embeddings([fake], tokenizers[:1], [CAT, RED])
        context(fake, torch.zeros(2, 77, dtype=torch.int64)).sum().backward()
        assert [list(p.grad.shape) for p in embeddings.parameters() if p.grad is not None] == [[3, 32], [1, 32]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([Word(token="cat")], "'cat' is in the tokenizer's vocabulary"),
        ([Word(token="a b")], "has a space"),
        ([Word(token="")], "is empty"),
        ([Word(token="<x>", vectors=0)], "0 vectors"),
        ([Word(token="<x>", begin="red cat")], "2 tokens for 1 vectors"),
        ([Word(token="<x>", vectors=2), Word(token="<X>_1")], "'<X>_1' is given twice"),
    ],
)
def test_wrong_words_are_told(encoders: list[nn.Module], tokenizers: list[Any], words: list[Word], told: str) -> None:
    with pytest.raises(LowVRAMError, match=told):
        Embeddings(encoders, tokenizers, words)


def test_wrong_vectors_are_told(encoders: list[nn.Module], tokenizers: list[Any]) -> None:
    embeddings = Embeddings(encoders, tokenizers, [CAT])
    with pytest.raises(LowVRAMError, match="no new word"):
        embeddings.vectors("<dog>")
    with pytest.raises(LowVRAMError, match=r"\[\[3, 32\]\], not \[\[3, 32\], \[3, 48\]\]"):
        embeddings.load("<cat-toy>", [torch.ones(3, 32)])
