"""Fine-tuning of published Stable Diffusion: all of its UNet, low-rank weights inside it, or a new word for it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowvram import standin
from lowvram.data import ImageSet
from lowvram.data.caption_templates import read_templates
from lowvram.data.caption_variants import TEMPLATED, variants_of
from lowvram.errors import LowVRAMError
from lowvram.noise import Predict
from lowvram.objectives.diffusion import diffusion_loss, pixel_weights
from lowvram.phase import MicroBatch
from lowvram.settings import Settings, StableDiffusionSettings
from lowvram.tasks import Place, codec, fine_tuned, instances, low_rank, published
from lowvram.tasks.codec import Codec
from lowvram.tasks.fine_tuned import FineTuned
from lowvram.tasks.latent import CAPTIONS, LATENT_OPTIONS, LatentTask, Wishes
from lowvram.tasks.pipeline_text import PipelineText

_TEMPLATES = "templates.txt"  # in the run's folder: the sentences that it was begun with


class StableDiffusionTask(LatentTask):
    """A UNet of published weights, with what is trained of it or in it (`tasks.fine_tuned`).

    Networks are made on the host, and stay there until a policy places them or `prepare_sampling` is called: the card
    may not hold them. Text encoders and autoencoder are on the device only while captions and images are encoded.
    """

    settings: StableDiffusionSettings
    condition: PipelineText

    def __init__(
        self,
        settings: StableDiffusionSettings,
        device: torch.device,
        folder: Path | None = None,
        *,
        pipeline: published.Source | None = None,
        tuned: FineTuned | None = None,
        untrained: bool = False,
    ) -> None:
        """pipeline, tuned: where they are made already. untrained: to sample from the weights as they are."""
        if settings.levels is None:  # a plan for weights that are not named
            settings = published.with_shape(settings)
        super().__init__(settings, device, folder)
        self.pipeline = published.source(settings) if pipeline is None else pipeline
        self.schedule = published.schedule(
            self.pipeline.config("scheduler"), zero_terminal_snr=bool(settings.loss.zero_terminal_snr)
        )
        self.predict = cast(Predict, settings.loss.predict)
        self.schedule.check(self.predict)
        if tuned is None:
            tuned = fine_tuned.make(settings, self.pipeline, device, folder, untrained=untrained)
        self.tuned, self.condition = tuned, tuned.condition
        self.networks = dict(self.tuned.trained)
        if settings.ema.enabled:
            self.tuned.average()
            self.networks |= self.tuned.averaged
        self.sampling_networks = tuple(self.tuned.averaged or self.tuned.trained)
        self.sample_options = (*LATENT_OPTIONS, "prompts", "negative", "guidance")

    @classmethod
    def with_shape_of_weights(cls, settings: Settings) -> Settings:
        assert isinstance(settings, StableDiffusionSettings)
        return published.with_shape(settings)

    def load_weights(self, path: Path) -> None:
        """They are loaded as the networks are made, for parts of them stay as they are."""

    @classmethod
    def prepare_data(
        cls,
        settings: Any,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
        place: Place | None = None,
    ) -> None:
        assert isinstance(settings, StableDiffusionSettings)
        if settings.templated:
            _templates(settings, folder)
        if settings.prior.prompt is not None:
            make = partial(cls, settings, device, folder, untrained=True)
            instances.make_class_images(settings, folder, make, say, place)
        path = codec.find(settings, folder)
        own = None if path is None else codec.load(path, settings)
        instances.open_all(settings, own or codec.of_pipeline(published.source(settings)), device, folder, say)

    def prepare_training(self) -> None:
        trained = self.tuned.trained
        for network in trained.values():
            network.requires_grad_(False)
        averages = [(trained[name.removesuffix("_ema")], target) for name, target in self.tuned.averaged.items()]
        text_lr = self.settings.text.lr
        lrs = {n: text_lr for name, n in trained.items() if text_lr is not None and name in self.tuned.text_networks}
        self.train_with_adam(tuple(trained.values()), averages, self.tuned.frozen, lrs)
        if self.folder is not None and not standin.active():
            self._take_in_data()

    def _take_in_data(self) -> None:
        self.scale, self.shift = self.codec.autoencoder.scaling_factor, self.codec.autoencoder.shift_factor
        self._check_captions()
        if self.settings.templated:
            templates = _templates(self.settings, self.folder)
            self.condition.options = replace(self.condition.options, templates=templates)
        self.condition.read(self.instances.captions, self.say, own=self.instances.own)
        if self.instances.size_ids is not None:
            self.condition.take_sizes(self.instances.size_ids, labelled=self.instances.labelled)
        if self.tuned.reader is None:  # read now what grids are sampled with: no encoder comes to a card that is full
            prompts = self.usual_prompts()[: self.settings.grid]
            self.condition.wanted(prompts, None, cut=True)
            self.condition.null(None, self.settings.sampling.negative)

    def _check_captions(self) -> None:
        """Textual inversion learns from captions with its word alone."""
        if self.settings.train != "textual_inversion":
            return
        token, captions = self.settings.embedding.token, self.instances.captions
        said = self.settings.text
        with_it = sum(
            caption == TEMPLATED or token in f"{said.prefix} {caption} {said.suffix}" for caption in captions if caption
        )
        if not with_it:
            raise LowVRAMError(
                f"none of the {len(captions)} captions has the word {token}, which is to be learned.",
                f"Write it into them, or let text.prefix or text.prompt name it: text.prompt='a photo of {token}'.",
            )
        if with_it < len(captions):
            self.say(f"{len(captions) - with_it:,} of {len(captions):,} captions lack {token}")

    def loss(self, micro: MicroBatch) -> Tensor:
        """The squared error of what the UNet predicts, on latents drawn from the autoencoder's distribution."""
        self.tuned.seed(micro.seeds)
        settings, channels = self.settings, self.settings.latent.channels
        moments = micro.images.to(self.device)  # [b, 2 C or, with a mask, 2 C + 1, h, w]
        x0 = self.drawn(moments[:, : 2 * channels], micro.seeds)
        told = self.condition.training(micro.labels, micro.seeds, self.tuned.text)
        mask = moments[:, 2 * channels :]
        losses = diffusion_loss(
            lambda x, time: self.tuned.unet(x, time, **told),
            x0,
            micro.seeds,
            schedule=self.schedule,
            predict=self.predict,
            min_snr_gamma=settings.loss.min_snr_gamma,
            offset_noise=settings.loss.offset_noise,
            weights=pixel_weights(mask, settings.loss.unmasked_weight) if mask.shape[1] else None,
            sample_weights=self._sample_weights(micro.labels),
        )
        return losses.mean()

    def _sample_weights(self, labels: Tensor) -> Tensor | None:
        if self.settings.prior.prompt is None or standin.active():
            return None
        of_class = self.instances.images_of(labels) >= self.instances.own
        return torch.where(of_class, self.settings.prior.weight, 1.0)

    # Data.

    @property
    def codec(self) -> Codec:
        """The autoencoder, on the host; in a plan a new one each time, whose memory is part of sampling's."""
        return codec.of_pipeline(self.pipeline) if standin.active() else self._codec

    @cached_property
    def _codec(self) -> Codec:
        path = codec.find(self.settings, self.folder)
        if path is None:
            return codec.of_pipeline(self.pipeline)
        found = codec.load(path, self.settings)
        if not found.scaled:
            found.measure(codec.latents(self.settings, found, self.device))
        return found

    @cached_property
    def instances(self) -> instances.Instances:
        """The images, as latents, and their captions."""
        return instances.open_all(self.settings, self.codec, self.device, self.folder, self.say)

    def items(self) -> ImageSet:
        return self.instances.items

    def example(self, n: int) -> Tensor:
        size, channels = self.settings.latent_size, 2 * self.settings.latent.channels
        channels += self.settings.data.masks is not None
        moments = torch.empty(n, channels, size, size, dtype=torch.float16, device=self.device)
        return moments if standin.active() else moments.normal_()

    def write_beside(self, folder: Path) -> None:
        low_rank.write_beside(self.settings, folder)
        if self.settings.templated and not (folder / _TEMPLATES).is_file():
            lines = _templates(self.settings, self.folder, word="{}")
            (folder / _TEMPLATES).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if self.settings.latent.path is not None:  # else that of the weights, which sampling needs anyway
            codec.write_beside(self.codec, folder)
        (folder / CAPTIONS).write_text("\n".join(self.usual_prompts()) + "\n", encoding="utf-8")

    # Sampling.

    def sample(self, n: int, seed: int = 0, **options: Any) -> Tensor:
        return super().sample(n, seed, **{"negative": self.settings.sampling.negative, **options})

    def _told(self, wishes: Wishes, n: int, start: int) -> dict[str, Tensor]:
        self._take_size(wishes)
        return super()._told(wishes, n, start)

    def _null(self, wishes: Wishes) -> dict[str, Tensor]:
        self._take_size(wishes)
        return super()._null(wishes)

    def _take_size(self, wishes: Wishes) -> None:
        """SDXL is told the size of what it makes."""
        width, height = wishes.size or (self.settings.resolution, self.settings.resolution)
        self.condition.size = (height, width)

    def prepare_sampling(self, place: Place | None = None) -> None:
        self.tuned.prepare_sampling(self.device, place)

    def denoise(self, x: Tensor, time: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        with self.tuned.sampling():
            out: Tensor = self.tuned.sampled(x, time, **told)
        return out

    def texts(self) -> nn.Module | None:
        return self.tuned.reader

    def reading(self) -> AbstractContextManager[None]:
        return self.tuned.sampling()

    def usual_prompts(self) -> list[str]:
        """The recipe's prompts, or else captions of the data set, which a run keeps some of."""
        if self.settings.sampling.prompts:
            return list(self.settings.sampling.prompts)
        if standin.active() or "instances" not in self.__dict__:
            return self.kept_captions(None)
        plain = replace(self.condition.options, shuffle=False, tag_dropout=0.0, variants=1)  # with prefix and suffix
        kinds = (variants_of(text, plain) for text in self.instances.captions if text)
        return self.kept_captions(found[number % len(found)] for number, found in enumerate(kinds))


def _templates(settings: StableDiffusionSettings, folder: Path | None, *, word: str | None = None) -> tuple[str, ...]:
    """Sentences with the new word: those that the run keeps, else as the settings say."""
    kept = None if folder is None else folder / _TEMPLATES
    name = str(kept) if kept is not None and kept.is_file() else settings.embedding.templates
    return read_templates(name, settings.embedding.token if word is None else word)


TASK = StableDiffusionTask
