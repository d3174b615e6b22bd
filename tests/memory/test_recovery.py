"""Out of memory: noticed, nothing of the failed try kept alive, and the step redone as if it had not been."""

import gc
import weakref
from collections.abc import Iterator
from types import TracebackType

import pytest
import torch
from torch import Tensor, nn

from lowvram.memory.recovery import OutOfMemory, Snapshot, free_memory, is_out_of_memory, retry, wanted_bytes

CPU = torch.device("cpu")
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 5.79 GiB of which 1.20 GiB is free."
)
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "is_it", "wanted"),
    [
        (torch.OutOfMemoryError(CUDA_MESSAGE), True, 5 * 2**29),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; ...)"), True, 20 * 2**20),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), True, 512),
        (RuntimeError(CPU_MESSAGE), True, 4096),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
            True,
            8,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"), True, None),
        (RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"), False, None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, None),
        (ValueError("CUDA out of memory"), False, None),
        (KeyboardInterrupt(), False, None),
    ],
)
def test_what_counts(error: BaseException, is_it: bool, wanted: int | None) -> None:
    assert is_out_of_memory(error) is is_it
    assert wanted_bytes(error) == wanted


def test_this_torchs_own_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    assert is_out_of_memory(caught.value)
    assert wanted_bytes(caught.value) == 1 << 60


def test_retry_lets_go_before_it_recovers() -> None:
    alive: list[weakref.ref[Tensor]] = []
    errors: list[Exception] = []  # these two as a debugger or a log may hold them
    frames: list[TracebackType | None] = []

    def deeper() -> None:
        saved = torch.ones(8)
        alive.append(weakref.ref(saved))
        raise KeyError("an error before it, with a frame of its own")

    def deep(activation: Tensor) -> None:
        graph = (activation * 2).requires_grad_() * 3
        alive.extend([weakref.ref(activation), weakref.ref(graph)])
        try:
            deeper()
        except KeyError:
            errors.append(torch.OutOfMemoryError(CUDA_MESSAGE))
            raise errors[0]  # noqa: B904 - the context is what is tested

    def run() -> str:
        if not alive:
            activation = torch.ones(8)
            try:
                deep(activation)
            except RuntimeError as error:
                frames.append(error.__traceback__)
                raise
        return "done"

    failures = []

    def recover(failure: OutOfMemory) -> bool:
        assert [ref() for ref in alive] == [None, None, None]
        failures.append(failure)
        return True

    gc.disable()  # dead without the collector's help
    try:
        assert retry(run, recover) == "done"
    finally:
        gc.enable()
    assert failures == [OutOfMemory(message=CUDA_MESSAGE, wanted_bytes=5 * 2**29)]


def test_retry_closes_generators_that_the_failed_try_left() -> None:
    closed = []

    def micro_batches() -> Iterator[int]:
        try:
            yield from range(3)
        finally:
            closed.append(True)

    def run() -> None:
        parts = micro_batches()
        next(parts)
        if not closed:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    def recover(failure: OutOfMemory) -> bool:
        assert closed == [True]
        return True

    retry(run, recover)


def test_retry_of_an_error_in_the_backward() -> None:
    weight = torch.ones(4, requires_grad=True)
    tries = []

    def run() -> Tensor:
        loss = (weight * 2).sum()
        if len(tries) < 2:
            tries.append(loss.grad_fn)
            loss.register_hook(lambda grad: _raise(torch.OutOfMemoryError(CUDA_MESSAGE)))
        loss.backward()
        assert weight.grad is not None
        return weight.grad

    assert retry(run, lambda failure: True).tolist() == [2.0] * 4
    assert len(tries) == 2


def test_retry_passes_other_errors_and_gives_up_when_told() -> None:
    def never(failure: OutOfMemory) -> bool:
        raise AssertionError("not out of memory")

    with pytest.raises(ZeroDivisionError):
        retry(lambda: 1 / 0, never)  # type: ignore[arg-type, return-value]
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.50 GiB"):
        retry(lambda: _raise(torch.OutOfMemoryError(CUDA_MESSAGE)), lambda failure: False)
    with pytest.raises(KeyError):  # what recover raises is what the caller gets
        retry(lambda: _raise(torch.OutOfMemoryError(CUDA_MESSAGE)), lambda failure: _raise(KeyError("clear error")))


def test_free_memory_breaks_cycles() -> None:
    tensor = torch.ones(2)
    cycle: list[object] = [tensor]
    cycle.append(cycle)
    ref = weakref.ref(tensor)
    gc.disable()
    try:
        del tensor, cycle
        assert ref() is not None
        free_memory(CPU)
        assert ref() is None
    finally:
        gc.enable()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("flag", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1  # replaced, not changed in place
        self.nothing = torch.ones(1)
        self.flag.logical_not_()
        return self.norm(x + torch.rand_like(x))


def test_snapshot_redoes_a_step_exactly() -> None:
    torch.manual_seed(0)
    network, plain = Counting(), nn.Linear(2, 2)  # plain: no buffers at all
    own = torch.Generator().manual_seed(5)
    snapshot = Snapshot([network, plain, network], CPU, generators=[own])
    for _ in range(2):  # the copies of the first time are used again
        snapshot.take()
        before = {name: value.clone() for name, value in network.named_buffers()}
        seen = network.seen
        first = network(torch.ones(4, 3)), torch.rand(3, generator=own)
        after = {name: value.clone() for name, value in network.named_buffers()}
        for _ in range(2):
            snapshot.restore()
            assert network.seen is seen
            assert network.nothing is before.get("nothing")
            for name, value in network.named_buffers():
                assert torch.equal(value, before[name]), name
            again = network(torch.ones(4, 3)), torch.rand(3, generator=own)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
        for name, value in network.named_buffers():
            assert torch.equal(value, after[name]), name
        network.nothing = None


def test_snapshot_of_nothing() -> None:
    snapshot = Snapshot([nn.Linear(1, 1)], CPU)
    with pytest.raises(RuntimeError, match="nothing was taken"):
        snapshot.restore()
    snapshot.take()
    value = torch.rand(2)
    snapshot.restore()
    assert torch.equal(torch.rand(2), value)


def _raise(error: BaseException) -> None:
    raise error
