"""What a training takes on each card of the table, and what a rented one may cost to be no dearer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram.errors import LowVRAMError
from lowvram.planner import cards

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan


@dataclass(frozen=True, kw_only=True)
class CardCost:
    """The fastest way to train on a card, found for that card alone.

    needed_bytes: on the device with the margin, of the thriftiest way where it does not fit; None: not even a block
    fits. usable_bytes: what may be filled. images_per_second, hours, kwh: as in Plan, of all processes together, and 0
    where it does not fit. changes: of the mathematics, as allowed.
    """

    card: str
    fits: bool
    needed_bytes: int | None
    usable_bytes: int
    images_per_second: float
    hours: float
    kwh: float
    changes: tuple[str, ...] = ()


def break_even(plan: "Plan", row: CardCost) -> float | None:
    """The rent of an hour of another card at which the whole training costs what the plan does; None: no rent does.

    None as well where the plan's card has no rent, or the other can't do it.
    """
    if not plan.rates.per_hour or not row.fits:
        return None
    left = plan.money - plan.rates.money(0.0, row.kwh)
    return left / (row.hours * plan.processes) if left > 0 else None


def smallest(rows: Sequence[CardCost]) -> CardCost | None:
    """The card of the least memory that does it, the first of several."""
    return min((row for row in rows if row.fits), key=_whole_bytes, default=None)


def _whole_bytes(row: CardCost) -> int:
    """Of the card, not of the budget that it was planned for."""
    try:
        return cards.usable_bytes(cards.find(row.card))
    except LowVRAMError:  # one that is there, and in no table
        return row.usable_bytes


def quickest(rows: Sequence[CardCost]) -> CardCost | None:
    """The card that is done first."""
    return min((row for row in rows if row.fits), key=lambda row: row.hours, default=None)


def thriftiest(rows: Sequence[CardCost]) -> CardCost | None:
    """The card that takes the least energy: the cheapest, and the one of the least CO2, where all are one's own."""
    return min((row for row in rows if row.fits), key=lambda row: row.kwh, default=None)
