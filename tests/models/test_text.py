"""Hashed words and the small text encoder that is trained along."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.models.dit import DiT
from lowvram.models.text import TextEncoder, WordTokenizer

SMALL = {"buckets": 512, "length": 8, "dim": 16, "depth": 2, "heads": 2}
CAPTIONS = ["a person with long hair, smiling", "", "a hat"]


def encoder(*, trained=True, **kwargs):
    torch.manual_seed(0)
    network = TextEncoder(**{**SMALL, **kwargs})
    if trained:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return network


# The tokenizer.


@pytest.mark.parametrize(
    "text, words",
    [
        ("A person,  with Long hair.", ["a", "person", ",", "with", "long", "hair", "."]),
        ("don’t / DON'T", ["don't", "/", "don't"]),
        ("t-shirt_2", ["t", "-", "shirt", "_", "2"]),
        ("Straße ＡＢＣ ﬁne", ["strasse", "abc", "fine"]),
        ("猫 и 🎩!", ["猫", "и", "🎩", "!"]),
        (" \t\n", []),
    ],
)
def test_words_are_lower_case_and_marks_stand_alone(text, words):
    assert WordTokenizer().words(text) == words


def test_numbers_are_those_of_crc32_and_the_rest_is_zero():
    ids = WordTokenizer(buckets=8192, length=6).encode(["A hat, a HAT", ""])
    a, hat, comma = (1 + crc % 8191 for crc in (0xE8B7BE43, 0x920BAC49, 0xE0DA836E))  # as gzip has them
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[a, hat, comma, a, hat, 0], [0] * 6]


def test_numbers_are_the_same_in_another_process():
    code = "from lowvram.models.text import WordTokenizer; print(WordTokenizer().encode(['red, hat']).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(WordTokenizer().encode(["red, hat"]).tolist())


@given(st.text(max_size=60), st.integers(2, 5000))
def test_any_text_gives_buckets_in_range_and_words_that_tokenise_to_themselves(text, buckets):
    tokenizer = WordTokenizer(buckets=buckets, length=8)
    words = tokenizer.words(text)
    assert bool(words) == bool(text.split())
    assert all(1 <= tokenizer.bucket(word) < buckets for word in words)
    ids = tokenizer.encode([text], too_long="cut")
    assert (ids != 0).sum() == min(len(words), 8)
    assert tokenizer.words(" ".join(words)) == words


def test_too_long_prompts_are_named_with_both_numbers_and_captions_may_be_cut():
    tokenizer = WordTokenizer(length=4)
    captions = ["one two three four", "one two three four five six", ""]
    with pytest.raises(LowVRAMError, match=r"'one two three four five six' has 6 words.*reads 4\.\n.*to 4"):
        tokenizer.encode(captions)
    ids = tokenizer.encode(captions, too_long="cut")
    assert torch.equal(ids[0], ids[1])
    assert tokenizer.count_too_long(captions) == 1
    with pytest.raises(LowVRAMError, match="too_long='no'"):
        tokenizer.encode(captions, too_long="no")


def test_a_long_text_does_not_fill_the_error():
    with pytest.raises(LowVRAMError) as caught:
        WordTokenizer().encode(["word " * 10_000])
    assert "10000 words" in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("change", [{"buckets": 1}, {"length": 0}])
def test_a_tokenizer_that_can_hold_nothing_is_refused(change):
    with pytest.raises(LowVRAMError, match="can hold no word"):
        WordTokenizer(**change)


def test_few_words_share_a_bucket():
    tokenizer = WordTokenizer()
    words = [f"{colour}{thing}" for colour in "abcdefghij" for thing in range(20)]
    assert len({tokenizer.bucket(word) for word in words}) >= 192  # 200 words; some 2.4 pairs by chance


# The encoder.


def test_shapes_and_mask():
    network = encoder()
    context, mask = network(network.tokenizer.encode(CAPTIONS))
    assert context.shape == (3, 9, 16) and context.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [8, 1, 3]  # the start token, and the words
    assert mask[:, 0].all()
    assert not context[~mask].any() and (context[mask].abs().amax(-1) > 0).all()
    with pytest.raises(LowVRAMError, match=r"ids have shape \[3, 7\], not \[B, 8\]"):
        network(torch.zeros(3, 7, dtype=torch.int64))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_caption_is_valid_in_every_width(trained, dtype):
    network = encoder(trained=trained).to(dtype)
    context, mask = network(torch.zeros(2, 8, dtype=torch.int64))
    assert context.dtype == dtype and context.isfinite().all() and mask[:, 0].all()
    assert context[:, 0].float().square().mean() > 1e-3
    grads = torch.autograd.grad(context.float().square().sum(), tuple(network.parameters()), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def test_captions_do_not_depend_on_their_batch_nor_on_their_padding():
    network, long = encoder(), encoder(length=12)
    long.load_state_dict(network.state_dict() | {"positions": long.positions.detach()})
    with torch.no_grad():
        long.positions[:9] = network.positions
    together, _ = network(network.tokenizer.encode(CAPTIONS))
    padded, mask = long(long.tokenizer.encode(CAPTIONS))
    torch.testing.assert_close(padded[:, :9], together, atol=1e-5, rtol=1e-4)
    assert not mask[:, 9:].any()
    for i, caption in enumerate(CAPTIONS):
        alone, _ = network(network.tokenizer.encode([caption]))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_order_and_company_of_words_matter():
    network = encoder()
    context, _ = network(network.tokenizer.encode(["red hat", "hat red", "red coat"]))
    assert (context[0, 0] - context[1, 0]).abs().max() > 1e-3  # the start token has read the words, in order
    assert (context[0, 1] - context[2, 1]).abs().max() > 1e-3  # "red" knows what is red


def test_words_differ_before_training():
    network = encoder(trained=False, dim=64, depth=4)
    context, _ = network(network.tokenizer.encode(["red hat", "blue hat"]))
    same, other = context[:, 2], context[:, 1]
    torch.testing.assert_close(same[0], same[1])
    assert torch.cosine_similarity(other[0], other[1], dim=0) < 0.8  # positions are shared


def test_unseen_words_of_a_prompt():
    network = encoder(buckets=8192)
    assert network.unseen("A hat!") == ["a", "hat", "!"]
    network.note(network.tokenizer.encode(CAPTIONS))
    network.note(network.tokenizer.encode(["red"]))
    assert network.unseen("a person in a Red hat") == ["in"]
    assert network.unseen("robot, a robot with hair") == ["robot"]
    assert network.unseen("") == []
    restored = encoder(buckets=8192)
    restored.load_state_dict(network.state_dict())
    assert restored.unseen("a person in a red hat") == ["in"]
    assert network.half().seen.dtype == torch.bool


def test_blocks_are_found_and_recomputing_them_is_exact():
    network = encoder()
    ids = network.tokenizer.encode(CAPTIONS)
    blocks = find_blocks(network)
    assert list(blocks) == ["layers.0", "layers.1"]
    parameters = tuple(network.parameters())
    plain = torch.autograd.grad(network(ids)[0].square().sum(), parameters)
    with recomputing(list(blocks.values())):
        recomputed = torch.autograd.grad(network(ids)[0].square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [({"dim": 18}, "dim=18 with heads=2"), ({"depth": -1}, "depth=-1"), ({"buckets": 0}, "buckets=0")],
)
def test_sizes_that_make_no_encoder_are_named(change, message):
    with pytest.raises(LowVRAMError, match=message):
        encoder(**change)


def test_text_and_image_learn_together_and_the_empty_caption_is_the_mean():
    """Captions name a colour and an object; the network is to paint it from noise, and knows it by words alone."""
    torch.manual_seed(0)
    text = TextEncoder(buckets=512, length=4, dim=32, depth=1, heads=2)
    network = DiT(in_channels=2, dim=32, depth=2, heads=2, context_dim=32)
    captions = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("hat", "coat")]
    ids = text.tokenizer.encode([*captions, ""])
    values = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    targets = values[:, :, None, None].expand(4, 2, 4, 4)
    optimizer = torch.optim.Adam([*text.parameters(), *network.parameters()], lr=3e-3)
    time = torch.tensor(1000.0)
    for _ in range(120):
        rows = torch.randint(4, (16,))
        dropped = torch.rand(16) < 0.2
        context, mask = text(ids[torch.where(dropped, 4, rows)])
        loss = (network(torch.randn(16, 2, 4, 4), time, context=context, context_mask=mask) - targets[rows]).square()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        context, mask = text(ids)
        painted = network(torch.randn(5, 2, 4, 4), time, context=context, context_mask=mask).mean((2, 3))
    torch.testing.assert_close(painted[:4], values, atol=0.25, rtol=0)
    assert painted[4].abs().max() < 0.5
