"""The samplers against diffusers' schedulers step by step, and against exact solutions with each method's order."""

import itertools
import math
from collections.abc import Callable
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.noise import Schedule
from lowvram.sampling import ode
from lowvram.sampling.diffusion import denoiser
from lowvram.sampling.ode import spacing

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TIMESTEPS = {"karras": {"use_karras_sigmas": True, "timestep_spacing": "linspace"}} | {
    ours: {"timestep_spacing": theirs} for ours, theirs in {"uniform": "linspace", "trailing": "trailing"}.items()
}
SEEDS = torch.arange(3)


def network(x: Tensor, time: Tensor) -> Tensor:
    """A fixed nonlinear function of the input and the time."""
    mixed = torch.tanh(1.3 * x + 0.4 * x.roll(1, dims=-1)) + 0.3 * x.roll(1, dims=1)
    return mixed * (0.8 + 0.2 * torch.cos(time / 300)).reshape(-1, 1, 1, 1)


def start() -> Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))


def ours(
    method: str, schedule: Schedule, predict: str, kind: str, steps: int, *, rounded: bool = False, **kw
) -> Tensor:
    """Our sampler from unit noise; the result is a denoised latent, the same in everyone's coordinates."""

    def as_given(x: Tensor, time: Tensor, condition: None) -> Tensor:
        return network(x, time.round() if rounded else time)

    denoise = denoiser(as_given, schedule, predict)  # type: ignore[arg-type]
    sigmas = spacing(schedule, steps, kind)  # type: ignore[arg-type]
    x = start() / float(schedule.c_in(sigmas[:1]))
    return ode.solve(method, lambda x, s: denoise(x, s, None), x, sigmas, seeds=SEEDS, **kw)  # type: ignore[arg-type]


