"""The condition of a published pipeline, against what the pipelines of diffusers feed their networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowvram import standin
from lowvram.data.caption_variants import TEMPLATED, CaptionOptions, variants_of
from lowvram.errors import LowVRAMError
from lowvram.memory.apply import apply
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.phase import Phase
from lowvram.tasks.pipeline_text import PipelineText
from lowvram.weights.pipeline import open_pipeline
from lowvram.weights.pipeline_writer import write_single_file
from lowvram.weights.random_pipeline import RandomPipeline

pytest.importorskip("diffusers")
from tiny_pipelines import FAMILIES, POOLED, SECOND_WIDTH, TEXT_WIDTH, load_pipeline, make_pipeline

CPU = torch.device("cpu")
CAPTIONS = ["a red cat", "", "a hat, a blue dog", "a red cat"]
SEEDS = torch.arange(4)


def opened(path: Path):
    """The pipeline, which notes in `loads` what is loaded of it."""
    pipeline = open_pipeline(path)
    load, pipeline.loads = pipeline.load, []

    def noted(part, network):
        pipeline.loads.append(part)
        load(part, network)

    pipeline.load = noted
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("pipelines")
    return {family: make_pipeline(home / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(folders):
    return {family: load_pipeline(folder) for family, folder in folders.items()}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make(folders):
    def of(family, **options):
        options = {"kept_dtype": torch.float32, "size": (32, 48)} | options
        return PipelineText(opened(folders[family]), options.pop("device", CPU), **options)

    return of


def fed(reference, prompts, negative=None, skip=None):
    """What a pipeline of diffusers feeds its network: context, negative context, and for SDXL both pooled."""
    with torch.no_grad():
        if hasattr(reference, "text_encoder_2"):
            return reference.encode_prompt(
                prompts, device="cpu", do_classifier_free_guidance=True, negative_prompt=negative, clip_skip=skip
            )
        negative = None if negative is None else [negative] * len(prompts)
        return reference.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("live", [False, True], ids=["kept", "live"])
def test_training_and_sampling_get_what_the_pipeline_feeds_its_network(family, live, make, references):
    condition = make(family, live=live)
    network = condition.network()
    assert (network is None) == (not live)
    said = []
    condition.read(CAPTIONS, said.append)
    told = condition.training(torch.arange(4), SEEDS, network)
    context, null, *pooled = fed(references[family], [caption or "x" for caption in CAPTIONS])
    if family == "sdxl":  # a caption that is missing is what the pipeline takes for no negative prompt
        context[1], pooled[0][1] = 0, 0
        torch.testing.assert_close(told["pooled"], pooled[0])
        assert told["size_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 4
    else:
        context[1] = null[0]
    torch.testing.assert_close(told["context"], context)
    assert set(told) == ({"context", "pooled", "size_ids"} if family == "sdxl" else {"context"})
    assert told["context"].shape[2] == condition.dim == TEXT_WIDTH[family] + (family == "sdxl") * SECOND_WIDTH
    assert said == ([] if live else [f"encoding 3 captions with {condition.pipeline.path}"])

    wanted = condition.wanted(["a hat", "a red cat"], network)
    context, null, *pooled = fed(references[family], ["a hat", "a red cat"])
    torch.testing.assert_close(wanted["context"], context)
    torch.testing.assert_close(condition.null(network)["context"], null[:1])
    if family == "sdxl":
        torch.testing.assert_close(wanted["pooled"], pooled[0])
        torch.testing.assert_close(condition.null(network)["pooled"], pooled[1][:1])
        assert wanted["pooled"].shape[1] == condition.pooled_dim == POOLED
        assert condition.null(network)["size_ids"].tolist() == [[32, 48, 0, 0, 32, 48]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_gives_the_same(family, make, folders, tmp_path):
    write_single_file(tmp_path / "model.safetensors", opened(folders[family]), {})
    single = open_pipeline(tmp_path / "model.safetensors")
    single.tokenizer = opened(folders[family]).tokenizer  # the file has none: CLIP's own has more words than this
    condition, expected = PipelineText(single, CPU, size=(32, 48)), make(family)
    for texts in (condition, expected):
        texts.read(CAPTIONS, print)
    for asked in (lambda texts: texts.wanted(["a hat"], None), lambda texts: texts.null(None)):
        told, wanted = asked(condition), asked(expected)
        assert set(told) == set(wanted)
        for name in told:
            torch.testing.assert_close(told[name], wanted[name])


def test_random_weights_of_the_published_shape(cache):
    pipeline = RandomPipeline("sd1")
    pipeline._configs["text_encoder"] |= {"num_hidden_layers": 2, "intermediate_size": 64}  # the widths alone
    condition = PipelineText(pipeline, CPU)
    assert (condition.dim, condition.length, condition.parts) == (768, 77, ("text_encoder",))
    told = condition.wanted(["a photo of a cat"], None)
    assert told["context"].shape == (1, 77, 768) and told["context"].isfinite().all()
    assert PipelineText(RandomPipeline("sdxl"), CPU).zeros


@pytest.mark.parametrize("negative", ["", "blue dog"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_negative_prompt_takes_the_place_of_none(family, negative, make, references):
    _, null, *pooled = fed(references[family], ["a"], negative=negative)
    told = make(family).null(None, negative)
    torch.testing.assert_close(told["context"], null)
    if family == "sdxl":
        torch.testing.assert_close(told["pooled"], pooled[1])


def test_no_caption_is_read_where_the_pipeline_says_so(make, folders, references, monkeypatch):
    """A training that knew "" as the encoders read it, told apart by model_index.json."""
    index = folders["sdxl"] / "model_index.json"
    before = index.read_text()
    try:
        index.write_text(json.dumps(json.loads(before) | {"force_zeros_for_empty_prompt": False}))
        condition = make("sdxl", dropout=1.0)
        condition.read(CAPTIONS, print)
        told, null = condition.training(torch.arange(4), SEEDS, None), condition.null(None)
    finally:
        index.write_text(before)
    _, expected, _, expected_pooled = fed(references["sdxl"], ["a"], negative="")
    for name, value in (("context", expected), ("pooled", expected_pooled)):
        torch.testing.assert_close(null[name], value)
        torch.testing.assert_close(told[name], value.expand_as(told[name]))


def test_what_is_kept_is_read_back_and_made_anew_for_other_settings(make, cache, folders):
    condition = make("sdxl", kept_dtype=torch.float16)
    condition.read(CAPTIONS, print)
    assert condition.pipeline.loads == ["text_encoder", "text_encoder_2"]
    first = condition.training(torch.arange(4), SEEDS, None)
    assert first["context"].dtype == torch.float32
    again = make("sdxl", kept_dtype=torch.float16)
    again.read(CAPTIONS, pytest.fail)
    assert again.pipeline.loads == []
    second = again.training(torch.arange(4), SEEDS, None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (kept,) = cache.rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    mended = make("sdxl", kept_dtype=torch.float16)
    mended.read(CAPTIONS, print)
    assert torch.equal(mended.training(torch.arange(4), SEEDS, None)["context"], first["context"])
    exact = make("sdxl")
    exact.read(CAPTIONS, print)
    torch.testing.assert_close(
        exact.training(torch.arange(4), SEEDS, None)["context"], first["context"], atol=5e-3, rtol=1e-3
    )
    for other in ({"skip": 1}, {"key": "another"}, {"dtype": torch.bfloat16}):
        make("sdxl", **other).read(CAPTIONS, print)
    make("sdxl").read([*CAPTIONS, "one more"], print)
    assert len(list(cache.rglob("*.safetensors"))) == 6 and not list(cache.rglob(".*safetensors.*"))


def test_captions_are_left_out_as_often_as_asked_and_by_the_sample_alone(make):
    condition = make("sd1", dropout=0.25)
    condition.read(CAPTIONS, print)
    seeds = torch.arange(400)
    told = condition.training(torch.zeros(400, dtype=torch.int64), seeds, None)["context"]
    empty = condition.null(None)["context"][0]
    left_out = (told - empty).flatten(1).abs().max(dim=1).values < 1e-6
    assert 70 < int(left_out.sum()) < 130
    few = condition.training(torch.zeros(3, dtype=torch.int64), seeds[[7, 300, 7]], None)["context"]
    assert torch.equal(few, told[[7, 300, 7]])


@pytest.mark.parametrize("live", [False, True], ids=["kept", "live"])
def test_training_draws_among_the_variants_of_a_caption(live, make):
    options = CaptionOptions(shuffle=True, keep=1, variants=5, prefix="the")
    captions = ["f, g, h", "a, b, c, d, e"]
    condition = make("sd1", live=live, options=options)
    network = condition.network()
    condition.read(captions, print)
    seeds = torch.arange(60)
    told = condition.training(torch.ones(60, dtype=torch.int64), seeds, network)["context"].detach()
    texts = variants_of(captions[1], options)
    expected = condition.wanted(texts, network)["context"]
    nearest = (told[:, None] - expected).abs().amax(dim=(2, 3)).min(dim=1)
    assert float(nearest.values.max()) < 1e-5 and {texts[i] for i in nearest.indices.tolist()} == set(texts)


def test_images_without_caption_draw_among_templates(make):
    """By the seed of the sample alone; with prefix and suffix, and beside captions with variants of their own."""
    templates = ("a photo of red", "one red", "the red cat")
    options = CaptionOptions(shuffle=True, keep=0, variants=2, suffix="hat", templates=templates)
    condition = make("sd1", options=options)
    condition.read([TEMPLATED, "a, b, c, d", "", "blue"], print, own=3)
    seeds = torch.arange(60)
    told = condition.training(torch.zeros(60, dtype=torch.int64), seeds, None)["context"]
    expected = condition.wanted([f"{template} hat" for template in templates], None)["context"]
    nearest = (told[:, None] - expected).abs().amax(dim=(2, 3)).min(dim=1)
    assert float(nearest.values.max()) < 1e-5
    counts = torch.bincount(nearest.indices, minlength=3)
    assert int(counts.min()) > 8
    few = condition.training(torch.zeros(2, dtype=torch.int64), seeds[[41, 3]], None)["context"]
    assert torch.equal(few, told[[41, 3]])
    labels = torch.tensor([1, 2, 3]).repeat(20)
    others = condition.training(labels, seeds, None)["context"]
    texts = [*variants_of("a, b, c, d", options), "", "blue"]
    expected = condition.wanted(texts, None)["context"]
    nearest = (others[:, None] - expected).abs().amax(dim=(2, 3)).min(dim=1)
    assert float(nearest.values.max()) < 1e-5
    drawn = [set(nearest.indices[labels == label].tolist()) for label in (1, 2, 3)]
    assert drawn == [{0, 1}, {2}, {3}]


def test_live_encoders_get_gradients_and_the_kept_ones_none(make):
    condition = make("sdxl", live=True)
    network = condition.network()
    condition.read(CAPTIONS, print)
    told = condition.training(torch.arange(4), SEEDS, network)
    (told["context"].square().sum() + told["pooled"].square().sum()).backward()
    named = dict(network.named_parameters())
    without = {name for name, parameter in named.items() if parameter.grad is None}
    # Of the first encoder nothing reads the last layer and its norm.
    assert without and all(name.startswith("encoders.0") for name in without)
    assert all("layers.2" in name or "final_layer_norm" in name for name in without)
    assert not make("sdxl").wanted(["a"], None)["context"].requires_grad
    assert not condition.wanted(["a"], network)["context"].requires_grad


def test_tokenizers_that_know_more_may_take_the_place_of_the_pipelines(make):
    condition = make("sd1", live=True)
    network = condition.network()
    usual = condition.tokenizers[0]

    def learned(texts, **options):  # "<new>" as two tokens
        return usual([text.replace("<new>", "cat red") for text in texts], **options)

    condition.tokenizers = [learned]
    condition.read(["a <new> hat"], print)
    told = condition.training(torch.zeros(1, dtype=torch.int64), SEEDS[:1], network)["context"]
    torch.testing.assert_close(told, make("sd1").wanted(["a cat red hat"], None)["context"])


def test_prompts_that_were_remembered_need_no_encoder(make):
    condition = make("sdxl")
    condition.wanted(["", "a red cat"], None)
    loads = len(condition.pipeline.loads)
    condition.wanted(["a red cat", "a red cat"], None)
    condition.null(None)
    assert len(condition.pipeline.loads) == loads == 2
    fresh = make("sdxl").wanted(["a hat", "a red cat"], None)["context"]
    torch.testing.assert_close(condition.wanted(["a red cat", "a hat"], None)["context"], fresh[[1, 0]])


def test_long_texts_are_cut_in_training_and_refused_in_sampling(make):
    long, cut = "cat " * 90, "cat " * 75
    condition = make("sd2")
    said = []
    condition.read([long, "a"], said.append)
    assert said[0] == "1 of 3 different captions are longer than 75 tokens, and cut" and len(said) == 2
    with pytest.raises(LowVRAMError, match="has 90 tokens, of which CLIP reads 75"):
        condition.wanted(["a", long], None)
    told = condition.training(torch.zeros(1, dtype=torch.int64), SEEDS[:1], None)["context"]
    torch.testing.assert_close(told, condition.wanted([cut], None)["context"])
    torch.testing.assert_close(told, condition.wanted([long], None, cut=True)["context"])


def test_sizes_go_with_their_images_and_variants(make):
    condition = make("sdxl")
    condition.read(CAPTIONS, print)
    table = np.arange(4 * 2 * 6).reshape(4, 2, 6)
    condition.take_sizes(table)
    told = condition.training(torch.tensor([2, 0]), SEEDS[:2], None)
    assert told["size_ids"].tolist() == [table[2, 0].tolist(), table[0, 0].tolist()]
    condition.take_sizes(table, labelled=True)
    both = condition.training(torch.tensor([2 * 2 + 1, 0]), SEEDS[:2], None)
    assert both["size_ids"].tolist() == [table[2, 1].tolist(), table[0, 0].tolist()]
    assert torch.equal(both["context"], told["context"])


def test_clip_skip_leaves_out_layers_at_the_end(make, references):
    expected = fed(references["sdxl"], ["a red cat"], skip=1)
    told = make("sdxl", skip=1).wanted(["a red cat"], None)
    torch.testing.assert_close(told["context"], expected[0])
    torch.testing.assert_close(told["pooled"], expected[2])
    # With one encoder the layer is normed; diffusers, with transformers 5, stops at an attribute that is not there.
    reference = references["sd1"]
    ids = reference.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
    encoder = reference.text_encoder
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
        expected = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
    torch.testing.assert_close(make("sd1", skip=1).wanted(["a red cat"], None)["context"], expected)


def test_a_plan_needs_neither_weights_nor_captions(make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for family, live in (("sd1", False), ("sdxl", False), ("sdxl", True)):
        condition = make(family, live=live)
        with FakeTensorMode(), standin.cuda():
            network = condition.network()
            told = condition.training(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), network)
            assert told["context"].shape == (3, 77, condition.dim)
            if live:
                (told["context"].sum() + told["pooled"].sum()).backward()
                assert network.encoders[1].text_projection.weight.grad is not None
            assert len(condition.wanted(["a", "b"], network)["context"]) == 2
        assert condition.pipeline.loads == []


def test_weights_that_overflow_are_found_out(make):
    def broken(part, module):
        condition.pipeline.load(part, module)
        next(iter(module.parameters())).data.fill_(float("inf"))

    condition = make("sd1", loading=broken)
    with pytest.raises(LowVRAMError, match=r"text_encoder of .* gives NaN or infinity in float32"):
        condition.read(CAPTIONS, print)
    with pytest.raises(LowVRAMError, match="skip=2 of an encoder of 3 layers"):
        make("sdxl", skip=2).wanted(["a"], None)


POLICIES = {
    "recompute": {"phases": {"text": PhasePolicy(activations="recompute")}},
    "offload": {"phases": {"text": PhasePolicy(activations="offload")}},
    "streamed": {"optimizers": {"text": OptimizerPolicy(weights="stream", update="deferred")}},
}


def trained(make, **policy):
    """The weights after two steps of training both encoders of SDXL under a memory policy."""
    condition = make("sdxl", live=True, dropout=0.25)
    network = condition.network().requires_grad_(False)
    condition.read(CAPTIONS, print)

    def loss(micro):
        told = condition.training(micro.labels, micro.seeds, network)
        return told["context"].square().mean() + told["pooled"].square().mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-4)
    phase = Phase(name="text", networks=(network,), optimizer=optimizer, loss=loss, samples=4)
    applied = apply(MemoryPolicy(**policy), [phase], device="cpu", seed=0)
    for step in range(2):
        positions = torch.arange(4) + 4 * step
        with applied.running(phase):
            parts = phase.micro_batches(torch.zeros(4, 1), torch.arange(4), positions, 4 * step, 0)
            found, _ = applied.accumulate(phase, parts)
        applied.update(phase, found)
    applied.settle()
    return {name: tensor.clone() for name, tensor in applied.full_state(network).items()}


@pytest.fixture(scope="module")
def plainly_trained(folders):
    return trained(lambda family, **options: PipelineText(opened(folders[family]), CPU, **options))


@pytest.mark.parametrize("policy", POLICIES)
def test_encoders_train_the_same_under_memory_policies(policy, make, plainly_trained):
    other = trained(make, **POLICIES[policy])
    assert all(torch.equal(other[name], tensor) for name, tensor in plainly_trained.items())
    before = make("sdxl", live=True).network().state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in plainly_trained.items())
