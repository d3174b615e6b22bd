"""Text in columns and numbers in words, for tables that a console shows: ASCII, one line each."""

import textwrap
from collections.abc import Sequence

from lowvram.receipt import rates

_LONGEST_NAME = 24
_LABEL = 14  # columns of the words in front: "settings", "smallest card"
_SIGNS = {"\u20ac": "EUR", "\u00a3": "GBP", "\u00a5": "JPY"}  # of currencies that ASCII has not

Column = tuple[tuple[str, ...], str, list[str]]  # header lines, "<" or ">", cells


def ascii_only(said: str) -> str:
    """Text that any console shows as it is meant, on one line."""
    return "".join(c if " " <= c <= "~" else "?" for c in said)


def laid(columns: Sequence[Column], gap: str = "  ") -> list[str]:
    """Columns beside each other, under their headers and a line."""
    done = []
    for headers, side, cells in columns:
        wide = max(map(len, (*headers, *cells)))
        done.append([f"{cell:{side}{wide}}" for cell in (*headers, "-" * wide, *cells)])
    return [gap.join(cells).rstrip() for cells in zip(*done, strict=True)]


def labelled(label: str, said: str, width: int) -> list[str]:
    """A label, and the text in a column of its own beside it."""
    lines = wrapped(said, width - _LABEL - 1)
    return [f"{label if n == 0 else '':<{_LABEL}} {line}" for n, line in enumerate(lines)]


def wrapped(said: str, width: int, indent: str = "") -> list[str]:
    """Broken at spaces, so that settings can be copied; within a word only where it has more than a whole line."""
    return textwrap.wrap(ascii_only(said), width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def clipped(name: str) -> str:
    """A name that columns have room for."""
    name = ascii_only(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 2] + ".."


def gb(size_bytes: int, *, up: bool = False) -> str:
    """Hundredths of 2^30 bytes, without the unit."""
    hundredths = -(-size_bytes * 100 // 2**30) if up else round(size_bytes * 100 / 2**30)
    return f"{hundredths / 100:.2f}"


def three(value: float) -> str:
    """Three digits that count, as far as thousandths."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"


def count_of_hours(hours: float) -> str:
    """Whole hours, of few with a digit that counts: 1,872, 0.3."""
    return f"{hours:,.0f}" if hours >= 9.5 else f"{hours:.2g}"


def duration(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def energy(kwh: float) -> str:
    """Kilowatt hours, or watt hours where those are few."""
    if kwh < 0.1:
        return f"{1000 * kwh:.2g} Wh"
    return f"{kwh:.1f} kWh" if kwh < 10 else f"{kwh:.0f} kWh"


def money(value: float, currency: str) -> str:
    """An amount in a currency, by its letters where its sign is not ASCII."""
    return rates.amount(value, ascii_only(_SIGNS.get(currency, currency)))


def co2(grams: float) -> str:
    """Grams of CO2, in kilograms or tonnes where those are many."""
    if grams < 1000:
        return f"{grams:.0f} g CO2"
    return f"{grams / 1000:.{1 if grams < 10_000 else 0}f} kg CO2" if grams < 1e6 else f"{grams / 1e6:.1f} t CO2"
