"""Frozen linear layers with weights of 4 bits (QLoRA, arXiv 2305.14314), packed and unpacked by bitsandbytes' kernels.

64 weights in a row share a scale, their largest magnitude; the scales are themselves kept in 8 bits (the paper's double
quantisation, section 3, here with integers: what is left of a scale after the mean is spread over 255 steps for each
256 scales). That is 4.127 bits a weight. A layer unpacks its weight each time that it runs, forward or backward, and
keeps none of it in between.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram import libraries
from lowvram.errors import LowVRAMError

Kind = Literal["nf4", "fp4"]
_BLOCK = 64  # weights to a scale
_SCALES = 256  # scales to a scale of scales
_SMALLEST = 2**12  # weights; a smaller layer saves nothing
# Layers that the network asks for its dtype, and that are small.
SKIP = ("time_embedding", "add_embedding", "class_embedding", "time_emb_proj")


class PackedLinear(nn.Linear):
    """A linear layer whose frozen weight is packed: [..., in] -> [..., out], in x's dtype or autocast's.

    `weight` unpacks it, into a tensor [out, in] of `compute_dtype`; it has gradients for x alone.

    Attributes:
        packed: uint8 [in * out / 2]. scales: uint8, the bytes of the scales. Frozen parameters, so that what streams
            weights streams them; and bytes, so that no conversion of a network's floats touches them.
        bias: frozen, or None.
    """

    def __init__(self, linear: nn.Linear, *, kind: Kind = "nf4", compute_dtype: torch.dtype = torch.bfloat16) -> None:
        nn.Module.__init__(self)
        _bitsandbytes()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.compute_dtype = kind, compute_dtype
        weight = linear.weight.detach()
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight, _BLOCK, kind, torch.uint8)
        self.packed = nn.Parameter(packed.flatten(), requires_grad=False)
        self.scales = nn.Parameter(_pack_scales(scales.flatten().float()), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.training = linear.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, unpacked now: [out, in] of compute_dtype."""
        shape = [self.out_features, self.in_features]
        scales = _unpack_scales(self.scales, self.in_features * self.out_features // _BLOCK)
        unpacked: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed[:, None], scales, _BLOCK, self.kind, shape, self.compute_dtype
        )
        return unpacked

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        width = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        out: Tensor = _Multiply.apply(input.to(width), self)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _Multiply(torch.autograd.Function):
    """x W^T + b. The backward unpacks the weight again, wherever it then is.

    It saves a tensor of no size, by which the backward asks for what the forward saved: in a block that streams or is
    recomputed that brings the block back first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x.new_empty(0))
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return grad @ ctx.layer.weight.to(grad.dtype), None


@torch.no_grad()
def quantize(
    network: nn.Module,
    kind: Kind = "nf4",
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    skip: Sequence[str] = SKIP,
    device: torch.device | str | None = None,
) -> list[str]:
    """Pack the large linear layers of a network in place, and freeze all of it; the paths of those that were packed.

    One after the other, so that memory shrinks on the way. Adapters are added after it.

    Args:
        kind: nf4, for weights that are normally distributed; or fp4.
        compute_dtype: that weights are unpacked to.
        skip: names, anywhere in the path, of layers to leave as they are. Convolutions are left too.
        device: where to pack a layer, which comes back from there: a card is faster. None: where it is.

    Raises:
        LowVRAMError: bitsandbytes is missing, the kind is not known, or nothing is left to pack.
    """
    if kind not in ("nf4", "fp4"):
        raise LowVRAMError(f"4-bit weights of kind {kind!r} are not known.", "Use nf4 or fp4.")
    _bitsandbytes()
    network.requires_grad_(False)
    done = []
    for path, module in list(network.named_modules()):
        if type(module) is not nn.Linear or not path:
            continue
        names = path.split(".")
        size = module.weight.numel()
        if size < _SMALLEST or size % _BLOCK or any(name in skip or name.startswith("lora_") for name in names):
            continue
        parent = network.get_submodule(".".join(names[:-1]))
        parent._modules[names[-1]] = _packed(module, kind, compute_dtype, device)
        done.append(path)
    if not done:
        raise LowVRAMError(
            f"{type(network).__name__} has no linear layer to pack in 4 bits.", "Leave quantisation off."
        )
    return done


def bytes_of(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, packed or not; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _packed(
    linear: nn.Linear, kind: Kind, compute_dtype: torch.dtype, device: torch.device | str | None
) -> PackedLinear:
    home = linear.weight.device
    if device is not None:
        there = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        there.weight = nn.Parameter(linear.weight.detach().to(device), requires_grad=False)
        there.bias = linear.bias
        linear = there
    packed = PackedLinear(linear, kind=kind, compute_dtype=compute_dtype)
    for parameter in packed.parameters():
        parameter.data = parameter.data.to(home)
    return packed


def _pack_scales(scales: Tensor) -> Tensor:
    """Scales fp32 [n] as bytes: their mean and the steps, fp32, then a signed 8-bit number of steps for each."""
    mean = scales.mean()
    rest = F.pad(scales - mean, (0, -len(scales) % _SCALES)).reshape(-1, _SCALES)
    steps = rest.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [blocks]
    counts = (rest / steps[:, None]).round().to(torch.int8).flatten()[: len(scales)]
    return torch.cat([torch.cat([mean[None], steps]).view(torch.uint8), counts.view(torch.uint8)])


def _unpack_scales(stored: Tensor, count: int) -> Tensor:
    """What `_pack_scales` packed, fp32 [count]."""
    blocks = -(-count // _SCALES)
    floats = stored[: 4 * (1 + blocks)].view(torch.float32)
    counts = stored[4 * (1 + blocks) :].view(torch.int8).float()
    steps = floats[1:].repeat_interleave(_SCALES, output_size=blocks * _SCALES)[:count]
    return floats[0] + counts * steps


def _bitsandbytes() -> None:
    """Have its operators registered."""
    libraries.load("bitsandbytes", "base=nf4, weights of 4 bits,", "pip install bitsandbytes")
