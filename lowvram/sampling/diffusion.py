"""Latents of a diffusion or flow network: from noise, from an image, within a mask, and along walks.

The network is a function `network(x_in [B, C, h, w], time [B], condition) -> F [B, C, h, w]`; what its condition means
(classes, text) is its own affair. Latents are float32 [n, C, h, w]; what comes out is on the CPU. Image i depends on
its seed, its condition and the settings alone, up to floating-point reordering, whichever micro-batch it is made in.

Legend: B micro-batch, n samples, K keyframes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lowvram import seeded, standin
from lowvram.errors import LowVRAMError
from lowvram.noise import Predict, Schedule, per_sample
from lowvram.sampling.ode import Denoiser, Method, OnStep, Spacing, check_method, solve, spacing

Condition = Mapping[str, Tensor]  # what each sample is made of, {"context": [n, L, D], ...}; one row serves all samples
Network = Callable[[Tensor, Tensor, Condition], Tensor]
Given = TypeVar("Given")
Conditioned = Callable[[Tensor, Tensor, Given], Tensor]  # (x, sigma [B], condition) -> denoised


def denoiser(
    network: Callable[[Tensor, Tensor, Given], Tensor], schedule: Schedule, predict: Predict
) -> Conditioned[Given]:
    """The network as (x, sigma [B], condition) -> denoised [B, ...], preconditioned by the schedule (EDM, equation 7).

    Raises LowVRAMError where `predict` does not go with the schedule.
    """
    schedule.check(predict)

    def denoise(x: Tensor, sigma: Tensor, condition: Given) -> Tensor:
        s = schedule.scalings(sigma, predict)
        out = network(per_sample(s.c_in, x) * x, s.time, condition).to(x.dtype)
        return per_sample(s.c_skip, x) * x + per_sample(s.c_out, x) * out

    return denoise


def guided(denoise: Conditioned[Given], condition: Given, null: Given, scale: float) -> Denoiser:
    """Classifier-free guidance, null + scale (conditioned - null) (arXiv 2207.12598, equation 6 with w = scale - 1).

    Two calls one after the other, not one of twice the batch, so that the peak stays that of one; scale 1 is the
    conditioned call alone, 0 the null one.
    """

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        if scale == 0:
            return denoise(x, sigma, null)
        wanted = denoise(x, sigma, condition)
        if scale == 1:
            return wanted
        plain = denoise(x, sigma, null)
        return plain + scale * (wanted - plain)

    return model


def blended(first: Denoiser, second: Denoiser, share: Tensor) -> Denoiser:
    """A path between two conditions: (1 - share) first + share second, share [B] within 0..1.

    It follows the weighted geometric mean of the two distributions (composition as in arXiv 2206.01714), and so is
    continuous for any kind of condition, classes and captions of different lengths too. Costs both calls.
    """

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        start = first(x, sigma)
        return start + per_sample(share.to(x), x) * (second(x, sigma) - start)

    return model


def keeping(model: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """A denoiser that knows the answer outside the mask: there it returns `known`.

    A sampler that started from known + sigma noise then holds the noised original there at each level, and the original
    exactly at level 0 (the replacement of arXiv 2201.09865, equation 8, in terms of the denoised latent). mask: [B, 1,
    h, w], 1 where the image is made anew; values between blend.
    """

    def keep(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(mask > 0, mask * model(x, sigma) + (1 - mask) * known, known)

    return keep


def slerp(first: Tensor, second: Tensor, share: Tensor | float) -> Tensor:
    """The point `share` of the way along the great circle between two samples' noise (Shoemake 1985, section 3.3).

    first, second: [B, ...]; share: [B] or a number. Unlike a straight mix it keeps the norm that a normal vector of so
    many dimensions has. Directions closer than 0.03 degrees are mixed straight; so are opposite ones, which have no
    shortest arc.
    """
    a, b = first.flatten(1).double(), second.flatten(1).double()
    t = torch.as_tensor(share, dtype=torch.float64, device=a.device).expand(len(a))[:, None]
    cosine = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True)).clamp_min(1e-30)
    angle = cosine.clamp(-1, 1).acos()  # [B, 1]
    sine = angle.sin()
    straight = sine < 5e-4
    safe = torch.where(straight, torch.ones_like(sine), sine)
    of_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    of_b = torch.where(straight, t, (t * angle).sin() / safe)
    return (of_a * a + of_b * b).to(first.dtype).reshape(first.shape)


def start_noise(seeds: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Unit noise to start from, float32 [n, C, h, w] on the CPU: row i is of seeds[i] alone, on any machine.

    seeds: int64 [n] on the CPU (`sampling.gan.sample_seeds` makes them of one seed and the images' indices).
    """
    return seeded.randn(seeds, *shape, stream="sampler.start")


