"""One set of coefficients for training and sampling: against diffusers' tables, the definitions, and each other."""

import pickle

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowvram.errors import LowVRAMError
from lowvram.noise import BETAS, PREDICTIONS, Predict, Schedule

DIFFUSERS_NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
COMBINATIONS = [
    (Schedule.discrete(), "eps"),
    (Schedule.discrete(), "v"),
    (Schedule.discrete(), "x0"),
    (Schedule.discrete(zero_terminal_snr=True), "v"),
    (Schedule.discrete(zero_terminal_snr=True), "x0"),
    (Schedule.flow(), "flow"),
    (Schedule.flow(shift=3.0), "flow"),
]


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("zero", [False, True])
def test_levels_are_those_of_diffusers(kind, zero):
    ours = Schedule.discrete(kind, zero_terminal_snr=zero)
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=DIFFUSERS_NAMES[kind], rescale_betas_zero_snr=zero
    )
    alpha_bars = 1 / (1 + ours.sigma_at(torch.arange(1000.0)).square())
    torch.testing.assert_close(alpha_bars, theirs.alphas_cumprod, atol=2e-6, rtol=0)


def test_zero_terminal_snr_ends_in_a_finite_level_and_leaves_the_first_alone():
    plain, zero = Schedule.discrete(), Schedule.discrete(zero_terminal_snr=True)
    assert zero.sigma_max == pytest.approx(4096, rel=1e-6)
    assert zero.sigma_min == pytest.approx(plain.sigma_min, rel=1e-6)
    assert plain.sigma_max == pytest.approx(14.6146, rel=1e-4)  # of Stable Diffusion, as published
    theirs = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    theirs.set_timesteps(10)
    assert float(theirs.sigmas[0]) == pytest.approx(zero.sigma_max, rel=1e-4)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in COMBINATIONS])
@given(time=st.floats(0.02, 999))
def test_time_and_level_are_inverse(schedule, time):
    times = torch.tensor([time])
    sigma = schedule.sigma_at(times)
    assert schedule.sigma_min * (1 - 1e-5) <= float(sigma) <= schedule.sigma_max * (1 + 1e-5)
    torch.testing.assert_close(schedule.time(sigma), times, atol=2e-3, rtol=1e-5)


def test_time_between_levels_follows_log_sigma_and_stops_at_the_ends():
    schedule = Schedule.discrete()
    pair = schedule.sigma_at(torch.tensor([400.0, 401.0]))
    torch.testing.assert_close(schedule.time(pair.log().mean().exp()[None]), torch.tensor([400.5]), atol=1e-3, rtol=0)
    outside = torch.tensor([1e-9, 1e9])
    assert schedule.time(outside).tolist() == [0, 999]
    assert Schedule.discrete(steps=500).time(outside).tolist() == [0, 998]  # 499 of 500, in 0..1000


def test_flow_times_are_a_thousand_t():
    schedule = Schedule.flow()
    torch.testing.assert_close(schedule.time(torch.tensor([1 / 3, 1.0, 9.0])), torch.tensor([250.0, 500.0, 900.0]))
    ends = schedule.sigma_at(torch.tensor([0.0, 1000.0]))
    assert bool(ends.isfinite().all()) and ends.tolist() == pytest.approx([schedule.sigma_min, 2**16 - 1])


def test_discrete_training_draws_each_level_alike():
    schedule = Schedule.discrete()
    u = (torch.arange(4000) + 0.5) / 4000
    index = schedule.time(schedule.draw(u)).round().long()
    assert torch.equal(index.bincount(minlength=1000), torch.full((1000,), 4))
    edges = schedule.draw(torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == pytest.approx([schedule.sigma_min, schedule.sigma_max])


def test_flow_training_draws_a_logit_normal_time_and_shifts_it():
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = Schedule.flow(mean=0.5, std=0.8).time(Schedule.flow(mean=0.5, std=0.8).draw(u)) / 1000
    logits = t.logit()
    assert float(logits.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(logits.std()) == pytest.approx(0.8, abs=2e-3)
    shifted = Schedule.flow(mean=0.5, std=0.8, shift=3.0)
    torch.testing.assert_close(shifted.time(shifted.draw(u)) / 1000, 3 * t / (1 + 2 * t), atol=1e-5, rtol=1e-5)
    assert bool(Schedule.flow(std=9).draw(torch.tensor([0.0, 1 - 2**-24])).isfinite().all())


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_a_network_that_predicts_the_target_denoises_exactly(schedule, predict):
    torch.manual_seed(0)
    x0, eps = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    sigma = schedule.draw(torch.rand(64)).double()
    s = schedule.scalings(sigma, predict)
    denoised = s.c_skip[:, None] * (x0 + sigma[:, None] * eps) + s.c_out[:, None] * schedule.target(
        x0, eps, sigma, predict
    )
    torch.testing.assert_close(denoised, x0, atol=1e-9, rtol=1e-9)
    assert torch.equal(s.time, schedule.time(sigma))


@pytest.mark.parametrize("predict", ["eps", "v", "x0"])
def test_discrete_inputs_and_targets_are_those_of_the_variance_preserving_process(predict):
    schedule = Schedule.discrete()
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.manual_seed(0)
    x0, eps, times = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 10, 500, 900, 999])
    sigma = schedule.sigma_at(times.float())
    s = schedule.scalings(sigma, predict)
    noised = s.c_in[:, None] * (x0 + sigma[:, None] * eps)
    torch.testing.assert_close(noised, theirs.add_noise(x0, eps, times), atol=1e-5, rtol=1e-5)
    wanted = {"eps": eps, "x0": x0, "v": theirs.get_velocity(x0, eps, times)}[predict]
    torch.testing.assert_close(schedule.target(x0, eps, sigma, predict), wanted, atol=1e-5, rtol=1e-5)


