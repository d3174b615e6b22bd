"""Offloaded activations: bit-equal gradients of every order, less memory by a stated number of bytes, and copies that
are right in whatever order a card would do them."""

import contextlib
import random
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lowvram.memory.offload import ActivationOffload
from lowvram.memory.tracer import LiveBytes
from lowvram.models.stylegan2 import Discriminator, Generator
from lowvram.objectives.adversarial import path_length_penalty, path_lengths, r1_penalty

CPU = torch.device("cpu")
KIB = 1024


class LateLanes:
    """Copies as a card may do them: each waits in its lane until somebody waits for it, or for a later one.

    A missing wait reads NaN; memory that is given back before its copy is done raises.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.lanes = {True: [], False: []}
        self.random = random.Random(seed) if seed is not None else None
        self.started = self.late = 0

    def start(self, target: Tensor, source: Tensor, *, to_host: bool, after):
        self.started += 1
        with torch.no_grad():
            target.fill_(float("nan"))
        lane = self.lanes[to_host]
        on_device = weakref.ref((source if to_host else target).untyped_storage())
        on_host = target if to_host else source
        like = (on_host.dtype, len(on_host), source.storage_offset() if to_host else 0)
        lane.append((on_device, on_host, like, after))
        return lane, lane[-1]

    def wait(self, ticket) -> None:
        lane, copy = ticket
        while any(copy is waiting for waiting in lane):
            self._run(lane)

    def done(self, ticket) -> bool:
        lane, copy = ticket
        if self.random is not None and self.random.random() < 0.5:
            self.wait(ticket)
        self.late += (late := any(copy is waiting for waiting in lane))
        return not late

    def _run(self, lane) -> None:
        on_device, on_host, (dtype, n, offset), after = lane.pop(0)
        if after is not None:
            self.wait(after)
        storage = on_device()
        assert storage is not None, "device memory was given back before its copy was done"
        flat = torch.empty(0, dtype=dtype).set_(storage, offset, (n,), (1,))
        with torch.no_grad():
            to_host = lane is self.lanes[True]
            (on_host if to_host else flat).data.copy_(flat if to_host else on_host)


def make_offload(lanes: str = "at once", **options) -> ActivationOffload:
    offload = ActivationOffload(CPU, **{"min_bytes": 1, **options})
    if lanes != "at once":
        offload._lanes = LateLanes(None if lanes == "late" else 3)
    return offload


LANES = pytest.mark.parametrize("lanes", ["at once", "late", "random"])


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = x + self.conv(torch.nn.functional.silu(self.norm(x)))
        x = x * x.sigmoid() * x.mean((2, 3), keepdim=True).expand_as(x)  # an expanded tensor is saved
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=2)  # views of one storage
        attended = (q @ k.transpose(1, 2) / 3).softmax(2) @ v
        return self.head(attended[:, ::3].mean(1))


def r1_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    d = Discriminator(16, channel_base=256, channel_max=16)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    return list(d.parameters()), r1_penalty(d(images), images).mean()


def path_length_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    g = Generator(16, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    ws = g.mapping(torch.randn(4, 16))
    images = g.synthesis(ws, noise_mode="random", noise_seeds=torch.arange(4))
    return list(g.parameters()), path_length_penalty(path_lengths(images, ws, torch.randn_like(images)), 0.1).mean()


def gan_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    g = Generator(16, z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16)
    d = Discriminator(16, channel_base=256, channel_max=16)
    return [*g.parameters(), *d.parameters()], d(g(torch.randn(4, 16))).sum()


def conv_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    net = ConvNet()
    return list(net.parameters()), net(torch.randn(4, 3, 16, 16)).square().sum()


def conv_penalty_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    net = ConvNet()
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    return list(net.parameters()), r1_penalty(net(x), x).mean()


def checkpointed_step() -> tuple[list[nn.Parameter], Tensor]:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.SiLU(), nn.Dropout(0.2)) for _ in range(4)]
    x = torch.randn(4, 3, 16, 16)
    for net in nets:
        x = checkpoint(net, x, use_reentrant=False) + x
    return [p for net in nets for p in net.parameters()], x.square().sum()


STEPS = [conv_step, conv_penalty_step, gan_step, r1_step, path_length_step, checkpointed_step]


def grads_of(step, around=None, *, backward_within: bool = True) -> list[Tensor]:
    with around or contextlib.nullcontext():
        params, loss = step()
        if backward_within:
            loss.backward()
    if not backward_within:
        loss.backward()
    grads = [p.grad for p in params if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    return [loss.detach(), *grads]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


@LANES
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_bit_identical(step, within, lanes):
    offload = make_offload(lanes)
    for _ in range(2):  # it is used again
        assert_same(grads_of(step, offload, backward_within=within), grads_of(step))
        assert offload.host_bytes == 0  # every graph is gone
    assert offload.peak_host_bytes > 8 * KIB


@LANES
def test_a_graph_that_is_kept_gives_the_same_again(lanes):
    torch.manual_seed(0)
    net = ConvNet()
    x = torch.randn(2, 3, 16, 16)
    want = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    offload = make_offload(lanes)
    with offload:
        y = net(x).sum()
    for keep in (True, True, False):
        assert_same(list(torch.autograd.grad(y, list(net.parameters()), retain_graph=keep)), list(want))
    assert offload.host_bytes == 0


@LANES
def test_third_derivatives_and_two_graphs_at_once(lanes):
    def third(x: Tensor) -> list[Tensor]:
        (g,) = torch.autograd.grad((x.sin() * x.exp()).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * x).tanh().sum(), x, create_graph=True)
        other = (x * 2).sigmoid().sum()  # a graph of its own, in between
        return [*torch.autograd.grad((h * h).sum(), x), *torch.autograd.grad(other, x)]

    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    want = third(x)
    with make_offload(lanes):
        assert_same(third(x), want)


def test_late_lanes_are_late_and_find_a_missing_wait():
    """The test's own test: without a wait a copy that has not happened is noticed."""
    offload = make_offload("late", in_flight_bytes=0)
    grads_of(conv_step, offload)
    assert offload._lanes.late > 10 and offload._lanes.started > 20
    broken = make_offload("late", in_flight_bytes=0)
    broken._lanes.wait = lambda ticket: None
    with pytest.raises(AssertionError):
        assert_same(grads_of(conv_step, broken), grads_of(conv_step))


