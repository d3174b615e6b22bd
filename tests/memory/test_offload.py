"""Offloaded activations: bit-equal gradients of every order, less memory by a stated number of bytes, and copies that
are right in whatever order a card would do them."""

import contextlib
import random
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from lowvram.memory import host
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

    def finish(self) -> None:
        """Do what nobody waited for."""
        for lane in self.lanes.values():
            while lane:
                self._run(lane)

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
    with unset_fake_temporarily():
        seeds = torch.arange(4)  # their values are read
    ws = g.mapping(torch.randn(4, 16))
    images = g.synthesis(ws, noise_mode="random", noise_seeds=seeds)
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


@pytest.mark.parametrize(
    ("step", "least_saved"), [(gan_step, 160 * KIB), (r1_step, 360 * KIB), (path_length_step, 360 * KIB)]
)
def test_stylegan2_needs_less_real_and_fake_alike(step, least_saved):
    plain, fewer = live_peak(step), live_peak(step, make_offload(min_bytes=2 * KIB))
    with FakeTensorMode():
        assert live_peak(step) == plain
        assert live_peak(step, make_offload(min_bytes=2 * KIB)) == fewer
    assert plain - fewer >= least_saved


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
        (g,) = torch.autograd.grad((x * 2).sin().sum(), x, create_graph=True)  # saves 2x, and 2x again for its cosine
    assert offload.host_bytes == offload.peak_host_bytes == 4000 + 4  # and a number
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
    assert offload.host_bytes == 2 * 400
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


def test_memory_taken_away_while_it_leaves_is_an_error():
    """As FSDP does with the weights of a block after its forward, unless it is told not to."""
    x, weight = torch.randn(100, requires_grad=True), torch.ones(100)
    offload = make_offload("late")
    with offload:
        y = x * weight
        weight.untyped_storage().resize_(0)
        weight.untyped_storage().resize_(400)
        weight.fill_(1)
    with pytest.raises(RuntimeError, match="memory freed"):
        y.sum().backward()


def test_a_failed_allocation_leaves_nothing_behind(monkeypatch):
    params, _ = conv_step()
    offload, allocate, calls = make_offload(), host.empty_like, []

    def fail_late(tensor: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 7:
            raise RuntimeError("out of memory")
        return allocate(tensor)

    monkeypatch.setattr(host, "empty_like", fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        grads_of(conv_step, offload)
    assert offload.host_bytes == 0 and params
    assert_same(grads_of(conv_step, offload), grads_of(conv_step))


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


@LANES
def test_the_tensor_saved_before_is_fetched_ahead_and_let_go_when_passed_over(lanes):
    """Of four saved tensors the last is asked for, and the first."""
    offload = make_offload(lanes, in_flight_bytes=0)
    xs = [torch.randn(128, requires_grad=True) for _ in range(4)]
    with offload:
        ys = [(x * 2).sin().sum() for x in xs]
    with LiveBytes() as memory:
        torch.autograd.grad(ys[3], xs[3])
        assert memory.live_bytes == 512  # that of ys[2]
        torch.autograd.grad(ys[1], xs[1])
        assert memory.live_bytes == 512  # that of ys[0]
        torch.autograd.grad(ys[2], xs[2])
        torch.autograd.grad(ys[0], xs[0])
        assert memory.live_bytes == 0 == offload.host_bytes


def test_a_wrong_guess_does_not_end_fetching_ahead():
    """As in R1: the inner gradient ends with a guess, and the outer one begins far behind it."""
    offload = make_offload()
    x = torch.randn(128, requires_grad=True)
    with offload:
        ys = [(x * 2).sin().sum() for _ in range(12)]
    with LiveBytes() as memory:
        for asked in (1, 11):
            torch.autograd.grad(ys[asked], x)
            assert offload._ahead().number == asked  # they count from 1, so the one before it
        assert memory.live_bytes == 512


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_left_when_graphs_are_dropped(asked):
    """Neither of copies on their way out, nor of one that was fetched ahead; and each copy ends before its memory."""
    offload = make_offload("late")
    with LiveBytes() as memory:
        x = torch.randn(128, requires_grad=True)
        with offload:
            ys = [(x * 2).sin().sum() for _ in range(3)]
        offload._give_back()
        if asked:
            for ref in offload._leaving[:-1]:
                ref().release()
            torch.autograd.grad(ys[2], x)
        del ys, x
        assert offload.host_bytes == memory.live_bytes == 0
    offload._lanes.finish()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("in_flight", [0, 64 << 20])
def test_on_a_card_the_gradients_are_the_same_and_the_peak_falls(in_flight):
    """R1 over 24 activations of 16 MiB, many times that of the weights; the memory of the second run is the first's."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Conv2d(16, 16, 1), nn.Softplus())]).to(device)
    images = torch.randn(16, 16, 128, 128, device=device)  # 16 MiB
    offload = ActivationOffload(device, skip=net.parameters(), in_flight_bytes=in_flight)

    def run(around) -> tuple[list[Tensor], int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = images.clone().requires_grad_()
        with around:
            loss = r1_penalty(net(x).mean((2, 3)).sum(1, keepdim=True), x).mean()
        grads = list(torch.autograd.grad(loss, list(net.parameters())))
        return grads, torch.cuda.max_memory_allocated() - before

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        want, plain = run(contextlib.nullcontext())
        for _ in range(2):
            got, fewer = run(offload)
            assert_same(got, want)
            assert offload.host_bytes == 0
            assert plain - fewer >= 24 * (16 << 20) - in_flight
