"""Samplers over any denoiser, in the variance-exploding coordinates of Karras et al. 2022 (EDM, arXiv 2206.00364).

A sampler takes `model(x [B, ...], sigma [B]) -> denoised [B, ...]` and follows the probability-flow equation
dx/dsigma = (x - denoised) / sigma (EDM, equation 1), or a stochastic one of the same marginals, along falling levels
`sigmas` [N + 1]. x starts at sigmas[0], as x0 + sigmas[0] eps; a last level of 0 gives the sample itself.

Steps are written as denoised + ratio (x - denoised), never as x plus a slope times a difference of levels: at levels
of 4096 and beyond (zero terminal SNR, flow) the latter would cancel to noise in float32, and a denoised value that does
not change between steps is reached exactly.

Legend: B batch, N steps; here and next stand for sigmas[i] and sigmas[i + 1].
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.noise import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], sigma [B]) -> denoised [B, ...]
Levels = Tensor | Sequence[float]  # noise levels, falling
OnStep = Callable[[int, Tensor], None]  # called with a finished step's index and its denoised [B, ...]
Method = Literal["euler", "heun", "dpmpp_2m", "ddim", "euler_ancestral"]
METHODS: tuple[Method, ...] = get_args(Method)
Spacing = Literal["karras", "uniform", "trailing"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
RHO = 7.0  # EDM, table 1
_KARRAS_RANGE = (0.002, 80.0)  # EDM, table 1
_PURE_NOISE = 1000.0


def spacing(schedule: Schedule, steps: int, kind: Spacing = "trailing") -> Tensor:
    """Levels to sample at, falling, the last 0: float32 [steps + 1] on the CPU.

    kind: "karras" makes sigma^(1/7) linear between the schedule's ends (EDM, equation 5); where those stand for pure
    noise or none (flow, zero terminal SNR) the curve spans EDM's 0.002 to 80 and follows one step from the schedule's
    last level, or most steps would go where there is nothing but noise. "uniform" and "trailing" are equal steps of
    time, with and without the least level (`Schedule.times`); trailing is what few steps need (arXiv 2305.08891,
    section 3.3).

    Raises LowVRAMError for steps below 1, an unknown kind, or more uniform or trailing steps than there are levels.
    """
    if steps < 1:
        raise LowVRAMError(f"{steps} steps make no sample.", "Take 1 or more; 20 to 50 are usual.")
    if kind not in SPACINGS:
        raise LowVRAMError(f"the spacing {kind!r} is not known.", f"Take one of {', '.join(SPACINGS)}.")
    levels = _karras(schedule, steps) if kind == "karras" else schedule.sigma_at(schedule.times(steps, kind))
    return torch.cat([levels, torch.zeros(1)])


def _karras(schedule: Schedule, steps: int) -> Tensor:
    low, high = max(schedule.sigma_min, _KARRAS_RANGE[0]), min(schedule.sigma_max, _KARRAS_RANGE[1])
    first = [schedule.sigma_max] if schedule.sigma_max > high else []
    ramp = torch.linspace(high ** (1 / RHO), low ** (1 / RHO), max(steps - len(first), 0), dtype=torch.float64) ** RHO
    return torch.cat([torch.tensor(first, dtype=torch.float64), ramp]).float()


def solve(
    method: Method,
    model: Denoiser,
    x: Tensor,
    sigmas: Levels,
    *,
    seeds: Tensor | None = None,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample by the method's name; `seeds` are for ddim with eta and euler_ancestral, `eta` for ddim.

    Raises LowVRAMError as `check_method`, and for a random method without seeds.
    """
    check_method(method, eta)
    match method:
        case "euler":
            return euler(model, x, sigmas, on_step=on_step)
        case "heun":
            return heun(model, x, sigmas, on_step=on_step)
        case "dpmpp_2m":
            return dpmpp_2m(model, x, sigmas, on_step=on_step)
        case "euler_ancestral":
            return euler_ancestral(model, x, sigmas, seeds=seeds, on_step=on_step)
        case "ddim":
            return ddim(model, x, sigmas, eta=eta, seeds=seeds, on_step=on_step)


def check_method(method: str, eta: float = 0.0) -> None:
    """Raise LowVRAMError for an unknown method, an eta outside 0..1, or one that the method does not use."""
    if method not in METHODS:
        raise LowVRAMError(f"the sampler {method!r} is not known.", f"Take one of {', '.join(METHODS)}.")
    if eta and method != "ddim":
        raise LowVRAMError(f"eta={eta} has no meaning for the sampler {method}.", "Take ddim, or leave eta out.")
    if not 0 <= eta <= 1:
        raise LowVRAMError(f"eta={eta} is not within 0..1.", "Take 0 (deterministic) to 1 (as DDPM).")


