"""The progress bar of whatever takes long outside training."""

import sys
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0  # where the bar goes to a file, each update is a line of its own


def bar(total: int, what: str, unit: str, *, shown: bool = True) -> Any:
    """A bar on stderr over `total` units: moving on a terminal, a line now and then elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        disable=not shown,
        leave=not terminal,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else _SECONDS_BETWEEN_LINES,
    )


def say(message: str) -> None:
    """Print a line, above the bar if there is one."""
    tqdm.write(f"lowvram: {message}", file=sys.stderr)
