"""Signs of trouble in the training of a GAN, each with a remedy: collapse, a discriminator that has won, a standstill.

All are taken from what a step computes anyway. Images are looked at by their features: those of a frozen network where
the task has one, otherwise their own pixels, made small.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.phase import MicroBatch

HALF_LIFE_KIMG = 0.5  # of the statistics
SLOW_HALF_LIFE_KIMG = 5.0  # of the mean whose movement is looked at: over fewer images chance moves it as far
CHECK_KIMG = 1.0  # from one look at them to the next
WON = 0.98  # share of the discriminator's logits that are right, of real images and of those made
COLLAPSED = 0.1  # diversity of the images made: variance of their features by that of the real ones
FALLEN = 0.3  # or so much of the highest that it was
STILL = 0.05  # movement of the mean features over STILL_KIMG, by their distance from the real ones
FAR = 0.5  # that distance, by the real ones' standard deviation, above which standing still is wrong
PATIENCE_KIMG = 20.0  # a young generator is far, weak and monotonous: nothing is said before
STILL_KIMG = 20.0
AGAIN_KIMG = 50.0  # from one warning to the same one

_NAMES = ("real_mean", "real_square", "fake_mean", "fake_square")
_SIGNS = ("collapse", "won", "still")
_VALUES = ("diversity", "d_right", "feature_distance")


class Signs:
    """Follows the statistics of a discriminator's phase, and warns.

    Args:
        batch: images of a step, over all processes.
        say: shows the user a line.
        weaken, widen: how to weaken the discriminator and how to widen the generator, in words.
    """

    def __init__(
        self, batch: int, device: torch.device, say: Callable[[str], None], *, weaken: str, widen: str
    ) -> None:
        self._batch, self._device, self.say, self.weaken, self.widen = batch, device, say, weaken, widen
        self._moments: dict[str, Tensor] = {}  # [D] each, moving means
        self._right = torch.zeros(2, device=device)  # shares of logits that are right, of real images and made ones
        self._slow = torch.zeros([], device=device)  # [D] moving mean of the made images' features over a longer time
        self._weight = self._slow_weight = 0.0  # of all images so far in the moving means: towards 1
        self._seen = 0  # images
        self._highest = 0.0  # diversity
        self._still_from: Tensor | None = None  # mean features of STILL_KIMG ago
        self._still_seen = 0
        self._said: dict[str, int] = {}  # images seen when a warning was given
        self.values: dict[str, float] = {}

    def report(self, micro: MicroBatch, features: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
        """Within the phase, of real images and of made ones: features [b, D], shares [b] of logits that are right."""
        real, fake = (x.float() for x in features)
        micro.report(real_mean=real, real_square=real.square(), fake_mean=fake, fake_square=fake.square())
        micro.report(right=torch.stack(right, dim=1))

    def take(self, means: dict[str, Tensor]) -> None:
        """At the phase's end: the means over the batch of what was reported.

        All is made before anything changes, so that where memory runs out it can be called again.
        """
        new, slow = 1 - _kept(self._batch, HALF_LIFE_KIMG), 1 - _kept(self._batch, SLOW_HALF_LIFE_KIMG)
        was = self._moments or {name: torch.zeros_like(means[name]) for name in _NAMES}
        moments = {name: moment.lerp(means[name], new) for name, moment in was.items()}
        right = self._right.lerp(means["right"], new)
        mean = means["fake_mean"]
        self._slow = (self._slow if self._slow.dim() else torch.zeros_like(mean)).lerp(mean, slow)
        self._moments, self._right = moments, right
        self._weight += new * (1 - self._weight)
        self._slow_weight += slow * (1 - self._slow_weight)
        self._seen += self._batch

    def look(self) -> None:
        """After a step: now and then, work out the values and warn."""
        every = CHECK_KIMG * 1000
        if self._moments and (self._seen - self._batch) // every < self._seen // every:
            self._check()

    def _check(self) -> None:
        moments = {name: moment / self._weight for name, moment in self._moments.items()}
        spread = {
            which: float((moments[f"{which}_square"] - moments[f"{which}_mean"].square()).sum().clamp(min=0))
            for which in ("real", "fake")
        }
        right = float(self._right.min()) / self._weight
        diversity = spread["fake"] / max(spread["real"], 1e-12)
        distance = float((moments["fake_mean"] - moments["real_mean"]).norm())
        self.values = {
            "diversity": diversity,
            "d_right": right,
            "feature_distance": distance / max(spread["real"], 1e-12) ** 0.5,
        }
        self._highest = max(self._highest, min(diversity, 1.0))  # a young generator may be more diverse than the data
        still = self._is_still(self._slow / self._slow_weight, distance)
        if self._seen < PATIENCE_KIMG * 1000:
            return
        if diversity < max(COLLAPSED, FALLEN * self._highest):
            self._warn(
                "collapse",
                f"collapse? Images made differ {diversity:.0%} as much as real ones do (once {self._highest:.0%}). Go "
                "back to an earlier checkpoint, with a lower optimizer.lr or a larger batch; augment few images more",
            )
        if right > WON:
            self._warn(
                "won",
                f"the discriminator has won: it is right on {right:.1%}, so that the generator learns little. "
                f"{self.weaken}, or augment more",
            )
        elif still and self.values["feature_distance"] > FAR:
            self._warn(
                "still",
                f"standstill: over {STILL_KIMG:g} kimg the images made have hardly changed, far from real ones. "
                f"Raise optimizer.lr, {self.widen}, or stop here",
            )

    def _is_still(self, mean: Tensor, distance: float) -> bool:
        """Whether the slow mean of the features has hardly moved since STILL_KIMG ago."""
        if self._still_from is None:
            self._still_from, self._still_seen = mean, self._seen
        if self._seen - self._still_seen < STILL_KIMG * 1000:
            return False
        moved = float((mean - self._still_from).norm())
        self._still_from, self._still_seen = mean, self._seen
        return moved < STILL * distance

    def _warn(self, sign: str, message: str) -> None:
        if self._seen - self._said.get(sign, -(10**12)) >= AGAIN_KIMG * 1000:
            self._said[sign] = self._seen
            self.say(f"warning: {message}")

    def resident(self) -> list[Tensor]:
        """What is on the device between steps: the means too, once there are any."""
        return [self._right, self._slow, *self._moments.values()]

    # Checkpoints.

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint: a few rows of features."""
        if not self._moments:
            return {}
        still = self._still_from if self._still_from is not None else torch.zeros_like(self._moments["fake_mean"])
        said = [self._said.get(sign, -1) for sign in _SIGNS]
        values = [self.values.get(name, -1.0) for name in _VALUES]
        weights = [self._weight, self._slow_weight, self._highest]
        numbers = [*weights, self._seen, self._still_from is not None, self._still_seen, *said, *values]
        return {
            **{f"signs.{name}": moment for name, moment in self._moments.items()},
            "signs.right": self._right,
            "signs.slow": self._slow,
            "signs.still": still,
            "signs.numbers": torch.tensor(numbers, dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave; without it, as in runs from before there were signs, anew."""
        if "signs.numbers" not in tensors:
            return
        self._moments = {name: tensors[f"signs.{name}"].to(self._device) for name in _NAMES}
        self._right, self._slow = (tensors[f"signs.{name}"].to(self._device) for name in ("right", "slow"))
        numbers = tensors["signs.numbers"].tolist()
        self._weight, self._slow_weight, self._highest, seen, is_still, still_seen = numbers[:6]
        self._seen, self._still_seen = int(seen), int(still_seen)
        self._still_from = tensors["signs.still"].to(self._device) if is_still else None
        self._said = {sign: int(at) for sign, at in zip(_SIGNS, numbers[6:9], strict=True) if at >= 0}
        self.values = {n: value for n, value in zip(_VALUES, numbers[9:], strict=True) if value >= 0}


def _kept(images: int, half_life_kimg: float) -> float:
    """How much of a moving mean is left after so many images."""
    return float(0.5 ** (images / (half_life_kimg * 1000)))


def small_pixels(images: Tensor) -> Tensor:
    """Features where there is no network of features: images [B, C, H, W] shrunk to 8x8, [B, C * 64]."""
    return F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