def live_peak(step, around=None) -> int:
    with LiveBytes() as memory, around or contextlib.nullcontext():
        grads = step()[1].backward()
    assert grads is None
    return memory.peak_bytes


def mlp_step() -> tuple[list[nn.Parameter], Tensor]:
    """Ten activations of 64 KiB; weights of 4 KiB each."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(10)]
    x = torch.randn(512, 32)  # 64 KiB
    for layer in layers:
        x = layer(x).sigmoid()
    return [layer.weight for layer in layers], x.sum()


@pytest.mark.parametrize("fake", [False, True])
def test_a_chain_needs_less_by_a_stated_number_of_bytes(fake):
    """Plain: ten results and the input are kept, and in the backward two gradients. Offloaded: the result at work, the
    one fetched ahead, and two gradients; ten of the eleven tensors are saved, and need the host."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        offload = make_offload(min_bytes=64 * KIB)
        saved = live_peak(mlp_step) - live_peak(mlp_step, offload)
        assert saved >= 7 * 64 * KIB
        assert offload.peak_host_bytes == 11 * 64 * KIB  # the input and ten results, each once
        assert offload.host_bytes == 0


@pytest.mark.parametrize(("step", "least_saved"), [(r1_step, 0.35), (path_length_step, 0.35), (gan_step, 0.35)])
def test_stylegan2_needs_less(step, least_saved):
    plain, fewer = live_peak(step), live_peak(step, make_offload(min_bytes=2 * KIB))
    with FakeTensorMode():
        fake = live_peak(lambda: step(), make_offload(min_bytes=2 * KIB)) if step is not path_length_step else fewer
    print(plain, fewer)
    assert fewer <= plain * (1 - least_saved)
    assert fake == fewer


def test_a_tensor_is_copied_once_for_all_its_views():
    offload = make_offload()
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        y = x * 2  # nothing saved but a number
        z = y.sin() + y.t().exp().t() + y[:40].cos().sum() + y.view(-1).square().sum()
    assert offload.peak_host_bytes == 2 * 64 * 64 * 4  # y, and exp's result
    z.sum().backward()
    assert offload.host_bytes == 0


def test_a_small_view_does_not_take_its_storage_along():
    offload = make_offload()
    x = torch.randn(100, 64, requires_grad=True)
    with offload:
        y = x * 2
        z = y[3:5].sin()
    assert offload.host_bytes == 2 * 64 * 4
    z.sum().backward()
    want = torch.zeros(100, 64)
    want[3:5] = (x[3:5] * 2).cos() * 2
    assert torch.equal(x.grad, want.detach())


