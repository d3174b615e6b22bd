"""The choice of attention; xformers is a stand-in that keeps to its published layouts and demands."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowvram.errors import LowVRAMError
from lowvram.memory import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class LowerTriangularMask:
    """What xformers calls a causal bias, from the upper left."""


class FakeOps(ModuleType):
    """xformers.ops on the CPU: [B, L, H, D] layouts, a bias of the full shape [B, H, L, S] with aligned rows."""

    LowerTriangularMask = LowerTriangularMask

    def __init__(self) -> None:
        super().__init__("xformers.ops")
        self.calls: list[SimpleNamespace] = []

    def memory_efficient_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | LowerTriangularMask | None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        self.calls.append(SimpleNamespace(p=p, bias=attn_bias, dtype=query.dtype))
        (batch, length, heads, depth), keys = query.shape, key.size(1)
        assert query.dtype == key.dtype == value.dtype
        assert key.shape == (batch, keys, heads, depth)
        assert value.shape[:3] == (batch, keys, heads)
        scores = torch.einsum("blhd,bshd->bhls", query, key) * (depth**-0.5 if scale is None else scale)
        if isinstance(attn_bias, LowerTriangularMask):
            scores = scores.masked_fill(~torch.ones(length, keys, dtype=torch.bool).tril(), float("-inf"))
        elif attn_bias is not None:
            assert attn_bias.shape == (batch, heads, length, keys)
            assert attn_bias.dtype == query.dtype
            assert attn_bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
            scores = scores + attn_bias
        return torch.einsum("bhls,bshd->blhd", F.dropout(scores.softmax(-1), p), value)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    package, module = ModuleType("xformers"), FakeOps()
    package.ops = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return module


def tensors(*shapes: tuple[int, ...]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


BOOL = torch.tensor([[True, False, True, True, False, True, True]])  # [1, S]
CASES = [
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), {}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"scale": 0.3}),
    (((2, 3, 7, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"is_causal": True}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"is_causal": True}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"attn_mask": BOOL.expand(5, 7)}),
    (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"attn_mask": BOOL.expand(2, 1, 1, 7)}),
    (((2, 3, 5, 8), (2, 3, 8, 8), (2, 3, 8, 8)), {"attn_mask": torch.linspace(-1, 1, 3 * 5 * 8).view(3, 5, 8)}),
    (((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {"enable_gqa": True}),
    (((4, 5, 8), (4, 7, 8), (4, 7, 8)), {}),
    (((5, 8), (7, 8), (7, 8)), {"attn_mask": BOOL.expand(5, 7)}),
    (((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)), {"attn_mask": BOOL.expand(2, 1, 1, 1, 7)}),
]


@pytest.mark.parametrize(("shapes", "options"), CASES)
def test_xformers_agrees_with_torch(
    ops: FakeOps, shapes: tuple[tuple[int, ...], ...], options: dict[str, object]
) -> None:
    inputs = list(tensors(*shapes))
    expected = F.scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    assert not ops.calls
    with attention.using("xformers"):
        out = F.scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
        grads = torch.autograd.grad((out * weights).sum(), inputs)
    assert len(ops.calls) == 1
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)
    F.scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
    assert len(ops.calls) == 1  # not outside


def test_xformers_gets_dropout_and_autocasts_dtype(ops: FakeOps) -> None:
    q, k = tensors((1, 2, 4, 8), (1, 2, 4, 8))
    with attention.using("xformers"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k.double(), q, torch.zeros(4, 4), 0.25)
    assert (ops.calls[0].p, ops.calls[0].dtype, out.dtype) == (0.25, torch.bfloat16, torch.bfloat16)


def test_xformers_refuses_what_torch_refuses(ops: FakeOps) -> None:
    (q,) = tensors((1, 2, 4, 8))
    with attention.using("xformers"), pytest.raises(ValueError, match="not both"):
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(4, 4), is_causal=True)


def test_xformers_in_a_recomputed_block(ops: FakeOps) -> None:
    (q,) = tensors((1, 2, 4, 8))
    with attention.using("xformers"):
        out = checkpoint(lambda x: F.scaled_dot_product_attention(x, x, x), q, use_reentrant=False)
        out.sum().backward()
    assert len(ops.calls) == 2


def test_choices_nest_and_end_with_an_error(ops: FakeOps) -> None:
    own = F.scaled_dot_product_attention
    (q,) = tensors((1, 2, 4, 8))
    with pytest.raises(KeyError), attention.using("xformers"):
        with attention.using("xformers"):
            F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q)
        raise KeyError
    assert len(ops.calls) == 2
    assert F.scaled_dot_product_attention is own


@pytest.mark.parametrize("choice", ["xformers", "math"])
def test_layers_in_evaluation_are_not_passed_by(ops: FakeOps, choice: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with attention.using(choice):
        assert not torch.backends.mha.get_fastpath_enabled()
        out = layer(x)
    assert torch.backends.mha.get_fastpath_enabled()
    assert len(ops.calls) == (choice == "xformers")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("choice", "second_order"), [("sdpa", True), ("math", True), ("math", False)])
def test_second_derivatives(choice: str, second_order: bool) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in tensors((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    with attention.using(choice, second_order=second_order):
        assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, (q, k, v))


def test_fused_attention_has_none() -> None:
    """Why sdpa is not left to choose in those phases."""
    (q,) = tensors((1, 1, 4, 8))
    with attention.using("sdpa"):
        (grad,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            grad.sum().backward()


def test_what_cannot_be_honoured(ops: FakeOps) -> None:
    for choice in ("sdpa", "math"):
        for second_order in (False, True):
            attention.check(choice, CPU, second_order)
    with pytest.raises(LowVRAMError, match="attention=flash"):
        attention.check("flash", CPU, False)
    with pytest.raises(LowVRAMError, match="attention=flash"), attention.using("flash"):
        pass
    for device in (CPU, CUDA):
        with pytest.raises(LowVRAMError, match=r"second derivatives.*\n.*attention=sdpa"):
            attention.check("xformers", device, True)
    with pytest.raises(LowVRAMError, match="second derivatives"), attention.using("xformers", second_order=True):
        pass
    with pytest.raises(LowVRAMError, match="no kernel for the cpu"):
        attention.check("xformers", CPU, False)


def test_xformers_is_tried(ops: FakeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_probe", lambda device, dtype: torch.zeros(1, 16, 1, 32, requires_grad=True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2060")
    attention.check("xformers", CUDA, False)
    assert len(ops.calls) == 1

    def refuse(*args: object, **options: object) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs ...")

    monkeypatch.setattr(ops, "memory_efficient_attention", refuse)
    with pytest.raises(
        LowVRAMError, match=r"RTX 2060 in torch.float16: No operator found.*\n +Use memory.attention=sdpa"
    ):
        attention.check("xformers", CUDA, False)


def test_xformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(LowVRAMError, match=r"can't be imported.*\n.*pip install xformers"):
        attention.check("xformers", CUDA, False)
    with pytest.raises(LowVRAMError, match="can't be imported"), attention.using("xformers"):
        pass


def test_xformers_whose_kernels_do_not_load(ops: FakeOps) -> None:
    sys.modules["xformers"]._cpp_lib = SimpleNamespace(_cpp_library_load_exception=OSError("undefined symbol"))  # type: ignore[attr-defined]
    with pytest.raises(LowVRAMError, match="do not load beside torch"):
        attention.check("xformers", CUDA, False)
