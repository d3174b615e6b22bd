"""Phases of StyleGAN2's training beside the same networks in plain PyTorch, as its paper writes them.

No package trains the established networks on a CPU; these are their operations (arXiv 1912.04958) without what we do
about them: a filter is zeros, padding and a convolution in groups, demodulation a kernel for each sample, and autograd
keeps what it wants.
"""

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import recipe_step
from benchmarks.peers.side import Missing, Peer, Step
from lowvram.kernels.upfirdn2d import plain as resample
from lowvram.models import stylegan2
from lowvram.models.stylegan2_layers import ConvLayer, FullyConnected, SynthesisLayer, ToRGB

if TYPE_CHECKING:
    from lowvram.settings import StyleGAN2Settings

PHASES = ("G", "path_length", "D", "R1")


def linear(layer: FullyConnected, x: Tensor) -> Tensor:
    """[B, in] -> [B, out], with equalised learning rate."""
    x = F.linear(x, layer.weight * layer.weight_gain, layer.bias * layer.bias_gain)
    return F.leaky_relu(x, 0.2) * math.sqrt(2) if layer.act == "lrelu" else x


def modulated(layer: SynthesisLayer, x: Tensor, w: Tensor) -> Tensor:
    """Style, convolution, demodulation by the norm of each sample's kernels (section 2.2), noise, leaky ReLU."""
    style = linear(layer.affine, w)
    kernels = layer.weight * style[:, None, :, None, None]  # [B, out, in, k, k]
    norm = (kernels.square().sum((2, 3, 4)) + 1e-8).rsqrt()
    x = x * style[:, :, None, None]
    if layer.up == 2:
        x = F.conv_transpose2d(x, layer.weight.transpose(0, 1), stride=2)
        x = resample(x, layer.resample_filter, padding=(1, 1, 1, 1), gain=4.0)
    else:
        x = F.conv2d(x, layer.weight, padding=1)
    x = x * norm[:, :, None, None]
    x = x + torch.randn(len(x), 1, *x.shape[2:], device=x.device) * layer.noise_strength
    return F.leaky_relu(x + layer.bias[:, None, None], 0.2) * math.sqrt(2)


