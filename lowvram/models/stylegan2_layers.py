"""Layers of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958) with equalised learning rate: weights are stored as unit
normals and scaled when used (arXiv 1710.10196, section 4.1)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowvram import seeded, standin
from lowvram.kernels.bias_act import Activation, bias_act
from lowvram.kernels.conv2d import conv2d
from lowvram.kernels.modulated_conv import kernel_energy
from lowvram.kernels.upfirdn2d import downsample2d, make_filter, upfirdn2d

NoiseMode = Literal["random", "const", "none"]

LRELU_GAIN = math.sqrt(2)  # keeps the variance through a leaky ReLU


def best_memory_format(x: Tensor, channels: int) -> torch.memory_format:
    """The layout in which a 3x3 convolution of x [B, C, H, W] from `channels` channels, and its filter, run fastest.

    Channels last halves the filters' time on a CPU and suits 16-bit tensor cores, but PyTorch then re-orders the weight
    in each call: not worth it where the weight is larger than the image (measured: 2x slower at 4x4, even at 16x16).
    """
    if standin.is_gpu(x.device):
        return torch.contiguous_format if x.dtype == torch.float32 else torch.channels_last
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return torch.channels_last if 2 * pixels >= 9 * channels else torch.contiguous_format


class _RunningWeight(torch.autograd.Function):
    """gain * weight in x's dtype and layout: one pass here and one for the gradient, instead of one for each use."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: float, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.settings = (gain, weight.dtype)
        out = torch.empty_like(weight, dtype=dtype, memory_format=layout)
        return torch.mul(weight, gain, out=out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        gain, dtype = ctx.settings
        (dy,) = grads
        dw = None if dy is None else _RunningWeight.apply(dy, gain, dtype, torch.contiguous_format)
        return dw, None, None, None


def prefers_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, H, W] lies in channels last, and not in both layouts at once."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def running_weight(weight: Tensor, x: Tensor, gain: float = 1.0) -> Tensor:
    """gain * weight [out, in, k, k] as a convolution of x wants it; the parameter itself stays contiguous and fp32."""
    layout = torch.channels_last if prefers_channels_last(x) else torch.contiguous_format
    if gain == 1 and weight.dtype == x.dtype and weight.is_contiguous(memory_format=layout):
        return weight
    return _RunningWeight.apply(weight, gain, x.dtype, layout)


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """1 / norm of each sample's kernels weight * style: [B, out] (arXiv 1912.04958, equation 3).

    Scaling the inputs by the style and the outputs by this is the same function as a kernel for each sample, and keeps
    one ordinary convolution for the batch. The sum over the kernel is shared by the samples: one small product.
    """
    return (style.square() @ kernel_energy(weight).T + 1e-8).rsqrt()


