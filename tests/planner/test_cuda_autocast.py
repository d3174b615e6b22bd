"""CUDA's autocast on the CPU: its casts are those of torch's own CUDA kernels, its memory is counted by hand.

Torch's AutocastCUDA kernels run without a card on fake tensors that say they are on one; they are the reference here.
"""

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autocast_cases import CASES, N, rand, with_widths
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from lowvram.memory.tracer import LiveBytes
from lowvram.planner import cuda_autocast
from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu, cuda_operations

HALVES = (torch.bfloat16, torch.float16)
NO_CASE = {
    "binary_cross_entropy",
    "_scaled_dot_product_flash_attention",
    "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell",
}
CARD_BOUND = {"_convolution", "_convolution.deprecated", "gru_cell", "lstm_cell"}  # some torch asks the card how
NAMES = sorted(cuda_operations() - cuda_autocast.ELSEWHERE - NO_CASE)


def overload(name: str) -> Callable[..., Any]:
    base, _, rest = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), rest or "default")


class Casts(TorchDispatchMode):
    """The dtypes of the copies in another dtype, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.dtypes.append(kwargs["dtype"])
        return func(*args, **(kwargs or {}))


@contextmanager
def real_cuda_autocast(dtype: torch.dtype, *, cached: bool = False) -> Iterator[None]:
    """torch.autocast("cuda") without the question whether there is a card."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.set_autocast_cache_enabled(before[2])


def outcome(name: str, args: tuple[Any, ...]) -> Any:
    """The dtypes of the results and of the casts, or the kind of error."""
    with Casts() as casts:
        try:
            out = overload(name)(*args)
        except RuntimeError as error:
            return type(error)
    return [leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], casts.dtypes


