"""Sampling of latents: guidance, starts, masks and walks, and that a sample depends on its seed and condition alone."""

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.noise import Predict, Schedule
from lowvram.objectives.diffusion import diffusion_loss
from lowvram.sampling.diffusion import LatentSampler, blended, denoiser, guided, keeping, slerp, start_noise
from lowvram.sampling.gan import sample_seeds
from lowvram.sampling.ode import METHODS

SHAPE = (2, 4, 6)
SPREAD = 0.3
COMBINATIONS = [
    (Schedule.discrete(), "eps"),
    (Schedule.discrete(zero_terminal_snr=True), "v"),
    (Schedule.flow(), "flow"),
]


class Gaussians:
    """The exact network for data N(center, SPREAD^2), the center by condition; it keeps what it was shown."""

    def __init__(self, schedule: Schedule, predict: Predict) -> None:
        self.schedule, self.predict = schedule, predict
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []

    def __call__(self, x_in: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        self.inputs.append(x_in.clone())
        self.times.append(time.clone())
        s = self.schedule.scalings(sigma := self.schedule.sigma_at(time), self.predict)
        center = condition.get("center", torch.zeros(1)).reshape(-1, 1, 1, 1)
        c_in, c_skip, c_out, s2 = (v.reshape(-1, 1, 1, 1) for v in (s.c_in, s.c_skip, s.c_out, sigma.square()))
        x = x_in / c_in
        denoised = (SPREAD**2 * x + s2 * center) / (SPREAD**2 + s2)
        return (denoised - c_skip * x) / c_out


def sampler(schedule: Schedule = COMBINATIONS[0][0], predict: Predict = "eps", **settings) -> LatentSampler:
    settings = {"steps": 12, "micro_batch": 3} | settings
    return LatentSampler(network=Gaussians(schedule, predict), schedule=schedule, predict=predict, **settings)


def shown(made_by: LatentSampler) -> Gaussians:
    assert isinstance(made_by.network, Gaussians)
    return made_by.network


def originals(n: int = 4) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(3)) * 0.5 + 1


