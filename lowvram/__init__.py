"""Train and fine-tune image generators on the 6 to 8 GB card you own.

    from lowvram import Trainer, load_recipe

    trainer = Trainer(load_recipe("faces64", ["batch=8"]))
    trainer.fit()
    images = trainer.sample(16, seed=0)     # uint8 [16, 3, 64, 64]

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowvram.config import load_recipe
    from lowvram.errors import LowVRAMError
    from lowvram.memory.policy import MemoryPolicy
    from lowvram.phase import MicroBatch, Phase
    from lowvram.planner.own import plan_memory
    from lowvram.tasks import load_run
    from lowvram.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "LowVRAMError": "errors",
    "MemoryPolicy": "memory.policy",
    "MicroBatch": "phase",
    "Phase": "phase",
    "Trainer": "trainer",
    "load_recipe": "config",
    "load_run": "tasks",
    "plan_memory": "planner.own",
}

__all__ = ["LowVRAMError", "MemoryPolicy", "MicroBatch", "Phase", "Trainer", "load_recipe", "load_run", "plan_memory"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
    return getattr(import_module(f"lowvram.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
