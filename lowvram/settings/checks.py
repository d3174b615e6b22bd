"""Checks that settings share, each an error that names the setting, its value and the remedy."""

import re
from difflib import get_close_matches
from typing import Any

from lowvram.errors import LowVRAMError

_UNITS_BYTES = {"gb": 2**30, "gib": 2**30, "mb": 2**20, "mib": 2**20}


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a size such as "6GB", which means 6 x 2^30 bytes as on a card's box; a bare number is refused."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or (match[2] and match[2].lower() not in _UNITS_BYTES):
        raise LowVRAMError(
            f"{name}={text} is not a size.", f"Write it with its unit, such as {name}=6GB or {name}=5500MB."
        )
    if not match[2]:
        raise LowVRAMError(f"{name}={text} has no unit.", f"Write {name}={match[1]}GB.")
    size_bytes = int(float(match[1]) * _UNITS_BYTES[match[2].lower()])
    if size_bytes <= 0:
        raise LowVRAMError(f"{name}={text} must be above 0.", f"Write the memory of your card, such as {name}=6GB.")
    return size_bytes


def check_resolution(resolution: int) -> None:
    """Raise LowVRAMError unless the resolution is a power of two from 16 to 1024."""
    if resolution < 16 or resolution > 1024 or resolution & (resolution - 1):
        below = min(1024, max(16, 2 ** (max(resolution, 1).bit_length() - 1)))
        near = sorted({below, min(1024, below * 2)})
        raise LowVRAMError(
            f"resolution={resolution} is not a power of two from 16 to 1024.", f"Use {' or '.join(map(str, near))}."
        )


def nearest(name: str, names: list[str]) -> str:
    """A phrase with the names most like `name`, for an error's remedy."""
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(sorted(names))}."


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LowVRAMError(f"{name}={value} is not known.", f"Use one of {', '.join(allowed)}.")


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise LowVRAMError(f"{name}={value} is too small.", f"Use {least} or more.")


def fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise LowVRAMError(f"{name}={value} must lie in [0, 1].", "Give it as a fraction, such as 0.5.")


def near_multiple(value: int, group: int) -> str:
    below = value // group * group
    return " or ".join(str(n) for n in (below, below + group) if n > 0)


def divisor(value: int, at_most: int) -> int:
    return max(n for n in range(1, at_most + 1) if value % n == 0)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
