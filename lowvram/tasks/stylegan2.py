"""StyleGAN2 with adaptive discriminator augmentation as four phases: G, path length, D, R1.

Papers: StyleGAN2 arXiv 1912.04958, ADA arXiv 2006.06676.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import seeded, standin
from lowvram.config import load_recipe
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.models.augment import AugmentPipe, adapt
from lowvram.models.stylegan2 import Discriminator, Generator, freeze_layers
from lowvram.models.stylegan2_layers import FullyConnected
from lowvram.objectives import adversarial
from lowvram.phase import MicroBatch, Phase
from lowvram.sampling import gan
from lowvram.settings import Settings, StyleGAN2Settings
from lowvram.settings.stylegan2 import PUBLISHED_MAPPING_LR
from lowvram.tasks import Task
from lowvram.weights import stylegan2 as weights


class StyleGAN2Task(Task):
    """Networks `G`, `D`, `G_ema` and, with augmentation, `augment`."""

    settings: StyleGAN2Settings
    sampling_networks = ("G_ema",)
    optional_networks = ("augment",)
    own_precision = True
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
        super().__init__(settings, device, folder)
        self.group = settings.model.mbstd_group_size
        if classes is None:
            classes = self.dataset().num_classes if settings.data.labels else 0
        self.c_dim = classes
        self.G_ema = self._generator().eval().requires_grad_(False)
        self.networks = {"G_ema": self.G_ema}

    def prepare_training(self) -> None:
        settings, loss = self.settings, self.settings.loss
        self.G = self._generator().requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.D = Discriminator(
            settings.resolution,
            c_dim=self.c_dim,
            channel_base=settings.model.channel_base,
            channel_max=settings.model.channel_max,
            mbstd_group_size=settings.model.mbstd_group_size,
            **self._precision(),
        )
        self.D.to(self.device).requires_grad_(False)
        freeze_layers(self.D, settings.freeze_d)
        self.augment = self._augment_pipe()
        self.path_length_mean = torch.zeros([], device=self.device)
        self._real_sign = torch.zeros([], device=self.device)  # mean of sign(D(real)), summed over D steps
        self._real_sign_steps = 0
        self.networks |= {"G": self.G, "D": self.D}
        if self.augment is not None:
            self.networks["augment"] = self.augment
        self._lookup = self._label_lookup()

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
            Phase(name="D", loss=self._d_loss, terms=2, micro_batch=micro.D, finish=self._track_sign, **d, **whole)
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
        del fakes, fake_logits
        real_logits = self.D(self._augmented(self._reals(micro), micro, "real"), self._onehot(micro.labels))
        micro.report(sign=real_logits.sign().reshape(-1))
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
        seeds, settings = micro.seeds, self.settings
        z = seeded.randn(seeds, settings.model.z_dim, stream="z").to(self.device)
        c = self._random_labels(seeds)
        ws = self.G.mapping(z, c)
        if settings.loss.style_mixing > 0:
            ws = self._mixed(ws, seeds, c)
        return self.G.synthesis(ws, noise_mode="random", noise_seeds=seeds), c, ws

    def _mixed(self, ws: Tensor, seeds: Tensor, c: Tensor | None) -> Tensor:
        """Style mixing: from a random layer on, w comes from a second latent (arXiv 1812.04948 section 3.1)."""
        num_ws = ws.shape[1]
        drawn = seeded.rand(seeds, 2, stream="mixing")  # [b, 2], CPU
        cutoff = 1 + (drawn[:, 0] * (num_ws - 1)).long()  # 1 ... num_ws - 1
        cutoff = torch.where(drawn[:, 1] < self.settings.loss.style_mixing, cutoff, num_ws)
        z2 = seeded.randn(seeds, self.settings.model.z_dim, stream="z2").to(self.device)
        second = self.G.mapping(z2, c)
        keep = torch.arange(num_ws)[None, :] < cutoff[:, None]  # [b, num_ws]
        return torch.where(keep[:, :, None].to(ws.device), ws, second)

    def _reals(self, micro: MicroBatch) -> Tensor:
        return micro.images.to(torch.float32) / 127.5 - 1

    def _augmented(self, images: Tensor, micro: MicroBatch, which: Literal["fake", "real"] = "fake") -> Tensor:
        if self.augment is None:
            return images
        augmented: Tensor = self.augment(images, micro.seeds, stream=f"augment.{which}")
        return augmented

    def _onehot(self, labels: Tensor) -> Tensor | None:
        return F.one_hot(labels, self.c_dim).float().to(self.device) if self.c_dim else None

    def _random_labels(self, seeds: Tensor) -> Tensor | None:
        """Labels of randomly chosen images of the data set, as the discriminator sees them on real ones."""
        if self._lookup is None:
            return None
        drawn = seeded.rand(seeds, stream="label")  # [b]
        return self._onehot(self._lookup[(drawn * len(self._lookup)).long()])

    # Statistics that the phases hand over, as means over the whole batch.

    def _track_w(self, means: dict[str, Tensor]) -> None:
        self.G.mapping.update_w_avg(means["w"], self.settings.ema.w_avg_beta)

    def _track_path_length(self, means: dict[str, Tensor]) -> None:
        self.path_length_mean.lerp_(means["length"], self.settings.loss.path_length_decay)

    def _track_sign(self, means: dict[str, Tensor]) -> None:
        self._real_sign += means["sign"]
        self._real_sign_steps += 1

    def end_step(self, step: int) -> None:
        """Move the augmentation's p by how far the discriminator overfits (ADA section 3, r_t)."""
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
        return {
            "path_length_mean": self.path_length_mean,
            "real_sign": self._real_sign,
            "real_sign_steps": steps,
            "mapping_lr": torch.tensor(self.settings.optimizer.mapping_lr, dtype=torch.float64),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._check_mapping_lr(float(tensors.get("mapping_lr", PUBLISHED_MAPPING_LR)))
        self.path_length_mean.copy_(tensors["path_length_mean"])
        self._real_sign.copy_(tensors["real_sign"])
        self._real_sign_steps = int(tensors["real_sign_steps"])
        if self.augment is not None:
            self.augment.set_probability(min(max(float(self.augment.p), 0.0), 1.0))

    def _check_mapping_lr(self, was: float) -> None:
        wanted = self.settings.optimizer.mapping_lr
        if was != wanted:
            raise LowVRAMError(
                f"optimizer.mapping_lr={wanted}, and the run was begun with {was:g}, which its weights are stored for.",
                f"Use optimizer.mapping_lr={was:g}; or begin a run with `weights` of what lowvram.convert makes of it.",
            )

    def status(self) -> dict[str, float]:
        return {} if self.augment is None else {"augment_p": self.augment.probability()}

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
        return network.to(self.device)

    def _precision(self) -> dict[str, Any]:
        chosen = self.settings.precision
        if chosen == "auto":
            chosen = "fp16" if standin.is_gpu(self.device) else "fp32"
        return {
            "num_fp16_res": 0 if chosen == "fp32" else self.settings.model.num_fp16_res,
            "conv_clamp": None if chosen == "fp32" else self.settings.model.conv_clamp,
            "half_dtype": torch.bfloat16 if chosen == "bf16" else torch.float16,
        }

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