def theirs(scheduler, steps: int, x: Tensor, step: Callable[..., Tensor] | None = None, **kw) -> Tensor:
    """A diffusers scheduler's loop, as its pipelines run it."""
    scheduler.set_timesteps(steps, **kw)
    for i, t in enumerate(scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        out = network(scale(x, t), torch.as_tensor(t, dtype=torch.float32).reshape(1))
        x = scheduler.step(out, t, x)[0] if step is None else step(i, out, t, x)
    return x


def ve_start(scheduler, steps: int) -> Tensor:
    """Unit noise as the network sees it, in the coordinates of schedulers that hold x0 + sigma eps."""
    scheduler.set_timesteps(steps)
    return start() * float((scheduler.sigmas[0] ** 2 + 1) ** 0.5)


def close(a: Tensor, b: Tensor) -> None:
    assert float(b.std()) > 0.1
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["karras", "uniform", "trailing"])
@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("steps", [10, 28])
def test_euler_is_that_of_diffusers(kind, predict, steps):
    if kind == "uniform" and 999 % (steps - 1):
        pytest.skip("diffusers' levels then lie between those of training")
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=PREDICTION[predict], **TIMESTEPS[kind])
    x = ve_start(scheduler, steps)
    close(ours("euler", Schedule.discrete(), predict, kind, steps), theirs(scheduler, steps, x))
    torch.testing.assert_close(scheduler.sigmas, spacing(Schedule.discrete(), steps, kind), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["karras", "uniform", "trailing"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_heun_is_that_of_diffusers(kind, predict):
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=PREDICTION[predict], **TIMESTEPS[kind])
    x = ve_start(scheduler, 10)
    close(ours("heun", Schedule.discrete(), predict, kind, 10), theirs(scheduler, 10, x))


@pytest.mark.parametrize("kind", ["karras", "trailing"])
@pytest.mark.parametrize("predict", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [10, 25])
def test_dpmpp_2m_is_that_of_diffusers(kind, predict, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, prediction_type=PREDICTION[predict], final_sigmas_type="zero", **TIMESTEPS[kind]
    )
    rounded = kind == "karras"  # there this one scheduler tells the network whole times
    close(
        ours("dpmpp_2m", Schedule.discrete(), predict, kind, steps, rounded=rounded), theirs(scheduler, steps, start())
    )


# With zero terminal SNR eps is refused, and for eta 1 diffusers takes the root of a rounding below 0.
DDIM = [(predict, eta, False) for predict in ("eps", "v", "x0") for eta in (0.0, 0.4, 1.0)]
DDIM += [(predict, eta, True) for predict in ("v", "x0") for eta in (0.0, 0.4)]


@pytest.mark.parametrize(("predict", "eta", "zero"), DDIM)
def test_ddim_is_that_of_diffusers(predict, eta, zero):
    scheduler = diffusers.DDIMScheduler(
        **BETAS,
        prediction_type=PREDICTION[predict],
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero,
    )

    def step(i, out, t, x):
        return scheduler.step(out, t, x, eta=eta, variance_noise=ode.step_noise(SEEDS, x, i)).prev_sample

    schedule = Schedule.discrete(zero_terminal_snr=zero)
    result, reference = ours("ddim", schedule, predict, "trailing", 20, eta=eta), theirs(scheduler, 20, start(), step)
    if zero:  # infinite there, 4096 here: x0 / 4096 is left in the first x
        torch.testing.assert_close(result, reference, atol=2e-3, rtol=1e-3)
    else:
        close(result, reference)


@pytest.mark.parametrize("kind", ["uniform", "trailing"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_euler_ancestral_is_that_of_diffusers(kind, predict):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, prediction_type=PREDICTION[predict], **TIMESTEPS[kind]
    )
    x = ve_start(scheduler, 10)

    def step(i, out, t, x):
        noise = ode.step_noise(SEEDS, x, i)
        with mock.patch.object(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *a, **k: noise):
            return scheduler.step(out, t, x).prev_sample

    close(ours("euler_ancestral", Schedule.discrete(), predict, kind, 10), theirs(scheduler, 10, x, step))


def test_zero_terminal_snr_is_that_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    x = ve_start(scheduler, 20).double()  # at a sigma of 4096 its own steps cancel in float32
    reference = theirs(scheduler, 20, x).float()
    result = ours("euler", Schedule.discrete(zero_terminal_snr=True), "v", "trailing", 20)
    torch.testing.assert_close(result, reference, atol=2e-3, rtol=1e-3)


# Uniform steps with a shift are another thing in diffusers, which shifts the last level twice.
@pytest.mark.parametrize(("kind", "shift"), [("uniform", 1.0), ("trailing", 1.0), ("trailing", 3.0)])
def test_flow_is_that_of_diffusers(kind, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    given = {} if kind == "uniform" else {"sigmas": torch.linspace(1, 1 / 20, 20).tolist()}
    close(ours("euler", Schedule.flow(shift=shift), "flow", kind, 20), theirs(scheduler, 20, start(), **given))


# Exact solutions. Data N(MEAN, SPREAD^2): the path keeps (x - MEAN) / sqrt(SPREAD^2 + sigma^2). Data of two points, -1
# and 1 alike: the path keeps the quantile, as any monotone transport of one dimension does.
MEAN, SPREAD = 0.7, 0.5
HIGH, LOW = 10.0, 0.1


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    s2 = sigma.reshape(-1, 1).square()
    return (SPREAD**2 * x + s2 * MEAN) / (SPREAD**2 + s2)


def gaussian_path(x: Tensor, high: float, low: float) -> Tensor:
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + low**2) / (SPREAD**2 + high**2))


def two_points(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x / sigma.reshape(-1, 1).square())


def two_points_path(x: Tensor, high: float, low: float) -> Tensor:
    def quantile(x: Tensor, sigma: float) -> Tensor:
        return (torch.special.ndtr((x - 1) / sigma) + torch.special.ndtr((x + 1) / sigma)) / 2

    wanted = quantile(x, high)
    below, above = torch.full_like(x, -50), torch.full_like(x, 50)
    for _ in range(80):
        middle = (below + above) / 2
        less = quantile(middle, low) < wanted
        below, above = torch.where(less, middle, below), torch.where(less, above, middle)
    return middle


CASES = {"gaussian": (gaussian, gaussian_path), "two_points": (two_points, two_points_path)}


def ramp(steps: int) -> Tensor:
    """EDM's curve between two levels that are not 0, where all methods have their full order."""
    return torch.linspace(HIGH ** (1 / 7), LOW ** (1 / 7), steps + 1, dtype=torch.float64) ** 7


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("case", CASES)
def test_halving_the_steps_shows_the_order(method, order, case):
    model, path = CASES[case]
    x = HIGH * torch.linspace(-1.7, 1.5, 40, dtype=torch.float64)[:, None]
    exact = path(x, HIGH, LOW)
    errors = [float((ode.solve(method, model, x, ramp(steps)) - exact).abs().mean()) for steps in (64, 128, 256)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.15), errors
    assert errors[-1] < (2e-2 if order == 1 else 3e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(
    "schedule", [Schedule.discrete(zero_terminal_snr=True), Schedule.flow()], ids=["zero_snr", "flow"]
)
@pytest.mark.parametrize("kind", ["karras", "uniform", "trailing"])
def test_from_pure_noise_to_the_data_in_few_steps(method, schedule, kind):
    """From levels of thousands down to 0 in float32: the whole distribution, not far off and never lost in rounding."""
    noise = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000)[:, None]
    sigmas = spacing(schedule, 50, kind)
    x = noise / schedule.c_in(sigmas[:1])
    result = ode.solve(method, gaussian, x, sigmas)
    exact = gaussian_path(x, float(sigmas[0]), 0)
    assert float((result - exact).abs().mean()) < (0.03 if method == "euler" else 0.02)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.02)