def normalise_for_half(weight: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """Divide weight (by output channel) and style (by sample) by their largest magnitudes, so that fp16 can't overflow.

    Demodulation cancels both factors (up to its epsilon), so they are constants to the gradient.
    """
    weight_peak = weight.detach().abs().amax((1, 2, 3), keepdim=True)  # [out, 1, 1, 1]
    style_peak = style.detach().abs().amax(1, keepdim=True)  # [B, 1]
    return weight / weight_peak, style / style_peak


class FullyConnected(nn.Module):
    """act(x W^T + b) with gain. [B, in] -> [B, out], fp32.

    lr_multiplier: the weight is stored 1 / lr_multiplier too large, so that Adam moves it that much more slowly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: Activation = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.act: Activation = act
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        # addmm takes both gains as scalars: no scaled copy of the weight. Leaky ReLU's own gain goes with them.
        gain = LRELU_GAIN if self.act == "lrelu" else 1.0
        x = torch.addmm(self.bias, x, self.weight.T, beta=self.bias_gain * gain, alpha=self.weight_gain * gain)
        return bias_act(x, act=self.act, inplace=True)


class ConvLayer(nn.Module):
    """Convolution of the discriminator: [filter and stride], convolution, bias, activation, gain, clamp.

    [B, in, H, W] -> [B, out, H / down, W / down]; runs in the dtype of x.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        act: Activation = "linear",
        down: int = 1,
        gain: float = 1.0,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", make_filter())
        self.act: Activation = act
        self.down = down
        # act(gain x) = gain act(x) for both activations: every gain can go into weight and bias, which are small.
        self.gain = gain * (LRELU_GAIN if act == "lrelu" else 1.0)
        self.weight_gain = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.clamp = None if clamp is None else clamp * gain

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and not prefers_channels_last(x):
            # Weights outweigh activations here: no scaled copy of them; the gain comes after (16 bit could overflow).
            weight: Tensor = self.weight
            gain = self.weight_gain
        else:
            weight = running_weight(self.weight, x, self.weight_gain)
            gain = 1.0
        padding = self.weight.shape[2] // 2
        if self.down == 1:
            x = conv2d(x, weight, padding=padding)
        elif padding == 0:
            x = conv2d(downsample2d(x, self.resample_filter), weight)
        else:
            # The filter's padding for factor 2 is 1, and the convolution's own 1 is added to it.
            x = conv2d(upfirdn2d(x, self.resample_filter, padding=(2, 2, 2, 2)), weight, stride=2)
        bias = None if self.bias is None else self.bias * (self.gain / gain)
        return bias_act(x, bias, act=self.act, gain=gain, clamp=self.clamp, inplace=True)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU, clamp. [B, in, R / up, R / up] -> [B, out, R, R]."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        *,
        up: int,
        clamp: float | None,
        name: str,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.up = up
        self.clamp = clamp
        self.noise_stream = f"noise.{name}"
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", make_filter())

    def noise(self, batch: int, noise_mode: NoiseMode, noise_seeds: Tensor | None) -> Tensor | None:
        """float32 [B, 1, R, R] for "random", [R, R] for "const", None for "none"."""
        if noise_mode == "none":
            return None
        if noise_mode == "const":
            return self.noise_const
        size, device = self.resolution, self.noise_const.device
        return seeded.randn(noise_seeds, 1, size, size, stream=self.noise_stream, device=device, batch=batch)

    def forward(
        self, x: Tensor, w: Tensor, noise_mode: NoiseMode = "random", noise_seeds: Tensor | None = None
    ) -> Tensor:
        """x: [B, in, h, h] in the block's dtype; w: float32 [B, w_dim]. Returns [B, out, R, R] in x's dtype."""
        style = self.affine(w)  # [B, in]
        weight: Tensor = self.weight
        if x.dtype in (torch.float16, torch.bfloat16):
            weight, style = normalise_for_half(weight, style)
        norm = demodulation(weight, style) * LRELU_GAIN  # [B, out]
        style, norm, weight = style.to(x.dtype), norm.to(x.dtype), running_weight(weight, x)
        if self.up == 2:
            x = conv2d(x, weight.transpose(0, 1), style=style, stride=2, transposed=True)  # [B, out, R + 1, R + 1]
            x = upfirdn2d(x, self.resample_filter, padding=(1, 1, 1, 1), gain=4.0)
        else:
            x = conv2d(x, weight, style=style, padding=1)
        noise = self.noise(len(x), noise_mode, noise_seeds)
        if noise is not None:
            noise = (noise * (self.noise_strength * LRELU_GAIN)).to(x.dtype)
        bias = self.bias * LRELU_GAIN
        return bias_act(x, bias, act="lrelu", clamp=self.clamp, scale=norm, noise=noise, inplace=True)


class _WideProduct(torch.autograd.Function):
    """kernels [B, out, in] fp32 times x [B, in, pixels] 16 bit, in fp32: keeps x as it is, not its fp32 copy."""

    @staticmethod
    def forward(ctx: Any, kernels: Tensor, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kernels, x)
        return torch.bmm(kernels, x.to(kernels.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        kernels, x = ctx.saved_tensors
        (dy,) = grads
        if dy is None:
            return None, None
        dkernels = torch.bmm(dy, x.to(kernels.dtype).transpose(1, 2))
        return dkernels, torch.bmm(kernels.transpose(1, 2), dy).to(x.dtype)


def wide_product(kernels: Tensor, x: Tensor) -> Tensor:
    """kernels [B, out, in] fp32 times x [B, in, pixels] of any dtype: fp32 [B, out, pixels]."""
    return torch.bmm(kernels, x) if x.dtype == kernels.dtype else _WideProduct.apply(kernels, x)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to an image, without demodulation. [B, in, R, R] -> float32 [B, out, R, R]."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * self.weight_gain  # [B, in]
        kernels = self.weight[:, :, 0, 0] * style[:, None]  # [B, out, in]: so few outputs that a kernel each is cheap
        image = wide_product(kernels, x.flatten(2)).unflatten(2, x.shape[2:])
        return bias_act(image, self.bias, clamp=self.clamp)
