"""The element-wise halves of adaLN-zero against fp64, by PyTorch and by Triton's interpreter (or the card)."""

import pytest
import torch
from ahead_of_time import ARCHITECTURES, compile_all
from tolerances import close, device
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.kernels import adaln as module
from lowvram.kernels import dispatch
from lowvram.kernels.adaln import adaln, gated_residual, plain, plain_residual

EPS = 1e-6
FUNCTIONS = {"adaln": (adaln, lambda *t: plain(*t, EPS)), "residual": (gated_residual, plain_residual)}


def inputs(name, shape, dtype=torch.float32, narrow=None):
    """x, and what is given for each sample as it comes in a transformer: cut out of one wider tensor. All leaves."""
    torch.manual_seed(0)
    batch, width = shape[0], shape[-1]
    x = torch.randn(shape, dtype=narrow or dtype, device=device()).requires_grad_()
    wider = torch.randn(batch, *[1] * (len(shape) - 2), 6 * width, dtype=dtype, device=device())
    of_sample = [part.requires_grad_() for part in wider.chunk(6, dim=-1)[1:3]]
    if name == "adaln":
        return x, *of_sample
    return x, torch.randn_like(x).requires_grad_(), of_sample[0]


def compare(name, tensors, impl, factor=1.0) -> None:
    """Value and gradients, in the dtypes of what they belong to, with those in fp64."""
    function, meaning = FUNCTIONS[name]
    y = function(*tensors, impl=impl)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = meaning(*(t.reshape(len(t), *[1] * (y.dim() - t.dim()), *t.shape[1:]) for t in wide))
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors, dy)
    expected_grads = torch.autograd.grad(expected, wide, dy.double())
    assert y.dtype == tensors[0].dtype
    close(y, expected, factor=factor)
    for grad, expected_grad, tensor in zip(grads, expected_grads, tensors, strict=True):
        assert grad.dtype == tensor.dtype
        close(grad, expected_grad, factor=factor)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 24), (2, 1, 1031), (2, 3, 2, 5), (5, 3), (0, 4, 8), (2, 0, 8)], ids=str)
