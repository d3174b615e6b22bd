"""Noise levels and the coefficients that follow from them: one definition for training and for sampling.

Everything is written in the variance-exploding coordinates of Karras et al. 2022 (EDM, arXiv 2206.00364): a noised
latent is x = x0 + sigma eps, whatever the network was trained to see and to predict. Its input is c_in x, and
denoised = c_skip x + c_out F(c_in x, time) (EDM, equation 7).

Legend: B batch, T levels of a discrete schedule.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.errors import LowVRAMError

Predict = Literal["eps", "v", "x0", "flow"]
PREDICTIONS: tuple[Predict, ...] = get_args(Predict)
Betas = Literal["scaled_linear", "linear", "cosine"]
BETAS: tuple[Betas, ...] = get_args(Betas)
TIME_SCALE = 1000.0  # a network's time runs over 0..1000
_LEAST_ALPHA_BAR = 2.0**-24  # for zero terminal SNR: sigma 4096, at which fp32 arithmetic is still exact enough
_FLOW_SIGMA_MAX = 2.0**16 - 1  # t = 1 - 2**-16: as good as pure noise, and finite
_MAX_BETA = 0.999  # of the cosine schedule (arXiv 2102.09672, section 3.2)


@dataclass(frozen=True, kw_only=True)
class Scalings:
    """Preconditioning of B noise levels, each float32 [B]: F sees c_in x and `time`; denoised = c_skip x + c_out F."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    time: Tensor


