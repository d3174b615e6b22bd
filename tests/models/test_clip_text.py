"""CLIP text encoders from folders, against transformers and the pipelines of diffusers, on tiny ones made here."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_clip import LENGTH, VOCABULARY, save_encoder, save_tokenizer
from torch.utils.checkpoint import checkpoint

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.models.clip_text import ClipText, number_tokens

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red cat", "", "blue dog, a hat"]


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_tokenizer(folder)
    return folder, save_encoder(folder, 16)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """SD 1.x: text_encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("sd")
    save_tokenizer(folder / "tokenizer")
    return folder, save_encoder(folder / "text_encoder", 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """SDXL: a second encoder, with a projection, whose tokenizer pads by "!"."""
    folder = tmp_path_factory.mktemp("sdxl")
    save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer_2", pad="!")
    first = save_encoder(folder / "text_encoder", 16)
    return folder, first, save_encoder(folder / "text_encoder_2", 24, projection=12, seed=1)


def test_a_lone_encoder_is_that_of_transformers(lone):
    folder, model = lone
    clip = ClipText(folder)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids)
    context, mask, pooled = clip.encode(PROMPTS)
    torch.testing.assert_close(context, expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)
    assert mask.shape == (3, LENGTH) and mask.dtype == torch.bool and mask.all()
    assert (clip.length, clip.dim, clip.pooled_dim) == (LENGTH, 16, 16)
    assert context.shape == (3, LENGTH, clip.dim) and pooled.shape == (3, clip.pooled_dim)
    assert (context[0] - context[2]).abs().max() > 0.1


def test_a_pipeline_folder_gives_what_its_pipeline_feeds_the_network(pipeline):
    diffusers = pytest.importorskip("diffusers")
    folder, model = pipeline
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    reference = diffusers.StableDiffusionPipeline(
        text_encoder=model, tokenizer=tokenizer, requires_safety_checker=False, **parts
    )
    with torch.no_grad():
        expected, _ = reference.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(ClipText(folder).encode(PROMPTS)[0], expected)


def test_two_encoders_give_what_the_sdxl_pipeline_feeds_the_network(pair):
    diffusers = pytest.importorskip("diffusers")
    folder, first, second = pair
    tokenizers = [transformers.CLIPTokenizerFast.from_pretrained(folder / n) for n in ("tokenizer", "tokenizer_2")]
    reference = diffusers.StableDiffusionXLPipeline(
        text_encoder=first,
        tokenizer=tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        add_watermarker=False,
        **dict.fromkeys(("vae", "unet", "scheduler")),
    )
    with torch.no_grad():
        expected, _, expected_pooled, _ = reference.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False
        )
    clip = ClipText(folder)
    context, _, pooled = clip.encode(PROMPTS)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(pooled, expected_pooled)
    assert (clip.dim, clip.pooled_dim) == (40, 12)


def test_the_mask_can_leave_padding_out(pair):
    folder, *_ = pair
    _, mask, _ = ClipText(folder, mask_padding=True).encode(PROMPTS)
    # start, "a", "red", "cat", end; start, end; start, b l u e, d o g, ",", a, h a t, end
    assert mask.sum(1).tolist() == [5, 2, 14]
    assert (mask.int().diff(dim=1) <= 0).all()


def test_it_is_frozen_and_keeps_to_evaluation(lone):
    clip = ClipText(lone[0]).train()
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert not any(value.requires_grad for value in clip.encode(["a"]))


def test_a_batch_is_its_rows_and_weights_may_be_narrow(lone):
    clip = ClipText(lone[0])
    together, alone = clip.encode(PROMPTS), [clip.encode([prompt]) for prompt in PROMPTS]
    for part in range(3):
        torch.testing.assert_close(together[part], torch.cat([row[part] for row in alone]))
    narrow = ClipText(lone[0], dtype=torch.bfloat16).encode(PROMPTS)
    assert narrow[0].dtype == narrow[2].dtype == torch.bfloat16
    torch.testing.assert_close(narrow[0].float(), together[0], atol=0.3, rtol=0.1)