def to_rgb(layer: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    """[B, in, R, R] -> [B, 3, R, R]."""
    style = linear(layer.affine, w) * layer.weight_gain
    return F.conv2d(x * style[:, :, None, None], layer.weight) + layer.bias[:, None, None]


def mapping(network: stylegan2.Mapping, z: Tensor) -> Tensor:
    """z [B, z_dim] -> ws [B, num_ws, w_dim]."""
    x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    for i in range(network.num_layers):
        x = linear(getattr(network, f"fc{i}"), x)
    assert network.num_ws is not None
    return x[:, None].expand(-1, network.num_ws, -1)


def synthesis(network: stylegan2.Synthesis, ws: Tensor) -> Tensor:
    """ws [B, num_ws, w_dim] -> images [B, 3, R, R]."""
    x = image = None
    for resolution in network.resolutions:
        block = getattr(network, f"b{resolution}")
        own = ws[:, block.first_ws :].unbind(1)
        x = block.const.expand(len(ws), -1, -1, -1) if x is None else modulated(block.conv0, x, own[0])
        x = modulated(block.conv1, x, own[block.num_convs - 1])
        rgb = to_rgb(block.torgb, x, own[block.num_convs])
        if image is not None:
            rgb = rgb + resample(image, block.resample_filter, up=2, padding=(2, 1, 2, 1), gain=4.0)
        image = rgb
    assert image is not None
    return image


def convolution(layer: ConvLayer, x: Tensor) -> Tensor:
    """A layer of the discriminator."""
    fan_in = layer.weight[0].numel()
    weight, size = layer.weight / math.sqrt(fan_in), layer.weight.shape[2]
    if layer.down == 1:
        x = F.conv2d(x, weight, padding=size // 2)
    elif size == 1:
        x = F.conv2d(resample(x, layer.resample_filter, down=2, padding=(1, 1, 1, 1)), weight)
    else:
        x = F.conv2d(resample(x, layer.resample_filter, padding=(2, 2, 2, 2)), weight, stride=2)
    if layer.bias is not None:
        x = x + layer.bias[:, None, None]
    return (F.leaky_relu(x, 0.2) if layer.act == "lrelu" else x) * layer.gain


def logits(network: stylegan2.Discriminator, images: Tensor) -> Tensor:
    """images [B, 3, R, R] -> [B, 1]."""
    x = images
    for resolution in network.resolutions[:-1]:
        block = getattr(network, f"b{resolution}")
        if block.has_fromrgb:
            x = convolution(block.fromrgb, x)
        x = convolution(block.skip, x) + convolution(block.conv1, convolution(block.conv0, x))
    last = network.b4
    x = stylegan2.minibatch_stddev(x, last.mbstd_group_size)
    return linear(last.out, linear(last.fc, convolution(last.conv, x).flatten(1)))


def theirs(settings: "StyleGAN2Settings", phase: str, device: torch.device) -> Step:
    """One phase of plain training: the same batch, losses and Adam, all images at once, in fp32."""
    torch.manual_seed(0)
    model, loss, batch = settings.model, settings.loss, settings.batch
    widths = {"channel_base": model.channel_base, "channel_max": model.channel_max}
    g = stylegan2.Generator(
        settings.resolution, model.z_dim, model.w_dim, mapping_layers=model.mapping_layers, **widths
    ).to(device)
    d = stylegan2.Discriminator(settings.resolution, mbstd_group_size=model.mbstd_group_size, **widths).to(device)
    trained: nn.Module = g if phase in ("G", "path_length") else d
    for network in (g, d):
        network.requires_grad_(network is trained)
    adam = settings.optimizer
    optimizer = torch.optim.Adam(trained.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps)
    reals = torch.randn(batch, 3, settings.resolution, settings.resolution, device=device)
    mean = torch.zeros([], device=device)

    def made(count: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(2, count, model.z_dim, device=device)
        ws, second = mapping(g.mapping, z[0]), mapping(g.mapping, z[1])
        cutoff = torch.randint(1, ws.shape[1], [])
        ws = torch.cat([ws[:, :cutoff], second[:, cutoff:]], 1)  # style mixing
        return synthesis(g.synthesis, ws), ws

    def run_g() -> None:
        F.softplus(-logits(d, made(batch)[0])).mean().backward()

    def run_path_length() -> None:
        images, ws = made(batch // loss.path_length_batch_shrink)
        noise = torch.randn_like(images) / settings.resolution
        (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        penalty = (lengths - mean.lerp(lengths.mean(), loss.path_length_decay)).square().mean()
        mean.lerp_(lengths.detach().mean(), loss.path_length_decay)
        (penalty * loss.path_length_weight * loss.path_length_every).backward()

    def run_d() -> None:
        with torch.no_grad():
            images, _ = made(batch)
        F.softplus(logits(d, images)).mean().backward()
        F.softplus(-logits(d, reals)).mean().backward()

    def run_r1() -> None:
        images = reals.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(logits(d, images).sum(), images, create_graph=True)
        (gradient.square().sum((1, 2, 3)).mean() * (settings.r1_gamma / 2 * loss.r1_every)).backward()

    backward = {"G": run_g, "path_length": run_path_length, "D": run_d, "R1": run_r1}[phase]

    def run() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(run=run, held=[g, d, optimizer, reals], samples=batch)


def peers(*, small: bool) -> list[Peer]:
    """A comparison for each phase, in fp32 and without augmentation.

    Raises:
        Missing: recipes can't be read.
    """
    recipe, batch = ("faces64", 4) if small else ("faces256", 8)
    words = [f"batch={batch}", "augment.mode=none", "precision=fp32", "model.z_dim=512", "model.w_dim=512"]
    try:
        from lowvram import load_recipe
        from lowvram.settings import StyleGAN2Settings

        settings = load_recipe(recipe, words)
    except ImportError as error:
        raise Missing("hydra-core", error) from None
    assert isinstance(settings, StyleGAN2Settings)
    return [
        Peer(
            name=f"stylegan2 {phase}",
            what=f"phase {phase} of {recipe}, batch {batch}, fp32",
            recipe=recipe,
            sides={"ours": partial(recipe_step.ours, settings, phase), "plain": partial(theirs, settings, phase)},
        )
        for phase in PHASES
    ]
