"""State of the global random number generators, for checkpoints.

Training draws no number from them (see lowvram.seeded); they are kept for a user's own code between steps.
"""

import random
from typing import Any

import numpy as np
import torch


def states(device: torch.device) -> dict[str, Any]:
    """Tensors and JSON numbers that hold the generators of Python, NumPy, torch and the device."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, keys, gauss = random.getstate()
    name, array, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is what users may use
    tensors["numpy"] = torch.from_numpy(np.asarray(array).astype(np.int64))
    numbers = {
        "python": [version, list(keys), gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return {"tensors": tensors, "numbers": numbers}


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `states` gave."""
    tensors, numbers = state["tensors"], state["numbers"]
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, keys, gauss = numbers["python"]
    random.setstate((version, tuple(keys), gauss))
    name, position, has_gauss, cached = numbers["numpy"]
    array = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, array, position, has_gauss, cached))  # noqa: NPY002