@dataclass(frozen=True, kw_only=True)
class LatentSampler:
    """How latents are sampled from a network.

    Args:
        network: F(c_in x [B, C, h, w] float32, time [B] within 0..1000, condition), of the input's shape.
        predict: what F means, "eps", "v", "x0" or "flow".
        steps, method, spacing: levels, solver and their placement (`sampling.ode`).
        guidance: scale of classifier-free guidance; 1: none, at half the time.
        eta: randomness of the method ddim, 0..1.
        micro_batch: samples at a time; it changes memory and time alone.
        device: where the network runs.
        on_step: called after each step of each micro-batch with the step's index and its denoised latents [B, C, h, w].

    Raises LowVRAMError for values that don't go together.
    """

    network: Network
    schedule: Schedule
    predict: Predict
    steps: int = 30
    method: Method = "dpmpp_2m"
    spacing: Spacing = "trailing"
    guidance: float = 1.0
    eta: float = 0.0
    micro_batch: int = 4
    device: torch.device | str = "cpu"
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        self.schedule.check(self.predict)
        if self.micro_batch < 1:
            raise LowVRAMError(f"micro_batch={self.micro_batch} makes no samples.", "Give 1 or more.")
        check_method(self.method, self.eta)
        spacing(self.schedule, self.steps, self.spacing)

    def from_noise(
        self,
        shape: tuple[int, int, int],
        seeds: Tensor,
        *,
        condition: Condition | None = None,
        null: Condition | None = None,
    ) -> Tensor:
        """One sample for each of the seeds (int64 [n] on the CPU), shape (C, h, w), from pure noise.

        condition: tensors of n rows, or of one that serves all; null: the same of "no condition", for guidance.
        """
        return self._all(start_noise(seeds, shape), seeds, condition, null)

    def from_images(
        self,
        init: Tensor,
        seeds: Tensor,
        *,
        strength: float = 0.6,
        condition: Condition | None = None,
        null: Condition | None = None,
    ) -> Tensor:
        """Variations of the latents `init` [n, C, h, w]: noised to where the last `strength` of the steps begins.

        SDEdit (arXiv 2108.01073, algorithm 1). strength: above 0, to 1, which starts from pure noise and keeps nothing.

        Raises LowVRAMError for another strength, or init and seeds of different n.
        """
        noise = start_noise(seeds, _shape_of(init, seeds))
        return self._all(noise, seeds, condition, null, init=init.float(), strength=strength)

    def inpaint(
        self,
        init: Tensor,
        mask: Tensor,
        seeds: Tensor,
        *,
        strength: float = 1.0,
        condition: Condition | None = None,
        null: Condition | None = None,
    ) -> Tensor:
        """Latents `init` [n, C, h, w] with what lies under the mask made anew, and exactly as they were elsewhere.

        mask: [n, 1, h, w] or [1, 1, h, w], 1 where the image is made anew, 0 where it stays, between for a soft edge.
        strength: below 1, what is made anew starts from the original, as in `from_images`.

        Raises LowVRAMError as `from_images`, and for a mask of another shape or outside 0..1.
        """
        noise = start_noise(seeds, _shape_of(init, seeds))
        if mask.shape[1:] != (1, *init.shape[2:]) or len(mask) not in (1, len(init)):
            raise LowVRAMError(
                f"a mask {list(mask.shape)} does not fit latents {list(init.shape)}.",
                f"Give {[len(init), 1, *init.shape[2:]]}: the mask in latent pixels.",
            )
        mask = mask.float()
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise LowVRAMError("the mask has values outside 0..1.", "1 is made anew, 0 stays.")
        mask = mask.expand(len(init), -1, -1, -1)
        return self._all(noise, seeds, condition, null, init=init.float(), strength=strength, mask=mask)

    def walk(
        self,
        shape: tuple[int, int, int],
        seeds: Tensor,
        *,
        frames_per_keyframe: int,
        condition: Condition | None = None,
        null: Condition | None = None,
    ) -> Iterator[Tensor]:
        """Frames of a walk through K keyframes that ends where it began: K frames_per_keyframe latents [C, h, w].

        Keyframe k starts from the noise of seeds[k], between them from its `slerp`; condition: K rows, between which
        it passes as `blended` does (twice the calls), or one row for the whole walk. Random methods draw the same
        noise for all frames.

        Raises LowVRAMError, at once, for frames_per_keyframe below 1 or rows that are neither K nor 1.
        """
        if frames_per_keyframe < 1:
            raise LowVRAMError(f"frames_per_keyframe={frames_per_keyframe} makes no walk.", "Give 1 or more.")
        count = len(seeds)
        self._check_condition(condition, null, count)
        keys = start_noise(seeds, shape)
        changes = any(len(rows) > 1 for rows in (condition or {}).values())

        def frames() -> Iterator[Tensor]:
            position = torch.arange(count * frames_per_keyframe, dtype=torch.float64) / frames_per_keyframe
            for p in position.split(self.micro_batch):
                here = p.long()
                after, share = (here + 1) % count, p - here
                noise = slerp(keys[here], keys[after], share)
                between = (after, share) if changes and bool(share.any()) else None
                own = seeds[:1].expand(len(p))
                done = self._some(noise, own, condition, null, rows=here, between=between)
                yield from done.clone()  # outside inference mode: tensors that autograd takes again

        return frames()

    def _all(
        self,
        noise: Tensor,
        seeds: Tensor,
        condition: Condition | None,
        null: Condition | None,
        *,
        init: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        self._check_condition(condition, null, len(seeds))
        if not 0 < strength <= 1:
            raise LowVRAMError(f"strength={strength} is not above 0 and at most 1.", "0.3 to 0.8 keep a likeness.")
        out = []
        for rows in torch.arange(len(seeds)).split(self.micro_batch):
            done = self._some(
                noise[rows],
                seeds[rows],
                condition,
                null,
                rows=rows,
                init=init if init is None else init[rows.to(init.device)],
                strength=strength,
                mask=mask if mask is None else mask[rows.to(mask.device)],
            )
            out.append(done)
        return torch.cat(out)

    @torch.inference_mode()
    def _some(
        self,
        noise: Tensor,
        seeds: Tensor,
        condition: Condition | None,
        null: Condition | None,
        *,
        rows: Tensor,
        between: tuple[Tensor, Tensor] | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch: noise [B, C, h, w]; rows int64 [B] of the condition; between: the rows and shares after."""
        pick = functools.partial(_pick, device=self.device)
        denoise = denoiser(self.network, self.schedule, self.predict)
        nothing = pick(null, rows)
        model = guided(denoise, pick(condition, rows), nothing, self.guidance)
        if between is not None:
            later = guided(denoise, pick(condition, between[0]), nothing, self.guidance)
            model = blended(model, later, between[1])
        with standin.real():
            sigmas = spacing(self.schedule, self.steps, self.spacing)
            levels = sigmas.tolist()[self.steps - max(1, round(self.steps * strength)) :]
        noise = noise.to(self.device)
        # The network's first input is unit noise, in the coordinates of its own process.
        x = noise / self.schedule.c_in(noise.new_tensor(levels[:1]))
        if init is not None:
            init = init.to(noise)
            noised = init + levels[0] * noise
            if strength < 1:
                x = noised
            if mask is not None:
                mask = mask.to(noise)
                x = torch.where(mask > 0, x, noised)
                model = keeping(model, init, mask)
        x = solve(self.method, model, x, levels, seeds=seeds, eta=self.eta, on_step=self.on_step)
        if not standin.active() and not bool(x.isfinite().all()):
            raise LowVRAMError(
                "the network gives NaN or infinity in place of latents.",
                "Sample in bf16 or fp32 where it ran in fp16, or from an earlier checkpoint.",
            )
        return x.cpu()

    def _check_condition(self, condition: Condition | None, null: Condition | None, count: int) -> None:
        if count < 1:
            raise LowVRAMError("there are no seeds, and so no samples.", "Give one seed for each sample.")
        if self.guidance != 1 and null is None:
            raise LowVRAMError(
                f"guidance={self.guidance} needs what the network takes for no condition.",
                "Give null, the empty caption or the null class; or set guidance=1.",
            )
        for name, rows in [*(condition or {}).items(), *(null or {}).items()]:
            if len(rows) not in (1, count):
                raise LowVRAMError(
                    f"the condition {name!r} has {len(rows)} rows for {count} seeds.", f"Give {count} rows, or 1."
                )


def _pick(condition: Condition | None, rows: Tensor, *, device: torch.device | str) -> Condition:
    """These rows of the condition, int64 [B], on the device."""

    def of(value: Tensor) -> Tensor:
        return value.expand(len(rows), *value.shape[1:]) if len(value) == 1 else value[rows.to(value.device)]

    return {name: of(value).to(device) for name, value in (condition or {}).items()}


def _shape_of(init: Tensor, seeds: Tensor) -> tuple[int, int, int]:
    if init.ndim != 4 or len(init) != len(seeds):
        raise LowVRAMError(
            f"latents {list(init.shape)} do not fit {len(seeds)} seeds.", "Give [n, C, h, w] and one seed for each."
        )
    channels, height, width = init.shape[1:]
    return channels, height, width
