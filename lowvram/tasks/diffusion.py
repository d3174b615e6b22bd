"""Latent diffusion (arXiv 2112.10752) as one phase: a denoiser of an autoencoder's latents, a UNet or a transformer."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded, standin
from lowvram.data.bucketed import BucketedSet
from lowvram.data.captions import read_captions
from lowvram.data.latents import LatentSet
from lowvram.ema import ExponentialMovingAverage, on_device
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import sample_latents
from lowvram.models.dit import DiT
from lowvram.models.unet import UNet
from lowvram.noise import Betas, Predict, Schedule
from lowvram.objectives.diffusion import diffusion_loss
from lowvram.phase import MicroBatch, Phase
from lowvram.sampling.diffusion import LatentSampler
from lowvram.sampling.gan import sample_seeds
from lowvram.sampling.grids import make_grid
from lowvram.settings import AutoencoderSettings, DiffusionSettings
from lowvram.tasks import Task, codec, conditions, load_json, open_images
from lowvram.tasks.codec import Codec
from lowvram.tasks.warmup import Warmup

_CAPTIONS = "captions.txt"  # in the run's folder: some of the data set's, for samples without a prompt
_KEPT_CAPTIONS = 1000
_CLASSES = "classes.json"  # in the run's folder: their names, so that it can be sampled from without the data
_GPU_SLICE = 8


class DiffusionTask(Task):
    """Networks `denoiser` and `denoiser_ema`; with text and no CLIP also `text` and `text_ema`."""

    settings: DiffusionSettings

    def __init__(self, settings: DiffusionSettings, device: torch.device, folder: Path | None = None) -> None:
        super().__init__(settings, device, folder)
        count = self._count_classes() if settings.condition == "class" else 0
        self.condition = conditions.make(settings, count, device)
        self.denoiser_ema = self._denoiser(count).eval().requires_grad_(False)
        self.networks = {"denoiser_ema": self.denoiser_ema}
        self.text_ema = self._text()
        if self.text_ema is not None:
            self.networks["text_ema"] = self.text_ema.eval().requires_grad_(False)
        self.sampling_networks = tuple(self.networks)
        loss = settings.loss
        if loss.schedule == "flow":
            self.schedule: Schedule = Schedule.flow(mean=loss.logit_mean, std=loss.logit_std, shift=loss.shift)
        else:
            self.schedule = Schedule.discrete(cast(Betas, loss.schedule), zero_terminal_snr=loss.zero_terminal_snr)
        self.predict = cast(Predict, loss.predict)
        self.schedule.check(loss.predict)
        self.scale, self.shift = 1.0, 0.0
        self._said: set[str] = set()  # words that no caption has
        told = {"none": (), "class": ("classes", "guidance"), "text": ("prompts", "guidance")}[settings.condition]
        self.sample_options = ("sampler", "steps", "spacing", "eta", "init", "strength", "mask", *told)

    @classmethod
    def earlier(cls, settings: Any, folder: Path | None) -> AutoencoderSettings | None:
        first = codec.to_train(settings, folder)
        if first is not None:  # what is wrong with this recipe should be known before days are spent on the other
            with torch.device("meta"):
                cls(settings, torch.device("meta"), folder)
            if settings.condition == "text":
                read_captions(open_images(settings), missing=settings.text.missing)
        return first

    @classmethod
    def prepare_data(cls, settings: Any, device: torch.device, folder: Path, say: Callable[[str], None]) -> None:
        path = codec.find(settings, folder)
        assert path is not None, "the autoencoder is trained before"
        named = settings.latent.path
        other = named is not None and codec.is_own(path, folder) and "latent.path" in settings.overrides
        say(f"latents by the autoencoder in {path}" + (f", the run's own: not {named}" if other else ""))
        images = codec.latents(settings, codec.load(path, settings), device).images
        if isinstance(images, BucketedSet):
            say(images.summary())

    def prepare_training(self) -> None:
        settings = self.settings
        self.denoiser = self._denoiser(getattr(self.condition, "count", 0)).requires_grad_(False)
        self.denoiser_ema.load_state_dict(self.denoiser.state_dict())
        self.text = self._text()
        self.networks["denoiser"] = self.denoiser
        trained: tuple[nn.Module, ...] = (self.denoiser,)
        pairs: list[tuple[nn.Module, nn.Module]] = [(self.denoiser, self.denoiser_ema)]
        if self.text is not None and self.text_ema is not None:
            self.networks["text"] = self.text.requires_grad_(False)
            trained = (*trained, self.text)
        if self.folder is not None and not standin.active():
            self._take_in_data()
        if self.text is not None and self.text_ema is not None:
            self.text_ema.load_state_dict(self.text.state_dict())
            pairs.append((self.text, self.text_ema))
        adam = settings.optimizer
        optimizer = torch.optim.AdamW(
            [p for network in trained for p in network.parameters()],
            lr=adam.lr,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        )
        self.optimizers = {"denoiser": optimizer}
        self.warmup = Warmup([optimizer], adam.warmup_kimg, settings.batch)
        self.phases = [
            Phase(
                name="denoiser",
                networks=trained,
                optimizer=optimizer,
                loss=self._loss,
                samples=settings.batch,
                micro_batch=settings.micro_batch.denoiser,
                clip_norm=adam.clip_norm,
            )
        ]
        ema = settings.ema
        self.averages = [
            ExponentialMovingAverage(source, target, half_life_kimg=ema.half_life_kimg, rampup=ema.rampup)
            for source, target in pairs
        ]

    def _take_in_data(self) -> None:
        self.scale, self.shift = self.codec.autoencoder.scaling_factor, self.codec.autoencoder.shift_factor
        if isinstance(self.condition, conditions.Classes) and self.condition.count != self.dataset().num_classes:
            raise LowVRAMError(
                f"{self.dataset().name} has {self.dataset().num_classes} classes, and the run was begun with "
                f"{self.condition.count}.",
                "Go on with the data set of then, or start a new run.",
            )
        if self.settings.condition != "text":
            return
        self.captions = read_captions(self.dataset(), missing=self.settings.text.missing)
        if isinstance(self.condition, conditions.Clip):
            self.condition.read(self.captions, self.say)
            return
        assert isinstance(self.condition, conditions.Words) and self.text is not None
        too_long = self.condition.read(self.captions, self.text)
        if too_long:
            self.say(f"{too_long:,} captions are longer than text.length={self.settings.text.length} and are cut")

    def _loss(self, micro: MicroBatch) -> Tensor:
        """The squared error of what the network predicts, on latents drawn from the autoencoder's distribution."""
        channels = self.settings.latent.channels
        noise = seeded.randn(micro.seeds, channels, *micro.images.shape[2:], stream="latent", device=self.device)
        x0 = (sample_latents(micro.images.to(self.device), noise) - self.shift) * self.scale
        told = self.condition.training(micro.labels, micro.seeds, self.text)
        loss = self.settings.loss
        losses = diffusion_loss(
            partial(self.denoiser, **told),
            x0,
            micro.seeds,
            schedule=self.schedule,
            predict=self.predict,
            min_snr_gamma=loss.min_snr_gamma,
            offset_noise=loss.offset_noise,
        )
        return losses.mean()

    def end_step(self, step: int) -> None:
        self._step = step
        self.warmup.set(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(getattr(self, "_step", 0))}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.end_step(int(tensors["step"]))

    # Data.

    @property
    def codec(self) -> Codec:
        """The run's autoencoder, on the host; in a plan a new one each time, whose memory is part of sampling's."""
        return codec.pretended(self.settings) if standin.active() else self._codec

    @cached_property
    def _codec(self) -> Codec:
        path = codec.find(self.settings, self.folder)
        if path is None:
            raise LowVRAMError(
                f"no run of {self.settings.latent.recipe} is done, whose autoencoder this recipe stands on.",
                f"python -m lowvram.train recipe={self.settings.latent.recipe}, or give latent.path.",
            )
        found = codec.load(path, self.settings)
        if not found.scaled:
            found.measure(codec.latents(self.settings, found, self.device))
        return found

    @cached_property
    def _latents(self) -> LatentSet:
        found = codec.latents(self.settings, self.codec, self.device)
        if self.settings.condition == "text":
            found.labels = np.arange(len(found))  # of each image's caption
        return found

    def items(self) -> LatentSet:
        return self._latents

    def example(self, n: int) -> Tensor:
        """As `Task.example`; with `data.buckets` the square, than which no bucket is larger."""
        size = self.settings.latent_size
        shape = (n, 2 * self.settings.latent.channels, size, size)
        moments = torch.empty(shape, dtype=torch.float16, device=self.device)
        return moments if standin.active() else moments.normal_()

    def _count_classes(self) -> int:
        """Those that the run was begun with, or else of the data set."""
        path = None if self.folder is None else self.folder / _CLASSES
        if path is None or not path.is_file():
            return self.dataset().num_classes
        names = load_json(path).get("names")
        if not isinstance(names, list) or not names:
            raise LowVRAMError(f"{path} names no classes.", "Restore it, or remove it where the data set is there.")
        return len(names)

    def write_beside(self, folder: Path) -> None:
        codec.write_beside(self.codec, folder)
        if self.settings.condition == "class":
            (folder / _CLASSES).write_text(json.dumps({"names": self.dataset().class_names}) + "\n", encoding="utf-8")
        if self.settings.condition == "text":
            (folder / _CAPTIONS).write_text("\n".join(self._kept_captions()) + "\n", encoding="utf-8")

    # Sampling.

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

        prompts, classes: in turn, image i has the i-th; none: captions of the data set, all classes. sampler, steps,
        spacing, guidance, eta: see `LatentSampler`; none: as the recipe says. init: uint8 [3, H, W], to make variations
        of, by `strength` (0.6). mask: uint8 or bool [1, H, W] beside it, above half where the image is made anew.

        Raises:
            LowVRAMError: an option that is not known or does not fit the run, or shapes that don't fit one another.
        """
        wishes = Wishes.of(options)
        sampler = self._sampler(wishes, micro_batch)
        seeds = sample_seeds(n, seed, start)
        told = {"condition": self._told(wishes, n, start), "null": self._null(wishes)}
        size = self.settings.latent_size
        if init is None:
            for name, value in (("mask", mask), ("strength", strength)):
                if value is not None:
                    raise LowVRAMError(f"{name} is given without an image to change.", "Give init as well.")
            z = sampler.from_noise((self.settings.latent.channels, size, size), seeds, **told)
            return self.codec.decode(z, self.device, sampler.micro_batch)
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
            return self.codec.decode(z, self.device, sampler.micro_batch)
        if mask.shape != (1, *init.shape[1:]):
            raise LowVRAMError(
                f"the mask is {list(mask.shape[1:])} and the image {list(init.shape[1:])} (height, width).",
                "Give a mask of the size of the image.",
            )
        anew = mask.float() > (0.5 if mask.dtype == torch.bool else 127.5)  # [1, H, W]
        # A latent pixel is made anew where any of its pixels is: those that stay are put back below.
        in_latents = F.max_pool2d(anew[None].float(), self.settings.latent.factor)
        z = sampler.inpaint(z, in_latents, seeds, strength=1.0 if strength is None else strength, **told)
        return torch.where(anew, self.codec.decode(z, self.device, sampler.micro_batch), init)

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
        null, size = self._null(wishes), self.settings.latent_size
        shape = (self.settings.latent.channels, size, size)
        walks = []
        for walk in range(rows * cols):
            told = self._told(wishes, keyframes if len(wishes.given()) > 1 else 1, 0 if wishes.given() else walk)
            seeds = sample_seeds(keyframes, seed, walk * keyframes)
            walks.append(sampler.walk(shape, seeds, frames_per_keyframe=frames_per_keyframe, condition=told, null=null))

        def frames() -> Iterator[Tensor]:
            for latents in zip(*walks, strict=True):
                images = self.codec.decode(torch.stack(latents), self.device, sampler.micro_batch)
                yield make_grid(images, columns=cols)

        return frames()

    def _sampler(self, wishes: "Wishes", micro_batch: int | None) -> LatentSampler:
        usual, guidance = self.settings.sampling, wishes.guidance
        if guidance is None:
            guidance = usual.guidance if self.condition.guidable else 1.0
        if guidance != 1 and not self.condition.guidable:
            raise LowVRAMError(
                f"guidance={guidance:g}: this network was trained without a condition.", "Leave guidance out."
            )

        def network(x: Tensor, time: Tensor, told: Any) -> Tensor:
            with self._precision():
                out: Tensor = self.denoiser_ema(x, time, **told)
            return out

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
            given = list(range(cast(conditions.Classes, self.condition).count))
        if kind == "text" and not given:
            given = self._kept_captions()
        own = [given[i % len(given)] for i in range(start, start + n)] if given else []
        if kind == "text" and wishes.prompts is not None and self.text_ema is not None:
            self._say_unseen(wishes.prompts)
        return self.condition.wanted(cast(Any, own), self.text_ema, cut=not wishes.given())

    def _null(self, wishes: "Wishes") -> dict[str, Tensor]:
        return self.condition.null(self.text_ema)

    def _say_unseen(self, prompts: Sequence[str]) -> None:
        unseen = [word for prompt in prompts for word in cast(Any, self.text_ema).unseen(prompt)]
        new = [word for word in dict.fromkeys(unseen) if word not in self._said]  # said once, not for each batch
        if new:
            self.say(f"no caption that this network learned from has {', '.join(new)}")
        self._said.update(new)

    def _kept_captions(self) -> list[str]:
        if hasattr(self, "captions"):
            return list(islice((text for text in self.captions if text), _KEPT_CAPTIONS)) or [""]
        path = None if self.folder is None else self.folder / _CAPTIONS
        if path is None or not path.is_file():
            return [""]
        return path.read_text(encoding="utf-8").splitlines() or [""]

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type != "cuda" or self.settings.precision == "fp32":
            return nullcontext()
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast("cuda", dtype=wanted or (torch.bfloat16 if has_bf16 else torch.float16))

    def _slice(self) -> int:
        """Samples at a time, so that sampling stays below the memory of a training step."""
        micro = self.settings.micro_batch.denoiser
        return max(1, min(_GPU_SLICE if self.device.type == "cuda" else 64, (micro or self.settings.batch) // 2))

    # Construction.

    def _denoiser(self, classes: int) -> nn.Module:
        settings, rows = self.settings, (classes + 1 if classes else None)
        context = None
        if isinstance(self.condition, conditions.Clip):
            context = self.condition.dim
        elif settings.condition == "text":
            context = settings.text.dim
        channels = settings.latent.channels
        if settings.network == "dit":
            shape = settings.dit
            network: nn.Module = DiT(
                in_channels=channels,
                patch=shape.patch,
                dim=shape.dim,
                depth=shape.depth,
                heads=shape.heads,
                num_classes=rows,
                context_dim=context,
            )
        else:
            network = self._unet(context, rows)
        return network.to(self.device)

    def _unet(self, context: int | None, rows: int | None) -> UNet:
        shape, latent = self.settings.unet, self.settings.latent
        attentive = "AttnDownBlock2D" if context is None else "CrossAttnDownBlock2D"
        down = [attentive if attention else "DownBlock2D" for attention in shape.attention]
        # Transformers are told how many heads they have, attention over pixels how wide each is.
        heads = [width // shape.head_channels for width in shape.channels]
        return UNet(
            in_channels=latent.channels,
            out_channels=latent.channels,
            block_out_channels=shape.channels,
            layers_per_block=shape.layers,
            down_block_types=down,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
            attention_head_dim=shape.head_channels if context is None else heads,
            cross_attention_dim=context,
            transformer_layers_per_block=shape.depth,
            use_linear_projection=True,
            num_class_embeds=rows,
            norm_num_groups=shape.norm_groups,
        )

    def _text(self) -> nn.Module | None:
        network = self.condition.network()
        return None if network is None else network.to(self.device)


@dataclass(kw_only=True)
class Wishes:
    """Options of sampling; None: as the recipe says."""

    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    guidance: float | None = None
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


TASK = DiffusionTask
