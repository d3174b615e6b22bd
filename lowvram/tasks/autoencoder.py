"""The KL autoencoder of latent diffusion (arXiv 2112.10752, section 3.1) as two phases: autoencoder, discriminator."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram import seeded, standin
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.models.autoencoder import Autoencoder, decode_safely
from lowvram.models.patch_discriminator import PatchDiscriminator
from lowvram.models.tiling import encode_tiled
from lowvram.objectives import hinge, reconstruction
from lowvram.phase import MicroBatch, Phase
from lowvram.settings import AutoencoderSettings
from lowvram.tasks import Task
from lowvram.tasks.step_size import StepSizes

TILE_PIXELS = 512  # images above this size are encoded and decoded in tiles, so that they don't set the peak

_FIRST_LOG_VARIANCE = -6.0


class AutoencoderTask(Task):
    """Networks `autoencoder`, `autoencoder_ema` and, with an adversarial loss, `discriminator`."""

    settings: AutoencoderSettings
    sampling_networks = ("autoencoder_ema",)
    optional_networks = ("discriminator",)

    def __init__(self, settings: AutoencoderSettings, device: torch.device, folder: Path | None = None) -> None:
        super().__init__(settings, device, folder)
        self.average = self._autoencoder().eval().requires_grad_(False)
        self.networks = {"autoencoder_ema": self.average}

    def prepare_training(self) -> None:
        settings, loss = self.settings, self.settings.loss
        self.autoencoder = self._autoencoder().requires_grad_(False)
        _quieten(self.autoencoder)
        self.average.load_state_dict(self.autoencoder.state_dict())
        self.perceptual = self._perceptual_loss()
        self.networks["autoencoder"] = self.autoencoder
        self.optimizers = {"autoencoder": self._adamw(self.autoencoder)}
        self._step = 0
        latent_numbers = settings.model.latent_channels * (settings.resolution // settings.factor) ** 2
        self._kl_weight = loss.kl_weight * latent_numbers / (3 * settings.resolution**2)  # beside means, not sums
        whole: dict[str, Any] = {"samples": settings.batch, "clip_norm": settings.optimizer.clip_norm}
        self.phases = [
            Phase(
                name="autoencoder",
                networks=(self.autoencoder,),
                optimizer=self.optimizers["autoencoder"],
                loss=self._autoencoder_loss,
                micro_batch=settings.micro_batch.autoencoder,
                **whole,
            )
        ]
        if loss.adversarial_weight:
            self._first_adversarial_step = round(loss.adversarial_start_kimg * 1000 / settings.batch)
            self.discriminator = PatchDiscriminator(
                channels=settings.model.discriminator_channels, layers=settings.model.discriminator_layers
            )
            self.discriminator.to(self.device).requires_grad_(False)
            self.networks["discriminator"] = self.discriminator
            self.optimizers["discriminator"] = self._adamw(self.discriminator)
            self.phases.append(
                Phase(
                    name="discriminator",
                    networks=(self.discriminator,),
                    optimizer=self.optimizers["discriminator"],
                    loss=self._discriminator_loss,
                    terms=2,
                    micro_batch=settings.micro_batch.discriminator,
                    start=self._first_adversarial_step,
                    **whole,
                )
            )
        self.step_sizes = StepSizes(
            self.optimizers.values(), settings.optimizer, kimg=settings.kimg, batch=settings.batch
        )
        self.averages = [
            ExponentialMovingAverage(
                self.autoencoder, self.average, half_life_kimg=settings.ema.half_life_kimg, rampup=settings.ema.rampup
            )
        ]

    # The two losses.

    def _autoencoder_loss(self, micro: MicroBatch) -> Tensor:
        """L1 and perceptual distance, KL, and what the discriminator finds (arXiv 2112.10752, equation 25)."""
        loss, images = self.settings.loss, to_range(micro.images)
        rebuilt, moments = self._rebuilt(images, micro)
        total = reconstruction.l1(rebuilt, images) + self._kl_weight * reconstruction.kl(moments)
        if self.perceptual is not None:
            total = total + loss.perceptual_weight * self.perceptual(rebuilt, images)
        if self._adversarial():
            logits = self._judged(rebuilt)
            total = total + loss.adversarial_weight * hinge.generator_loss(logits)
        return total.mean()

    def _discriminator_loss(self, micro: MicroBatch) -> Iterator[Tensor]:
        """Hinge loss on reconstructions, then on images: two graphs, of which one is in memory at a time."""
        images = to_range(micro.images)
        with torch.no_grad():
            rebuilt, _ = self._rebuilt(images, micro)
        yield hinge.discriminator_fake_loss(self._judged(rebuilt)).mean()
        del rebuilt
        yield hinge.discriminator_real_loss(self._judged(images)).mean()

    # Networks get what they are held in (memory.weights_dtype); losses are of float32.

    def _rebuilt(self, images: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        dtype = next(self.autoencoder.parameters()).dtype
        rebuilt, moments = self.autoencoder(images.to(dtype), self._noise(micro).to(dtype))
        return rebuilt.float(), moments.float()

    def _judged(self, images: Tensor) -> Tensor:
        logits: Tensor = self.discriminator(images.to(next(self.discriminator.parameters()).dtype))
        return logits.float()

    def _noise(self, micro: MicroBatch) -> Tensor:
        side = self.settings.resolution // self.settings.factor
        shape = (self.settings.model.latent_channels, side, side)
        return seeded.randn(micro.seeds, *shape, stream="latent", device=self.device)

    def _adversarial(self) -> bool:
        return bool(self.settings.loss.adversarial_weight) and self._step >= self._first_adversarial_step

    def end_step(self, step: int) -> None:
        self._step = step
        self.step_sizes.set(step)

    def tensors(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.end_step(int(tensors["step"]))

    def resident(self) -> list[Tensor]:
        return [] if self.perceptual is None else [*self.perceptual.parameters(), *self.perceptual.buffers()]

    # Sampling.

    @torch.no_grad()
    def sample(
        self, n: int, seed: int = 0, *, micro_batch: int | None = None, start: int = 0, **options: object
    ) -> Tensor:
        """Reconstructions of images of the data set, by the latents' means: for the recipe's own seed of the first."""
        if options:
            raise LowVRAMError(f"{next(iter(options))} has no meaning for an autoencoder.", "Leave it out.")
        size = micro_batch or max(1, (self.settings.micro_batch.autoencoder or self.settings.batch) // 2)
        out = []
        first = start + 1009 * (seed - self.settings.seed)
        for begin in range(first, first + n, size):
            end = min(begin + size, first + n)
            images = self._reals(range(begin, end))
            moments = encode_tiled(self.average, to_range(images), tile_pixels=TILE_PIXELS)
            mean = moments.chunk(2, dim=1)[0]
            out.append(to_pixels(decode_safely(self.average, mean, tile_pixels=TILE_PIXELS)).cpu())
        return torch.cat(out)

    def _reals(self, indices: range) -> Tensor:
        if standin.active():  # a plan is made without the data
            return self.example(len(indices))
        dataset = self.dataset()
        return torch.stack([dataset[i % len(dataset)] for i in indices]).to(self.device)

    def interpolate(
        self, seed: int = 0, *, keyframes: int = 8, frames_per_keyframe: int = 30, **options: Any
    ) -> Iterator[Tensor]:
        raise LowVRAMError(
            "an autoencoder gives back images that it is shown, and has no walk to take.",
            "Sample a run of a recipe that generates, such as faces64_ldm.",
        )

    # Construction.

    def _autoencoder(self) -> Autoencoder:
        model = self.settings.model
        network = Autoencoder(
            latent_channels=model.latent_channels,
            block_out_channels=tuple(model.channels),
            layers_per_block=model.layers,
            norm_num_groups=model.norm_groups,
            mid_block_add_attention=model.attention,
            scaling_factor=1.0,  # measured on the latents once they are made
        )
        return network.to(self.device)

    def _perceptual_loss(self) -> nn.Module | None:
        loss = self.settings.loss
        if loss.perceptual == "none" or not loss.perceptual_weight:
            return None
        kind = reconstruction.LPIPS if loss.perceptual == "lpips" else reconstruction.PerceptualLoss
        return kind().to(self.device)

    def _adamw(self, network: nn.Module) -> torch.optim.Optimizer:
        settings = self.settings.optimizer
        return torch.optim.AdamW(
            network.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )


@torch.no_grad()
def _quieten(network: Autoencoder) -> None:
    """Begin with latents of little noise. As much noise as signal would hide fine things and colours for thousands of
    images; the KL term raises it where it does no harm."""
    last = network.encoder.conv_out if network.quant_conv is None else network.quant_conv
    assert last.bias is not None
    last.bias[network.latent_channels :] += _FIRST_LOG_VARIANCE


def to_range(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8; what lies beyond is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save(autoencoder: Autoencoder, folder: Path) -> None:
    """Write config.json and the weights as a `vae` folder of diffusers has them, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    partial = folder / "diffusion_pytorch_model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(folder / "diffusion_pytorch_model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(autoencoder.to_config(), indent=2) + "\n")
    partial.replace(folder / "config.json")


TASK = AutoencoderTask
