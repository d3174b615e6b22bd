"""bias_act against fp64, by PyTorch and by Triton's interpreter (or the card): value, first and second derivatives."""

import itertools

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.kernels import bias_act_triton, dispatch
from lowvram.kernels.bias_act import bias_act, plain

CASES = list(itertools.product(("linear", "lrelu"), (None, 0.7), (False, True)))
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
GAIN, CLAMP = 1.25, 0.75  # every type holds them


def double(*shape, low=None):
    x = torch.randn(shape, dtype=torch.float64) if low is None else torch.rand(shape, dtype=torch.float64) + low
    return x.to(device()).requires_grad_()


def settled(shape, dtype, act, terms) -> tuple[Tensor, ...]:
    """x, b, scale and noise whose results are well away from zero and from the clamp, so that rounding leaves them on
    their side: of each sign and side of the clamp a quarter."""
    n, c, *space = shape
    size = torch.rand(shape, dtype=torch.float64) * 0.6 + 0.2 + (torch.rand(shape) < 0.5)  # 0.2 to 0.8, 1.2 to 1.8
    sign = torch.where(torch.rand(shape) < 0.5, 1.0, -5.0 if act == "lrelu" else -1.0)  # the slope makes it -1
    x = size * sign * CLAMP / GAIN
    b = torch.randn(c, dtype=torch.promote_types(dtype, torch.float32)) if "b" in terms else None
    scale = (torch.rand(n, c) + 0.5).to(dtype) if "scale" in terms else None
    noise = torch.randn(n, 1, *space).to(dtype) if "noise" in terms else None
    noise = torch.randn(space).to(dtype) if "shared noise" in terms else noise
    if b is not None:
        x = x - b.double().reshape(-1, *[1] * len(space))
    if noise is not None:
        x = x - noise.double()
    if scale is not None:
        x = x / scale.double()[:, :, None, None]
    return tuple(None if t is None else t.to(device()).requires_grad_() for t in (x.to(dtype), b, scale, noise))


def agrees_with_fp64(impl, shape, dtype, act, terms, layout=torch.contiguous_format, **kwargs) -> None:
    """The value and all gradients, by the backward that is run once and by the one that can be differentiated."""
    torch.manual_seed(0)
    inputs = settled(shape, dtype, act, terms)
    wide = [t.detach().double().requires_grad_() if t is not None else None for t in inputs]
    expected = plain(wide[0], wide[1], act, GAIN, CLAMP, *wide[2:])
    dy = torch.randn_like(expected).to(dtype).double()
    wanted = torch.autograd.grad(expected, [t for t in wide if t is not None], dy)

    x, b, scale, noise = inputs
    argument = (x * 1).contiguous(memory_format=layout)
    address = argument.data_ptr()
    y = bias_act(argument, b, act=act, gain=GAIN, clamp=CLAMP, scale=scale, noise=noise, impl=impl, **kwargs)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    assert (y.data_ptr() == address) == kwargs.get("inplace", not y.numel())
    rounds = 4 if impl == "reference" else 1  # after each operation
    close(y, expected, factor=rounds)
    sums = 4 if dtype.itemsize == 2 else 2  # of y's rounding, in the scale's gradient
    for create_graph in (True, False):
        given = [t for t in inputs if t is not None]
        found = torch.autograd.grad(y, given, dy.to(dtype), create_graph=create_graph)
        for actual, want in zip(found, wanted, strict=True):
            close(actual.to(dtype), want, factor=rounds * sums)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_everything_at_once_is_as_in_fp64(impl, layout, dtype) -> None:
    agrees_with_fp64(impl, (2, 5, 9, 7), dtype, "lrelu", "b scale noise", LAYOUTS[layout])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("terms", ["b", "scale", "noise", "b shared noise", "scale shared noise", ""])