def test_views_come_back_as_one_device_copy_while_it_is_alive():
    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.t(), x)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            a, b, c = ctx.saved_tensors
            addresses.append({t.data_ptr() for t in (a, b, c)})
            kept.append(a)
            return grad * (a + b.t() + c)

    addresses, kept = [], []
    x = torch.randn(8, 8, requires_grad=True)
    with make_offload():
        y = Two.apply(x)
    y.backward(retain_graph=True)
    y.backward()  # `kept` still holds the copy
    assert len(addresses[0]) == 1 and addresses[0] == addresses[1]
    assert addresses[0] != {x.data_ptr()}


def test_what_came_back_is_not_sent_again():
    """Under create_graph the backward saves tensors that came back from the host; they are there already."""
    offload = make_offload()
    x = torch.randn(1000, requires_grad=True)
    with offload:
        (g,) = torch.autograd.grad((x * 2).sin().sum(), x, create_graph=True)  # saves 2x, then cos(2x) and 2x again
        sent = offload.host_bytes
    assert sent == 2 * 4000
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(h, -(x * 2).sin().detach() * 4)


def test_a_changed_tensor_is_sent_anew():
    offload = make_offload()
    x = torch.randn(100, requires_grad=True)
    buffer = torch.ones(100)
    with offload:
        y = x * buffer
        buffer.mul_(3)
        z = x * buffer
    assert offload.host_bytes == 3 * 400
    (g,) = torch.autograd.grad((y + z).sum(), x)  # plain autograd refuses; the host knows both
    assert torch.equal(g, torch.full((100,), 4.0))


def test_a_tensor_changed_while_it_leaves_is_an_error():
    x = torch.randn(100, requires_grad=True)
    buffer = torch.ones(100)
    for in_flight in (1 << 20, 0):
        offload = make_offload("late", in_flight_bytes=in_flight)
        with offload:
            y = x * buffer
            buffer.mul_(3)
            y.exp()  # something else to send
        with pytest.raises(RuntimeError, match="changed in place"):
            y.sum().backward()


def test_parameters_small_tensors_and_other_devices_stay():
    net = nn.Linear(32, 32)
    x = torch.randn(16, 32)
    offload = make_offload(skip=net.parameters(), min_bytes=1)
    with offload:
        y = net(x.requires_grad_()).sum()
    assert offload.host_bytes == 16 * 32 * 4  # the input alone, no weight
    y.backward()
    want = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    assert_same([p.grad for p in net.parameters()], list(want))
    with make_offload(min_bytes=16 * 32 * 4 + 1, skip=net.parameters()) as high:
        y = net(x).sum()
    assert high.host_bytes == 0 and y.requires_grad
    elsewhere = ActivationOffload(torch.device("meta"), min_bytes=1)
    with elsewhere:
        net(x).sum().backward()
    assert elsewhere.peak_host_bytes == 0


def test_skipped_storages_are_looked_up_at_each_entry():
    weight = nn.Parameter(torch.randn(32, 32))
    offload = make_offload(skip=[weight])
    for _ in range(2):
        weight.data = torch.randn(32, 32)
        with offload:
            y = torch.ones(1, 32, requires_grad=True) @ weight
        assert offload.host_bytes == 32 * 4
        del y


def test_only_so_much_is_in_flight():
    """On a card device memory is held until its copy is done: at most in_flight_bytes and the newest tensor."""
    peaks = {}
    for in_flight in (0, 3 * 64 * KIB, 1 << 30):
        peaks[in_flight] = live_peak(mlp_step, make_offload("late", min_bytes=64 * KIB, in_flight_bytes=in_flight))
    tight, some, all_ = peaks.values()
    assert tight < some < all_
    assert tight <= live_peak(mlp_step, make_offload(min_bytes=64 * KIB)) + 2 * 64 * KIB
    assert all_ >= live_peak(mlp_step) - 64 * KIB


def test_entered_twice_is_an_error_and_an_exception_leaves_it_usable():
    offload = make_offload()
    with offload, pytest.raises(RuntimeError, match="entered already"), offload:
        pass
    with pytest.raises(ValueError, match="stop"), offload:
        raise ValueError("stop")
    assert_same(grads_of(conv_step, offload), grads_of(conv_step))


def test_complex_and_integer_tensors_come_back():
    x = torch.randn(32, dtype=torch.complex64, requires_grad=True)
    index = torch.arange(31, -1, -1)

    def run() -> list[Tensor]:
        y = (x.conj() * x * x.imag)[index].abs().square().sum()
        return list(torch.autograd.grad(y, x))

    want = run()
    with make_offload():
        assert_same(run(), want)


def test_nothing_is_left_when_a_graph_is_dropped_without_a_backward():
    offload = make_offload("late")
    with LiveBytes() as memory:
        with offload:
            params, loss = conv_step()
        del loss, params
        assert offload.host_bytes == 0
        assert memory.live_bytes == 0
