"""What a run of latent diffusion samples: conditions, guidance, seeds, changed images, walks.

The networks are not trained but randomised: a fresh denoiser's output is zero, whatever it is told.
"""

from collections.abc import Callable

import pytest
import torch
from tiny_diffusion import DIT_WORDS, UNET_CLASSES, ldm_recipe, save_vae
from torch import Tensor

from lowvram import LowVRAMError, Trainer
from lowvram.tasks.diffusion import DiffusionTask

FACE = "a person with short hair"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DiffusionTask]:
    """tasks("plain" | "classes" | "words"): made once."""
    home = tmp_path_factory.mktemp("runs")
    vae = save_vae(home / "vae")
    words = {"plain": (), "classes": UNET_CLASSES, "words": DIT_WORDS}
    made: dict[str, DiffusionTask] = {}

    def make(name: str) -> DiffusionTask:
        if name not in made:
            task = Trainer(ldm_recipe(home / name, vae, *words[name]), quiet=True).task
            assert isinstance(task, DiffusionTask)
            generator = torch.Generator().manual_seed(0)
            for network in task.networks.values():
                for parameter in network.parameters():
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            made[name] = task
        return made[name]

    return make


def most(one: Tensor, other: Tensor) -> int:
    """The largest difference of uint8 images."""
    return int((one.int() - other.int()).abs().max())