@pytest.mark.parametrize("method", ["euler_ancestral", "ddim"])
def test_a_random_sampler_has_the_data_s_mean_and_variance(method):
    count = 50
    x = 40 * torch.randn(count, 320, generator=torch.Generator().manual_seed(0))
    sigmas = torch.cat([torch.linspace(40 ** (1 / 7), 0.01 ** (1 / 7), 120) ** 7, torch.zeros(1)])
    extra = {"eta": 0.7} if method == "ddim" else {}
    result = ode.solve(method, gaussian, x, sigmas, seeds=torch.arange(count), **extra)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(result.std()) == pytest.approx(SPREAD, rel=0.05)
    fixed = gaussian_path(x, 40, 0)
    assert float((result - fixed).abs().mean()) > 0.1  # not the deterministic path


def test_random_steps_belong_to_the_sample():
    x, sigmas = 10 * torch.ones(4, 3), torch.tensor([10.0, 3.0, 1.0, 0.0])
    seeds = torch.tensor([5, 6, 5, 7])
    whole = ode.euler_ancestral(gaussian, x, sigmas, seeds=seeds)
    assert torch.equal(whole[0], whole[2]) and not torch.equal(whole[0], whole[1])
    torch.testing.assert_close(ode.euler_ancestral(gaussian, x[2:], sigmas, seeds=seeds[2:]), whole[2:])
    assert not torch.equal(ode.step_noise(seeds, x, 0), ode.step_noise(seeds, x, 1))


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("ddim", 5), ("dpmpp_2m", 5), ("heun", 9)])
def test_calls_and_reports(method, calls):
    seen: list[float] = []
    reports: list[int] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,) and sigma.dtype == x.dtype
        seen.append(float(sigma[0]))
        return gaussian(x, sigma)

    def on_step(i: int, denoised: Tensor) -> None:
        assert denoised.shape == (2, 3)
        reports.append(i)

    sigmas = spacing(Schedule.discrete(), 5, "karras")
    ode.solve(method, model, torch.ones(2, 3), sigmas, on_step=on_step)
    assert len(seen) == calls and reports == [0, 1, 2, 3, 4]
    assert seen[0] == pytest.approx(Schedule.discrete().sigma_max) and min(seen) > 0


def test_karras_levels_span_the_schedule():
    sigmas = spacing(Schedule.discrete(), 10, "karras")
    assert float(sigmas[0]) == pytest.approx(14.6146, rel=1e-4) and float(sigmas[-2]) == pytest.approx(0.0292, rel=1e-2)
    torch.testing.assert_close((sigmas[:-1] ** (1 / 7)).diff().diff(), torch.zeros(8), atol=1e-5, rtol=0)
    pure = spacing(Schedule.discrete(zero_terminal_snr=True), 10, "karras")
    assert float(pure[0]) == pytest.approx(4096) and float(pure[1]) == pytest.approx(80)
    for kind in ode.SPACINGS:
        assert spacing(Schedule.flow(), 1, kind).tolist() == [2**16 - 1, 0]


def test_what_makes_no_sense_is_refused():
    x, sigmas = torch.ones(1, 1), torch.tensor([1.0, 0.0])
    for call in (
        lambda: spacing(Schedule.flow(), 0),
        lambda: spacing(Schedule.flow(), 5, "leading"),  # type: ignore[arg-type]
        lambda: spacing(Schedule.discrete(), 2000, "uniform"),
        lambda: ode.solve("plms", gaussian, x, sigmas),  # type: ignore[arg-type]
        lambda: ode.solve("heun", gaussian, x, sigmas, eta=0.5),
        lambda: ode.ddim(gaussian, x, sigmas, eta=1.5, seeds=torch.arange(1)),
        lambda: ode.ddim(gaussian, x, sigmas, eta=0.5),
        lambda: ode.euler_ancestral(gaussian, x, sigmas, seeds=None),
        lambda: ode.euler(gaussian, x, torch.tensor([1.0, 1.0, 0.0])),
        lambda: ode.euler(gaussian, x, torch.tensor([1.0])),
        lambda: ode.euler(gaussian, x, torch.tensor([1.0, -1.0])),
    ):
        with pytest.raises(LowVRAMError):
            call()
