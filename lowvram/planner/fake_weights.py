"""Fake tensors in the place of modules' own, and everything put back after."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parameter import is_lazy

from lowvram.errors import LowVRAMError
from lowvram.memory import host


class FakeWeights:
    """Swaps parameters and buffers for fake ones of the same shapes and dtypes, until `undo`.

    Make it where tensors are fake (`subject.fake_card`). Shared tensors stay shared, whatever lists a module keeps of
    its parameters follow (RNNs), and optimizers hold the fakes. `undo` also puts back what the modules themselves and
    their lists, dicts and sets held, so that nothing that runs between, such as caches, leaves a trace.

    Raises:
        LowVRAMError: a tensor is of a kind that can't be made fake: not initialised, sparse, or made of others.
    """

    def __init__(self, networks: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._saved: list[tuple[Any, Any]] = []  # containers, and copies of what they held
        self._fakes: dict[int, Tensor] = {}  # by the address of the real one, which the copies keep alive
        modules = dict.fromkeys(module for network in networks.values() for module in network.modules())
        for module in modules:
            self._save(vars(module))
            for value in vars(module).values():
                self._save(value)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                self._save(group["params"])
        try:
            for name, network in networks.items():
                for path, tensor in (*network.named_parameters(), *network.named_buffers()):
                    self._make(f"{name}.{path}", tensor)
            for container, _ in self._saved:
                self._swap(container)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back."""
        for container, content in self._saved:
            if isinstance(container, dict):
                if not _same(list(container.items()), list(content.items())):
                    container.clear()
                    container.update(content)
            elif isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)

    def _save(self, value: Any) -> None:
        if isinstance(value, dict | list | set):
            self._saved.append((value, value.copy()))

    def _make(self, name: str, tensor: Tensor) -> None:
        if id(tensor) in self._fakes:
            return
        if is_lazy(tensor):
            raise LowVRAMError(f"{name} has no shape yet.", "Run the network once on a small batch.")
        if not host.has_storage(tensor) or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise LowVRAMError(
                f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, which can't be planned for.",
                "Plan with a network of plain tensors, before they are quantised or sharded.",
            )
        with unset_fake_temporarily():  # as moving it to a card would lay it out
            strides = torch.empty_like(tensor, device="meta").stride()
        made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        for key, value in vars(tensor).items():  # marks that optimizers and models leave on parameters
            setattr(made, key, value)
        self._fakes[id(tensor)] = made

    def _swap(self, container: Any) -> None:
        if isinstance(container, set):
            return
        items = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        for key, value in items:
            if isinstance(value, Tensor) and id(value) in self._fakes:
                container[key] = self._fakes[id(value)]


def _same(one: list[tuple[Any, Any]], other: list[tuple[Any, Any]]) -> bool:
    return len(one) == len(other) and all(a[0] is b[0] and a[1] is b[1] for a, b in zip(one, other, strict=True))
