"""upfirdn2d against zero insertion, padding, convolution and slicing one by one; derivatives; nothing kept."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import close, device

from lowvram.kernels import dispatch
from lowvram.kernels.upfirdn2d import downsample2d, make_filter, plain, upfirdn2d, upsample2d
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu

LAYOUTS = [torch.contiguous_format, torch.channels_last]

small = st.integers(1, 5)
side = st.integers(-2, 5)


factor = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
ARGUMENTS = {"up": factor, "down": factor, "f_size": st.tuples(small, small), "padding": st.tuples(*[side] * 4),
                 "size": st.tuples(st.integers(3, 8), st.integers(3, 8)), "seed": st.integers(0, 99)}  # fmt: skip


def compare_with_plain(impl, up, down, f_size, padding, size, seed):
    """Value and gradient in fp64; both layouts, by the seed."""
    left, right, top, bottom = padding
    (up_y, up_x) = (up, up) if isinstance(up, int) else up
    assume(size[0] * up_y + min(top, 0) + min(bottom, 0) > 0 and size[1] * up_x + min(left, 0) + min(right, 0) > 0)
    assume(size[0] * up_y + top + bottom >= f_size[0] and size[1] * up_x + left + right >= f_size[1])
    torch.manual_seed(seed)
    x = torch.randn(2, 3, *size, dtype=torch.float64, device=device())
    x = x.contiguous(memory_format=LAYOUTS[seed % 2]).requires_grad_()
    f = torch.randn(f_size, dtype=torch.float64, device=device())
    y = upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.7, impl=impl)
    expected = plain(x, f, up=up, down=down, padding=padding, gain=1.7)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


@settings(max_examples=120, deadline=None)
@given(**ARGUMENTS)
def test_equals_the_plain_operations_in_value_and_gradient(**arguments):
    compare_with_plain("reference", **arguments)


@settings(max_examples=6, deadline=None)
@given(**ARGUMENTS)
def test_triton_equals_the_plain_operations_in_value_and_gradient(**arguments):
    compare_with_plain("triton", **arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("resample", [upsample2d, downsample2d])
def test_second_derivative(resample, layout):
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    f = make_filter().double()

    def squared(x):  # the second derivative of a linear operation alone is zero
        return resample(x, f, impl="reference").square()

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


def test_second_derivative_by_triton():
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, device=device(), requires_grad=True)
    f = torch.randn(3, 2, dtype=torch.float64, device=device())

    def squared(x):
        return upfirdn2d(x, f, up=(2, 1), padding=(1, 0, 1, 1), impl="triton").square()

    assert torch.autograd.gradcheck(squared, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(squared, x, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_stylegan2_does_is_as_in_fp64(impl, dtype, layout):
    x = torch.randn(1, 5, 7, 9, dtype=dtype, device=device()).contiguous(memory_format=layout).requires_grad_()
    f = make_filter().to(device())
    for settings_ in ({"padding": (2, 2, 2, 2)}, {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}):
        y = upfirdn2d(x, f, impl=impl, **settings_)
        wide = x.detach().double().requires_grad_()
        expected = plain(wide, f, **settings_)
        dy = torch.randn_like(y)
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        close(y, expected, factor=2)
        (dx,) = torch.autograd.grad(y, x, dy)
        close(dx, torch.autograd.grad(expected, wide, dy.double())[0], factor=2)


def test_triton_takes_any_strides_and_no_images():
    f = make_filter().to(device())
    x = torch.randn(2, 3, 6, 5, device=device())[:, ::2].transpose(2, 3)
    close(upsample2d(x, f, impl="triton"), plain(x.double(), f, up=2, padding=(2, 1, 2, 1), gain=4.0))
    assert downsample2d(x[:0], f, impl="triton").shape == (0, 2, 2, 3)


def test_resampling_keeps_brightness_and_size():
    x = torch.full((1, 2, 16, 16), 0.5)
    assert upsample2d(x, make_filter()).shape == (1, 2, 32, 32)
    torch.testing.assert_close(upsample2d(x, make_filter())[:, :, 4:-4, 4:-4], torch.full((1, 2, 24, 24), 0.5))
    assert downsample2d(x, make_filter()).shape == (1, 2, 8, 8)
    torch.testing.assert_close(downsample2d(x, make_filter())[:, :, 2:-2, 2:-2], torch.full((1, 2, 4, 4), 0.5))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_activation_is_kept(impl):
    kept = []
    x = torch.randn(2, 3, 8, 8, device=device(), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        upsample2d(x, make_filter().to(device()), impl=impl)
    assert sum(kept) <= 16  # the filter


def test_batches_beyond_32_bits_are_addressed_in_64():
    launches = []
    x = torch.empty(1 << 11, 16, 256, 256, dtype=torch.float16)  # 2^31 elements, never touched, so never there
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        upfirdn2d(x, make_filter(), padding=(2, 2, 2, 2), impl="triton")
    ((_, (programs,), arguments, options),) = launches
    _, _, y, channels, _, _, out_height, out_width, cells_y, cells_x, blocks, *_ = arguments
    assert y.shape == (1 << 11, 16, 257, 257) and (out_height, out_width) == (257, 257)
    assert cells_y * options["CELL_Y"] >= 257 and cells_x * options["CELL_X"] >= 257
    assert programs == blocks << 11 and blocks * options["BLOCK"] >= channels * cells_y * cells_x
    assert channels * out_height * out_width < 2**31  # within an image 32 bits do; its beginning is computed in 64


def test_what_is_too_large_for_triton_runs_in_pytorch():
    with pytest.raises(ValueError, match="too large for the Triton kernel"):
        upfirdn2d(torch.zeros(1, 1, 9, 9, device=device()), torch.zeros(9, 9, device=device()), impl="triton")
    launches = []
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)), dispatch.using("triton"):
        assert upfirdn2d(torch.ones(1, 1, 9, 9), torch.ones(9, 9)).item() == 81
    assert not launches


def test_compiles_for_every_card_into_wide_accesses_that_load_each_pixel_once():
    records = compile_all(
        """
