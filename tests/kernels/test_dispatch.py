"""Which kernels run where."""

import logging
import subprocess
import sys

import pytest
import torch
from commands import environment

from lowvram import Trainer
from lowvram.errors import LowVRAMError
from lowvram.kernels import dispatch
from lowvram.kernels.swiglu import plain, swiglu

CPU = torch.zeros(1)


def test_a_cpu_runs_pytorch_unless_the_interpreter_is_asked_for(monkeypatch) -> None:
    assert not dispatch.runs_triton("auto", CPU)
    assert not dispatch.runs_triton("reference", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.runs_triton("triton", CPU) and not dispatch.runs_triton("auto", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(LowVRAMError, match="kernels=auto"):
        dispatch.runs_triton("triton", CPU)


def test_a_default_for_the_process_stands_in_for_auto() -> None:
    with dispatch.using("triton"):
        assert dispatch.runs_triton("auto", CPU)
        assert not dispatch.runs_triton("reference", CPU)
    with dispatch.using("reference"), dispatch.pretending(True):
        assert not dispatch.runs_triton("auto", CPU)
    assert not dispatch.runs_triton("auto", CPU)
    with pytest.raises(ValueError, match="impl='quick'"):
        dispatch.use("quick")


def test_a_trace_takes_the_kernels_of_the_card_it_stands_for() -> None:
    with dispatch.pretending(True):
        assert dispatch.runs_triton("auto", CPU)
        with dispatch.pretending(False):
            assert not dispatch.runs_triton("auto", CPU)


def test_launches_can_be_taken_and_empty_grids_start_nothing() -> None:
    taken = []
    with dispatch.launches_go_to(lambda *launch: taken.append(launch)):
        dispatch.launch("kernel", (2, 3), CPU, 5, BLOCK=16)
        dispatch.launch("kernel", (2, 0), CPU)
    assert taken == [("kernel", (2, 3), (CPU, 5), {"BLOCK": 16})]


def test_a_registered_operation_traces_and_compiles() -> None:
    x = torch.randn(3, 8)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode, dispatch.pretending(True):
        fake = mode.from_tensor(x).requires_grad_()
        y = swiglu(fake)
        assert y.shape == (3, 4) and type(y.detach()) is type(fake.detach())
        (g,) = torch.autograd.grad(y.sum(), fake)
        assert g.shape == x.shape
    torch.library.opcheck(torch.ops.lowvram.swiglu.default, (x, False))
    compiled = torch.compile(lambda x: swiglu(x, impl="triton") * 2, backend="aot_eager", fullgraph=True)
    wide = x.clone().requires_grad_()
    compiled(wide).sum().backward()
    expected = x.clone().requires_grad_()
    (plain(expected, "silu") * 2).sum().backward()
    torch.testing.assert_close(wide.grad, expected.grad)


def test_a_card_where_triton_fails_is_told_once_and_trains_on(monkeypatch, caplog) -> None:
    def broken(*_, **__):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch, "ones", broken)
    dispatch._tried_on.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="lowvram"):
            assert not dispatch.works_on(0) and not dispatch.works_on(0)
        assert sum("no C compiler" in record.getMessage() for record in caplog.records) == 1
        dispatch._tried_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
        assert not dispatch.works_on(0)
    finally:
        dispatch._tried_on.cache_clear()


def test_a_trace_that_asks_first_does_not_decide_for_all(monkeypatch) -> None:
    def ones(*size, device):
        return torch.full(size, 1.0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch, "ones", ones)
    dispatch._tried_on.cache_clear()
    try:
        with torch._subclasses.fake_tensor.FakeTensorMode():
            assert dispatch.works_on(0)
    finally:
        dispatch._tried_on.cache_clear()


def test_compiling_takes_the_answer_and_not_the_trial(monkeypatch) -> None:
    asked = []

    def tried_on(device):
        asked.append(torch.ones(1).item())  # which would break the graph
        return True

    monkeypatch.setattr(dispatch, "_tried_on", tried_on)
    compiled = torch.compile(lambda x: x + 1 if dispatch.works_on(0) else x, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1 and asked


def test_without_triton_everything_imports_and_runs(tmp_path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from lowvram.kernels import dispatch, swiglu, bias_act, upfirdn2d\n"
        "from lowvram.models.unet import UNet\n"
        "print(swiglu.swiglu(torch.ones(2, 4)).sum().item())\n"
        "try: swiglu.swiglu(torch.ones(2, 4), impl='triton')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()[:2]
    assert float(first) == pytest.approx(4 * 0.7310586)
    assert second.startswith("LowVRAMError") and "can't be imported" in second


def test_kernels_that_can_not_run_are_refused_before_there_is_a_run(tiny, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    try:
        with pytest.raises(LowVRAMError, match="kernels=auto"):
            Trainer(tiny("kernels=triton"), quiet=True)
    finally:
        dispatch.use("auto")
    assert not (tmp_path / "run").exists()
