"""conv2d with its own derivatives against PyTorch's; what it keeps and what it leaves out."""

import itertools

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch.profiler import profile

from lowvram.kernels import dispatch
from lowvram.kernels.conv2d import conv2d, plain
from lowvram.kernels.modulated_conv import kernel_energy
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu

GEOMETRIES = list(itertools.product((1, 2), (0, 1), (False, True)))  # stride, padding, transposed


@pytest.mark.parametrize("stride, padding, transposed", GEOMETRIES)
@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_plain_operations_and_has_both_derivatives(stride, padding, transposed, styled, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(*((3, 2) if transposed else (2, 3)), 3, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, w, torch.randn(2, 3, dtype=torch.float64, requires_grad=True)) if styled else (x, w)

    def f(x, w, style=None):
        return conv2d(x, w, style=style, stride=stride, padding=padding, transposed=transposed)

    expected = plain(*inputs, stride=stride, padding=padding, transposed=transposed)
    torch.testing.assert_close(f(*inputs), expected)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("stride, padding, transposed", GEOMETRIES)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_equal_the_plain_operations_and_have_both_derivatives(stride, padding, transposed, groups):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    out = 8
    w = torch.randn(
        *((4, out // groups) if transposed else (out, 4 // groups)), 3, 3, dtype=torch.float64, requires_grad=True
    )
    options = {"stride": stride, "padding": padding, "transposed": transposed, "groups": groups}
    torch.testing.assert_close(conv2d(x, w, **options), plain(x, w, **options))
    assert torch.autograd.gradcheck(lambda x, w: conv2d(x, w, **options), (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: conv2d(x, w, **options), (x, w), fast_mode=True)


@pytest.mark.parametrize("kernel", [1, 3])
def test_third_derivative_equals_pytorch(kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)

    def third(convolution):
        y = convolution(x, w, padding=kernel // 2).pow(3).sum()
        for _ in range(3):
            dx, dw = torch.autograd.grad(y, (x, w), create_graph=True)
            y = dx.pow(2).sum() + dw.pow(2).sum()
        return y

    torch.testing.assert_close(third(conv2d), third(plain))


def test_the_image_gradient_computes_no_weight_gradient():
    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = conv2d(torch.tanh(x), w, padding=1).sum()
    with profile() as profiled:
        torch.autograd.grad(y, x, create_graph=True)
    names = {event.key for event in profiled.key_averages()}
    assert any("_ConvolveBackward" in name for name in names)
    assert not any("_WeightProxyBackward" in name or "convolution_backward" in name for name in names)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_style_times_x_is_not_kept(impl):
    x = torch.randn(2, 8, 16, 16, device=device(), requires_grad=True) * 1
    w = torch.randn(8, 8, 3, 3, device=device(), requires_grad=True)
    style = torch.randn(2, 8, device=device(), requires_grad=True)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv2d(x, w, style=style, padding=1, impl=impl)
    assert sum(kept.values()) == x.nbytes + w.nbytes + style.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 2, 70, 70), (1, 70, 7, 10), (0, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_modulation_and_its_gradients_are_those_of_fp64(impl, layout, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device()).contiguous(memory_format=layout).requires_grad_()
    style = torch.randn(shape[:2], dtype=dtype, device=device(), requires_grad=True)
    w = torch.eye(shape[1], dtype=dtype, device=device())[:, :, None, None]  # the convolution itself rounds nothing
    y = conv2d(x, w, style=style, impl=impl)
    dy = torch.randn_like(y)
    dx, dstyle = torch.autograd.grad(y, (x, style), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, style)]
    expected = plain(wide[0], w.double(), wide[1])
    wide_dx, wide_dstyle = torch.autograd.grad(expected, wide, dy.double())
    close(y, expected)
    close(dx, wide_dx)
    close(dstyle, wide_dstyle, factor=8)
    if shape[0]:  # each gradient by itself is another way through the code
        close(torch.autograd.grad(conv2d(x, w, style=style.detach(), impl=impl), x, dy)[0], wide_dx)
        close(torch.autograd.grad(conv2d(x.detach(), w, style=style, impl=impl), style, dy)[0], wide_dstyle, factor=8)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_derivatives_by_triton(layout, transposed):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, device=device()).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(3, 3, 3, 3, dtype=torch.float64, device=device(), requires_grad=True)
    style = torch.randn(2, 3, dtype=torch.float64, device=device(), requires_grad=True)

    def f(x, w, style):
        return conv2d(x, w, style=style, stride=1 + transposed, padding=1, transposed=transposed, impl="triton")

    assert torch.autograd.gradcheck(f, (x, w, style), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, w, style), fast_mode=True)


def test_the_backward_of_modulation_makes_no_map_but_its_result():
    """With Triton not even parts of one: what the operations allocate, as a trace for a card counts it."""
    from lowvram.memory.tracer import LiveBytes

    peaks = {}
    for impl in ("reference", "triton"):
        x = torch.randn(8, 16, 32, 32, device=device(), requires_grad=True)
        style = torch.randn(8, 16, device=device(), requires_grad=True)
        w = torch.randn(4, 16, 1, 1, device=device())
        y = conv2d(x, w, style=style, impl=impl)
        dy = torch.randn_like(y)
        with LiveBytes() as live:
            live.watch(x)
            torch.autograd.grad(y, (x, style), dy)
        peaks[impl] = live.peak_bytes / x.nbytes
    assert peaks["triton"] < 2.02  # x, and the gradient by style * x that becomes x's
    assert peaks["reference"] < 2.02 + 1 / 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_beyond_32_bits_are_addressed_in_64(layout):
    launches = []
    x = torch.empty(1 << 12, 16, 256, 256, dtype=torch.float16)  # 2^32 elements, never touched, so never there
    style = torch.empty(1 << 12, 16, dtype=torch.float16)
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        torch.ops.lowvram.modulate(x, style)
        torch.ops.lowvram.modulate_backward(x, x, style, True)
    for _, (programs,), arguments, options in launches:
        channels, pixels, channel_blocks, pixel_blocks = arguments[-4:]
        assert programs == channel_blocks * pixel_blocks << 12
        assert channel_blocks * options["BLOCK_C"] >= channels and pixel_blocks * options["BLOCK_P"] >= pixels
        assert channels * pixels < 2**31  # within an image 32 bits do; its beginning is computed in 64


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (20, 30, 1, 1), (0, 4, 3, 3)], ids=str)
def test_the_energy_of_kernels(impl, shape):
    w = torch.randn(shape, device=device(), requires_grad=True)
    wide = w.detach().double().requires_grad_()
    energy, expected = kernel_energy(w, impl=impl), wide.square().sum((2, 3))
    close(energy, expected)
    d = torch.randn_like(energy)
    close(torch.autograd.grad(energy, w, d)[0], torch.autograd.grad(expected, wide, d.double())[0])
    if len(w):
        wide = wide[:2, :2].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda w: kernel_energy(w, impl=impl), wide, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda w: kernel_energy(w, impl=impl), wide, fast_mode=True)


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses():
    records = compile_all(
        """
from lowvram.kernels.conv2d import conv2d
from lowvram.kernels.modulated_conv import kernel_energy
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu
w = torch.empty(4, 64, 1, 1, dtype=torch.float16, requires_grad=True)
style = torch.empty(2, 64, dtype=torch.float16, requires_grad=True)
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.empty(2, 64, 32, 32, dtype=torch.float16).contiguous(memory_format=layout).requires_grad_()
    conv2d(x, w, style=style, impl="triton").sum().backward()
kernel_energy(torch.empty(64, 64, 3, 3), impl="triton")
"""
    )
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    maps = {"_modulate_kernel": (1, 1), "_modulate_backward_kernel": (2, 1)}  # read, written
    for record in records:
        if record["kernel"] in maps:
            loads, stores = maps[record["kernel"]]
            assert record["loads"]["128"] >= 4 * loads and record["stores"]["128"] == 4 * stores, record
    assert {r["kernel"] for r in records} == {*maps, "_energy_kernel"}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="don't fit"):
        conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 2, 3, 3))
    with pytest.raises(ValueError, match="don't fit"):
        conv2d(torch.zeros(1, 6, 8, 8), torch.zeros(4, 2, 3, 3), groups=3)  # 4 outputs in 3 groups
    with pytest.raises(ValueError, match=r"style \(1, 4\) must be"):
        conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3), style=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="impl='fast'"):
        conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3), impl="fast")


@pytest.mark.parametrize("with_style", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_under_a_cards_autocast_it_computes_in_16_bits_and_has_its_gradients(impl, with_style) -> None:
    x, w = (torch.randn(size, requires_grad=True) for size in ((2, 3, 6, 6), (4, 3, 3, 3)))
    style = torch.randn(2, 3, requires_grad=True) if with_style else None
    with cuda_autocast_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv2d(x, w, style=style, padding=1, impl=impl)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # outside of autocast, as trainings do
    expected = plain(x.detach(), w.detach(), None if style is None else style.detach(), padding=1)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.15)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, w, style) if t is not None)