class Schedule(ABC):
    """The noise levels of training, and how a network is told of them. Immutable, comparable, picklable.

    Made by `Schedule.discrete` or `Schedule.flow`. Methods take and return float32 tensors on the device of their
    argument.
    """

    @staticmethod
    def discrete(
        kind: Betas = "scaled_linear",
        steps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> DiscreteSchedule:
        """The variance-preserving levels of DDPM (arXiv 2006.11239): sigma^2 = (1 - alpha_bar) / alpha_bar.

        kind: beta goes linearly ("linear") or its root does ("scaled_linear", Stable Diffusion), from `beta_start` to
        `beta_end`; or alpha_bar follows a squared cosine ("cosine": arXiv 2102.09672, equation 17).
        zero_terminal_snr: move the levels so that the last is pure noise (arXiv 2305.08891, algorithm 1), here sigma
        4096; for networks that predict v or x0.

        Raises LowVRAMError for an unknown kind, fewer than 2 steps, or betas out of 0 < start <= end < 1.
        """
        if kind not in BETAS:
            raise LowVRAMError(f"the noise schedule {kind!r} is not known.", f"Take one of {', '.join(BETAS)}.")
        if steps < 2:
            raise LowVRAMError(f"a noise schedule of {steps} steps has no range.", "Give 2 or more; 1000 is usual.")
        if not 0 < beta_start <= beta_end < 1:
            raise LowVRAMError(
                f"beta_start={beta_start} and beta_end={beta_end} make no noise schedule.",
                "Give 0 < beta_start <= beta_end < 1, as 0.00085 and 0.012.",
            )
        alpha_bars = _alpha_bars(kind, steps, beta_start, beta_end)
        if zero_terminal_snr:
            alpha_bars = _zero_terminal_snr(alpha_bars)
        log_sigmas = tuple(0.5 * math.log((1 - a) / a) for a in alpha_bars)
        return DiscreteSchedule(log_sigmas=log_sigmas, zero_terminal_snr=zero_terminal_snr)

    @staticmethod
    def flow(mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> FlowSchedule:
        """The straight paths of rectified flow, x_t = (1 - t) x0 + t eps (arXiv 2209.03003), so sigma = t / (1 - t).

        Training draws t as the sigmoid of a normal number of `mean` and `std` (arXiv 2403.03206, section 3.1); `shift`
        moves training and sampling towards noise, t' = shift t / (1 + (shift - 1) t) (there equation 23).

        Raises LowVRAMError where std or shift is not above 0.
        """
        if not (std > 0 and shift > 0):
            raise LowVRAMError(f"flow with std={std} and shift={shift} has no levels.", "Give both above 0.")
        return FlowSchedule(mean=mean, std=std, shift=shift)

    @property
    @abstractmethod
    def predictions(self) -> tuple[Predict, ...]:
        """What a network under this schedule may predict."""

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """The least noise level of training."""

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """The greatest one; finite also where it stands for pure noise."""

    @abstractmethod
    def sigma_at(self, time: Tensor) -> Tensor:
        """Noise level at a network's time, [B] -> [B]; between discrete levels log sigma is linear in time."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told, [B] -> [B] within 0..1000: the inverse of `sigma_at`, clamped to its range."""

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """Noise levels to train on, [B] -> [B], from numbers u uniform in [0, 1); increasing in u."""

    @abstractmethod
    def c_in(self, sigma: Tensor) -> Tensor:
        """What scales x = x0 + sigma eps to the network's input, [B] -> [B]."""

    @abstractmethod
    def times(self, steps: int, kind: Literal["uniform", "trailing"]) -> Tensor:
        """Times to sample at, float32 [steps], falling, on the CPU (arXiv 2305.08891, table 2).

        "uniform" goes from the last level to the first ("linspace" there); "trailing" in equal steps from the last
        level towards 0, which is left out.
        """

    def check(self, predict: str) -> None:
        """Raise LowVRAMError where a network that predicts this can't be trained under the schedule."""
        if predict not in PREDICTIONS:
            raise LowVRAMError(f"predict={predict!r} is not known.", f"Take one of {', '.join(PREDICTIONS)}.")
        if predict not in self.predictions:
            fits = ", ".join(self.predictions)
            raise LowVRAMError(
                f"predict={predict!r} does not go with a {type(self).__name__}.",
                f"Predict {fits} with it, or take Schedule.{'flow' if predict == 'flow' else 'discrete'}.",
            )

    def scalings(self, sigma: Tensor, predict: Predict) -> Scalings:
        """Coefficients at the levels `sigma` [B] (float32, above 0), for a network that predicts `predict`.

        Raises LowVRAMError as `check`.
        """
        self.check(predict)
        c_in = self.c_in(sigma)
        if predict == "eps":  # x0 = x - sigma eps
            c_skip, c_out = torch.ones_like(sigma), -sigma
        elif predict == "x0":
            c_skip, c_out = torch.zeros_like(sigma), torch.ones_like(sigma)
        elif predict == "v":  # arXiv 2202.00512, appendix D: x0 = alpha x_vp - sigma_vp v, alpha = c_in
            c_skip, c_out = c_in * c_in, -sigma * c_in
        else:  # x0 = x_t - t u, t = sigma / (1 + sigma)
            c_skip, c_out = c_in, -sigma * c_in
        return Scalings(c_in=c_in, c_skip=c_skip, c_out=c_out, time=self.time(sigma))

    def target(self, x0: Tensor, eps: Tensor, sigma: Tensor, predict: Predict) -> Tensor:
        """What F should be for x = x0 + sigma eps: eps; v = alpha eps - sigma_vp x0; x0; or the flow eps - x0.

        x0, eps: [B, ...]; sigma: [B]. Raises LowVRAMError as `check`.
        """
        self.check(predict)
        if predict == "eps":
            return eps
        if predict == "x0":
            return x0
        if predict == "v":
            alpha = per_sample(self.c_in(sigma), x0)
            return alpha * eps - alpha * per_sample(sigma, x0) * x0
        return eps - x0

    def weight(self, sigma: Tensor, predict: Predict, min_snr_gamma: float | None = None) -> Tensor:
        """Weight of each sample's squared error, [B] -> [B]: 1, or Min-SNR-gamma (arXiv 2303.09556, section 3.4).

        With SNR = 1 / sigma^2: min(SNR, gamma) for x0, divided by SNR for eps and by SNR + 1 for v.

        Raises LowVRAMError as `check`, for Min-SNR with flow, and for a gamma not above 0.
        """
        self.check(predict)
        if min_snr_gamma is None:
            return torch.ones_like(sigma)
        if predict == "flow":
            raise LowVRAMError(
                f"min_snr_gamma={min_snr_gamma} is not defined for flow.",
                "Leave it out: the distribution of t (mean, std, shift) is what weighs the levels of flow.",
            )
        if not min_snr_gamma > 0:
            raise LowVRAMError(f"min_snr_gamma={min_snr_gamma} weighs nothing.", "Give it above 0; 5 is usual.")
        snr = sigma.square().reciprocal()
        clipped = snr.clamp(max=min_snr_gamma)
        if predict == "eps":
            return clipped / snr
        return clipped / (snr + 1) if predict == "v" else clipped


@dataclass(frozen=True, kw_only=True)
class DiscreteSchedule(Schedule):
    """T levels of a variance-preserving process; the network's time is the level's index, scaled to 0..1000."""

    log_sigmas: tuple[float, ...]  # rising
    zero_terminal_snr: bool = False

    @property
    def predictions(self) -> tuple[Predict, ...]:
        """As in Schedule: of pure noise, eps is the input itself and says nothing of x0 (2305.08891, section 3.2)."""
        return ("v", "x0") if self.zero_terminal_snr else ("eps", "v", "x0")

    @property
    def sigma_min(self) -> float:
        return math.exp(self.log_sigmas[0])

    @property
    def sigma_max(self) -> float:
        return math.exp(self.log_sigmas[-1])

    @property
    def _time_of_index(self) -> float:
        return TIME_SCALE / len(self.log_sigmas)  # 1 for the usual 1000 levels

    @functools.cached_property
    def _array(self) -> NDArray[np.float32]:
        return np.array(self.log_sigmas, dtype=np.float32)

    def _table(self, device: torch.device) -> Tensor:
        # Not a kept tensor, which would belong to one device and, made within a trace, to that trace: 4 kB are sent
        # each time, without waiting for the device.
        return torch.as_tensor(self._array).to(device, non_blocking=True)

    def sigma_at(self, time: Tensor) -> Tensor:
        table = self._table(time.device)
        index = (time.float() / self._time_of_index).clamp(0, len(table) - 1)
        low = index.floor().long().clamp(0, len(table) - 2)  # again, for whatever is not finite
        return torch.lerp(table[low], table[low + 1], index - low).exp()

    def time(self, sigma: Tensor) -> Tensor:
        table = self._table(sigma.device)
        wanted = sigma.float().log()
        low = (torch.searchsorted(table, wanted.contiguous()) - 1).clamp(0, len(table) - 2)
        share = (wanted - table[low]) / (table[low + 1] - table[low])
        return (low + share.clamp(0, 1)) * self._time_of_index

    def draw(self, u: Tensor) -> Tensor:
        table = self._table(u.device)
        return table[(u * len(table)).long().clamp(0, len(table) - 1)].exp()

    def c_in(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + 1).rsqrt()

    def times(self, steps: int, kind: Literal["uniform", "trailing"]) -> Tensor:
        """As in Schedule, rounded to levels that the network was trained on.

        Raises LowVRAMError for more steps than levels.
        """
        levels = len(self.log_sigmas)
        if steps > levels:
            raise LowVRAMError(
                f"{steps} {kind} steps are more than the {levels} noise levels of the schedule.",
                f"Take {levels} or fewer, or the spacing karras.",
            )
        if kind == "uniform":
            index = torch.linspace(levels - 1, 0, steps, dtype=torch.float64)
        else:
            index = levels - torch.arange(steps, dtype=torch.float64) * (levels / steps) - 1
        return (index.round() * self._time_of_index).float()


@dataclass(frozen=True, kw_only=True)
class FlowSchedule(Schedule):
    """Straight paths between data and noise; the network's time is 1000 t."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    @property
    def predictions(self) -> tuple[Predict, ...]:
        return ("flow",)

    @property
    def sigma_min(self) -> float:
        return 1 / _FLOW_SIGMA_MAX

    @property
    def sigma_max(self) -> float:
        return _FLOW_SIGMA_MAX

    def _clip(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def sigma_at(self, time: Tensor) -> Tensor:
        t = time.float() / TIME_SCALE
        return self._clip(t / (1 - t))

    def time(self, sigma: Tensor) -> Tensor:
        return TIME_SCALE * sigma / (1 + sigma)

    def draw(self, u: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)  # the inverse of the normal distribution; -inf at u = 0
        # sigma = t / (1 - t) is the exponential of t's logit, and the shift of t multiplies it.
        return self._clip(self.shift * (self.mean + self.std * normal).exp())

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def times(self, steps: int, kind: Literal["uniform", "trailing"]) -> Tensor:
        last = 1 / steps if kind == "trailing" else 1 / TIME_SCALE
        t = torch.linspace(1, last, steps, dtype=torch.float64)
        return (TIME_SCALE * self.shift * t / (1 + (self.shift - 1) * t)).float()


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient for each sample, [B] -> [B, 1, ...], to multiply x [B, ...] by."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def _alpha_bars(kind: Betas, steps: int, beta_start: float, beta_end: float) -> list[float]:
    """Products of 1 - beta up to each level, falling from about 1, in double precision."""
    if kind == "cosine":
        curve = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - after / before, _MAX_BETA) for before, after in itertools.pairwise(curve)]
    else:
        power = 2 if kind == "scaled_linear" else 1
        start, end = beta_start ** (1 / power), beta_end ** (1 / power)
        betas = [(start + (end - start) * i / (steps - 1)) ** power for i in range(steps)]
    return list(itertools.accumulate((1 - beta for beta in betas), lambda product, alpha: product * alpha))


def _zero_terminal_snr(alpha_bars: list[float]) -> list[float]:
    """Shift and scale the roots so that the first stays and the last is 0 (arXiv 2305.08891, algorithm 1)."""
    first, last = math.sqrt(alpha_bars[0]), math.sqrt(alpha_bars[-1])
    moved = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in alpha_bars]
    return [max(a, _LEAST_ALPHA_BAR) for a in moved]
