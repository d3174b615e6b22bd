"""Latent diffusion (arXiv 2112.10752) as one phase: a denoiser of an autoencoder's latents, a UNet or a transformer."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lowvram import standin
from lowvram.data.bucketed import BucketedSet
from lowvram.data.captions import read_captions
from lowvram.data.latents import LatentSet
from lowvram.errors import LowVRAMError
from lowvram.models.dit import DiT
from lowvram.models.unet import UNet
from lowvram.noise import Betas, Predict, Schedule
from lowvram.objectives.diffusion import diffusion_loss
from lowvram.phase import MicroBatch
from lowvram.settings import AutoencoderSettings, DiffusionSettings
from lowvram.tasks import Place, codec, conditions, load_json, open_images
from lowvram.tasks.codec import Codec
from lowvram.tasks.latent import CAPTIONS, LATENT_OPTIONS, LatentTask

_CLASSES = "classes.json"  # in the run's folder: their names, so that it can be sampled from without the data


class DiffusionTask(LatentTask):
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
        self._said: set[str] = set()  # words that no caption has
        told = {"none": (), "class": ("classes", "guidance"), "text": ("prompts", "negative", "guidance")}
        self.sample_options = (*LATENT_OPTIONS, *told[settings.condition])

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
    def prepare_data(
        cls,
        settings: Any,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
        place: Place | None = None,
    ) -> None:
        path = codec.find(settings, folder)
        assert path is not None, "the autoencoder is trained before"
        named = settings.latent.path
        other = named is not None and codec.is_own(path, folder) and "latent.path" in settings.overrides
        say(f"latents by the autoencoder in {path}" + (f", the run's own: not {named}" if other else ""))
        images = codec.latents(settings, codec.load(path, settings), device).images
        if isinstance(images, BucketedSet):
            say(images.summary())

    def prepare_training(self) -> None:
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
        self.train_with_adam(trained, pairs)

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

    def loss(self, micro: MicroBatch) -> Tensor:
        """The squared error of what the network predicts, on latents drawn from the autoencoder's distribution."""
        x0 = self.drawn(micro.images.to(self.device), micro.seeds)
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
            (folder / CAPTIONS).write_text("\n".join(self.usual_prompts()) + "\n", encoding="utf-8")

    # Sampling.

    def denoise(self, x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.denoiser_ema(x, time, **told)
        return out

    def texts(self) -> nn.Module | None:
        return self.text_ema

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Say once which words no caption has, for an encoder that learned from those alone."""
        if self.text_ema is None:
            return
        unseen = [word for prompt in prompts for word in cast(Any, self.text_ema).unseen(prompt)]
        new = [word for word in dict.fromkeys(unseen) if word not in self._said]  # said once, not for each batch
        if new:
            self.say(f"no caption that this network learned from has {', '.join(new)}")
        self._said.update(new)

    def usual_prompts(self) -> list[str]:
        return self.kept_captions(getattr(self, "captions", None))

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


TASK = DiffusionTask