def test_flow_inputs_lie_on_the_straight_line():
    schedule, t = Schedule.flow(), torch.tensor([0.1, 0.5, 0.9])
    x0, eps = torch.randn(3, 4), torch.randn(3, 4)
    sigma = schedule.sigma_at(1000 * t)
    x_in = schedule.scalings(sigma, "flow").c_in[:, None] * (x0 + sigma[:, None] * eps)
    torch.testing.assert_close(x_in, (1 - t)[:, None] * x0 + t[:, None] * eps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(schedule.target(x0, eps, sigma, "flow"), eps - x0)


def test_min_snr_weighs_the_same_error_of_x0_alike_whatever_is_predicted():
    """min(SNR, gamma) on x0's error, which is sigma^2 of eps's and sigma^2 / (1 + sigma^2) of v's."""
    schedule, gamma = Schedule.discrete(), 5.0
    sigma = schedule.sigma_at(torch.tensor([0.0, 100.0, 300.0, 700.0, 999.0]))
    wanted = sigma.pow(-2).clamp(max=gamma)
    assert torch.equal(wanted == gamma, torch.tensor([True, True, False, False, False]))
    for predict in ("eps", "v", "x0"):
        per_x0_error = schedule.weight(sigma, predict, gamma) / schedule.scalings(sigma, predict).c_out.square()
        torch.testing.assert_close(per_x0_error, wanted)
        assert torch.equal(schedule.weight(sigma, predict), torch.ones(5))


@pytest.mark.parametrize("kind", ["uniform", "trailing"])
def test_times_to_sample_at_begin_at_the_last_level_and_fall(kind):
    for schedule in (Schedule.discrete(), Schedule.flow(), Schedule.flow(shift=3.0)):
        for steps in (1, 2, 7, 30, 999, 1000):
            times = schedule.times(steps, kind)
            assert times.shape == (steps,) and bool((times.diff() < 0).all())
            assert float(times[0]) == (1000 if schedule.predictions == ("flow",) else 999)
    assert torch.equal(Schedule.discrete().times(30, kind), Schedule.discrete().times(30, kind).round())
    assert Schedule.discrete().times(4, "trailing").tolist() == [999, 749, 499, 249]
    assert Schedule.discrete().times(4, "uniform").tolist() == [999, 666, 333, 0]


def test_what_does_not_go_together_is_refused():
    sigma, x = torch.ones(2), torch.ones(2, 3)
    zero = Schedule.discrete(zero_terminal_snr=True)
    for schedule, predict in ((zero, "eps"), (zero, "flow"), (Schedule.discrete(), "flow"), (Schedule.flow(), "v")):
        for call in (
            lambda s=schedule, p=predict: s.check(p),
            lambda s=schedule, p=predict: s.scalings(sigma, p),
            lambda s=schedule, p=predict: s.target(x, x, sigma, p),
            lambda s=schedule, p=predict: s.weight(sigma, p),
        ):
            with pytest.raises(LowVRAMError, match=f"predict='{predict}'"):
                call()
    bad: Predict = "score"  # type: ignore[assignment]
    with pytest.raises(LowVRAMError, match="score"):
        Schedule.discrete().check(bad)
    with pytest.raises(LowVRAMError, match="min_snr_gamma=5"):
        Schedule.flow().weight(sigma, "flow", 5.0)
    with pytest.raises(LowVRAMError, match="min_snr_gamma=0"):
        Schedule.discrete().weight(sigma, "v", 0.0)
    for make in (
        lambda: Schedule.discrete("quadratic"),  # type: ignore[arg-type]
        lambda: Schedule.discrete(steps=1),
        lambda: Schedule.discrete(beta_start=0.02, beta_end=0.01),
        lambda: Schedule.flow(std=0),
        lambda: Schedule.flow(shift=-1),
        lambda: Schedule.discrete().times(1001, "uniform"),
    ):
        with pytest.raises(LowVRAMError):
            make()


def test_a_schedule_is_a_value():
    assert Schedule.discrete() == Schedule.discrete() != Schedule.discrete("cosine")
    assert hash(Schedule.flow()) == hash(Schedule.flow())
    used = Schedule.discrete()
    used.time(torch.ones(1))
    assert used == Schedule.discrete() == pickle.loads(pickle.dumps(used))
    assert {p for s in (Schedule.discrete(), Schedule.flow()) for p in s.predictions} == set(PREDICTIONS)


@pytest.mark.parametrize(("schedule", "predict"), COMBINATIONS)
def test_coefficients_can_be_traced_without_numbers(schedule, predict):
    with FakeTensorMode():
        s = schedule.scalings(schedule.draw(torch.empty(3)), predict)
    assert isinstance(s.c_in, FakeTensor) and isinstance(s.time, FakeTensor)
    assert not isinstance(schedule.scalings(torch.ones(1), predict).time, FakeTensor)  # and nothing of it stays
    assert s.c_in.shape == s.c_skip.shape == s.c_out.shape == s.time.shape == (3,)
