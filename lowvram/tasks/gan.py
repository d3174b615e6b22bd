"""What the tasks of generative adversarial networks share: what their losses are given, augmentation, and sampling.

A loss of a sample depends on the sample's own seed, so that it is the same in any micro-batch.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded, standin
from lowvram.models.augment import AugmentPipe, adapt
from lowvram.phase import MicroBatch
from lowvram.sampling import gan
from lowvram.settings.gan import GanSettings
from lowvram.tasks import Task
from lowvram.tasks.trouble import Signs

Pair = tuple[Tensor, Tensor]


class GanTask(Task):
    """Networks `G_ema`, from which images are drawn; and once there is training `G`, `D` and, at times, `augment`."""

    settings: GanSettings
    sampling_networks = ("G_ema",)
    optional_networks = ("augment",)
    own_precision = True
    sample_options: tuple[str, ...] = ("classes",)
    weaken = "Lower optimizer.lr_d"  # the remedies of `Signs`
    widen = "widen the generator (model.channel_base)"
    G: Any  # of the task's own kind, here and below
    D: Any

    def __init__(
        self,
        settings: GanSettings,
        device: torch.device,
        folder: Path | None = None,
        *,
        classes: int | None = None,
    ) -> None:
        """classes: that the networks know; None: those of the data set."""
        super().__init__(settings, device, folder)
        if classes is None:
            classes = self.dataset().num_classes if settings.data.labels else 0
        self.c_dim = classes
        self.G_ema = self._generator().to(device).eval().requires_grad_(False)
        self.networks: dict[str, nn.Module] = {"G_ema": self.G_ema}
        self.augment: AugmentPipe | None = None

    @abstractmethod
    def _generator(self) -> Any:
        """A new generator (see `sampling.gan.Generator`), on the host."""

    def _prepare_pair(self, make_discriminator: Callable[[], nn.Module]) -> None:
        """Make a generator to train, the discriminator, and what augments images for the latter."""
        self.G = self._generator().to(self.device).requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.D = make_discriminator().to(self.device).requires_grad_(False)
        self.augment = self._augment_pipe()
        self._real_sign = torch.zeros([], device=self.device)  # mean of sign(D(real)), summed over D steps
        self._real_sign_steps = 0
        self.networks |= {"G": self.G, "D": self.D}
        if self.augment is not None:
            self.networks["augment"] = self.augment
        self._lookup = self._label_lookup()
        words = {"weaken": self.weaken, "widen": self.widen}
        self.signs = Signs(self.settings.batch, self.device, lambda line: self.say(line), **words)

    # What the losses share.

    def _latents(self, seeds: Tensor, stream: str = "z") -> Tensor:
        """z, float32 [b, z_dim] on the device, of seeds [b]."""
        return seeded.randn(seeds, self.G.z_dim, stream=stream).to(self.device)

    def _reals(self, micro: MicroBatch) -> Tensor:
        """Images [b, C, H, W] in [-1, 1]."""
        return micro.images.to(torch.float32) / 127.5 - 1

    def _augmented(self, images: Tensor, micro: MicroBatch, which: Literal["fake", "real"] = "fake") -> Tensor:
        if self.augment is None:
            return images
        augmented: Tensor = self.augment(images, micro.seeds, stream=f"augment.{which}")
        return augmented

    def _onehot(self, labels: Tensor) -> Tensor | None:
        """Labels [b] as float [b, c_dim]; None without classes."""
        return F.one_hot(labels, self.c_dim).float().to(self.device) if self.c_dim else None

    def _random_labels(self, seeds: Tensor) -> Tensor | None:
        """Labels of randomly chosen images of the data set, as the discriminator sees them on real ones."""
        if self._lookup is None:
            return None
        drawn = seeded.rand(seeds, stream="label")  # [b]
        return self._onehot(self._lookup[(drawn * len(self._lookup)).long()])

    # What follows the discriminator: signs of trouble, and augmentation (ADA).

    def _report_d(self, micro: MicroBatch, logits: Pair, features: Pair) -> None:
        """Within the discriminator's phase: of real images and of those made, logits [b, ...] and features [b, D]."""
        share = [(x > 0).float().flatten(1).mean(1) for x in (logits[0], -logits[1])]  # right ones
        micro.report(sign=logits[0].sign().flatten(1).mean(1))
        self.signs.report(micro, features, (share[0], share[1]))

    def _track_d(self, means: dict[str, Tensor]) -> None:
        """At its end: `finish` of the phase."""
        self.signs.take(means)
        self._real_sign += means["sign"]
        self._real_sign_steps += 1

    def end_step(self, step: int) -> None:
        """Look for signs of trouble; move the augmentation's p by how far the discriminator overfits (ADA, arXiv
        2006.06676, section 3, r_t)."""
        self.signs.look()
        augment = self.settings.augment
        if self.augment is None or augment.mode != "ada" or step % augment.interval or not self._real_sign_steps:
            return
        images = self.settings.batch * self._real_sign_steps
        sign = float(self._real_sign) / self._real_sign_steps
        p = adapt(self.augment.probability(), sign, augment.target, images=images, adjust_kimg=augment.adjust_kimg)
        self.augment.set_probability(p)
        self._real_sign.zero_()
        self._real_sign_steps = 0

    def tensors(self) -> dict[str, Tensor]:
        steps = torch.tensor(self._real_sign_steps)
        return {"real_sign": self._real_sign, "real_sign_steps": steps, **self.signs.tensors()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._real_sign.copy_(tensors["real_sign"])
        self._real_sign_steps = int(tensors["real_sign_steps"])
        self.signs.load(tensors)
        if self.augment is not None:
            self.augment.set_probability(min(max(float(self.augment.p), 0.0), 1.0))

    def resident(self) -> list[Tensor]:
        return [*super().resident(), *self.signs.resident()]

    def status(self) -> dict[str, float]:
        augmented = {} if self.augment is None else {"augment_p": self.augment.probability()}
        return {**augmented, **self.signs.values}

    # Sampling.

    def sample(
        self,
        n: int,
        seed: int = 0,
        *,
        micro_batch: int | None = None,
        start: int = 0,
        **options: Any,
    ) -> Tensor:
        """As `gan.sample_images`, which says what the options mean."""
        micro_batch = micro_batch or self._sampling_slice()
        return gan.sample_images(self.G_ema, n, seed=seed, micro_batch=micro_batch, start=start, **options)

    def interpolate(
        self, seed: int = 0, *, keyframes: int = 8, frames_per_keyframe: int = 30, **options: Any
    ) -> Iterator[Tensor]:
        options = {"micro_batch": self._sampling_slice(), **options}
        return gan.interpolate(
            self.G_ema, seed=seed, keyframes=keyframes, frames_per_keyframe=frames_per_keyframe, **options
        )

    def _sampling_slice(self) -> int:
        """Images at a time, so that sampling stays below the memory of a training step."""
        return max(1, (self.settings.micro_batch.G or self.settings.batch) // 2)

    # Construction.

    @property
    def half_dtype(self) -> torch.dtype | None:
        """The 16-bit type that the networks use; None: they are fp32."""
        return self._half_dtype()

    def _half_dtype(self) -> torch.dtype | None:
        """The 16-bit type of the highest resolutions, as the recipe and the device have it; None: all is fp32."""
        chosen = self.settings.precision
        if chosen == "auto":
            chosen = "fp16" if standin.is_gpu(self.device) else "fp32"
        return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[chosen]

    def _augment_pipe(self) -> AugmentPipe | None:
        augment = self.settings.augment
        if augment.mode == "none":
            return None
        pipe = AugmentPipe.from_name(augment.pipeline).to(self.device)
        pipe.set_probability(augment.p)
        return pipe

    def _label_lookup(self) -> Tensor | None:
        if not self.c_dim:  # and no need for the data to be there, which a plan on another machine lacks
            return None
        labels = self.dataset().labels
        return None if labels is None else torch.as_tensor(labels)
