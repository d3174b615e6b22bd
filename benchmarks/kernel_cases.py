"""What benchmarks.kernels runs: each kernel on shapes of our recipes, its meaning in PyTorch, and what else there is.

Shapes are those of one micro-batch, in 16 bits where the recipe computes so. A module is imported when its cases are
asked for, so that one that can't be is no obstacle to the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram.kernels.dispatch import Impl

Inputs = dict[str, Tensor]
Shape = tuple[int, ...]

HALF = torch.float16
BRAIN = torch.bfloat16
WIDE = torch.float32
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel on one set of shapes.

    name: of the shape. shapes: of its inputs, by name, for a number of samples, `batch` of them. Inputs are of `dtype`
    but those named in `fp32`; all are differentiated but those in `constant`; those in `factors` lie about 1. needed:
    what of inputs and "y" a backward can't do without, which counts among the bytes that it must move. element_wise:
    one pass over memory, so that a copy is the measure; a convolution is not. ours, plain: the kernel, and its meaning
    for autograd. others: by name, what else a user would take. tf32: in fp32 PyTorch may compute it in TF32.
    """

    kernel: str
    name: str
    recipe: str
    shapes: Callable[[int], Mapping[str, Shape]]
    batch: int
    ours: Callable[[Inputs, Impl], Tensor]
    plain: Callable[[Inputs], Tensor]
    dtype: torch.dtype
    needed: tuple[str, ...] = ("x",)
    fp32: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    channels_last: bool = False
    element_wise: bool = True
    tf32: bool = False
    others: Mapping[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Kernel, shape and type."""
        layout = ", channels last" if self.channels_last else ""
        return f"{self.kernel} {self.name}, B={self.batch}, {str(self.dtype).removeprefix('torch.')}{layout}"

    def inputs(self, batch: int, device: torch.device) -> Inputs:
        """Normal random numbers, the same each time on a device."""
        generator = torch.Generator(device).manual_seed(0)
        found: Inputs = {}
        for name, shape in self.shapes(batch).items():
            value = torch.randn(shape, generator=generator, device=device)
            value = torch.exp(value / 4) if name in self.factors else value
            value = value.to(WIDE if name in self.fp32 else self.dtype)
            if self.channels_last and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            found[name] = value.requires_grad_(name not in self.constant)
        return found

    def moved_bytes(self, inputs: Inputs, y: Tensor) -> tuple[int, int]:
        """Bytes that forward and backward must move: what is read and what is written, each once."""
        known = {**inputs, "y": y}
        forward = sum(x.nbytes for x in known.values())
        gradients = sum(x.nbytes for x in inputs.values() if x.requires_grad)
        return forward, y.nbytes + sum(known[name].nbytes for name in self.needed) + gradients


def bias_act() -> list[Case]:
    """Bias and activation after the convolutions of StyleGAN2."""
    from lowvram.kernels import bias_act as module

    def case(name: str, recipe: str, channels: int, size: int, *, modulated: bool, dtype: torch.dtype) -> Case:
        clamp = 256.0 if dtype == HALF else None

        def shapes(n: int) -> dict[str, Shape]:
            found: dict[str, Shape] = {"x": (n, channels, size, size), "b": (channels,)}
            return found | ({"scale": (n, channels), "noise": (n, 1, size, size)} if modulated else {})

        def ours(i: Inputs, impl: Impl) -> Tensor:
            scale, noise = i.get("scale"), i.get("noise")
            return module.bias_act(i["x"], i["b"], act="lrelu", clamp=clamp, scale=scale, noise=noise, impl=impl)

        def plain(i: Inputs) -> Tensor:
            return module.plain(i["x"], i["b"], "lrelu", 1.0, clamp, i.get("scale"), i.get("noise"))

        return Case(
            kernel="bias_act",
            name=f"{name} [B, {channels}, {size}, {size}]",
            recipe=recipe,
            shapes=shapes,
            batch=16,
            ours=ours,
            plain=plain,
            dtype=dtype,
            needed=("y",),
            fp32=("b",),
            factors=("scale",),  # a norm's inverse, by which the derivative divides
            channels_last=dtype == HALF,
        )

    return [
        case("synthesis", "faces256", 64, 256, modulated=True, dtype=HALF),
        case("discriminator", "faces256", 64, 256, modulated=False, dtype=HALF),
        case("synthesis", "faces256", 512, 32, modulated=True, dtype=HALF),
        case("synthesis", "faces64", 128, 64, modulated=True, dtype=WIDE),
    ]


def upfirdn2d() -> list[Case]:
    """Resampling of StyleGAN2, and of its augmentation."""
    from lowvram.kernels import upfirdn2d as module

    def case(
        name: str,
        shape: Shape,
        *,
        up: int = 1,
        down: int = 1,
        padding: tuple[int, int, int, int],
        gain: float = 1.0,
        taps: Shape = (4, 4),
        dtype: torch.dtype = HALF,
    ) -> Case:
        return Case(
            kernel="upfirdn2d",
            name=f"{name} [B, {', '.join(map(str, shape))}]",
            recipe="faces256",
            shapes=lambda n: {"x": (n, *shape), "f": taps},
            batch=16,
            ours=lambda i, impl: module.upfirdn2d(
                i["x"], i["f"], up=up, down=down, padding=padding, gain=gain, impl=impl
            ),
            plain=lambda i: module.plain(i["x"], i["f"], up, down, padding, gain),
            dtype=dtype,
            needed=(),
            fp32=("f",),
            constant=("f",),
            tf32=True,
            channels_last=dtype == HALF,
        )

    return [
        case("after up-sampling convolution", (64, 257, 257), padding=(1, 1, 1, 1), gain=4.0),
        case("before strided convolution", (64, 256, 256), padding=(2, 2, 2, 2)),
        case("half the size", (64, 256, 256), down=2, padding=(1, 1, 1, 1)),
        case("twice the size, images", (3, 128, 128), up=2, padding=(2, 1, 2, 1), gain=4.0, dtype=WIDE),
        case("12 taps, twice the width", (3, 268, 268), up=2, padding=(6, 5, 0, 0), taps=(1, 12), dtype=WIDE),
    ]


def conv2d() -> list[Case]:
    """Modulated convolutions of StyleGAN2: most of their time is the convolution's own."""
    from lowvram.kernels import conv2d as module

    def case(channels: int, size: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="conv2d",
            name=f"modulated [B, {channels}, {size}, {size}]",
            recipe="faces256",
            shapes=lambda n: {
                "x": (n, channels, size, size),
                "w": (channels, channels, 3, 3),
                "style": (n, channels),
            },
            batch=16,
            ours=lambda i, impl: module.conv2d(i["x"], i["w"], style=i["style"], padding=1, impl=impl),
            plain=lambda i: module.plain(i["x"], i["w"], i["style"], 1, 1),
            dtype=dtype,
            needed=("x", "w"),
            channels_last=dtype == HALF,
            element_wise=False,
            tf32=True,
        )

    return [case(64, 256, HALF), case(512, 32, HALF), case(512, 16, WIDE)]


def weight_gradient() -> list[Case]:
    """Convolutions of which the weight alone is trained: of a kind of its own on CPUs without AVX-512."""
    from lowvram.kernels import conv2d as module

    return [
        Case(
            kernel="weight_gradient",
            name=f"of a convolution [B, {channels}, {size}, {size}]",
            recipe="faces64",
            shapes=lambda n, c=channels, s=size: {"x": (n, c, s, s), "w": (c, c, 3, 3)},
            batch=4,
            ours=lambda i, impl: module.conv2d(i["x"], i["w"], padding=1, impl=impl),
            plain=lambda i: module.plain(i["x"], i["w"], None, 1, 1),
            dtype=WIDE,
            constant=("x",),
            channels_last=True,
            element_wise=False,
            tf32=True,
        )
        for channels, size in ((128, 64), (512, 16))
    ]


def kernel_energy() -> list[Case]:
    """The norms of kernels, of which demodulation is made: no batch in it."""
    from lowvram.kernels import modulated_conv as module

    return [
        Case(
            kernel="kernel_energy",
            name="[512, 512, 3, 3]",
            recipe="faces256",
            shapes=lambda n: {"w": (512, 512, 3, 3)},
            batch=1,
            ours=lambda i, impl: module.kernel_energy(i["w"], impl=impl),
            plain=lambda i: i["w"].square().sum((2, 3)),
            dtype=WIDE,
            needed=("w",),
        )
    ]


def group_norm_silu() -> list[Case]:
    """Group norm with SiLU in the UNet, and in the autoencoder at full resolution."""
    from lowvram.kernels import group_norm_silu as module

    def case(
        recipe: str, batch: int, channels: int, size: int, groups: int, dtype: torch.dtype, *, last: bool = False
    ) -> Case:
        return Case(
            kernel="group_norm_silu",
            name=f"[B, {channels}, {size}, {size}]",
            recipe=recipe,
            shapes=lambda n: {"x": (n, channels, size, size), "weight": (channels,), "bias": (channels,)},
            batch=batch,
            ours=lambda i, impl: module.group_norm_silu(i["x"], groups, i["weight"], i["bias"], _EPS, impl=impl),
            plain=lambda i: module.plain(i["x"], groups, i["weight"], i["bias"], _EPS),
            dtype=dtype,
            fp32=("weight", "bias"),
            channels_last=last,
            others={
                "torch": lambda i: F.silu(
                    F.group_norm(i["x"], groups, i["weight"].to(i["x"].dtype), i["bias"].to(i["x"].dtype), _EPS)
                )
            },
        )

    return [
        case("faces256_vae", 4, 32, 256, 16, BRAIN),
        case("faces256_vae", 4, 32, 256, 16, BRAIN, last=True),
        case("faces256_ldm", 16, 128, 32, 32, BRAIN),
        case("faces512_ldm", 4, 256, 32, 32, HALF),
    ]


def rms_norm() -> list[Case]:
    """RMS norm of the transformer's text, queries and keys."""
    from lowvram.kernels import rms_norm as module

    def case(name: str, batch: int, shape: Shape, dtype: torch.dtype) -> Case:
        return Case(
            kernel="rms_norm",
            name=f"{name} [B, {', '.join(map(str, shape))}]",
            recipe="faces256_dit",
            shapes=lambda n: {"x": (n, *shape), "weight": shape[-1:]},
            batch=batch,
            ours=lambda i, impl: module.rms_norm(i["x"], i["weight"], _EPS, impl=impl),
            plain=lambda i: module.plain(i["x"], i["weight"], _EPS),
            dtype=dtype,
            fp32=("weight",),
            others={"torch": lambda i: F.rms_norm(i["x"], shape[-1:], i["weight"].to(i["x"].dtype), _EPS)},
        )

    return [
        case("tokens", 64, (256, 768), BRAIN),
        case("queries", 64, (12, 256, 64), BRAIN),
        case("tokens", 16, (256, 768), WIDE),
    ]


def rms_norm_rotate() -> list[Case]:
    """The norm of queries and keys with their rotary positions."""
    from lowvram.kernels import rms_norm_rotate as module

    def case(batch: int, tokens: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="rms_norm_rotate",
            name=f"[B, 12, {tokens}, 64]",
            recipe="faces256_dit",
            shapes=lambda n: {"x": (n, 12, tokens, 64), "weight": (64,), "rotation": (2, tokens, 32)},
            batch=batch,
            ours=lambda i, impl: module.rms_norm_rotate(i["x"], i["weight"], i["rotation"], _EPS, impl=impl),
            plain=lambda i: module.plain(i["x"], i["weight"], i["rotation"], _EPS),
            dtype=dtype,
            fp32=("weight", "rotation"),
            constant=("rotation",),
        )

    return [case(64, 256, BRAIN), case(16, 256, BRAIN)]


def adaln() -> list[Case]:
    """RMS norm with the time's scale and shift, in each block of the transformer."""
    from lowvram.kernels import adaln as module

    def case(batch: int, tokens: int, width: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="adaln",
            name=f"[B, {tokens}, {width}]",
            recipe="faces256_dit",
            shapes=lambda n: {"x": (n, tokens, width), "scale": (n, 1, width), "shift": (n, 1, width)},
            batch=batch,
            ours=lambda i, impl: module.adaln(i["x"], i["scale"], i["shift"], _EPS, impl=impl),
            plain=lambda i: module.plain(i["x"], i["scale"], i["shift"], _EPS),
            dtype=dtype,
            others={
                "torch": lambda i: torch.addcmul(i["shift"], F.rms_norm(i["x"], (width,), None, _EPS), 1 + i["scale"])
            },
        )

    return [case(64, 256, 768, BRAIN), case(16, 256, 768, BRAIN), case(16, 256, 768, HALF)]


def gated_residual() -> list[Case]:
    """What each half of a transformer's block ends with."""
    from lowvram.kernels import adaln as module

    return [
        Case(
            kernel="gated_residual",
            name="[B, 256, 768]",
            recipe="faces256_dit",
            shapes=lambda n: {"x": (n, 256, 768), "h": (n, 256, 768), "gate": (n, 1, 768)},
            batch=64,
            ours=lambda i, impl: module.gated_residual(i["x"], i["h"], i["gate"], impl=impl),
            plain=lambda i: module.plain_residual(i["x"], i["h"], i["gate"]),
            dtype=BRAIN,
            needed=("h",),
            others={"torch": lambda i: torch.addcmul(i["x"], i["gate"], i["h"])},
        )
    ]


def swiglu() -> list[Case]:
    """The gated units of the transformer."""
    from lowvram.kernels import swiglu as module

    def case(batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="swiglu",
            name=f"[B, {tokens}, 2 x {hidden}]",
            recipe="faces256_dit",
            shapes=lambda n: {"x": (n, tokens, 2 * hidden)},
            batch=batch,
            ours=lambda i, impl: module.swiglu(i["x"], impl=impl),
            plain=lambda i: module.plain(i["x"], "silu"),
            dtype=dtype,
        )

    return [case(64, 256, 2048, BRAIN), case(16, 256, 2048, BRAIN), case(16, 256, 2048, WIDE)]


def geglu() -> list[Case]:
    """The gated units of the UNet's transformer blocks, with captions."""
    from lowvram.kernels import swiglu as module

    def case(batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="geglu",
            name=f"[B, {tokens}, 2 x {hidden}]",
            recipe="faces256_text",
            shapes=lambda n: {"x": (n, tokens, 2 * hidden)},
            batch=batch,
            ours=lambda i, impl: module.geglu(i["x"], impl=impl),
            plain=lambda i: module.plain(i["x"], "gelu"),
            dtype=dtype,
        )

    return [case(64, 256, 1024, BRAIN), case(16, 256, 1024, HALF)]


def norm_glu() -> list[Case]:
    """FastGAN's layers, after their convolutions: by PyTorch on every device, made of several passes."""
    from lowvram.kernels import norm_glu as module

    def case(channels: int, size: int, dtype: torch.dtype) -> Case:
        return Case(
            kernel="norm_glu",
            name=f"[B, 2 x {channels}, {size}, {size}]",
            recipe="faces256_fast",
            shapes=lambda n: {"x": (n, 2 * channels, size, size), "bias": (2 * channels,), "noise": (n, 1, size, size)},
            batch=8,
            ours=lambda i, impl: module.norm_glu(i["x"], i["bias"], i["noise"]),
            plain=lambda i: module.plain(i["x"], i["bias"].to(i["x"].dtype), i["noise"].to(i["x"].dtype)),
            dtype=dtype,
            fp32=("bias", "noise"),
            channels_last=dtype == HALF,
            element_wise=False,
        )

    return [case(32, 256, HALF), case(128, 64, HALF)]


CASES: dict[str, Callable[[], list[Case]]] = {
    "bias_act": bias_act,
    "upfirdn2d": upfirdn2d,
    "conv2d": conv2d,
    "weight_gradient": weight_gradient,
    "kernel_energy": kernel_energy,
    "group_norm_silu": group_norm_silu,
    "rms_norm": rms_norm,
    "rms_norm_rotate": rms_norm_rotate,
    "adaln": adaln,
    "gated_residual": gated_residual,
    "swiglu": swiglu,
    "geglu": geglu,
    "norm_glu": norm_glu,
}


def small(cases: list[Case]) -> list[Case]:
    """The same for a look on a CPU: of each kind of shape the smallest, one sample in fp32."""
    found: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: sum(torch.Size(shape).numel() for shape in case.shapes(1).values())):
        found.setdefault(case.name.partition("[")[0], replace(case, batch=1, dtype=WIDE, channels_last=False))
    return list(found.values())