def test_value_and_gradients_are_those_of_fp64(impl, name, dtype, shape) -> None:
    compare(name, inputs(name, shape, dtype), impl, factor=2)  # PyTorch rounds narrow types after each operation


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_given_for_a_sample_may_be_wider(impl, name) -> None:
    compare(name, inputs(name, (2, 5, 16), narrow=torch.bfloat16), impl, factor=2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_tokens_are_summed_in_parts(name, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    x, *rest = inputs(name, (2, 45, 300))  # four tokens in a tile, 12 tiles of a sample
    assert module._backward_steps(x) == (2, 8)  # 32 tokens for each program
    compare(name, (x, *rest), "triton", factor=2)
    y = FUNCTIONS[name][0](x, *rest, impl="triton")
    first, second = (torch.autograd.grad(y, rest, torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_strides(impl, name) -> None:
    function, meaning = FUNCTIONS[name]
    shapes = [(8, 3, 4), (8, 4), (8, 4)] if name == "adaln" else [(8, 3, 4), (8, 3, 4), (8, 4)]
    leaves = [torch.randn(shape, device=device()).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def turned(tensors):
        return [t.permute(*reversed(range(t.dim()))) for t in tensors]

    y = function(*turned(leaves), impl=impl)
    expected = meaning(*(t.reshape(4, -1, 8) for t in turned(wide)))
    (dy,) = turned([torch.randn(8, 3, 4, device=device())])
    close(y, expected)
    grads, expected_grads = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        close(grad, expected_grad, factor=2)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_by_differences_and_no_second_ones(impl, name) -> None:
    function, tensors = FUNCTIONS[name][0], inputs(name, (2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: function(*t, impl=impl), tensors, fast_mode=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (g,) = torch.autograd.grad(function(*tensors, impl=impl).sum(), tensors[1], create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_keeps_one_tensor_of_x_s_size(impl, name) -> None:
    x, second, third = inputs(name, (2, 3, 16), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FUNCTIONS[name][0](x, second, third, impl=impl)
    wanted = [x, second] if name == "adaln" else [second, third]
    assert [k.data_ptr() for k in kept[:2]] == [t.data_ptr() for t in wanted]  # scale and gate where they are
    assert [(k.dtype, k.shape) for k in kept[2:]] == ([(torch.float32, (2, 3, 1))] if name == "adaln" else [])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_sees_what_a_card_would_allocate(name) -> None:
    with FakeTensorMode(), dispatch.pretending(True):
        tensors = inputs(name, (2, 64, 16), torch.bfloat16)
        y = FUNCTIONS[name][0](*tensors)
        grads = torch.autograd.grad(y.sum(), tensors)
    assert y.dtype == torch.bfloat16
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in tensors]


def test_tokens_beyond_32_bits_are_addressed_in_64() -> None:
    launches = []
    x = torch.empty(64, 1 << 14, 4096, dtype=torch.float16)  # never touched, so never there
    scale, rstd = torch.empty(64, 4096), torch.empty(64, 1 << 14, 1)
    with dispatch.launches_go_to(lambda *launch: launches.append(launch)):
        adaln(x, scale, scale, impl="triton")
        torch.ops.lowvram.adaln_backward(x, x, scale, rstd)
        gated_residual(x, x, scale, impl="triton")
        torch.ops.lowvram.gated_residual_backward(x, x, scale)
    assert len(launches) == 4
    for kernel, (programs,), arguments, options in launches:
        of_sample, tokens, width = arguments[kernel.arg_names.index("programs") :][:3]
        assert (programs, tokens, width) == (64 * of_sample, 1 << 14, 4096)  # 64 bits: a row's number times the width
        assert of_sample * options.get("STEPS", 1) * options["ROWS"] >= tokens
        assert programs <= (512 if "STEPS" in options else 1 << 20)


@pytest.mark.slow
def test_compiles_for_every_card_into_wide_accesses() -> None:
    records = compile_all(
        """
from lowvram.kernels.adaln import adaln, gated_residual
for dtype, function in ((torch.float16, adaln), (torch.bfloat16, gated_residual)):
    x, h = (torch.randn(2, 64, 384, dtype=dtype, requires_grad=True) for _ in range(2))
    of_sample = torch.randn(2, 1, 6 * 384, dtype=dtype, requires_grad=True).chunk(6, dim=-1)
    tensors = (x, *of_sample[:2]) if function is adaln else (x, h, of_sample[2])
    function(*tensors, impl="triton").sum().backward()
"""
    )
    assert {r["kernel"] for r in records} == {
        "_adaln_kernel",
        "_adaln_backward_kernel",
        "_residual_kernel",
        "_residual_backward_kernel",
    }
    assert {r["architecture"] for r in records} == set(ARCHITECTURES)
    for record in records:  # a thread has 16 elements of a tile, and 4 of what is given for a sample
        reads = 1 if record["kernel"] == "_adaln_kernel" else 2
        assert record["loads"]["128"] >= 2 * reads and record["stores"]["128"] >= 2, record
        assert record["stores"].get("64", 0) == 0 and record["stores"].get("32", 0) <= 1, record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.zeros(2, 5)}, r"scale \(2, 5\) must be \(2, 4\), for x \(2, 3, 4\)"),
        ({"shift": torch.zeros(4)}, r"shift \(4,\) must be"),
        ({"scale": torch.zeros(2, 3, 4)}, r"scale \(2, 3, 4\) must be"),
        ({"x": torch.zeros(4)}, r"x \(4,\) must have"),
        ({"impl": "fast"}, "impl='fast'"),
    ],
)
def test_bad_input_is_named(change, message) -> None:
    given = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(2, 4), "shift": torch.zeros(2, 1, 4)} | change
    with pytest.raises(ValueError, match=message):
        adaln(**given)


def test_a_residual_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"h \(2, 3\) must have x's shape \(3, 3\)"):
        gated_residual(torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(3, 3))
