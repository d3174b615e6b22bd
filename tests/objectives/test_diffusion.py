"""The diffusion loss against its definition, and its independence of the micro-batch."""

import pytest
import torch
from torch import nn

from lowvram.errors import LowVRAMError
from lowvram.noise import Schedule
from lowvram.objectives.diffusion import diffusion_loss, pixel_weights

COMBINATIONS = [
    (Schedule.discrete(), "eps"),
    (Schedule.discrete("cosine"), "v"),
    (Schedule.discrete("linear"), "x0"),
    (Schedule.discrete(zero_terminal_snr=True), "v"),
    (Schedule.flow(), "flow"),
    (Schedule.flow(mean=-0.5, std=1.5, shift=2.0), "flow"),
]
SEEDS = torch.arange(100, 106)


def latents(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 4, 6, 10, generator=torch.Generator().manual_seed(0))


class Seen:
    """A network that answers with a constant and keeps what it was shown."""

    def __init__(self, answer: float = 0.3) -> None:
        self.answer = answer

    def __call__(self, x_in: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        self.x_in, self.time = x_in, time
        return torch.full_like(x_in, self.answer)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_the_loss_is_the_squared_error_of_what_is_predicted(schedule, predict):
    x0, network = latents(), Seen()
    loss = diffusion_loss(network, x0, SEEDS, schedule=schedule, predict=predict)
    assert loss.shape == (6,) and loss.dtype == torch.float32

    sigma = schedule.sigma_at(network.time).double()[:, None, None, None]
    scale = 1 / (1 + sigma) if predict == "flow" else 1 / (1 + sigma.square()).sqrt()  # the signal left in x_in
    eps = (network.x_in - scale * x0) / (scale * sigma)
    assert abs(float(eps.mean())) < 0.1 and float(eps.std()) == pytest.approx(1, abs=0.05)
    target = {"eps": eps, "x0": x0, "v": scale * (eps - sigma * x0), "flow": eps - x0}[predict]
    torch.testing.assert_close(loss, (0.3 - target).float().square().mean((1, 2, 3)), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_a_network_that_knows_the_answer_has_no_loss(schedule, predict):
    x0 = latents()

    def network(x_in, time):
        sigma = schedule.sigma_at(time)
        s = schedule.scalings(sigma, predict)
        x = x_in / s.c_in[:, None, None, None]
        return (x0 - s.c_skip[:, None, None, None] * x) / s.c_out[:, None, None, None]

    loss = diffusion_loss(network, x0, SEEDS, schedule=schedule, predict=predict)
    assert float(loss.max()) < 1e-3  # rounding, in the division by a small c_out
    # 0 is what it measures, not what it always returns:
    assert float(diffusion_loss(Seen(), x0, SEEDS, schedule=schedule, predict=predict).min()) > 0.05


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_losses_and_gradients_do_not_depend_on_the_micro_batch(schedule, predict):
    torch.manual_seed(0)
    conv, x0 = nn.Conv2d(4, 4, 3, padding=1), latents()

    def network(x_in, time):
        return conv(x_in) * (1 + time[:, None, None, None] / 1000)

    def run(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        conv.zero_grad()
        losses = torch.empty(6)
        for part in rows:
            loss = diffusion_loss(network, x0[part], SEEDS[part], schedule=schedule, predict=predict, offset_noise=0.1)
            (loss.sum() / 6).backward()
            losses[part] = loss.detach()
        assert conv.weight.grad is not None
        return losses, conv.weight.grad.clone()

    whole, gradient = run([[0, 1, 2, 3, 4, 5]])
    parts, summed = run([[4, 0], [5], [3, 1, 2]])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-5)
    assert len(set(whole.tolist())) == 6


def test_min_snr_weighs_the_loss():
    schedule, network = Schedule.discrete(), Seen()
    plain = diffusion_loss(network, latents(), SEEDS, schedule=schedule, predict="eps")
    snr = schedule.sigma_at(network.time).pow(-2)
    weighed = diffusion_loss(network, latents(), SEEDS, schedule=schedule, predict="eps", min_snr_gamma=1.0)
    torch.testing.assert_close(weighed, plain * snr.clamp(max=1.0) / snr)
    assert bool((weighed < 0.9 * plain).any())


def test_offset_noise_moves_whole_channels_and_belongs_to_the_target():
    schedule, seeds, x0 = Schedule.discrete(), torch.arange(200), torch.zeros(200, 4, 16, 16)
    network = Seen(0.0)
    loss = diffusion_loss(network, x0, seeds, schedule=schedule, predict="eps", offset_noise=0.5)
    s = schedule.scalings(schedule.sigma_at(network.time), "eps")
    eps = network.x_in / (s.c_in * -s.c_out)[:, None, None, None]
    assert float(eps.mean((2, 3)).std()) == pytest.approx((0.25 + 1 / 256) ** 0.5, rel=0.05)
    torch.testing.assert_close(loss, eps.square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    plain = diffusion_loss(network, x0, seeds, schedule=schedule, predict="eps")
    assert float(plain.mean()) == pytest.approx(1, abs=0.02) and float(loss.mean()) == pytest.approx(1.25, abs=0.05)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_narrow_latents_and_outputs_are_compared_in_float32(schedule, predict):
    x0 = latents().half()

    def narrow(x_in, time):
        assert x_in.dtype == time.dtype == torch.float32
        return (0.5 * x_in).half()

    loss = diffusion_loss(narrow, x0, SEEDS, schedule=schedule, predict=predict)
    wide = diffusion_loss(lambda x, t: narrow(x, t).float(), x0.float(), SEEDS, schedule=schedule, predict=predict)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide)


def test_what_cannot_be_compared_is_refused():
    x0 = latents()
    with pytest.raises(LowVRAMError, match=r"predicts \[6, 8, 6, 10\] for latents \[6, 4, 6, 10\]"):
        diffusion_loss(lambda x, t: x.repeat(1, 2, 1, 1), x0, SEEDS, schedule=Schedule.flow(), predict="flow")
    with pytest.raises(LowVRAMError, match="predict='eps'"):
        diffusion_loss(Seen(), x0, SEEDS, schedule=Schedule.discrete(zero_terminal_snr=True), predict="eps")
    with pytest.raises(LowVRAMError, match="min_snr_gamma"):
        diffusion_loss(Seen(), x0, SEEDS, schedule=Schedule.flow(), predict="flow", min_snr_gamma=5.0)


def test_weights_choose_which_pixels_count():
    x0, network = latents(), Seen()
    args = {"schedule": Schedule.discrete(), "predict": "eps"}
    plain = diffusion_loss(network, x0, SEEDS, **args)
    s = args["schedule"].scalings(args["schedule"].sigma_at(network.time), "eps")
    eps = (network.x_in - s.c_in[:, None, None, None] * x0) / (s.c_in * -s.c_out)[:, None, None, None]
    error = (0.3 - eps).square()
    masks = torch.zeros(6, 1, 6, 10)
    masks[:, :, 2:4, 5:9] = 1
    inside = diffusion_loss(network, x0, SEEDS, weights=masks, **args)
    torch.testing.assert_close(inside, error[:, :, 2:4, 5:9].mean((1, 2, 3)), rtol=2e-3, atol=1e-4)
    # The rest counts a quarter: 8 pixels of 1 and 52 of 1/4.
    outside = diffusion_loss(network, x0, SEEDS, weights=1 - masks, **args)
    mixed = diffusion_loss(network, x0, SEEDS, weights=pixel_weights(masks.half(), 0.25), **args)
    torch.testing.assert_close(mixed, (8 * inside + 13 * outside) / 21)
    assert not torch.allclose(inside, outside, rtol=1e-2)
    for even in (1.0, 0.01):
        weighed = diffusion_loss(network, x0, SEEDS, weights=torch.full_like(masks, even), **args)
        torch.testing.assert_close(weighed, plain)


def test_an_empty_mask_has_no_loss_and_no_gradient():
    conv = nn.Conv2d(4, 4, 1)
    masks = torch.ones(6, 1, 6, 10, dtype=torch.float16)
    masks[1] = 0
    loss = diffusion_loss(
        lambda x, t: conv(x), latents(), SEEDS, schedule=Schedule.flow(), predict="flow", weights=masks
    )
    assert loss.dtype == torch.float32 and loss[1] == 0 and bool((loss[[0, 2, 3, 4, 5]] > 0).all())
    loss[1].backward()
    assert conv.weight.grad is not None and not conv.weight.grad.any()


def test_sample_weights_multiply_the_losses():
    args = {"schedule": Schedule.flow(), "predict": "flow"}
    plain = diffusion_loss(Seen(), latents(), SEEDS, **args)
    factors = torch.tensor([0, 1, 0.5, 2, 1, 1])
    torch.testing.assert_close(
        diffusion_loss(Seen(), latents(), SEEDS, sample_weights=factors, **args), plain * factors
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("weights", (6, 4, 6, 10)), ("weights", (6, 1, 10, 6)), ("weights", (6,)), ("sample_weights", (1,))],
)
def test_weights_of_another_shape_are_refused(name, shape):
    with pytest.raises(LowVRAMError, match=name):
        diffusion_loss(Seen(), latents(), SEEDS, schedule=Schedule.flow(), predict="flow", **{name: torch.ones(shape)})
