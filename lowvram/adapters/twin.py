"""A second set of values for a few trained weights: their average, without a second network."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Branch(nn.Module):
    """A node of a tree of weights, which names them as the network does: no function of its own."""

    def plant(self, path: str, child: nn.Module | nn.Parameter) -> None:
        """Put a module or parameter at a path of names with dots between."""
        *names, last = path.split(".")
        branch: nn.Module = self
        for name in names:
            if name not in branch._modules:
                branch.add_module(name, Branch())
            branch = branch.get_submodule(name)
        if isinstance(child, nn.Parameter):
            branch.register_parameter(last, child)
        else:
            branch.add_module(last, child)


class Twin(Branch):
    """Weights of the names, order, shapes, devices and dtypes of `source`, with its values to begin with.

    They lie in no network: `active` lends them to it. So whatever averages them may keep them on the host.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, parameter in source.named_parameters():
            self.plant(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        self.__dict__["_source"] = source  # not as a part of this module

    @contextmanager
    def active(self) -> Iterator[None]:
        """The source's parameters have these values within, on their devices and in their dtypes; no gradients.

        The parameters stay the same objects. What is written to them within is lost.
        """
        parameters = list(self.__dict__["_source"].parameters())
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, twin in zip(parameters, self.parameters(), strict=True):
                parameter.data = twin.detach().to(parameter.device, parameter.dtype)
            with torch.no_grad():
                yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data