def test_too_long_prompts_say_by_how_much(pair):
    clip = ClipText(pair[0])
    fits, long = "cat " * 75, "cat " * 80
    clip.encode([fits])
    with pytest.raises(LowVRAMError, match=r"has 80 tokens, of which CLIP reads 75.*\n.*by 5 tokens"):
        clip.encode(["a", long])
    assert clip.count_too_long(["a", long, fits, long]) == 2
    cut, whole = clip.encode([long], too_long="cut"), clip.encode([fits])
    torch.testing.assert_close(cut[0], whole[0])
    torch.testing.assert_close(cut[2], whole[2])
    with pytest.raises(LowVRAMError, match="too_long='no'"):
        clip.encode(["a"], too_long="no")


# ---- from parts


def parts_of(folder: Path, *names: str):
    """What `from_parts` takes, of the encoders of a folder; the weights by their published names."""
    from safetensors.torch import load_file

    def loading(name):
        def load(module):
            tensors = load_file(folder / name / "model.safetensors")
            module.load_state_dict({n if "text_" in n else f"text_model.{n}": t for n, t in tensors.items()})

        return load

    encoders = [(json.loads((folder / name / "config.json").read_text()), loading(name)) for name in names]
    return encoders, [folder / name.replace("text_encoder", "tokenizer") for name in names]


def _load_into(state, module):
    module.load_state_dict(state)


def test_parts_give_what_their_folder_gives(pipeline, pair):
    for folder, names in ((pipeline[0], ["text_encoder"]), (pair[0], ["text_encoder", "text_encoder_2"])):
        whole, made = ClipText(folder), ClipText.from_parts(*parts_of(folder, *names))
        for one, other in zip(made.encode(PROMPTS), whole.encode(PROMPTS), strict=True):
            assert torch.equal(one, other)
        assert (made.length, made.dim, made.pooled_dim) == (whole.length, whole.dim, whole.pooled_dim)
        assert not made.train().training and not any(p.requires_grad for p in made.parameters())
        for number, name in enumerate(names):
            state = made.state(number)
            assert all(key.startswith(("text_model.", "text_projection.")) for key in state)
            again = {key: tensor.clone() for key, tensor in state.items()}
            config, _ = parts_of(folder, name)[0][0]
            load = functools.partial(_load_into, again)
            copy = ClipText.from_parts([(config, load)], [folder / "tokenizer"])
            assert all(torch.equal(copy.state(0)[key], tensor) for key, tensor in state.items())


def test_an_encoder_alone_gives_its_share_of_the_context(pair):
    folder = pair[0]
    context = ClipText(folder).encode(PROMPTS)[0]
    alone = [
        ClipText.from_parts(*parts_of(folder, name), last_but_one=True).encode(PROMPTS)[0]
        for name in ("text_encoder", "text_encoder_2")
    ]
    torch.testing.assert_close(torch.cat(alone, dim=-1), context)


def test_layers_may_be_left_out_at_the_end(pipeline):
    folder, model = pipeline
    made = ClipText.from_parts(*parts_of(folder, "text_encoder"), skip=1)
    ids, _ = number_tokens(made.tokenizers[0], PROMPTS, LENGTH)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-2]
        expected = getattr(model, "text_model", model).final_layer_norm(hidden)
    torch.testing.assert_close(made.encode(PROMPTS)[0], expected)
    with pytest.raises(LowVRAMError, match=r"skip=3 of an encoder of 3 layers[^\n]*\n.*0 to 2"):
        ClipText.from_parts(*parts_of(folder, "text_encoder"), skip=3)