def test_any_part_of_it_is_as_in_fp64(impl, layout, terms) -> None:
    agrees_with_fp64(impl, (1, 3, 5, 6), torch.float32, "lrelu", terms, LAYOUTS[layout])
    agrees_with_fp64(impl, (2, 3, 1, 2), torch.float16, "linear", terms, LAYOUTS[layout], inplace=True)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "shape", [(7, 5), (0, 3), (3, 0), (2, 3, 11), (2, 3, 2, 3, 2), (1, 1, 1, 1), (0, 3, 4, 4)], ids=str
)
def test_any_shape_is_as_in_fp64(impl, shape) -> None:
    agrees_with_fp64(impl, shape, torch.float32, "lrelu", "b")
    if len(shape) == 4:
        agrees_with_fp64(impl, shape, torch.float32, "lrelu", "b scale noise", inplace=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_tiles_a_program_and_many_programs_an_image(layout, monkeypatch) -> None:
    monkeypatch.setattr(bias_act_triton, "_TILE", 32)
    monkeypatch.setattr(bias_act_triton, "_TILE_ROW_BYTES", 32)
    monkeypatch.setattr(bias_act_triton, "_PROGRAMS", 2)
    shape = (2, 19, 3, 7)
    made = bias_act_triton._tiles(torch.empty(shape).to(memory_format=LAYOUTS[layout]))
    assert made.tiles > 1 and made.row_blocks > 1 and made.column_blocks > 1
    agrees_with_fp64("triton", shape, torch.float32, "lrelu", "b scale noise", LAYOUTS[layout])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_any_strides(impl) -> None:
    x = torch.randn(4, 3, 2, 5, device=device()).transpose(0, 2).requires_grad_()  # [2, 3, 4, 5]
    b = torch.randn(6, device=device())[::2]
    wide = x.detach().double().requires_grad_()
    y, expected = bias_act(x, b, act="lrelu", impl=impl), plain(wide, b.double(), "lrelu")
    close(y, expected)
    for dy in (
        torch.ones(1, device=device()).expand(y.shape),
        torch.randn(5, 4, 3, 2, device=device()).permute(3, 2, 1, 0),
    ):
        close(*(torch.autograd.grad(r, t, dy.to(r.dtype), retain_graph=True)[0] for r, t in ((y, x), (expected, wide))))


@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 1), (2, 3, 5, 7), (3, 5, 1, 2)])
@pytest.mark.parametrize("act, clamp, bias", CASES)
def test_equals_plain_and_has_both_derivatives(act, clamp, bias, shape) -> None:
    torch.manual_seed(0)

    def f(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=clamp, impl="reference")

    inputs = double(*shape), double(shape[1]) if bias else None
    torch.testing.assert_close(f(*inputs), plain(*inputs, act, 1.3, clamp))
    quickly = len(shape) == 4  # along random directions, in place of every number alone
    assert torch.autograd.gradcheck(f, inputs, fast_mode=quickly)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=quickly)


@pytest.mark.parametrize("act, clamp, bias", CASES)
@pytest.mark.parametrize("noise_shape", [None, (2, 1, 2, 3), (2, 3)])
def test_scale_and_noise_have_both_derivatives(act, clamp, bias, noise_shape) -> None:
    torch.manual_seed(0)

    def f(x, scale, noise, b):
        return bias_act(x, b, act=act, clamp=clamp, scale=scale, noise=noise, impl="reference")

    x, scale, b = double(2, 3, 2, 3), double(2, 3, low=0.5), double(3) if bias else None
    noise = noise_shape and double(*noise_shape)
    torch.testing.assert_close(f(x, scale, noise, b), plain(x, b, act, 1.0, clamp, scale, noise))
    assert torch.autograd.gradcheck(f, (x, scale, noise, b))
    assert torch.autograd.gradgradcheck(f, (x, scale, noise, b), fast_mode=noise is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "act, clamp, terms", [("lrelu", 0.75, "b scale noise"), ("lrelu", None, "b"), ("linear", 0.75, "b")]
)
def test_triton_has_both_derivatives(act, clamp, terms, layout) -> None:
    torch.manual_seed(0)

    def f(x, b, scale=None, noise=None):
        x = (x * 1).contiguous(memory_format=LAYOUTS[layout])
        return bias_act(x, b, act=act, clamp=clamp, gain=1.25, scale=scale, noise=noise, inplace=True, impl="triton")

    inputs = [double(1, 2, 3, 2), double(2)]
    if "scale" in terms:
        inputs += [double(1, 2, low=0.5), double(1, 1, 3, 2)]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("act, clamp, bias", CASES)