def on_cuda(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> Any:
    def on_card(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value

    with FakeTensorMode(), real_cuda_autocast(dtype):
        return outcome(name, tree_map(on_card, args))


def emulated(name: str, args: tuple[Any, ...], dtype: torch.dtype, *, fake: bool) -> Any:
    with ExitStack() as stack:
        if fake:
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            args = tree_map(lambda x: mode.from_tensor(x) if torch.is_tensor(x) else x, args)
        stack.enter_context(cuda_autocast_on_cpu())
        stack.enter_context(torch.autocast("cpu", dtype=dtype, cache_enabled=False))
        return outcome(name, args)


def test_every_operation_of_the_list_has_a_rule_and_a_case() -> None:
    """A torch that knows another operation fails here: give it a rule and a case."""
    ruled = (
        cuda_autocast.NARROW
        | cuda_autocast.WIDE
        | cuda_autocast.WIDE_RESULT
        | cuda_autocast.WIDE_RESULT_BY.keys()
        | cuda_autocast.WIDEST
        | cuda_autocast.BANNED
        | cuda_autocast.ELSEWHERE
    )
    assert cuda_operations() - ruled == set()
    assert set(NAMES) - CASES.keys() == set()
    assert len(NAMES) > 100


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_casts_are_those_of_cuda(name: str, half: torch.dtype) -> None:
    wide = torch.float32
    for dtypes in ((wide,), (half,), (wide, half), (half, wide), (torch.float64,)):
        args = with_widths(CASES[name], dtypes)
        found = emulated(name, args, half, fake=True)
        if name in CARD_BOUND and not torch.cuda.is_available():
            assert torch.float64 in dtypes or {*found[0], *found[1]} <= {half}
            continue
        expected = on_cuda(name, args, half)
        if name == "scaled_dot_product_attention" and found != expected:  # each device has its own way to do it
            assert (found[0], found[1]) == (expected[0], expected[1][: len(found[1])])
        else:
            assert found == expected, dtypes


@pytest.mark.skipif(sys.platform != "linux", reason="each compiler has its order")
def test_casts_come_in_the_order_of_cuda() -> None:
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    for device, autocast in (("cpu", emulation), ("cuda", real_cuda_autocast)):
        shapes: list[tuple[int, ...]] = []
        with FakeTensorMode(), torch.device(device), autocast(torch.bfloat16), Shapes():
            F.linear(rand(2, 3), rand(4, 3), rand(4))
        assert shapes == [(4,), (4, 3), (2, 3)]


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", sorted({*NAMES} - CARD_BOUND))
def test_real_tensors_get_the_same_dtypes(name: str) -> None:
    for dtypes in ((torch.float32,), (torch.bfloat16,)):
        args = with_widths(CASES[name], dtypes)
        found = emulated(name, args, torch.bfloat16, fake=False)
        expected = on_cuda(name, args, torch.bfloat16)
        if isinstance(expected, type):
            assert isinstance(found, type), dtypes  # no kernel for it in 16 bits, here or there
        else:
            assert found[0] == expected[0], dtypes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a card")
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("half", HALVES)
def test_a_card_gives_the_same_dtypes(half: torch.dtype) -> None:
    different = []
    for name in NAMES:
        for dtype in (torch.float32, half):
            args = with_widths(CASES[name], (dtype,))
            with torch.autocast("cuda", dtype=half, cache_enabled=False):
                expected = outcome(name, tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, args))
            found = emulated(name, args, half, fake=True)
            if not isinstance(expected, type) and (isinstance(found, type) or found[0] != expected[0]):
                different.append((name, dtype, found, expected))
    assert different == []


@contextmanager
def emulation(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Iterator[None]:
    with cuda_autocast_on_cpu(), torch.autocast("cpu", dtype=dtype, **{"cache_enabled": False, **kwargs}):
        yield


@contextmanager
def cpu_list(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        yield


def test_what_cuda_refuses() -> None:
    with emulation(), pytest.raises(RuntimeError, match=r"binary_cross_entropy is refused .*with_logits"):
        F.binary_cross_entropy(rand(N), rand(N))
    with cuda_autocast_on_cpu():
        assert F.binary_cross_entropy(rand(N), rand(N)).dtype is torch.float32  # without autocast it may
    for widths in ((torch.float16, torch.float16), (torch.float16, torch.float32)):
        with emulation(), pytest.raises(RuntimeError, match=r"dot.* of torch\.float16 .* to torch\.bfloat16"):
            torch.dot(rand(N).to(widths[0]), rand(N).to(widths[1]))
    with emulation():
        assert torch.dot(rand(N), rand(N).half()).dtype is torch.float32  # torch looks from left to right


def test_what_only_the_cpu_casts_is_left_alone() -> None:
    mixed = [rand(N), rand(N).bfloat16()]
    images = rand(1, 1, 8, 8).bfloat16()
    with cpu_list():
        assert F.pad(images, (1, 1, 1, 1), mode="reflect").dtype is torch.float32
    with emulation():
        assert F.pad(images, (1, 1, 1, 1), mode="reflect").dtype is torch.bfloat16
        assert torch.cat(mixed).dtype is torch.float32
        assert torch.stack(mixed).dtype is torch.float32


class Net(nn.Module):
    """Convolutions round a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.silu(self.norm(self.first(x))))
        return out


def held_bytes(
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], device: str, autocast: Any
) -> tuple[int, int]:
    """Bytes held after a forward pass besides weights and input, and the most that were alive in it."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        net, x = build()
        with LiveBytes() as memory:
            memory.watch(net, x)
            before = memory.live_bytes
            with autocast(torch.bfloat16):
                out = net(x)
            held = memory.live_bytes - before, memory.peak_bytes - before
            del out
    return held


def test_bytes_of_a_group_norm_network() -> None:
    def build() -> tuple[nn.Module, Tensor]:
        return Net(), torch.randn(2, 8, 16, 16)

    size, small = 2 * 8 * 16 * 16, 512
    # Kept: the input in 16 bits, the norm's input and output in 32, the last convolution's input and output in 16;
    # and, of at most 512 bytes each, mean and deviation of the norm, and both convolutions' weights in 16 bits.
    assert held_bytes(build, "cpu", emulation)[0] == (2 + 4 + 4 + 2 + 2) * size + 4 * small
    assert held_bytes(build, "cpu", cpu_list)[0] == (2 + 2 + 2 + 2 + 2) * size + 4 * small
    assert held_bytes(build, "cpu", emulation) == held_bytes(build, "cuda", real_cuda_autocast)


class Block(nn.Module):
    """What image networks are made of, Python's composites among them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(self.net(x), scale_factor=2, mode="bilinear")
        tokens = self.norm(h.flatten(2).transpose(1, 2))
        tokens = self.attention(tokens, tokens, tokens)[0] + tokens @ self.mix
        tokens = torch.einsum("bic,dc->bid", tokens, self.mix)
        scores = (tokens @ tokens.transpose(1, 2)).softmax(-1)
        loss = F.cross_entropy(tokens.flatten(0, 1), torch.zeros(tokens[..., 0].numel(), dtype=torch.int64))
        return loss + torch.linalg.vector_norm(scores @ tokens) + F.mse_loss(h, torch.zeros_like(h)) + h.exp().mean()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("half", HALVES)
def test_bytes_of_composites(half: torch.dtype, cached: bool) -> None:
    def build() -> tuple[nn.Module, Tensor]:
        return Block(), torch.randn(2, 8, 8, 8)

    found = held_bytes(build, "cpu", lambda _: emulation(half, cache_enabled=cached))
    assert found == held_bytes(build, "cuda", lambda _: real_cuda_autocast(half, cached=cached))
    assert found[0] > 1.1 * held_bytes(build, "cpu", lambda _: cpu_list(half))[0]


@pytest.mark.parametrize("fake", [False, True])
def test_gradients(fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else ExitStack():
        torch.manual_seed(0)
        block, x = Block(), torch.randn(2, 8, 4, 4, requires_grad=True)
        with emulation():
            loss = block(x)
        loss.backward()
        leaves = [x, *block.parameters()]
        assert all(leaf.grad is not None and leaf.grad.dtype is torch.float32 for leaf in leaves)
        if fake:
            return
        narrow = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        for leaf in leaves:
            leaf.grad = None
        block(x).backward()
        wide = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        assert 0.95 < F.cosine_similarity(narrow, wide, dim=0) < 1


def test_recomputed_blocks_cast_again() -> None:
    block, x = Net(), rand(1, 8, 4, 4)
    with cuda_autocast_on_cpu():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = checkpoint(block, x, use_reentrant=False)
        out.sum().backward()  # raises if what is recomputed has another dtype
    assert block.first.weight.grad is not None


def state() -> tuple[Any, ...]:
    names = [name for name in dir(torch) if "autocast" in name]
    mode = torch.amp.autocast_mode
    return (
        *(getattr(torch, name) for name in names),
        *(mode._cast, mode.autocast.__init__, torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
        *(torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    )


def norm_dtype() -> torch.dtype:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.group_norm(rand(2, 8, 4).bfloat16(), 2).dtype


def test_undone_at_the_end() -> None:
    before = state()
    assert norm_dtype() is torch.bfloat16
    for _ in range(2):
        with cuda_autocast_on_cpu():
            assert norm_dtype() is torch.float32
            assert state() != before
        assert norm_dtype() is torch.bfloat16
        assert state() == before
    with cpu_list():
        with cuda_autocast_on_cpu():  # the autocast round it goes on
            assert F.group_norm(F.linear(rand(8, 8), rand(8, 8)), 2).dtype is torch.float32
            assert F.linear(rand(8, 8), rand(8, 8)).dtype is torch.bfloat16
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert state() == before


def test_undone_after_an_error() -> None:
    before = state()
    with pytest.raises(ValueError, match="from the step"), emulation():
        raise ValueError("from the step")
    with pytest.raises(RuntimeError, match="refused"), emulation():
        F.binary_cross_entropy(rand(N), rand(N))
    assert state() == before
    assert norm_dtype() is torch.bfloat16


def test_undone_when_it_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no patches")

    before = state()
    with monkeypatch.context() as patched:
        patched.setattr(cuda_autocast, "_patches", fail)
        with pytest.raises(ValueError, match="no patches"), cuda_autocast_on_cpu():
            pass
    assert state() == before
    assert norm_dtype() is torch.bfloat16
    with cuda_autocast_on_cpu():
        assert norm_dtype() is torch.float32


def test_nested_and_overlapping() -> None:
    before = state()
    with cuda_autocast_on_cpu():
        with cuda_autocast_on_cpu():
            assert norm_dtype() is torch.float32
        assert norm_dtype() is torch.float32
    first, second = cuda_autocast_on_cpu(), cuda_autocast_on_cpu()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert norm_dtype() is torch.float32
    second.__exit__(None, None, None)
    assert norm_dtype() is torch.bfloat16
    assert state() == before


def test_no_warning_reaches_the_user() -> None:
    """Torch warns once in a process of a kernel that replaces another."""
    code = """
        import torch
        from lowvram.planner.cuda_autocast import cuda_autocast_on_cpu
        with cuda_autocast_on_cpu(), torch.autocast("cuda"):
            assert torch.nn.functional.group_norm(torch.ones(2, 8).half(), 2).dtype is torch.float32
    """
    command = [sys.executable, "-W", "error:.*verrid", "-W", "error:CUDA", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_users_cuda_autocast() -> None:
    square = rand(8, 8)
    with warnings.catch_warnings(), cuda_autocast_on_cpu():
        warnings.simplefilter("error")
        assert not torch.is_autocast_enabled("cuda")
        with torch.autocast(device_type="cuda"):
            assert torch.is_autocast_enabled("cuda")
            assert torch.is_autocast_enabled()
            assert torch.get_autocast_dtype("cuda") is torch.float16
            assert (square @ square).dtype is torch.float16
            assert F.layer_norm(square.half(), [8]).dtype is torch.float32
            with torch.amp.autocast("cuda", enabled=False):
                assert (square @ square).dtype is torch.float32
            with torch.autocast("cuda:0", dtype=torch.bfloat16), torch.autocast("cuda"):
                assert (square @ square).dtype is torch.bfloat16  # what is round it counts
        assert (square @ square).dtype is torch.float32

        @torch.autocast("cuda", dtype=torch.bfloat16)
        def decorated() -> Tensor:
            return square @ square

        assert decorated().dtype is torch.bfloat16
        torch.set_autocast_enabled("cuda", True)
        assert (square @ square).dtype is torch.float16
        torch.set_autocast_enabled("cuda", False)
        warnings.simplefilter("ignore", FutureWarning)  # of the old name itself
        with torch.cuda.amp.autocast(dtype=torch.bfloat16):
            assert (square @ square).dtype is torch.bfloat16


def test_functions_with_their_own_casts() -> None:
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append((x.dtype, torch.is_autocast_enabled("cuda")))
            return x + x

        @staticmethod
        @torch.amp.custom_bwd(device_type="cuda")
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad + grad

    x = rand(N).bfloat16().requires_grad_()
    with emulation():
        out = Double.apply(x)
        out.sum().backward()
    assert seen == [(torch.float32, False)]
    assert (out.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("cached", [True, False])
def test_bytes_of_the_weight_cache(cached: bool) -> None:
    side, casts = 256, 2 * 256 * 256

    def use(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight) + torch.einsum("ij,jk->ik", x, weight)

    with FakeTensorMode(), cuda_autocast_on_cpu():
        weights, x = [torch.randn(side, side, requires_grad=True) for _ in range(3)], torch.randn(1, side)
        with LiveBytes() as memory, torch.no_grad():
            memory.watch(x, weights)
            before = memory.live_bytes
            with torch.autocast("cuda", cache_enabled=cached):
                for _ in range(2):
                    with torch.autocast("cuda"):  # an inner one keeps the outer one's cache
                        for weight in weights:
                            use(x, weight)
                assert memory.live_bytes - before == (3 * casts if cached else 0)
                with torch.enable_grad():
                    assert use(x, weights[0]).requires_grad  # though cached without gradients
                    use(x, torch.randn(side, side))  # no weight
                    use(x, weights[0] * 1)
                    use(x, torch.randn(side, side)[:].requires_grad_())  # a leaf, but a view
                assert memory.live_bytes - before == (3 * casts if cached else 0)
            assert memory.live_bytes == before
            assert memory.peak_bytes - before >= (3 * casts if cached else casts)


def test_function_modes_do_not_see_the_casts() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x, weight = rand(N), rand(N)
    with emulation(), Seen() as mode:
        torch.mv(torch.outer(x, x), weight).exp()
    assert mode.names == ["outer", "mv", "exp"]
