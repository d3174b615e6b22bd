"""What a call gave is given again, and only to the same call; all else is test_pieces'."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram.planner import quick_fake
from lowvram.planner.quick_fake import QuickFakes


class Quick(TorchDispatchMode):
    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.quick = QuickFakes(fakes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.quick(func, args, kwargs or {})


def form(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return [form(one) for one in x]
    return (x.shape, x.stride(), x.dtype, x.untyped_storage().nbytes()) if isinstance(x, Tensor) else x


def image(**own: Any) -> Tensor:
    return torch.empty(2, 4, 8, 8, **own)


CALLS: dict[str, Callable[[], Any]] = {
    "a convolution": lambda: torch.conv2d(image(), torch.empty(6, 4, 3, 3), padding=1),
    "of channels last": lambda: torch.conv2d(image().to(memory_format=torch.channels_last), torch.empty(6, 4, 1, 1)),
    "a sum, kept": lambda: image().sum((2, 3), keepdim=True),
    "a sum": lambda: image().sum((2, 3)),
    "by a number": lambda: image() * 2,
    "of bools": lambda: image() > 0,
    "of half": lambda: image(dtype=torch.float16) * 2.0,
    "several": lambda: torch.var_mean(image(), dim=(0, 2)),
    "none of three": lambda: torch.ops.aten.convolution_backward(
        image(), image(), torch.empty(4, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    ),
    "from nothing": lambda: torch.zeros(3, 5),
    "into a part": lambda: image()[:, :2].mul_(2),
    "into another": lambda: torch.add(image(), 1, out=image()),
    "a view": lambda: image().transpose(1, 2),
    "a list": lambda: torch.cat([image(), image()], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_time_is_as_the_first(name: str) -> None:
    with FakeTensorMode():
        usual = form(CALLS[name]())
    with FakeTensorMode() as fakes, Quick(fakes) as mode:
        first = form(CALLS[name]())
        asked = mock.Mock(side_effect=mode.quick._run)
        with mock.patch.object(mode.quick, "_run", asked):
            out = CALLS[name]()
        assert first == form(out) == usual
        if name not in ("a view", "of channels last", "into a part"):
            assert not asked.called or all(call.args[0]._schema.name == "aten::empty" for call in asked.mock_calls)


def test_results_are_new_each_time() -> None:
    with FakeTensorMode() as fakes, Quick(fakes):
        x = image()
        one, other = x + 1, x + 1
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
        assert x.mul_(2) is x


def test_other_types_of_numbers_are_other_calls() -> None:
    with FakeTensorMode() as fakes, Quick(fakes):
        whole = torch.ones(3, dtype=torch.int64)
        assert (whole * 2).dtype == torch.int64
        assert (whole * 2.0).dtype == torch.float32
        assert (whole * True).dtype == torch.int64


def test_what_is_made_of_nothing_is_real_where_the_mode_is_put_aside() -> None:
    with FakeTensorMode() as fakes, Quick(fakes):
        assert type(torch.arange(1, 5)) is FakeTensor
        with unset_fake_temporarily():
            assert torch.arange(1, 5).tolist() == [1, 2, 3, 4]
        assert type(torch.arange(1, 5)) is FakeTensor


def test_the_default_type_is_looked_at() -> None:
    with FakeTensorMode() as fakes, Quick(fakes):
        assert torch.zeros(3).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.zeros(3).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_an_operation_that_is_not_known_by_form_goes_the_usual_way() -> None:
    assert quick_fake._sort(torch.ops.aten.nonzero.default) is None
    assert quick_fake._sort(torch.ops.aten.view.default) is None
    assert quick_fake._sort(torch.ops.aten._local_scalar_dense.default) is None
