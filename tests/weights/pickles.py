"""Writes pickles as StyleGAN2 is published in: attributes of modules beside the source of their classes."""

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn


@contextmanager
def _published_names() -> Iterator[tuple[Any, type]]:
    """The modules that such files name, for as long as one is written."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("the reader must not call this")

    class EasyDict(dict):
        pass

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = EasyDict
    parents = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    sys.modules |= parents | {"torch_utils.persistence": persistence, "dnnlib.util": util}
    try:
        yield _reconstruct_persistent_obj, EasyDict
    finally:
        for name in (*parents, "torch_utils.persistence", "dnnlib.util"):
            del sys.modules[name]


class _Persistent:
    """Pickles as a persistent module does."""

    def __init__(self, module: nn.Module, names: tuple[Any, type], kwargs: dict[str, Any] | None = None) -> None:
        self.module, self.names, self.kwargs = module, names, kwargs

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        reconstruct, easy_dict = self.names
        attributes = self.module.__dict__
        children = OrderedDict((k, _Persistent(v, self.names)) for k, v in attributes["_modules"].items())
        state = {
            "training": True,
            "_parameters": attributes["_parameters"],
            "_buffers": attributes["_buffers"],
            "_modules": children,
            "_init_args": (),
            "_init_kwargs": easy_dict(_easy(self.kwargs or {}, easy_dict)),
        }
        name = {"Mapping": "MappingNetwork"}.get(type(self.module).__name__, type(self.module).__name__)
        source = "raise SystemExit('executed')"
        return reconstruct, (easy_dict(type="class", version=6, module_src=source, class_name=name, state=state),)


def _easy(values: dict[str, Any], easy_dict: type) -> dict[str, Any]:
    return {k: easy_dict(_easy(v, easy_dict)) if isinstance(v, dict) else v for k, v in values.items()}


def write(path: Path, networks: dict[str, tuple[nn.Module, dict[str, Any]]], **others: Any) -> Path:
    """Write networks, each with the arguments that its class had, as the published training script does."""
    with _published_names() as names, path.open("wb") as file:
        content = {name: _Persistent(network, names, kwargs) for name, (network, kwargs) in networks.items()}
        pickle.dump({**content, "augment_pipe": None, **others}, file)
    return path
