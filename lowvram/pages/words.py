"""Numbers as people read them: three digits that count, and a unit."""

import json
import math
import re
from typing import Any

# What no HTML may hold, as it is or in its script.
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def number(value: float) -> str:
    """Three digits that count, thousands with commas: 0.00123, 12.3, 4,640."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def exact(value: Any) -> str:
    """A value as metrics.jsonl writes it; text as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def six(value: float) -> str:
    """Six digits that count, as metrics are compared."""
    return f"{value:,.6g}"


def count(value: float) -> str:
    """A whole number with commas."""
    return f"{value:,.0f}"


def gigabytes(size_bytes: float) -> str:
    """Bytes in GB of 2^30, as `vram=6GB` is meant, or smaller units below a tenth of one."""
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if size_bytes >= size / 10:
            value = size_bytes / size
            return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{size_bytes:.0f} bytes"


def span(seconds: float) -> str:
    """A length of time: 12 seconds, 5 minutes, 3.4 hours, 12.5 days."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def images(kimg: float) -> str:
    """Thousands of images, as counted in a run."""
    return f"{kimg:,.6g} kimg"


def plain(value: Any) -> str:
    """A setting as it is written on a command line: null, true, [8,16], text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(plain(entry) for entry in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else str(value)