def test_those_that_are_trained_have_gradients_blocks_and_dropout(pair):
    made = ClipText.from_parts(*parts_of(pair[0], "text_encoder", "text_encoder_2"), trained=True)
    assert made.train().encoders[0].training and not made.eval().training
    blocks = find_blocks(made)
    assert len(blocks) == 6 and all(type(block).__name__ == "CLIPEncoderLayer" for block in blocks.values())
    ids = [number_tokens(tokenizer, PROMPTS, LENGTH)[0] for tokenizer in made.tokenizers]
    context, pooled = made(*ids)
    (context.sum() + pooled.sum()).backward()
    assert all(block.mlp.fc1.weight.grad is not None for name, block in blocks.items() if name[-1] != "2")
    kept = made.encoders[1].text_projection.weight.grad.clone()
    made.zero_grad()
    for block in blocks.values():  # recomputed, as a memory policy has it
        forward = block.forward
        block.forward = lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
    context, pooled = made(*ids)
    (context.sum() + pooled.sum()).backward()
    assert torch.equal(made.encoders[1].text_projection.weight.grad, kept)


def test_parts_of_something_else(pipeline):
    folder = pipeline[0]
    (config, load), *_ = parts_of(folder, "text_encoder")[0]
    tokenizer = [folder / "tokenizer"]
    with pytest.raises(LowVRAMError, match="of type 't5', not a CLIP"):
        ClipText.from_parts([(config | {"model_type": "t5"}, load)], tokenizer)
    for wrong in ({"num_attention_heads": 3}, {"hidden_act": "no_such"}, {"hidden_size": "wide"}):
        with pytest.raises(LowVRAMError, match="describes none that can be made"):
            ClipText.from_parts([(config | wrong, load)], tokenizer)
    with pytest.raises(LowVRAMError, match="holds no tokenizer"):
        ClipText.from_parts([(config, load)], [folder])
    with pytest.raises(LowVRAMError, match=f"has {VOCABULARY} tokens, the encoder 10"):
        ClipText.from_parts([(config | {"vocab_size": 10}, None)], tokenizer)


# ---- folders that lack something


def without(folder: Path, *names: str):
    def change(copy: Path) -> None:
        for name in names:
            (copy / folder / name).unlink()

    return change


def write(name: str, content: bytes):
    return lambda copy: (copy / name).write_bytes(content)


def of_type(kind: str):
    def change(copy: Path) -> None:
        file = copy / "text_encoder/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))

    return change


def with_fewer_weights(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "text_encoder/model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


def with_other_tokenizer(copy: Path) -> None:
    file = copy / "tokenizer/vocab.json"
    tokens = json.loads(file.read_text())
    file.write_text(json.dumps(tokens | {"surplus": len(tokens)}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda copy: shutil.rmtree(copy), "there is no folder"),
        (lambda copy: shutil.rmtree(copy / "text_encoder"), r"holds no config.json"),
        (without("text_encoder", "config.json"), r"text_encoder holds no config.json"),
        (without("text_encoder", "model.safetensors"), "text_encoder holds no weights"),
        (without("tokenizer", "merges.txt"), "tokenizer holds no tokenizer"),
        (lambda copy: shutil.rmtree(copy / "tokenizer"), "tokenizer holds no tokenizer"),
        (write("text_encoder/config.json", b"{"), "config.json can't be read"),
        (write("text_encoder/config.json", b"[]"), "config.json can't be read"),
        (of_type("t5"), "a model of type 't5', not a CLIP"),
        (write("text_encoder/model.safetensors", b"\x08"), "can't be loaded"),
        (write("tokenizer/vocab.json", b"{"), "tokenizer in .* can't be loaded"),
        (with_fewer_weights, r"lack 1 tensors of the encoder, .*layers.1.mlp.fc1.weight"),
        (with_other_tokenizer, f"has {VOCABULARY + 1} tokens, the encoder {VOCABULARY}"),
    ],
)
def test_a_folder_that_lacks_something_says_what(pipeline, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(pipeline[0], copy)
    change(copy)
    with pytest.raises(LowVRAMError, match=message):
        ClipText(copy)


def test_without_transformers_the_error_names_the_extra(lone, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # which makes its import fail
    with pytest.raises(LowVRAMError, match=r"needs transformers[^\n]*\n.*lowvram\[text\]"):
        ClipText(lone[0])


def test_nothing_reaches_for_the_network(lone, monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("it went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ClipText(lone[0]).encode(["a cat"])
    with pytest.raises(LowVRAMError, match="there is no folder"):
        ClipText("openai/clip-vit-large-patch14")
