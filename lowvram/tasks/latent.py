"""What tasks share that train a denoiser of an autoencoder's latents: the schedule, and sampling of all kinds."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded
from lowvram.ema import ExponentialMovingAverage, on_device
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import sample_latents
from lowvram.noise import Predict, Schedule
from lowvram.phase import MicroBatch, Phase
from lowvram.sampling.diffusion import LatentSampler
from lowvram.sampling.gan import sample_seeds
from lowvram.sampling.grids import make_grid
from lowvram.tasks import Task
from lowvram.tasks.codec import Codec
from lowvram.tasks.conditions import Classes, Condition
from lowvram.tasks.step_size import StepSizes

_GPU_SLICE = 8


CAPTIONS = "captions.txt"  # in the run's folder
_KEPT_CAPTIONS = 1000
LATENT_OPTIONS = ("sampler", "steps", "spacing", "eta", "size", "init", "strength", "mask")  # of sampling


class LatentTask(Task):
    """A denoiser, its schedule and condition, and the autoencoder of its latents.

    Attributes:
        condition: what the denoiser is told, of the kind `settings.condition` names: none, class or text.
        schedule, predict: the noise levels, and what the network predicts.
    """

    settings: Any  # with the groups latent, sampling, optimizer, ema and micro_batch.denoiser, and condition and sizes
    condition: Condition
    schedule: Schedule
    predict: Predict
    scale, shift = 1.0, 0.0  # of latents, known with the data
    in_training = False

    # Training.

    @abstractmethod
    def loss(self, micro: MicroBatch) -> Tensor:
        """The mean loss of a micro-batch of moments."""

    def train_with_adam(
        self,
        trained: tuple[nn.Module, ...],
        averages: Iterable[tuple[nn.Module, nn.Module]],
        frozen: tuple[nn.Module, ...] = (),
        lrs: Mapping[nn.Module, float] | None = None,
    ) -> None:
        """One phase, `denoiser`, of AdamW. averages: pairs of a trained network and what holds its average.

        lrs: step sizes of networks that have their own; these come last in `trained`.
        """
        self.in_training = True
        settings, adam, own = self.settings, self.settings.optimizer, lrs or {}
        shared = [p for network in trained if network not in own for p in network.parameters()]
        groups: list[dict[str, Any]] = [{"params": shared}]
        groups += [{"params": list(network.parameters()), "lr": lr} for network, lr in own.items()]
        optimizer = torch.optim.AdamW(
            groups,
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        )
        self.optimizers = {"denoiser": optimizer}
        self.step_sizes = StepSizes([optimizer], adam, kimg=settings.kimg, batch=settings.batch)
        self.phases = [
            Phase(
                name="denoiser",
                networks=trained,
                frozen=frozen,
                optimizer=optimizer,
                loss=self.loss,
                samples=settings.batch,
                micro_batch=settings.micro_batch.denoiser,
                clip_norm=adam.clip_norm,
            )
        ]
        ema = settings.ema
        self.averages = [
            ExponentialMovingAverage(source, target, half_life_kimg=ema.half_life_kimg, rampup=ema.rampup)
            for source, target in averages
        ]

    def drawn(self, moments: Tensor, seeds: Tensor) -> Tensor:
        """Latents from the autoencoder's distribution: moments [b, 2 C, h, w] on the device -> [b, C, h, w]."""
        channels = self.settings.latent.channels
        noise = seeded.randn(seeds, channels, *moments.shape[2:], stream="latent", device=self.device)
        return (sample_latents(moments, noise) - self.shift) * self.scale

    def end_step(self, step: int) -> None:
        self._step = step
        self.step_sizes.set(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(getattr(self, "_step", 0))}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.end_step(int(tensors["step"]))

    def kept_captions(self, captions: Iterable[str] | None) -> list[str]:
        """Some captions for samples without a prompt: of the data set, or those that the run's folder keeps."""
        if captions is not None:
            return list(islice((text for text in captions if text), _KEPT_CAPTIONS)) or [""]
        path = None if self.folder is None else self.folder / CAPTIONS
        if path is None or not path.is_file():
            return [""]
        return path.read_text(encoding="utf-8").splitlines() or [""]

    # Sampling.

    @property
    @abstractmethod
    def codec(self) -> Codec:
        """The autoencoder, on the host."""

    @abstractmethod
    def denoise(self, x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """What the network that is sampled predicts of x [n, C, h, w] at time [n], told its condition."""

    def texts(self) -> nn.Module | None:
        """The network that reads prompts for sampling, where it is one that was trained."""
        return None

    def reading(self) -> AbstractContextManager[None]:
        """What holds while prompts are read."""
        return nullcontext()

    def usual_prompts(self) -> list[str]:
        """What samples show where no prompt is given."""
        return [""]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Say what is to be said of the prompts of a user."""

    def sample(
        self,
        n: int,
        seed: int = 0,
        *,
        micro_batch: int | None = None,
        start: int = 0,
        init: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Images by the averaged denoiser.

        prompts, classes: in turn, image i has the i-th; none: captions of the data set, all classes. negative: what
        guidance leads away from, in place of no text. size: width and height in pixels; none: the recipe's square.
        sampler, steps, spacing, guidance, eta: see `LatentSampler`; none: as the recipe says. init: uint8 [3, H, W],
        to make variations of, by `strength` (0.6). mask: uint8 or bool [1, H, W] beside it, above half where the image
        is made anew.

        Raises:
            LowVRAMError: an option that is not known or does not fit the run, or shapes that don't fit one another.
        """
        wishes = Wishes.of(options)
        sampler = self._sampler(wishes, micro_batch)
        seeds = sample_seeds(n, seed, start)
        told = {"condition": self._told(wishes, n, start), "null": self._null(wishes)}
        shape = self._shape(wishes)
        if init is None:
            for name, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise LowVRAMError(f"{name} is given without an image to change.", "Give init as well.")
            z = sampler.from_noise(shape, seeds, **told)
            return self._decoded(z, sampler)
        if wishes.size is not None:
            raise LowVRAMError(
                f"size={wishes.size[0]}x{wishes.size[1]} beside an image to change, which has a size.",
                "Leave size out.",
            )
        return self._changed(init, mask, strength, sampler, seeds, told)

    def _changed(
        self,
        init: Tensor,
        mask: Tensor | None,
        strength: float | None,
        sampler: LatentSampler,
        seeds: Tensor,
        told: dict[str, Any],
    ) -> Tensor:
        grain = self.settings.latent.factor * self.settings.grain
        sides = init.shape[1:]
        if init.dim() != 3 or len(init) != 3 or init.dtype != torch.uint8 or any(not s or s % grain for s in sides):
            raise LowVRAMError(
                f"init is {str(init.dtype).removeprefix('torch.')} {list(init.shape)}, not uint8 [3, H, W] with sides "
                f"that are multiples of {grain}.",
                "Convert, crop or resize it.",
            )
        with torch.no_grad(), on_device(self.codec.autoencoder, self.device):
            moments = self.codec.encode(init[None], self.device)
            z = self.codec.to_latents(moments).cpu().expand(len(seeds), -1, -1, -1)
        if mask is None:
            z = sampler.from_images(z, seeds, strength=0.6 if strength is None else strength, **told)
            return self._decoded(z, sampler)
        if mask.shape != (1, *init.shape[1:]):
            raise LowVRAMError(
                f"the mask is {list(mask.shape[1:])} and the image {list(init.shape[1:])} (height, width).",
                "Give a mask of the size of the image.",
            )
        anew = mask.float() > (0.5 if mask.dtype == torch.bool else 127.5)  # [1, H, W]
        # A latent pixel is made anew where any of its pixels is: those that stay are put back below.
        in_latents = F.max_pool2d(anew[None].float(), self.settings.latent.factor)
        z = sampler.inpaint(z, in_latents, seeds, strength=1.0 if strength is None else strength, **told)
        return torch.where(anew, self._decoded(z, sampler), init)

    def _decoded(self, z: Tensor, sampler: LatentSampler) -> Tensor:
        """Images of latents; in a training large ones in tiles, which is what was planned."""
        return self.codec.decode(z, self.device, sampler.micro_batch, whole=not self.in_training)

    def interpolate(
        self,
        seed: int = 0,
        *,
        keyframes: int = 8,
        frames_per_keyframe: int = 30,
        **options: Any,
    ) -> Iterator[Tensor]:
        """Walks between the noise of keyframes, and between prompts or classes where several are given."""
        rows, cols = options.pop("rows", 1), options.pop("cols", 1)
        micro_batch = options.pop("micro_batch", None)
        wishes = Wishes.of(options)
        sampler = self._sampler(wishes, micro_batch)
        null, shape = self._null(wishes), self._shape(wishes)
        walks = []
        for walk in range(rows * cols):
            told = self._told(wishes, keyframes if len(wishes.given()) > 1 else 1, 0 if wishes.given() else walk)
            seeds = sample_seeds(keyframes, seed, walk * keyframes)
            walks.append(sampler.walk(shape, seeds, frames_per_keyframe=frames_per_keyframe, condition=told, null=null))

        def frames() -> Iterator[Tensor]:
            for latents in zip(*walks, strict=True):
                images = self._decoded(torch.stack(latents), sampler)
                yield make_grid(images, columns=cols)

        return frames()

    def _shape(self, wishes: "Wishes") -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        latent, grain = self.settings.latent, self.settings.latent.factor * self.settings.grain
        if wishes.size is None:
            return latent.channels, self.settings.latent_size, self.settings.latent_size
        width, height = wishes.size
        if width % grain or height % grain or min(width, height) < grain:
            raise LowVRAMError(
                f"size={width}x{height} is not made of multiples of {grain}.",
                f"Use {max(1, round(width / grain)) * grain}x{max(1, round(height / grain)) * grain}.",
            )
        return latent.channels, height // latent.factor, width // latent.factor

    def _sampler(self, wishes: "Wishes", micro_batch: int | None) -> LatentSampler:
        usual, guidance = self.settings.sampling, wishes.guidance
        if guidance is None:
            guidance = usual.guidance if self.condition.guidable else 1.0
        if guidance != 1 and not self.condition.guidable:
            raise LowVRAMError(
                f"guidance={guidance:g}: this network was trained without a condition.", "Leave guidance out."
            )

        def network(x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
            with self.sampling_precision():
                return self.denoise(x, time, told)

        return LatentSampler(
            network=network,
            schedule=self.schedule,
            predict=self.predict,
            steps=wishes.steps or usual.steps,
            method=cast(Any, wishes.sampler or usual.sampler),
            spacing=cast(Any, wishes.spacing or usual.spacing),
            guidance=guidance,
            eta=wishes.eta,
            micro_batch=micro_batch or self._slice(),
            device=self.device,
        )

    def _told(self, wishes: "Wishes", n: int, start: int) -> dict[str, Tensor]:
        """The condition of images start ... start + n - 1."""
        given = wishes.given()
        kind = self.settings.condition
        for name, values, of in (("prompts", wishes.prompts, "text"), ("classes", wishes.classes, "class")):
            if values is not None and kind != of:
                raise LowVRAMError(f"{name}={values}: this network was trained without {name}.", f"Leave {name} out.")
        if kind == "class" and not given:
            given = list(range(cast(Classes, self.condition).count))
        if kind == "text" and not given:
            given = self.usual_prompts()
        own = [given[i % len(given)] for i in range(start, start + n)] if given else []
        if wishes.prompts is not None:
            self.check_prompts(wishes.prompts)
        with self.reading():
            return self.condition.wanted(cast(Any, own), self.texts(), cut=not wishes.given())

    def _null(self, wishes: "Wishes") -> dict[str, Tensor]:
        with self.reading():
            return self.condition.null(self.texts(), wishes.negative)

    def sampling_precision(self) -> AbstractContextManager[Any]:
        """Autocast as the recipe's precision says, on a card."""
        if self.device.type != "cuda" or self.settings.precision == "fp32":
            return nullcontext()
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", dtype=wanted or (torch.bfloat16 if has_bf16 else torch.float16))

    def _slice(self) -> int:
        """Samples at a time, so that sampling stays below the memory of a training step."""
        micro = self.settings.micro_batch.denoiser
        return max(1, min(_GPU_SLICE if self.device.type == "cuda" else 64, (micro or self.settings.batch) // 2))


@dataclass(kw_only=True)
class Wishes:
    """Options of sampling; None: as the recipe says."""

    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    guidance: float | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    eta: float = 0.0

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Wishes":
        """Raises LowVRAMError for an option that is not known."""
        for name in options:
            if name not in cls.__dataclass_fields__:
                raise LowVRAMError(f"{name} has no meaning for a diffusion model.", "Leave it out.")
        return cls(**options)

    def given(self) -> list[Any]:
        """The prompts or classes that were named."""
        return list(self.prompts or self.classes or [])
