"""StyleGAN2 with adaptive discriminator augmentation as four phases: G, path length, D, R1.

Papers: StyleGAN2 arXiv 1912.04958, ADA arXiv 2006.06676.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import seeded
from lowvram.config import load_recipe
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Discriminator, Generator, freeze_layers
from lowvram.models.stylegan2_layers import FullyConnected
from lowvram.objectives import adversarial
from lowvram.phase import MicroBatch, Phase
from lowvram.settings import Settings, StyleGAN2Settings
from lowvram.settings.stylegan2 import PUBLISHED_MAPPING_LR
from lowvram.tasks.gan import GanTask
from lowvram.tasks.trouble import small_pixels
from lowvram.weights import stylegan2 as weights


class StyleGAN2Task(GanTask):
    """Networks `G`, `D`, `G_ema` and, with augmentation, `augment`."""

    settings: StyleGAN2Settings
    weaken = "Raise loss.r1_gamma, lower optimizer.lr_d"
    sample_options = ("truncation_psi", "noise_mode", "classes")

    def __init__(
        self,
        settings: StyleGAN2Settings,
        device: torch.device,
        folder: Path | None = None,
        *,
        classes: int | None = None,
    ) -> None:
        """classes: that the networks know; None: those of the data set."""
        super().__init__(settings, device, folder, classes=classes)
        self.group = settings.model.mbstd_group_size

    def prepare_training(self) -> None:
        settings, loss = self.settings, self.settings.loss
        self._prepare_pair(self._discriminator)
        freeze_layers(self.D, settings.freeze_d)
        self.path_length_mean = torch.zeros([], device=self.device)

        path_length_every = loss.path_length_every if loss.path_length_weight > 0 else 0
        r1_every = loss.r1_every if settings.r1_gamma > 0 else 0
        lr_d = settings.optimizer.lr_d if settings.optimizer.lr_d is not None else settings.optimizer.lr
        self.optimizers = {
            "G": self._adam(self.G, settings.optimizer.lr, path_length_every),
            "D": self._adam(self.D, lr_d, r1_every),
        }
        micro = settings.micro_batch
        g: dict[str, Any] = {"networks": (self.G,), "optimizer": self.optimizers["G"]}
        d: dict[str, Any] = {"networks": (self.D,), "optimizer": self.optimizers["D"]}
        whole: dict[str, Any] = {"samples": settings.batch, "group": self.group}
        self.phases = [Phase(name="G", loss=self._g_loss, micro_batch=micro.G, finish=self._track_w, **g, **whole)]
        if path_length_every:
            self.phases.append(
                Phase(
                    name="path_length",
                    loss=self._path_length_loss,
                    samples=settings.phase_batch("path_length"),
                    second_order=True,
                    every=path_length_every,
                    micro_batch=micro.path_length,
                    finish=self._track_path_length,
                    **g,
                )
            )
        self.phases.append(
            Phase(name="D", loss=self._d_loss, terms=2, micro_batch=micro.D, finish=self._track_d, **d, **whole)
        )
        if r1_every:
            r1: dict[str, Any] = {"every": r1_every, "micro_batch": micro.R1}
            if loss.r1_kind == "exact":
                r1 |= {"loss": self._r1_loss, "second_order": True}
            else:
                r1 |= {"loss": self._r1_difference_loss, "terms": 2}
            self.phases.append(Phase(name="R1", **r1, **d, **whole))
        self.averages = [
            ExponentialMovingAverage(
                self.G, self.G_ema, half_life_kimg=settings.ema.half_life_kimg, rampup=settings.ema.rampup
            )
        ]

    @classmethod
    def with_shape_of_weights(cls, settings: Settings) -> Settings:
        assert isinstance(settings, StyleGAN2Settings) and settings.weights is not None
        path = Path(settings.weights).expanduser()
        published = weights.shape(path, weights.read(path))
        size = published["resolution"]
        if size != settings.resolution:
            raise LowVRAMError(
                f"weights={path} makes images of {size} pixels, and resolution={settings.resolution}.",
                f"Use resolution={size}, or a recipe of that size.",
            )
        model = settings.model
        for name, value in published.items():
            group, _, key = name.partition(".")
            if group != "model" or getattr(model, key) == value:
                continue
            if name in settings.overrides:
                raise LowVRAMError(
                    f"{name}={getattr(model, key)} is not the {value} of weights={path}.", f"Leave {name} out."
                )
            model = replace(model, **{key: value})
        return replace(settings, model=model)

    def load_weights(self, path: Path) -> None:
        published = weights.read(path)
        classes = weights.shape(path, published).get("c_dim", 0)
        if classes != self.c_dim:
            raise LowVRAMError(
                f"weights={path} knows {classes} classes, and the data has {self.c_dim}.",
                "Use data of as many classes (data.labels=true), or weights without any (data.labels=false).",
            )
        averaged, trained = (published.get(name) for name in ("G_ema", "G"))
        sources = {"G_ema": averaged or trained, "G": trained or averaged, "D": published.get("D")}
        for name, source in sources.items():
            network = self.networks.get(name)
            if network is None:  # made for training alone
                continue
            if source is None:
                self.say(f"weights={path} has no {name}, which starts from random weights")
            elif isinstance(network, Generator):
                _set_mapping_lr(network, PUBLISHED_MAPPING_LR)
                weights.load(path, name, source, network)
                _set_mapping_lr(network, self.settings.optimizer.mapping_lr)
            else:
                weights.load(path, name, source, network)

    @classmethod
    def of_weights(cls, path: Path, device: torch.device) -> "StyleGAN2Task":
        """A task that samples from a file of weights, in fp32, and knows nothing of how they were trained.

        Raises:
            LowVRAMError: the file can't be read, or holds no generator.
        """
        published = weights.read(path)
        if not {"G", "G_ema"} & set(published):
            raise LowVRAMError(f"weights={path} holds no generator.", "Use a file with G_ema.")
        shape = weights.shape(path, published)
        overrides = [f"weights={path}", f"resolution={shape['resolution']}", "precision=fp32", "data.labels=false"]
        settings = load_recipe("faces256", overrides)
        assert isinstance(settings, StyleGAN2Settings)
        task = cls(settings, device, classes=shape.get("c_dim", 0))
        task.load_weights(path)
        return task

    # The four losses. Each returns a mean over the micro-batch; the phase's interval is applied by the trainer.

    def _g_loss(self, micro: MicroBatch) -> Tensor:
        """Non-saturating logistic loss (StyleGAN2 section 3; Goodfellow et al. 2014)."""
        images, c, ws = self._fakes(micro)
        micro.report(w=ws[:, 0])
        logits = self.D(self._augmented(images, micro), c)
        return adversarial.generator_loss(logits).mean()

    def _path_length_loss(self, micro: MicroBatch) -> Tensor:
        """Path length regularisation (StyleGAN2 section 3.2 and appendix B).

        The moving mean is that of the steps before, so that a sample's loss does not depend on its micro-batch.
        """
        images, _, ws = self._fakes(micro)
        noise = seeded.randn(micro.seeds, *images.shape[1:], stream="path_length", device=images.device)
        lengths = adversarial.path_lengths(images, ws, noise)  # [b]
        micro.report(length=lengths)
        return (
            adversarial.path_length_penalty(lengths, self.path_length_mean).mean()
            * self.settings.loss.path_length_weight
        )

    def _d_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """Logistic loss on images made, then on real ones: two graphs, of which one is in memory at a time."""
        with torch.no_grad():
            fakes, c, _ = self._fakes(micro)
        fake_logits = self.D(self._augmented(fakes, micro, "fake"), c)
        yield adversarial.discriminator_fake_loss(fake_logits).mean()
        judged, features = fake_logits.detach(), small_pixels(fakes)
        del fakes, fake_logits
        reals = self._reals(micro)
        real_logits = self.D(self._augmented(reals, micro, "real"), self._onehot(micro.labels))
        self._report_d(micro, (real_logits, judged), (small_pixels(reals), features))
        yield adversarial.discriminator_real_loss(real_logits).mean()

    def _r1_loss(self, micro: MicroBatch) -> Tensor:
        """Gradient penalty on real images (Mescheder et al. 2018, arXiv 1801.04406)."""
        reals = self._reals(micro).requires_grad_(True)
        logits = self.D(self._augmented(reals, micro, "real"), self._onehot(micro.labels))
        return adversarial.r1_penalty(logits, reals).mean() * (self.settings.r1_gamma / 2)

    def _r1_difference_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """R1 estimated by two steps of the real images, to and fro in a random direction, without its derivative.

        Like the exact one it moves images before their augmentation, which is the same for both. Each forward has the
        micro-batch's own groups (minibatch standard deviation). Both graphs at once would take more memory than exact
        R1; one forward more, without a graph, makes it one at a time, for the same gradient.
        """
        sigma, weight, c = self.settings.loss.r1_sigma, self.settings.r1_gamma / 2, self._onehot(micro.labels)
        reals = self._reals(micro)
        step = seeded.randn(micro.seeds, *reals.shape[1:], stream="r1", device=reals.device).mul_(sigma)
        with torch.no_grad():
            behind = self.D(self._augmented(reals - step, micro, "real"), c)
        ahead = self.D(self._augmented(reals + step, micro, "real"), c)
        yield adversarial.r1_difference_penalty(ahead, behind, sigma).mean() * weight
        ahead = ahead.detach()
        behind = self.D(self._augmented(reals.sub_(step), micro, "real"), c)
        del step
        penalty = adversarial.r1_difference_penalty(ahead, behind, sigma).mean() * weight
        yield penalty - penalty.detach()  # its gradient; the value was in the first term

    # What the losses share.

    def _fakes(self, micro: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images [b, C, H, W], labels [b, c_dim] or None, and ws [b, num_ws, w_dim] for the seeds of a micro-batch."""
        seeds = micro.seeds
        z = self._latents(seeds)
        c = self._random_labels(seeds)
        ws = self.G.mapping(z, c)
        if self.settings.loss.style_mixing > 0:
            ws = self._mixed(ws, seeds, c)
        return self.G.synthesis(ws, noise_mode="random", noise_seeds=seeds), c, ws

    def _mixed(self, ws: Tensor, seeds: Tensor, c: Tensor | None) -> Tensor:
        """Style mixing: from a random layer on, w comes from a second latent (arXiv 1812.04948 section 3.1)."""
        num_ws = ws.shape[1]
        drawn = seeded.rand(seeds, 2, stream="mixing")  # [b, 2], CPU
        cutoff = 1 + (drawn[:, 0] * (num_ws - 1)).long()  # 1 ... num_ws - 1
        cutoff = torch.where(drawn[:, 1] < self.settings.loss.style_mixing, cutoff, num_ws)
        second = self.G.mapping(self._latents(seeds, "z2"), c)
        keep = torch.arange(num_ws)[None, :] < cutoff[:, None]  # [b, num_ws]
        return torch.where(keep[:, :, None].to(ws.device), ws, second)

    # Statistics that the phases hand over, as means over the whole batch.

    def _track_w(self, means: dict[str, Tensor]) -> None:
        self.G.mapping.update_w_avg(means["w"], self.settings.ema.w_avg_beta)

    def _track_path_length(self, means: dict[str, Tensor]) -> None:
        self.path_length_mean.lerp_(means["length"], self.settings.loss.path_length_decay)

    def tensors(self) -> dict[str, Tensor]:
        return {
            **super().tensors(),
            "path_length_mean": self.path_length_mean,
            "mapping_lr": torch.tensor(self.settings.optimizer.mapping_lr, dtype=torch.float64),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._check_mapping_lr(float(tensors.get("mapping_lr", PUBLISHED_MAPPING_LR)))
        super().load_tensors(tensors)
        self.path_length_mean.copy_(tensors["path_length_mean"])

    def _check_mapping_lr(self, was: float) -> None:
        wanted = self.settings.optimizer.mapping_lr
        if was != wanted:
            raise LowVRAMError(
                f"optimizer.mapping_lr={wanted}, and the run was begun with {was:g}, which its weights are stored for.",
                f"Use optimizer.mapping_lr={was:g}; or begin a run with `weights` of what lowvram.convert makes of it.",
            )

    # Construction.

    def _generator(self) -> Generator:
        model = self.settings.model
        network = Generator(
            self.settings.resolution,
            z_dim=model.z_dim,
            w_dim=model.w_dim,
            c_dim=self.c_dim,
            mapping_layers=model.mapping_layers,
            channel_base=model.channel_base,
            channel_max=model.channel_max,
            **self._precision(),
        )
        _set_mapping_lr(network, self.settings.optimizer.mapping_lr)
        return network

    def _discriminator(self) -> Discriminator:
        model = self.settings.model
        return Discriminator(
            self.settings.resolution,
            c_dim=self.c_dim,
            channel_base=model.channel_base,
            channel_max=model.channel_max,
            mbstd_group_size=model.mbstd_group_size,
            **self._precision(),
        )

    def _precision(self) -> dict[str, Any]:
        half = self._half_dtype()
        return {
            "num_fp16_res": 0 if half is None else self.settings.model.num_fp16_res,
            "conv_clamp": None if half is None else self.settings.model.conv_clamp,
            "half_dtype": half or torch.float16,
        }

    def _adam(self, network: nn.Module, lr: float, every: int) -> torch.optim.Optimizer:
        """Adam whose step and memory allow for the extra update of a lazy phase (StyleGAN2 appendix B)."""
        settings = self.settings.optimizer
        ratio = every / (every + 1) if every else 1.0
        betas = (settings.beta1**ratio, settings.beta2**ratio)
        return torch.optim.Adam(network.parameters(), lr=lr * ratio, betas=betas, eps=settings.eps, fused=True)


@torch.no_grad()
def _set_mapping_lr(network: Generator, lr: float) -> None:
    """Let the mapping learn at `lr` times the step size of other layers; it computes the same as before.

    Adam moves a number by the step size, however large its gradient: so the weights are stored 1 / lr too large, which
    a gain makes up for (arXiv 1812.04948, appendix C). A group of parameters of its own would do too, but memory
    policies take optimizers with one group.
    """
    for layer in network.mapping.children():
        if isinstance(layer, FullyConnected) and layer is not getattr(network.mapping, "embed", None):
            ratio = layer.bias_gain / lr
            if ratio != 1:  # published weights stay as they are, bit for bit
                layer.weight.mul_(ratio)
                layer.bias.mul_(ratio)
                layer.weight_gain /= ratio
                layer.bias_gain = lr


TASK = StyleGAN2Task
