"""The published StyleGAN2's peaks, foretold by the planner's trace of networks that keep what the published ones keep.

    python -m benchmarks.published_stylegan2 [--only "auto 256,paper 1024"] [--json FILE]

Our own networks keep less, so that their peaks say nothing of the published ones. Within `holding_as_published` the
same networks hold: a kernel for each sample, which demodulation takes the norm of; the modulated copy of each
convolution's input beside the input; the convolution's output beside the activation's, for demodulation and noise are
an operation of their own, which keeps its input; the inputs of convolutions whose weight is frozen; and no result
takes the place of its input. Adam's first moment, whose beta is 0, is added.

Published are GB per GPU, the peak that torch's allocator had handed out, in 2^30 bytes.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lowvram import load_recipe
from lowvram.config import report_errors
from lowvram.kernels.bias_act import bias_act
from lowvram.kernels.conv2d import conv2d
from lowvram.kernels.upfirdn2d import upfirdn2d
from lowvram.memory.policy import MemoryPolicy
from lowvram.models import stylegan2_layers as layers
from lowvram.models.stylegan2_layers import LRELU_GAIN, SynthesisLayer, ToRGB
from lowvram.planner import calibration, cards
from lowvram.planner.allocator import replay
from lowvram.planner.compose import highest
from lowvram.planner.estimate import Estimator
from lowvram.planner.pieces import Pieces
from lowvram.planner.recipe import subject_of
from lowvram.planner.tracing import Structure
from lowvram.settings import Settings

GIB = 2**30
PHASES = ("G", "path_length", "D", "R1")  # in the order of `Published.phases_gib`


@dataclass(frozen=True)
class Published:
    """A configuration of the published table: images of one GPU, its GB, and the peaks of its phases where known."""

    resolution: int
    images: int
    gib: float
    phases_gib: tuple[float, float, float, float] | None = None
    mapping_layers: int = 2
    mbstd_group: int = 4

    @property
    def channel_base(self) -> int:
        """The same of both kinds of configuration."""
        return 32768 if self.resolution >= 512 else 16384


CONFIGURATIONS = {
    "auto 128": Published(128, 32, 6.2),
    "auto 256": Published(256, 16, 4.5, (4.45, 4.23, 1.76, 2.48)),
    "auto 512": Published(512, 8, 6.8, (6.73, 5.26, 2.88, 4.42)),
    "auto 1024": Published(1024, 4, 7.2, (6.68, 4.94, 3.04, 4.61)),
    "paper 256": Published(256, 8, 2.7, (2.65, 2.51, 1.32, 1.61), mapping_layers=8, mbstd_group=8),
    "paper 512": Published(512, 8, 6.7, mapping_layers=8, mbstd_group=8),
    "paper 1024": Published(1024, 4, 6.9, mapping_layers=8),
}


# What the published networks keep.


def _synthesis_layer(
    self: SynthesisLayer, x: Tensor, w: Tensor, noise_mode: Any = "random", noise_seeds: Tensor | None = None
) -> Tensor:
    """`SynthesisLayer.forward` with every step an operation of its own."""
    style = self.affine(w)
    weight: Tensor = self.weight
    if x.dtype in (torch.float16, torch.bfloat16):
        weight, style = layers.normalise_for_half(weight, style)
    kernels = weight * style[:, None, :, None, None]  # [B, out, in, 3, 3] in fp32: one for each sample, for its norm
    norm = (kernels.square().sum((2, 3, 4)) + 1e-8).rsqrt().to(x.dtype)
    weight = layers.running_weight(weight, x)
    x = x * style.to(x.dtype)[:, :, None, None]
    if self.up == 2:
        x = conv2d(x, weight.transpose(0, 1), stride=2, transposed=True)
        x = upfirdn2d(x, self.resample_filter, padding=(1, 1, 1, 1), gain=4.0)
    else:
        x = conv2d(x, weight, padding=1)
    noise = self.noise(len(x), noise_mode, noise_seeds)
    scale = norm[:, :, None, None]
    x = x * scale if noise is None else torch.addcmul((noise * self.noise_strength).to(x.dtype), x, scale)
    return bias_act(x, self.bias, act="lrelu", gain=LRELU_GAIN, clamp=self.clamp)


def _to_rgb(self: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    """`ToRGB.forward` as a convolution of the modulated input in the input's type."""
    style = self.affine(w) * self.weight_gain
    x = x * style.to(x.dtype)[:, :, None, None]
    image = conv2d(x, self.weight.to(x.dtype))
    return bias_act(image, self.bias, clamp=self.clamp).to(torch.float32, memory_format=torch.contiguous_format)


