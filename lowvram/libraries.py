"""Libraries that few need, imported where they are needed."""

import logging
from importlib import import_module
from types import ModuleType

from lowvram.errors import LowVRAMError


def load(name: str, needed_for: str, remedy: str) -> ModuleType:
    """Import a library. What it, or bitsandbytes on its way in, logs of parts that it could do without is not shown.

    Raises:
        LowVRAMError: it can't be imported; with what it is needed for.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return import_module(name)
    except ImportError as error:
        raise LowVRAMError(f"{needed_for} needs {name}, which can't be imported: {error}.", remedy) from error
    finally:
        logger.setLevel(level)