from lowvram.kernels.upfirdn2d import make_filter, upfirdn2d, upsample2d
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu
f = make_filter()
x = torch.empty(2, 64, 32, 32, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
upfirdn2d(x, f, padding=(1, 1, 1, 1), gain=4.0, impl="triton")
upsample2d(x.bfloat16(), f, impl="triton")
upsample2d(torch.empty(2, 3, 32, 32), f, impl="triton")
"""
    )
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    taps = 16  # each loaded once, by itself
    channels_last = [r for r in records if r["stores"] == {"128": 4}]
    assert len(channels_last) == 2 * len(ARCHITECTURES)
    pixels = {r["loads"]["128"] for r in channels_last}
    assert pixels == {5 * 5, 3 * 3}  # for 2 x 2 pixels of the result, 8 channels at a time
    assert all(r["loads"].get("32") == taps for r in channels_last)
    contiguous = [r for r in records if r not in channels_last]
    assert [r["loads"] for r in contiguous] == [{"32": 2 * 3 * 3 + taps}] * len(ARCHITECTURES)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        upfirdn2d(torch.zeros(3, 4, 4), make_filter())
    with pytest.raises(ValueError, match="up=0"):
        upfirdn2d(torch.zeros(1, 3, 4, 4), make_filter(), up=0)
    with pytest.raises(ValueError, match="smaller than f"):
        upfirdn2d(torch.zeros(1, 3, 4, 3), make_filter())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_autocast_changes_no_dtype(impl) -> None:
    x = torch.randn(1, 2, 8, 8)
    with cuda_autocast_on_cpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert upfirdn2d(x, make_filter(), up=2, padding=(2, 1, 2, 1), impl=impl).dtype == torch.float32