def _apart(x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
    """`bias_act` whose result is a tensor of its own."""
    return bias_act(x, *args, **kwargs)


class _Kept(torch.autograd.Function):
    """x, which the graph keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _keeping(x: Tensor, w: Tensor, **kwargs: Any) -> Tensor:
    """`conv2d` that keeps its input even where the weight asks for no gradient, as the discriminator's in phase G."""
    return conv2d(_Kept.apply(x), w, **kwargs)


@contextmanager
def holding_as_published() -> Iterator[None]:
    """Within, our networks compute as ever, and hold what the published ones do."""
    with (
        mock.patch.object(SynthesisLayer, "forward", _synthesis_layer),
        mock.patch.object(ToRGB, "forward", _to_rgb),
        mock.patch.object(layers, "bias_act", _apart),
        mock.patch.object(layers, "conv2d", _keeping),
    ):
        yield


# Traced.


def settings_of(published: Published) -> Settings:
    """Our recipe with a published configuration's sizes."""
    words = {
        "batch": published.images,
        "model.channel_base": published.channel_base,
        "model.mapping_layers": published.mapping_layers,
        "model.mbstd_group_size": published.mbstd_group,
        "loss.path_length_batch_shrink": 2,
        "precision": "fp16",
        **{f"micro_batch.{name}": "null" for name in PHASES},
    }
    words |= {"loss.path_length_every": 4, "loss.path_length_weight": 2, "loss.style_mixing": 0.9}
    return load_recipe(f"faces{published.resolution}", [f"{name}={value}" for name, value in words.items()])


def trace(published: Published, *, lean: bool = False) -> dict[str, Any]:
    """Peaks of a configuration, in bytes: by phase, the whole, reserved. lean: of our own networks instead."""
    settings = settings_of(published)
    names = settings.phase_names()
    policy = MemoryPolicy.from_settings(settings, phases=names, precision="fp32")
    card = cards.find("T4")
    with Pieces(subject_of(settings), processes=1) as pieces:
        estimator = Estimator(pieces, Structure.of(policy), card)
        if lean:
            requests = _requests(estimator, policy)
        else:
            with holding_as_published():
                requests = _requests(estimator, policy)
        first_moment = 0 if lean else sum(estimator.facts.parameter_bytes.values())
    parts = highest(requests)
    constants = calibration.default(card)
    return {
        "phases": {name: parts[name].live_bytes + first_moment for name in names},
        "live_bytes": max(parts[name].live_bytes for name in names) + first_moment,
        "device_bytes": calibration.needed_bytes(replay(requests).reserved_bytes + first_moment, constants),
    }


def _requests(estimator: Estimator, policy: MemoryPolicy) -> Any:
    estimator.settle(policy)
    return estimator.requests(policy)


def table(results: dict[str, dict[str, Any]]) -> str:
    """In GiB; in brackets what was published, or traced of it."""
    rows = [f"{'configuration':<14}{'predicted':>10}{'published':>10}{'ratio':>7}{'device':>8}  by phase"]
    for name, found in results.items():
        published = CONFIGURATIONS[name]
        by_phase = "  ".join(
            f"{phase} {found['phases'][phase] / GIB:.2f}"
            + (f" ({published.phases_gib[index]:.2f})" if published.phases_gib else "")
            for index, phase in enumerate(PHASES)
        )
        live = found["live_bytes"] / GIB
        rows.append(
            f"{name:<14}{live:>10.2f}{published.gib:>10.1f}{live / published.gib:>7.2f}"
            f"{found['device_bytes'] / GIB:>8.2f}  {by_phase}"
        )
    return "\n".join(rows)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS), help="configurations, separated by commas")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()

    def run() -> None:
        results = {name: trace(CONFIGURATIONS[name]) for name in map(str.strip, options.only.split(","))}
        print(table(results))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    report_errors(run, [])


if __name__ == "__main__":
    main()