def euler(model: Denoiser, x: Tensor, sigmas: Levels, *, on_step: OnStep | None = None) -> Tensor:
    """Euler's method, order 1, one call a step: EDM, algorithm 1 without its second-order correction.

    The same as DDIM with eta 0 (arXiv 2010.02502, equation 13), and as Euler steps of t on flow's straight paths.
    """
    for i, here, after in _pairs(sigmas):
        denoised = model(x, _level(x, here))
        x = _towards(denoised, x, after / here)
        _report(on_step, i, denoised)
    return x


def heun(model: Denoiser, x: Tensor, sigmas: Levels, *, on_step: OnStep | None = None) -> Tensor:
    """Heun's method, order 2, two calls a step: EDM, algorithm 1 (with S_churn 0).

    A step to 0 is Euler's, as there. So is one from pure noise (sigma beyond 1000: zero terminal SNR, flow): the
    correction weighs the second call by here / (2 next), hundreds of times too much where the denoised image leaves
    the data's mean as 1 / sigma.
    """
    for i, here, after in _pairs(sigmas):
        denoised = model(x, _level(x, here))
        x = _towards(denoised, x, after / here)
        if after > 0 and here < _PURE_NOISE:
            # (slope at here + slope at next) / 2 in place of the former, with the slopes' common part taken out.
            second = model(x, _level(x, after))
            x = x + (second - denoised) * ((here - after) / (2 * after))
            denoised = second
        _report(on_step, i, denoised)
    return x


def dpmpp_2m(model: Denoiser, x: Tensor, sigmas: Levels, *, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M), order 2, one call a step (arXiv 2211.01095, algorithm 2).

    The first step, and one to 0, are of order 1: there is no earlier value, or no finite step in log sigma.
    """
    before: Tensor | None = None
    h_before = 0.0
    for i, here, after in _pairs(sigmas):
        denoised = model(x, _level(x, here))
        h = math.log(here / after) if after > 0 else math.inf  # in lambda = -log sigma
        ahead = denoised
        if before is not None and after > 0:
            ahead = denoised + (denoised - before) * (h / (2 * h_before))
        x = _towards(ahead, x, after / here)
        before, h_before = denoised, h
        _report(on_step, i, denoised)
    return x


def ddim(
    model: Denoiser,
    x: Tensor,
    sigmas: Levels,
    *,
    eta: float = 0.0,
    seeds: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equations 12 and 16), order 1: eta 0 is deterministic, eta 1 is DDPM's ancestral step.

    seeds: int64 [B] on the CPU, of the fresh noise (`step_noise`); needed where eta is above 0.

    Raises LowVRAMError for an eta outside 0..1, or none of the seeds that it needs.
    """
    check_method("ddim", eta)
    if eta and seeds is None:
        raise LowVRAMError("a random sampler has no seeds to draw from.", "Give seeds, or take a deterministic one.")
    for i, here, after in _pairs(sigmas):
        denoised = model(x, _level(x, here))
        # Equation 16 divided by the root of alpha_bar, which leaves the levels of x = x0 + sigma eps.
        fresh = eta**2 * (1 - (after / here) ** 2)  # the new noise's share of the variance next^2, within 0..1
        x = _towards(denoised, x, after * math.sqrt(1 - fresh) / here)
        if fresh and after > 0 and seeds is not None:
            x = x + after * math.sqrt(fresh) * step_noise(seeds, x, i)
        _report(on_step, i, denoised)
    return x


def euler_ancestral(
    model: Denoiser, x: Tensor, sigmas: Levels, *, seeds: Tensor | None, on_step: OnStep | None = None
) -> Tensor:
    """Ancestral sampling with Euler steps (arXiv 2006.11239, algorithm 2, on any levels): DDIM with eta 1.

    Each step goes down to next^2 / here and adds noise back up to next.
    """
    return ddim(model, x, sigmas, eta=1.0, seeds=seeds, on_step=on_step)


def step_noise(seeds: Tensor, x: Tensor, step: int) -> Tensor:
    """The fresh noise of a step, shaped as x [B, ...]: of each sample's seed and the step's index alone.

    Drawn on the CPU wherever x is, so that a GPU makes the same images.
    """
    return seeded.randn(seeds, *x.shape[1:], stream=f"sampler.step.{step}").to(x)


def _pairs(sigmas: Levels) -> list[tuple[int, float, float]]:
    """(step, here, next) of each step.

    Raises LowVRAMError for levels that do not fall, or fewer than two.
    """
    levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
    pairs = [(i, here, after) for i, (here, after) in enumerate(itertools.pairwise(levels))]
    if not pairs or not all(here > after >= 0 for _, here, after in pairs):
        raise LowVRAMError(f"the noise levels {levels} do not fall step by step.", "Make them with `spacing`.")
    return pairs


def _level(x: Tensor, sigma: float) -> Tensor:
    return x.new_full((len(x),), sigma)


def _towards(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    return denoised + ratio * (x - denoised)


def _report(on_step: OnStep | None, step: int, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(step, denoised)
