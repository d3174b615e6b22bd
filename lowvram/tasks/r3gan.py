"""R3GAN: a relativistic loss with both gradient penalties, in two phases, G and D (arXiv 2501.05441).

With penalty_every above 1 the penalties are a third, lazy phase.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import standin
from lowvram.ema import ExponentialMovingAverage
from lowvram.models.r3gan import Discriminator, Generator
from lowvram.objectives import adversarial
from lowvram.phase import MicroBatch, Phase
from lowvram.settings.r3gan import R3GANSettings
from lowvram.tasks.gan import GanTask
from lowvram.tasks.trouble import small_pixels


class R3GANTask(GanTask):
    """Networks `G`, `D`, `G_ema` and, with augmentation, `augment`.

    Images of a pair, one real and one made, are of the same class and of the same place in the batch, so that its loss
    is the same in any micro-batch.
    """

    settings: R3GANSettings
    weaken = "Raise loss.gamma"
    widen = "widen the networks (model.widths)"

    def prepare_training(self) -> None:
        settings, micro = self.settings, self.settings.micro_batch
        every = settings.loss.penalty_every
        self._prepare_pair(self._discriminator)
        # An update more for the lazy phase: each of the two is that much smaller (StyleGAN2, appendix B).
        self._ratios = {"G": 1.0, "D": every / (every + 1) if every > 1 else 1.0}
        self.optimizers = {"G": self._adam(self.G), "D": self._adam(self.D)}
        g: dict[str, Any] = {"networks": (self.G,), "optimizer": self.optimizers["G"], "samples": settings.batch}
        d: dict[str, Any] = {"networks": (self.D,), "optimizer": self.optimizers["D"], "samples": settings.batch}
        self.phases = [
            Phase(name="G", loss=self._g_loss, micro_batch=micro.G, **g),
            Phase(
                name="D",
                loss=self._d_loss,
                terms=2,
                second_order=every == 1,
                micro_batch=micro.D,
                finish=self._track_d,
                **d,
            ),
        ]
        if every > 1:
            self.phases.append(
                Phase(
                    name="penalty",
                    loss=self._penalty_loss,
                    terms=2,
                    second_order=True,
                    every=every,
                    micro_batch=micro.penalty,
                    **d,
                )
            )
        self.averages = [
            ExponentialMovingAverage(
                self.G, self.G_ema, half_life_kimg=settings.ema.half_life_kimg, rampup=settings.ema.rampup
            )
        ]
        self._images_seen = 0
        self._follow_schedule()

    # The losses. Each returns means over the micro-batch; the phase's interval is applied by the trainer.

    def _g_loss(self, micro: MicroBatch) -> Tensor:
        """That images made look more real than real ones (section 2, equation 2, in its non-saturating form)."""
        c = self._onehot(micro.labels)
        with torch.no_grad():
            real_logits = self.D(self._augmented(self._reals(micro), micro, "real"), c)
        fake_logits = self.D(self._augmented(self._fakes(micro, c), micro, "fake"), c)
        return adversarial.relativistic_loss(fake_logits, real_logits).mean()

    def _d_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """That real images look more real, and the penalties where they are not lazy: a graph for the real images, then
        one for those made.

        The loss of a pair depends on both logits, and both graphs at once would take twice the memory. Its gradient is
        the sum of those with either logit held constant: one forward more, without a graph, makes it one at a time.
        """
        c, lazy = self._onehot(micro.labels), self.settings.loss.penalty_every > 1
        with torch.no_grad():
            fakes = self._fakes(micro, c)
            fake_logits = self.D(self._augmented(fakes, micro, "fake"), c)
        reals = self._reals(micro).requires_grad_(not lazy)
        real_logits = self.D(self._augmented(reals, micro, "real"), c)
        loss = adversarial.relativistic_loss(real_logits, fake_logits).mean()
        ahead = (real_logits - fake_logits).detach()  # of a pair, only the difference means something
        self._report_d(micro, (ahead, -ahead), (small_pixels(reals.detach()), small_pixels(fakes)))
        yield loss if lazy else loss + self._penalty(real_logits, reals)
        real_logits = real_logits.detach()
        del reals, loss, fake_logits
        fake_logits = self.D(self._augmented(fakes.requires_grad_(not lazy), micro, "fake"), c)
        loss = adversarial.relativistic_loss(real_logits, fake_logits).mean()
        again = loss - loss.detach()  # its gradient; the value was in the first term
        yield again if lazy else again + self._penalty(fake_logits, fakes)

    def _penalty_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """R1 and R2 alone, lazily."""
        c = self._onehot(micro.labels)
        reals = self._reals(micro).requires_grad_(True)
        yield self._penalty(self.D(self._augmented(reals, micro, "real"), c), reals)
        del reals
        with torch.no_grad():
            fakes = self._fakes(micro, c)
        fakes.requires_grad_(True)
        yield self._penalty(self.D(self._augmented(fakes, micro, "fake"), c), fakes)

    def _penalty(self, logits: Tensor, images: Tensor) -> Tensor:
        """R1 on real images, R2 on those made (section 2.2, equations 4 and 5). The images are not yet augmented."""
        return adversarial.r1_penalty(logits, images).mean() * (self._gamma / 2)

    def _fakes(self, micro: MicroBatch, c: Tensor | None) -> Tensor:
        """Images [b, C, R, R] for the seeds of a micro-batch, of the classes of its real images."""
        images: Tensor = self.G(self._latents(micro.seeds), c)
        return images

    # The schedule.

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self._images_seen += self.settings.batch
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Set what changes over the burn-in (appendix D), by the images seen alone, so that a run resumes exactly."""
        settings, schedule = self.settings, self.settings.schedule
        adam = settings.optimizer
        self._gamma = self._now(settings.loss.gamma, schedule.gamma)
        lr, beta2 = self._now(adam.lr, schedule.lr), self._now(adam.beta2, schedule.beta2)
        for name, optimizer in self.optimizers.items():
            ratio = self._ratios[name]
            for group in optimizer.param_groups:
                group["lr"] = lr * ratio
                group["betas"] = (adam.beta1**ratio, beta2**ratio)
        for average in self.averages:
            average.half_life_kimg = self._now(settings.ema.half_life_kimg, schedule.half_life_kimg)
        if self.augment is not None and settings.augment.mode == "fixed" and schedule.augment_p is not None:
            self.augment.set_probability(self._now(settings.augment.p, schedule.augment_p))

    def _now(self, first: float, last: float | None) -> float:
        """A setting that goes from `first` to `last` over schedule.kimg, along a cosine; None: it stays."""
        if last is None:
            return first
        whole = self.settings.schedule.kimg * 1000
        passed = min(1.0, self._images_seen / whole) if whole else 1.0
        return last + (first - last) * (1 + math.cos(math.pi * passed)) / 2

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "images_seen": torch.tensor(self._images_seen)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self._images_seen = int(tensors["images_seen"])
        self._follow_schedule()

    def status(self) -> dict[str, float]:
        return {**super().status(), "gamma": self._gamma}

    # Construction.

    def _generator(self) -> Generator:
        return Generator(z_dim=self.settings.model.z_dim, **self._shape())

    def _discriminator(self) -> Discriminator:
        return Discriminator(**self._shape())

    def _shape(self) -> dict[str, Any]:
        model, half = self.settings.model, self._half_dtype()
        return {
            "resolution": self.settings.resolution,
            "widths": model.widths,
            "blocks": model.blocks,
            "groups": model.groups,
            "c_dim": self.c_dim,
            "embed_dim": model.embed_dim,
            "expansion": model.expansion,
            "num_fp16_res": 0 if half is None else model.num_fp16_res,
            "half_dtype": half or torch.bfloat16,
        }

    def _half_dtype(self) -> torch.dtype | None:
        """auto is bf16, as in the paper, or fp32 where a card has no bf16: nothing bounds the activations or scales the
        gradients, and fp16 might not hold them. A plan does not know its card here, and is made for bf16."""
        half = super()._half_dtype()
        if half is None or self.settings.precision != "auto":
            return half
        here = self.device.type == "cuda" and not standin.active()
        lacking = here and not torch.cuda.is_bf16_supported(including_emulation=False)
        return None if lacking else torch.bfloat16

    def _adam(self, network: nn.Module) -> torch.optim.Optimizer:
        """Adam; the schedule sets its step size and beta2."""
        adam = self.settings.optimizer
        return torch.optim.Adam(
            network.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=True
        )


TASK = R3GANTask
