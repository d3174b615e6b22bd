"""Projected GANs (Sauer et al. 2021, arXiv 2111.01007) as two phases, G and D, of first order.

The discriminator looks at images through a frozen network trained on ImageNet, and so knows from the first step on what
an eye and an edge are: a generator learns in a fraction of the images. There is neither R1 nor path length, so that
every activation can be recomputed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.models import backbones, fastgan, stylegan2
from lowvram.models.projected import ProjectedDiscriminator, Projection
from lowvram.objectives import hinge
from lowvram.objectives.adversarial import range_penalty
from lowvram.phase import MicroBatch, Phase
from lowvram.settings.projected_gan import ProjectedGanSettings
from lowvram.tasks.gan import GanTask
from lowvram.tasks.trouble import small_pixels


class ProjectedGanTask(GanTask):
    """Networks `G`, `D` (the heads), `G_ema`, `projection` and, with augmentation, `augment`.

    The backbone is in no checkpoint: it comes from its package, or from where timm has it.
    """

    settings: ProjectedGanSettings
    G: stylegan2.Generator | fastgan.Generator
    D: ProjectedDiscriminator

    def __init__(
        self,
        settings: ProjectedGanSettings,
        device: torch.device,
        folder: Path | None = None,
        *,
        classes: int | None = None,
    ) -> None:
        """classes: that the networks know; None: those of the data set."""
        super().__init__(settings, device, folder, classes=classes)
        self.group = max(1, settings.projection.group)
        self.sample_options = ("noise_mode", "classes")
        if settings.model.generator == "stylegan2":
            self.sample_options = ("truncation_psi", *self.sample_options)

    def prepare_training(self) -> None:
        settings = self.settings
        self.projection = self._projection()
        self._prepare_pair(self._discriminator)
        self.networks["projection"] = self.projection
        lr_d = settings.optimizer.lr_d if settings.optimizer.lr_d is not None else settings.optimizer.lr
        self.optimizers = {"G": self._adam(self.G, settings.optimizer.lr), "D": self._adam(self.D, lr_d)}
        whole: dict[str, Any] = {"samples": settings.batch, "group": self.group}
        self.phases = [
            Phase(
                name="G",
                networks=(self.G,),
                frozen=(self.projection, self.projection.backbone),
                optimizer=self.optimizers["G"],
                loss=self._g_loss,
                micro_batch=settings.micro_batch.G,
                finish=self._track_w,
                **whole,
            ),
            Phase(
                name="D",
                networks=(self.D,),
                optimizer=self.optimizers["D"],
                loss=self._d_loss,
                terms=2,
                micro_batch=settings.micro_batch.D,
                finish=self._end_of_d,
                **whole,
            ),
        ]
        self.averages = [
            ExponentialMovingAverage(
                self.G, self.G_ema, half_life_kimg=settings.ema.half_life_kimg, rampup=settings.ema.rampup
            )
        ]

    # The two losses: a mean over the micro-batch of the sum over the scales.

    def _g_loss(self, micro: MicroBatch) -> Tensor:
        """The hinge loss's generator (equation 2): its gradient comes through the frozen network."""
        images, c, ws = self._fakes(micro)
        if isinstance(self.G, stylegan2.Generator):
            micro.report(w=ws[:, 0])
        logits = self.D(self.projection(self._augmented(images, micro)), c)
        loss = _over_scales(hinge.generator_loss(scale) for scale in logits)
        if isinstance(self.G, fastgan.Generator):  # whose images stay in range
            return loss
        return loss + range_penalty(images).mean() * self.settings.loss.range_weight

    def _d_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """Hinge loss on images made, then on real ones: two graphs, of which one is in memory at a time."""
        with torch.no_grad():
            images, c, _ = self._fakes(micro)
            fake_maps = self.projection(self._augmented(images, micro, "fake"))
            features = self._features(images, fake_maps)
            del images
        fake_logits = self.D(fake_maps, c)
        yield _over_scales(hinge.discriminator_fake_loss(scale) for scale in fake_logits)
        judged = _joined(fake_logits)
        del fake_maps, fake_logits
        with torch.no_grad():
            reals = self._reals(micro)
            real_maps = self.projection(self._augmented(reals, micro, "real"))
        real_logits = self.D(real_maps, self._onehot(micro.labels))
        self._report_d(micro, (_joined(real_logits), judged), (self._features(reals, real_maps), features))
        yield _over_scales(hinge.discriminator_real_loss(scale) for scale in real_logits)

    def _features(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """What signs of trouble are read from, [b, D]: the deepest map; or, as augmented images differ also where those
        behind them are all the same, small pixels."""
        deepest = maps[len(self.projection.backbone.channels) - 1]
        return deepest.mean((2, 3)) if self.augment is None else small_pixels(images)

    def _fakes(self, micro: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images [b, C, H, W], labels [b, c_dim] or None, and what the mapping gave, for the seeds of a micro-batch."""
        c = self._random_labels(micro.seeds)
        ws = self.G.mapping(self._latents(micro.seeds), c)
        return self.G.synthesis(ws, noise_mode="random", noise_seeds=micro.seeds), c, ws

    # Statistics that the phases hand over, as means over the whole batch.

    def _track_w(self, means: dict[str, Tensor]) -> None:
        if isinstance(self.G, stylegan2.Generator):
            self.G.mapping.update_w_avg(means["w"], self.settings.ema.w_avg_beta)

    def _end_of_d(self, means: dict[str, Tensor]) -> None:
        self._track_d(means)
        self.D.keep_vectors()

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "backbone": self._fingerprint}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not torch.allclose(tensors["backbone"], self._fingerprint, rtol=1e-6):
            raise LowVRAMError(
                f"projection.backbone={self.settings.projection.backbone} is not what the run was begun with, and its "
                "heads have learned that one's features.",
                "Leave projection.backbone and projection.backbone_weights as they were, or begin a new run.",
            )
        super().load_tensors(tensors)

    # Construction.

    def _generator(self) -> stylegan2.Generator | fastgan.Generator:
        model, half = self.settings.model, self._half_dtype()
        shape: dict[str, Any] = {
            "z_dim": model.z_dim,
            "c_dim": self.c_dim,
            "channel_base": model.channel_base,
            "channel_max": model.channel_max,
            "num_fp16_res": 0 if half is None else model.num_fp16_res,
            "half_dtype": half or torch.float16,
        }
        if model.generator == "fastgan":
            return fastgan.Generator(self.settings.resolution, **shape)
        return stylegan2.Generator(
            self.settings.resolution,
            w_dim=model.w_dim,
            mapping_layers=model.mapping_layers,
            conv_clamp=None if half is None else model.conv_clamp,
            **shape,
        )

    def _projection(self) -> Projection:
        chosen = self.settings.projection
        weights = None if chosen.backbone_weights is None else Path(chosen.backbone_weights)
        backbone = backbones.make(chosen.backbone, weights)
        sums = [p.double().abs().sum() for p in backbone.parameters()]
        self._fingerprint = torch.stack([torch.stack(sums).sum(), sums[0]])  # tells one backbone from another
        backbone.to(self.device)
        projection = Projection(
            backbone,
            channels=chosen.channels,
            size=self.settings.feature_size,
            half_dtype=self._half_dtype(),
            pixels=chosen.pixels,
            group=chosen.group,
        )
        return projection.to(self.device)

    def _discriminator(self) -> ProjectedDiscriminator:
        chosen = self.settings.projection
        return ProjectedDiscriminator(
            self.projection.widths,
            self.projection.sizes,
            channels=chosen.head_channels,
            group=chosen.group,
            c_dim=self.c_dim,
            of_features=len(self.projection.backbone.channels),
        )

    def _adam(self, network: nn.Module, lr: float) -> torch.optim.Optimizer:
        settings = self.settings.optimizer
        betas = (settings.beta1, settings.beta2)
        return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=settings.eps, fused=True)


def _over_scales(losses: Iterator[Tensor]) -> Tensor:
    """The mean over the samples [b] of the sum over the scales."""
    return torch.stack(list(losses)).sum(0).mean()


def _joined(logits: list[Tensor]) -> Tensor:
    """The logits of all scales, [b, n], without their graph."""
    return torch.cat([scale.detach().flatten(1) for scale in logits], dim=1)


TASK = ProjectedGanTask
