"""Host memory: marked by storage, and for no longer than the storage lives."""

import gc
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.memory import host


@pytest.fixture(params=["real", "fake"])
def mode(request):
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def test_empty_like_keeps_shape_dtype_and_strides(mode):
    dense = torch.empty(2, 8, 5, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    gaps = torch.empty(4, 10)[:, ::2]
    for tensor in (dense, gaps, torch.empty(()), torch.empty(0, 3)):
        got = host.empty_like(tensor)
        assert (got.shape, got.dtype, got.device.type) == (tensor.shape, tensor.dtype, "cpu")
        assert host.is_host(got) and not host.is_host(tensor)
    assert host.empty_like(dense).stride() == dense.stride()
    assert host.empty_like(gaps).is_contiguous()


def test_copy_of_is_equal_detached_and_apart():
    x = torch.randn(3, 4, requires_grad=True)
    copy = host.copy_of(x)
    assert torch.equal(copy, x) and not copy.requires_grad and copy.data_ptr() != x.data_ptr()


def test_device_copy_leaves_the_host_even_on_the_cpu(mode):
    on_host = host.copy_of(torch.ones(5))
    back = host.device_copy(on_host, torch.device("cpu"))
    assert not host.is_host(back)
    assert back.untyped_storage()._cdata != on_host.untyped_storage()._cdata


def test_views_are_host_memory_and_results_are_not(mode):
    x = host.empty_like(torch.empty(4, 4))
    assert all(host.is_host(v) for v in (x[1:], x.t(), x.view(2, 8), x.detach(), x.add_(1)))
    assert not any(host.is_host(v) for v in (x + 1, x.clone()))


def test_on_host_marks_what_is_new_and_nothing_older(mode):
    old = torch.zeros(4)
    with host.on_host():
        made = [torch.zeros(3), torch.tensor([1.0, 2.0]), old + 1, *torch.ones(4).split(2)]
        shared = [old[1:], old.add_(1), old.view(2, 2), old.detach()]
    assert all(map(host.is_host, made))
    assert not any(map(host.is_host, [*shared, old]))
    assert not host.is_host(torch.zeros(3))
    assert not host.allocating_on_host()


def test_on_host_nests_and_ends_with_an_error():
    with host.on_host():
        with host.on_host():
            pass
        assert host.allocating_on_host() and host.is_host(torch.zeros(1))
    with pytest.raises(RuntimeError, match="stop"), host.on_host():
        raise RuntimeError("stop")
    assert not host.allocating_on_host() and not host.is_host(torch.zeros(1))


def test_on_host_concerns_its_thread_alone():
    seen = []
    with host.on_host():
        thread = threading.Thread(target=lambda: seen.append(host.is_host(torch.zeros(1))))
        thread.start()
        thread.join()
    assert seen == [False]


def test_marks_go_with_the_storage(mode):
    before = len(host._on_host)
    x = host.empty_like(torch.empty(1000))
    view = x[3:]
    del x
    assert len(host._on_host) == before + 1 and host.is_host(view)
    del view
    assert len(host._on_host) == before  # at once, without the garbage collector


def test_a_reused_address_is_not_host_memory():
    """Storages come and go at the same addresses; a stale mark would take some of them for host memory."""
    for _ in range(200):
        host.empty_like(torch.empty(16))
        assert not host.is_host(torch.empty(16))


def test_table_reports_deaths_in_order_and_follows_replaced_values():
    dropped = []
    table = host.StorageTable[str](dropped.append)
    a, b = torch.empty(4), torch.empty(4)
    table.set(a, "first")
    table.set(a[1:], "second")  # the same storage
    table.set(b, "b")
    assert table.get(a) == "second" and len(table) == 2
    view = a.view(2, 2)
    del a
    assert dropped == []
    del view
    assert dropped == ["second"]
    del b
    assert dropped == ["second", "b"] and len(table) == 0


def test_tensors_without_a_storage_are_left_alone():
    sparse = torch.eye(3).to_sparse()
    table = host.StorageTable[int]()
    table.set(sparse, 1)
    assert table.get(sparse) is None and not host.is_host(sparse)
    with host.on_host():
        torch.eye(3).to_sparse()
    gc.collect()
