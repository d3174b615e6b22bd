"""Images to train on: a folder, a zip or the built-in drawn faces, and the loader that feeds them.

Importing this package costs nothing; each name is fetched from its file when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.data.dataset import ImageSet
    from lowvram.data.loader import Batch, Loader
    from lowvram.data.open import open_dataset

__all__ = ["Batch", "ImageSet", "Loader", "open_dataset"]

_HOME = {"Batch": "loader", "ImageSet": "dataset", "Loader": "loader", "open_dataset": "open"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