def mean(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


@pytest.mark.parametrize("name", ["plain", "classes", "words"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_an_image_depends_on_the_seed_and_its_number_alone(
    name: str, sampler: str, tasks: Callable[..., DiffusionTask]
) -> None:
    task = tasks(name)
    images = task.sample(5, seed=3, sampler=sampler)
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == torch.uint8
    for micro_batch in (1, 2):
        assert most(task.sample(5, seed=3, sampler=sampler, micro_batch=micro_batch), images) <= 1
    assert most(task.sample(2, seed=3, sampler=sampler, start=3), images[3:]) <= 1
    assert mean(task.sample(5, seed=4, sampler=sampler), images) > 1
    assert mean(images[:1], images[1:]) > 1


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [("classes", "classes", ([0], [1])), ("words", "prompts", ([FACE], ["someone with blue hair, smiling"]))],
)
def test_the_condition_changes_the_image(
    name: str, option: str, values: tuple[list[object], list[object]], tasks: Callable[..., DiffusionTask]
) -> None:
    task, (one, two) = tasks(name), values
    first, second = (task.sample(2, **{option: value}) for value in values)
    assert mean(first, second) > 0.3
    both = task.sample(4, **{option: [*one, *two]})  # in turn
    assert most(both[0], first[0]) <= 1
    assert most(both[1], second[1]) <= 1
    assert most(both[2], task.sample(1, start=2, **{option: one})) <= 1
    # Without any: captions of the data set, or all classes, in turn.
    if name == "classes":
        assert most(task.sample(2), task.sample(2, classes=[0, 1])) <= 1
    else:
        assert most(task.sample(2), task.sample(2, prompts=list(task.captions[:2]))) <= 1


@pytest.mark.parametrize(
    ("name", "option", "values"), [("classes", "classes", [[2], [5]]), ("words", "prompts", [[FACE], ["a red shirt"]])]
)
def test_guidance(
    name: str,
    option: str,
    values: list[list[object]],
    tasks: Callable[..., DiffusionTask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = tasks(name)

    def sample(guidance: float, at: int = 0) -> Tensor:
        return task.sample(2, seed=1, guidance=guidance, **{option: values[at]})

    plain = task.sample(2, seed=1, **{option: values[0]})
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with task.denoiser_ema.register_forward_hook(count):
        assert torch.equal(sample(1), plain)
        assert calls == 2
        strong = sample(4)
        assert calls == 2 + 4
    assert mean(strong, plain) > 0.3
    assert torch.equal(sample(0, 0), sample(0, 1))  # nothing of the condition
    decode, latents = task.codec.decode, []
    monkeypatch.setattr(task.codec, "decode", lambda z, *rest, **more: (latents.append(z), decode(z, *rest, **more))[1])
    for guidance in (0, 1, 3):
        task.sample(1, guidance=guidance, steps=1, **{option: values[0]})
    null, once, thrice = latents  # of a single step, which is linear in what the network gives
    assert float((once - null).abs().max()) > 0.01
    assert torch.allclose(thrice - null, 3 * (once - null), atol=1e-4)
    monkeypatch.setattr(
        task, "_null", lambda wishes: {key: 0 * value for key, value in task._told(wishes, 1, 0).items()}
    )
    assert torch.equal(sample(1), plain)


def test_an_unconditional_network_knows_no_guidance(tasks: Callable[..., DiffusionTask]) -> None:
    with pytest.raises(LowVRAMError, match="without a condition"):
        tasks("plain").sample(1, guidance=3)
    with pytest.raises(LowVRAMError, match="trained without prompts"):
        tasks("plain").sample(1, prompts=[FACE])
    with pytest.raises(LowVRAMError, match="trained without classes"):
        tasks("words").sample(1, classes=[1])
    with pytest.raises(LowVRAMError, match="truncation has no meaning"):
        tasks("plain").sample(1, truncation=1)


def test_classes_that_are_not_there_are_refused(tasks: Callable[..., DiffusionTask]) -> None:
    count = tasks("classes").dataset().num_classes
    for wrong in (count, -1):
        with pytest.raises(LowVRAMError, match=f"class {wrong} is not there"):
            tasks("classes").sample(1, classes=[wrong])


def test_words_that_no_caption_had_are_said_once(tasks: Callable[..., DiffusionTask]) -> None:
    task = tasks("words")
    said: list[str] = []
    task.say = said.append
    task.sample(1, prompts=[FACE])
    assert not said
    task.sample(1, prompts=["a person with a zeppelin", "a zeppelin and a xylophone"])
    assert len(said) == 1
    assert said[0].endswith("zeppelin, xylophone")
    task.sample(1, prompts=["a zeppelin"])
    assert len(said) == 1


def test_a_prompt_that_is_too_long_is_an_error(tasks: Callable[..., DiffusionTask]) -> None:
    with pytest.raises(LowVRAMError, match="has 40 words and punctuation marks, of which this model reads 32"):
        tasks("words").sample(1, prompts=["hair " * 40])


# Images to start from.


@pytest.fixture(scope="module")
def face(tasks: Callable[..., DiffusionTask]) -> Tensor:
    return tasks("plain").dataset()[7]


def test_strength_is_how_far_an_image_is_left_behind(tasks: Callable[..., DiffusionTask], face: Tensor) -> None:
    task = tasks("plain")
    decoded = task.codec.decode(
        task.codec.to_latents(task.codec.encode(face[None], torch.device("cpu"))), torch.device("cpu"), 1
    )
    changed = [mean(task.sample(4, init=face, strength=strength, steps=20), decoded) for strength in (0.05, 0.3, 0.7)]
    assert changed[0] < changed[1] < changed[2]
    assert changed[0] < 0.4 * changed[2]
    usual = task.sample(2, init=face)
    assert torch.equal(usual, task.sample(2, init=face, strength=0.6))
    assert mean(usual[0], usual[1]) > 1  # variations
    assert most(task.sample(2, init=face, micro_batch=1), usual) <= 1


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_outside_the_mask_no_pixel_changes(sampler: str, tasks: Callable[..., DiffusionTask], face: Tensor) -> None:
    task = tasks("plain")
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 5:19, 9:30] = 255  # off the latents' grid
    mask[:, 0, 0] = 127  # below half
    images = task.sample(3, init=face, mask=mask, sampler=sampler)
    stays = (mask < 128).expand(3, -1, -1)
    assert torch.equal(images[:, stays], face[stays].expand(3, -1))
    anew = images[:, ~stays].float()
    assert float((anew - face[~stays].float()).abs().mean()) > 2
    assert mean(images[0], images[1]) > 0.5
    assert torch.equal(task.sample(3, init=face, mask=mask > 127, sampler=sampler), images)
    gentle = task.sample(3, init=face, mask=mask, strength=0.3, sampler=sampler)
    assert torch.equal(gentle[:, stays], face[stays].expand(3, -1))
    assert not torch.equal(gentle, images)
    assert torch.equal(task.sample(1, init=face, mask=torch.zeros_like(mask)), face[None])


def test_what_is_made_anew_fits_what_stays(tasks: Callable[..., DiffusionTask], face: Tensor) -> None:
    """The network is shown the known part: another surrounding gives another middle."""
    task = tasks("plain")
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 12:20, 12:20] = 255
    one, other = (task.sample(1, init=image, mask=mask, steps=8) for image in (face, 255 - face))
    inside = (mask > 127)[None].expand(1, 3, -1, -1)
    assert float((one[inside].float() - other[inside].float()).abs().mean()) > 1


def test_images_and_masks_that_do_not_fit_are_refused(tasks: Callable[..., DiffusionTask], face: Tensor) -> None:
    task = tasks("plain")
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)

    def refused(message: str, **options: object) -> None:
        with pytest.raises(LowVRAMError, match=message):
            task.sample(1, **options)

    refused(r"mask is \[32, 24\] and the image \[32, 32\]", init=face, mask=mask[:, :, :24])
    refused("without an image", mask=mask)
    refused("without an image", strength=0.5)
    refused(r"uint8 \[3, 30, 32\]", init=face[:, :30])
    refused(r"uint8 \[1, 32, 32\]", init=face[:1])
    refused(r"float32 \[3, 32, 32\]", init=face.float())
    refused("strength=0 ", init=face, strength=0)
    refused("strength=1.5", init=face, strength=1.5)
    assert task.sample(1, init=face[:, :24], strength=0.5).shape == (1, 3, 24, 32)  # another shape than in training


# Walks.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("classes", {"classes": [1]}),
        ("classes", {"classes": [0, 3]}),
        ("words", {"prompts": [FACE, "a person with long hair"]}),
    ],
)
def test_a_walk_passes_its_keyframes_and_comes_back(
    name: str, options: dict[str, object], tasks: Callable[..., DiffusionTask]
) -> None:
    task = tasks(name)
    frames = torch.stack(list(task.interpolate(2, keyframes=2, frames_per_keyframe=6, **options)))
    assert frames.shape == (12, 3, 32, 32)
    ends = task.sample(2, seed=2, **(options or {}))
    assert most(frames[[0, 6]], ends) <= 1
    pace = [mean(frames[i], frames[(i + 1) % 12]) for i in range(12)]
    assert min(pace) > 0
    assert pace[-1] < 2 * max(pace[:-1])  # the last frame leads to the first
    assert mean(frames[0], frames[6]) > 1.5 * max(pace)


def test_walks_side_by_side(tasks: Callable[..., DiffusionTask]) -> None:
    task = tasks("plain")
    one, pair = (
        list(task.interpolate(2, keyframes=2, frames_per_keyframe=2, rows=1, cols=cols, micro_batch=cols))
        for cols in (1, 2)
    )
    assert [frame.shape for frame in pair] == [(3, 32, 64)] * 4
    assert max(most(a, b[:, :, :32]) for a, b in zip(one, pair, strict=True)) <= 1
    assert mean(pair[0][:, :, :32], pair[0][:, :, 32:]) > 1
    with pytest.raises(LowVRAMError, match="truncation_psi has no meaning"):
        task.interpolate(truncation_psi=1)