def test_guidance_is_two_calls_that_never_double_the_batch():
    calls = []

    def denoise(x: Tensor, sigma: Tensor, condition: str) -> Tensor:
        calls.append((condition, len(x)))
        return x * {"wanted": 2.0, "none": 0.5}[condition]

    x, sigma = torch.ones(3, 2), torch.ones(3)
    for scale, value, made in (
        (7.5, 0.5 + 7.5 * 1.5, ["wanted", "none"]),
        (1.0, 2.0, ["wanted"]),
        (0.0, 0.5, ["none"]),
    ):
        calls.clear()
        assert torch.equal(guided(denoise, "wanted", "none", scale)(x, sigma), value * x)
        assert calls == [(name, 3) for name in made]


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_the_micro_batch(schedule, predict, method):
    seeds, center = sample_seeds(7, 11), torch.arange(7.0)
    condition, null = {"center": center}, {"center": torch.zeros(1)}
    eta = 0.5 if method == "ddim" else 0.0
    made = sampler(schedule, predict, method=method, guidance=1.5, eta=eta, micro_batch=7)
    whole = made.from_noise(SHAPE, seeds, condition=condition, null=null)
    assert whole.shape == (7, *SHAPE) and whole.dtype == torch.float32 and not whole.is_inference()
    parts = dataclasses.replace(made, micro_batch=2).from_noise(SHAPE, seeds, condition=condition, null=null)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    last = made.from_noise(SHAPE, sample_seeds(2, 11, start=5), condition={"center": center[5:]}, null=null)
    torch.testing.assert_close(last, whole[5:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made.from_noise(SHAPE, sample_seeds(7, 12), condition=condition, null=null), whole)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_samples_have_the_distribution_of_their_own_condition(schedule, predict):
    made = sampler(schedule, predict, steps=30, spacing="karras")
    result = made.from_noise((4, 16, 16), sample_seeds(4, 0), condition={"center": torch.tensor([-2.0, 0, 1, 3])})
    assert result.mean((1, 2, 3)).tolist() == pytest.approx([-2, 0, 1, 3], abs=0.1)
    assert result.std((1, 2, 3)).tolist() == pytest.approx([SPREAD] * 4, rel=0.15)
    first = shown(made).inputs[0]
    torch.testing.assert_close(first, start_noise(sample_seeds(3, 0), (4, 16, 16)))  # unit noise, whatever the schedule
    assert float(shown(made).times[0][0]) == pytest.approx(1000 if predict == "flow" else 999, abs=0.1)


def test_one_row_of_a_condition_serves_all():
    condition, each = {"center": torch.tensor([2.0])}, {"center": torch.full((5,), 2.0)}
    one = sampler().from_noise(SHAPE, sample_seeds(5, 0), condition=condition)
    assert torch.equal(one, sampler().from_noise(SHAPE, sample_seeds(5, 0), condition=each))
    assert float(one.mean()) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_strength_says_how_much_of_an_image_is_left(schedule, predict):
    init, seeds = originals(), sample_seeds(4, 0)
    distances = []
    for strength, steps in ((0.25, 3), (0.5, 6), (1.0, 12)):
        made = sampler(schedule, predict, method="euler", micro_batch=4)
        result = made.from_images(init, seeds, strength=strength)
        assert len(shown(made).inputs) == steps
        distances.append(float((result - init).abs().mean()))
        if strength < 1:  # the first input is the noised original
            sigma = schedule.sigma_at(shown(made).times[0])
            noised = init + sigma[0] * start_noise(seeds, SHAPE)
            first = shown(made).inputs[0] / float(schedule.c_in(sigma)[0])
            torch.testing.assert_close(first, noised, atol=1e-4, rtol=1e-3)
    assert distances[0] < distances[1] < distances[2]
    torch.testing.assert_close(
        result, sampler(schedule, predict, method="euler").from_noise(SHAPE, seeds), atol=1e-5, rtol=1e-5
    )
    assert result.shape == init.shape


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_leaves_the_known_exactly_as_it_was(schedule, predict, method, strength):
    init, seeds = originals(), sample_seeds(4, 0)
    mask = torch.zeros(4, 1, *SHAPE[1:])
    mask[:2, :, 1:3, 2:5] = 1
    mask[2:, :, :, :2] = 1
    made = sampler(schedule, predict, method=method, eta=0.7 if method == "ddim" else 0.0)
    result = made.inpaint(init, mask, seeds, strength=strength)
    known = (mask == 0).expand_as(init)
    assert torch.equal(result[known], init[known])
    assert float((result - init)[~known].abs().mean()) > 0.05
    whole = dataclasses.replace(made, micro_batch=4).inpaint(init, mask, seeds, strength=strength)
    torch.testing.assert_close(result, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
def test_the_network_sees_the_noised_original_outside_the_mask_at_each_step(method):
    schedule = Schedule.discrete()
    init, seeds = originals(), sample_seeds(4, 0)
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[..., 3:] = 1
    made = sampler(schedule, method=method, micro_batch=4)
    made.inpaint(init, mask, seeds)
    noise = start_noise(seeds, SHAPE)
    assert len(shown(made).inputs) >= 12
    for x_in, time in zip(shown(made).inputs, shown(made).times, strict=True):
        sigma = schedule.sigma_at(time).reshape(-1, 1, 1, 1)
        x = x_in * (1 + sigma.square()).sqrt()
        torch.testing.assert_close(x[..., :3], (init + sigma * noise)[..., :3], atol=1e-4, rtol=1e-4)


def test_the_ends_of_inpainting_are_the_image_and_a_free_sample():
    init, seeds = originals(), sample_seeds(4, 0)
    ones = torch.ones(1, 1, *SHAPE[1:])
    assert torch.equal(sampler().inpaint(init, 0 * ones, seeds), init)
    torch.testing.assert_close(sampler().inpaint(init, ones, seeds), sampler().from_noise(SHAPE, seeds))
    x = torch.full((1, 1, 1, 3), 5.0)  # a soft edge: between what is known and what is made
    keep = keeping(lambda x, sigma: x, torch.ones_like(x), torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3))
    assert keep(x, torch.ones(1)).flatten().tolist() == [1, 2, 5]


def test_slerp_keeps_the_norm_and_goes_evenly():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, *SHAPE, generator=generator)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)

    def angle(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(1).double(), y.flatten(1).double()
        return ((x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)).acos()

    third = slerp(a, b, torch.tensor([0.3, 0.3, 0.3]))
    torch.testing.assert_close(third.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    torch.testing.assert_close(angle(a, third), 0.3 * angle(a, b), atol=1e-5, rtol=1e-5)
    mixed = slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))  # each sample its own share
    torch.testing.assert_close(mixed[0], a[0])
    torch.testing.assert_close(mixed[2], b[2])
    assert torch.allclose(slerp(a, a, 0.4), a)
    assert bool(slerp(a, -a, 0.5).isfinite().all()) and bool(slerp(0 * a, b, 0.5).isfinite().all())