def test_inplace_changes_nothing_but_the_memory(act, clamp, bias) -> None:
    torch.manual_seed(0)
    x, b, scale = double(2, 3, 2, 3), double(3) if bias else None, double(2, 3, low=0.5)

    def f(x, b, scale):
        return bias_act(x * 1, b, act=act, clamp=clamp, scale=scale, inplace=True, impl="reference")

    torch.testing.assert_close(f(x, b, scale), plain(x, b, act, clamp=clamp, scale=scale))
    assert torch.autograd.gradcheck(f, (x, b, scale))
    assert torch.autograd.gradgradcheck(f, (x, b, scale), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_narrow_types_keep_the_bias_gradient_wide(impl, dtype, tolerance) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 33, 31, device=device()).to(dtype).requires_grad_()
    b = torch.randn(3, device=device(), requires_grad=True)
    dy = (torch.randn(4, 3, 33, 31, device=device()) + 1).to(dtype)
    y = bias_act(x, b, act="lrelu", gain=2**0.5, clamp=2.0, impl=impl)
    assert y.dtype == dtype
    dx, db = torch.autograd.grad(y, (x, b), dy)
    wide = x.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    expected = plain(*wide, act="lrelu", gain=2**0.5, clamp=2.0)
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    expected_dx, expected_db = torch.autograd.grad(expected, wide, dy.double())
    assert db.dtype == torch.float32
    assert (dx.double() - expected_dx).abs().mean() < 3 * tolerance  # a value may round to the clamp's other side
    torch.testing.assert_close(db.double(), expected_db, rtol=5 * tolerance, atol=1e-2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_scales_gradient_does_not_overflow_where_its_terms_would(impl) -> None:
    x = torch.full((1, 1, 2, 2), 200.0, dtype=torch.float16, device=device())
    scale = torch.ones(1, 1, dtype=torch.float16, device=device(), requires_grad=True)
    dy = torch.tensor([400.0, -400, 0, 1], dtype=torch.float16, device=device()).reshape(1, 1, 2, 2)
    bias_act(x, act="lrelu", clamp=256.0, scale=scale, impl=impl).backward(dy)  # 400 * 200 is beyond fp16
    assert scale.grad.item() == 200


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_gradient_where_clamped_whatever_the_clamp_rounds_to(impl, dtype) -> None:
    x = torch.tensor([[-9.0, 9.0, 0.5]], dtype=dtype, device=device()).requires_grad_()
    for clamp in (0.7, 256 * 0.5**0.5, 1e-3):
        (dx,) = torch.autograd.grad(bias_act(x * 1000, clamp=clamp, impl=impl).sum(), x)
        assert dx.tolist() == [[0, 0, 0]]
    (dx,) = torch.autograd.grad(bias_act(x, clamp=0.7, impl=impl).sum(), x)
    assert dx.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_not_a_number_stays_so(impl) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf")]], device=device())
    y = bias_act(x, act="lrelu", clamp=2.0, impl=impl)
    assert y.isnan().tolist() == [[True, False, False]] and y[0, 1:].tolist() == [2, -2]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_keeps_one_tensor_where_plain_pytorch_keeps_several(impl) -> None:
    x = torch.randn(2, 8, 16, 16, device=device(), requires_grad=True)
    b = torch.randn(8, device=device(), requires_grad=True)

    def saved_bytes(function):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(x * 1)
        return sum(kept.values()) / y.untyped_storage().nbytes()

    assert saved_bytes(lambda x: bias_act(x, b, act="lrelu", gain=1.5, clamp=2.0, impl=impl)) < 1.01
    assert saved_bytes(lambda x: plain(x, b, "lrelu", 1.5, 2.0)) >= 2


def backward_bytes(shape, layout) -> tuple[int, int]:
    """Of the Triton backward's results: dx, and the shares of all three sums."""
    with FakeTensorMode():
        y = torch.empty(shape, dtype=torch.float16).to(memory_format=LAYOUTS[layout])
        scale, noise = y.new_empty(shape[:2]), y.new_empty(shape[0], 1, *shape[2:])
        dx, *sums = torch.ops.lowvram.bias_act_backward(y, y, None, scale, noise, 0.2, 1.0, None, True, True, True)
        assert dx.stride() == y.stride()
        return dx.nbytes, sum(s.nbytes for s in sums)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, size", [(512, 16), (256, 64), (64, 256), (32, 1024)])
def test_sums_take_little_room_and_grow_with_the_batch(layout, channels, size) -> None:
    dx_bytes, sums_bytes = backward_bytes((1, channels, size, size), layout)
    noise_gradient = 4 * size * size  # which is wanted, however small the channels
    assert sums_bytes - noise_gradient < max(150_000, 0.02 * dx_bytes)
    assert backward_bytes((7, channels, size, size), layout) == (7 * dx_bytes, 7 * sums_bytes)


def test_a_trace_without_a_card_sees_the_kernels() -> None:
    with FakeTensorMode(), dispatch.pretending(True):
        x = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        b, scale = torch.empty(3, requires_grad=True), torch.empty(2, 3, requires_grad=True)
        noise = torch.empty(2, 1, 4, 4, requires_grad=True)
        y = bias_act(x * 1, b, act="lrelu", clamp=2.0, scale=scale, noise=noise, inplace=True)
        found = torch.autograd.grad(y.sum(), (x, b, scale, noise), create_graph=True)
        assert [g.shape for g in found] == [t.shape for t in (x, b, scale, noise)]
        found = torch.autograd.grad(y.sum(), (x, b, scale, noise))
        assert [g.shape for g in found] == [t.shape for t in (x, b, scale, noise)]
        assert y.stride() == x.stride() == found[0].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_beyond_32_bits_are_addressed_in_64(layout) -> None:
    launches = []
    x = torch.empty(17, 128, 1024, 1024, dtype=torch.float16, device="meta")
    x = torch.empty_strided(x.shape, x.to(memory_format=LAYOUTS[layout]).stride(), dtype=x.dtype)  # never touched
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        bias_act(x, act="lrelu", inplace=True, impl="triton")
    ((_, (programs,), arguments, options),) = launches
    rows, columns, row_blocks, column_blocks = arguments[7:11]
    assert rows * columns * 17 == x.numel() > 2**31 > rows * columns  # the image's number is taken in 64 bits
    assert row_blocks * options["ROWS"] * options["TILES"] >= rows and column_blocks * options["COLUMNS"] >= columns
    assert programs == 17 * row_blocks * column_blocks


def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(
        """
from lowvram.kernels.bias_act import bias_act
layouts = (torch.contiguous_format, torch.channels_last)
for layout, dtype in zip(layouts, (torch.float16, torch.bfloat16)):
    x = torch.randn(1, 64, 64, 64, dtype=dtype).to(memory_format=layout).requires_grad_()
    b, scale = torch.randn(64, requires_grad=True), torch.rand(1, 64, dtype=dtype, requires_grad=True)
    noise = torch.randn(1, 1, 64, 64, dtype=dtype, requires_grad=True)
    bias_act(x, b, act="lrelu", clamp=256.0, scale=scale, noise=noise, impl="triton").sum().backward()
"""
    )
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    assert len(records) == len(ARCHITECTURES) * 2 * 2
    for record in records:
        maps = 2 if record["kernel"] == "_backward_kernel" else 1  # to read; each thread has 32 bytes of a tile
        loads, stores = record["loads"], record["stores"]
        assert loads["128"] >= 2 * maps and stores["128"] >= 2, record
        # Every other store is a sum's, of which a tile has few.
        assert sum(stores.values()) - 2 <= 4, record


@pytest.mark.parametrize(
    "kwargs",
    [
        {"act": "relu"},
        {"gain": 0.0},
        {"clamp": -1.0},
        {"impl": "cuda"},
        {"b": torch.zeros(4)},
        {"scale": torch.zeros(3)},
        {"noise": torch.zeros(2, 3, 4, 4)},
        {"noise": torch.zeros(4, 1)},
    ],
)
def test_bad_arguments_are_refused(kwargs) -> None:
    with pytest.raises(ValueError):
        bias_act(torch.zeros(2, 3, 4, 4), **kwargs)