@pytest.mark.parametrize("method", ["dpmpp_2m", "euler_ancestral"])
def test_a_walk_passes_its_keyframes_and_closes(method):
    seeds, per = sample_seeds(3, 2), 8
    condition = {"center": torch.tensor([-1.0, 0.0, 2.0])}
    made = sampler(method=method, micro_batch=5, spacing="karras")
    each = list(made.walk(SHAPE, seeds, frames_per_keyframe=per, condition=condition))
    assert not any(frame.is_inference() for frame in each)
    frames = torch.stack(each)
    assert frames.shape == (24, *SHAPE)
    if method == "dpmpp_2m":
        alone = made.from_noise(SHAPE, seeds, condition=condition)
        torch.testing.assert_close(frames[::per], alone, atol=1e-4, rtol=1e-4)
    centers = frames.mean((1, 2, 3))
    assert centers[::per].tolist() == pytest.approx([-1, 0, 2], abs=0.15)
    assert float(centers[per + per // 2]) == pytest.approx(1, abs=0.3)  # half-way from 0 to 2
    moves = (frames.roll(-1, dims=0) - frames).abs().mean((1, 2, 3)).reshape(3, per)  # the last: to the first frame
    apart = (frames[::per].roll(-1, dims=0) - frames[::per]).abs().mean((1, 2, 3))
    assert bool((moves.amax(1) < 0.35 * apart).all()) and float(moves.min()) > 0
    other = torch.stack(
        list(dataclasses.replace(made, micro_batch=4).walk(SHAPE, seeds, frames_per_keyframe=per, condition=condition))
    )
    torch.testing.assert_close(other, frames, atol=1e-4, rtol=1e-4)


def test_a_walk_between_conditions_blends_what_each_denoises_to():
    schedule = Schedule.discrete()
    denoise = denoiser(Gaussians(schedule, "eps"), schedule, "eps")

    def at(center: float):
        return lambda x, sigma: denoise(x, sigma, {"center": torch.tensor([center])})

    x, sigma = torch.randn(3, *SHAPE), torch.tensor([0.5, 1.0, 2.0])
    result = blended(at(1.0), at(3.0), torch.tensor([0.0, 0.5, 1.0]))(x, sigma)
    wanted = torch.stack([at(1.0)(x, sigma)[0], at(2.0)(x, sigma)[1], at(3.0)(x, sigma)[2]])
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)

    calls = []
    for condition in (None, {"center": torch.tensor([1.0])}, {"center": torch.tensor([1.0, 1.0])}):
        made = sampler(micro_batch=8)
        list(made.walk(SHAPE, sample_seeds(2, 0), frames_per_keyframe=4, condition=condition))
        calls.append(len(shown(made).inputs))
    assert calls == [12, 12, 24]  # a second call only where the condition changes


def test_progress_is_told():
    told: list[int] = []
    made = sampler(steps=5, on_step=lambda i, denoised: told.append(i))
    made.from_noise(SHAPE, sample_seeds(4, 0))
    assert told == [0, 1, 2, 3, 4] * 2


def test_what_makes_no_sense_is_refused():
    init, seeds, mask = originals(), sample_seeds(4, 0), torch.ones(4, 1, *SHAPE[1:])
    made = sampler()
    for words, call in {
        "guidance=7.5": lambda: sampler(guidance=7.5).from_noise(SHAPE, seeds),
        "predict='flow'": lambda: sampler(predict="flow"),
        "micro_batch=0": lambda: sampler(micro_batch=0),
        "plms": lambda: sampler(method="plms"),
        "eta=0.5": lambda: sampler(eta=0.5),
        "0 steps": lambda: sampler(steps=0),
        "leading": lambda: sampler(spacing="leading"),
        "strength=0": lambda: made.from_images(init, seeds, strength=0),
        "strength=1.2": lambda: made.from_images(init, seeds, strength=1.2),
        "3 seeds": lambda: made.from_images(init, seeds[:3]),
        "a mask": lambda: made.inpaint(init, mask[:3], seeds),
        "outside 0..1": lambda: made.inpaint(init, 255 * mask, seeds),
        "2 rows for 4 seeds": lambda: made.from_noise(SHAPE, seeds, condition={"center": torch.ones(2)}),
        "no seeds": lambda: made.from_noise(SHAPE, seeds[:0]),
        "frames_per_keyframe=0": lambda: made.walk(SHAPE, seeds, frames_per_keyframe=0),
        "for 3 seeds": lambda: made.walk(SHAPE, seeds[:3], frames_per_keyframe=2, condition={"center": torch.ones(2)}),
        "NaN": lambda: dataclasses.replace(made, network=lambda x, t, c: x * math.nan).from_noise(SHAPE, seeds),
    }.items():
        with pytest.raises(LowVRAMError, match=words):
            call()


@pytest.mark.parametrize(("schedule", "predict"), [*COMBINATIONS, (Schedule.discrete("cosine"), "x0")])
def test_what_was_trained_is_what_is_sampled(schedule, predict):
    """The loss alone teaches a network what the sampler needs; of data N(0.7, 0.5^2), for which F is affine in x."""
    torch.manual_seed(0)
    knots = nn.Parameter(torch.zeros(2, 25))  # slope and offset at 25 times, linear between

    def network(x_in: Tensor, time: Tensor) -> Tensor:
        at = (time / 1000 * 24).clamp(0, 23.999)
        low = at.long()
        slope, offset = torch.lerp(knots[:, low], knots[:, low + 1], at - low)[:, :, None, None, None]
        return slope * x_in + offset

    optimizer = torch.optim.Adam([knots], lr=0.1)
    for step in range(150):
        seeds = torch.arange(16 * step, 16 * step + 16)
        x0 = 0.7 + 0.5 * torch.randn(16, 1, 24, 24)
        loss = diffusion_loss(network, x0, seeds, schedule=schedule, predict=predict).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        optimizer.step()
    made = LatentSampler(
        network=lambda x, time, condition: network(x, time), schedule=schedule, predict=predict, steps=40
    )
    result = made.from_noise((1, 24, 24), sample_seeds(4, 0))
    assert float(result.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(result.std()) == pytest.approx(0.5, abs=0.05)
