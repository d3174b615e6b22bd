"""Prices of a card's hour and of electricity, and the CO2 of that, as users write them: 0.40/h, 0.30/kWh, 400g/kWh."""

import re
from dataclasses import dataclass

from lowvram.errors import LowVRAMError

USUAL_ELECTRICITY = "0.30/kWh"  # about what a household pays in Europe; half of it is usual in North America
USUAL_GRID = "400g/kWh"  # about the mean of the world's grids
_AMOUNT = re.compile(
    r"\s*(?P<before>[^\d\s.,/-]{0,4})\s*(?P<number>\d{1,9}(?:\.\d{1,9})?)\s*(?P<after>[^\d\s.,/-]{0,4})\s*/\s*(?P<per>\w+)\s*"
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What an hour of a card and a kilowatt hour cost, in `currency`, and what a kilowatt hour emits, in grams of CO2.

    currency: a sign or letters, "" where the user wrote none.
    """

    per_hour: float = 0.0
    per_kwh: float = 0.30
    grams_per_kwh: float = 400.0
    currency: str = ""

    @classmethod
    def of(cls, price: str | None, electricity: str | None, carbon: str | None) -> "Rates":
        """Rates in the words of the settings; None: a card of one's own at the usual rates.

        The rent of a card has its electricity in it, so with a price that is usually nothing.

        Raises:
            LowVRAMError: one is not understood, or they are in two currencies.
        """
        per_hour, first = _amount("price", price or "0/h", "h", "0.40/h")
        usual = USUAL_ELECTRICITY if per_hour == 0 else "0/kWh"
        per_kwh, second = _amount("electricity", electricity or usual, "kWh", "0.30/kWh")
        if first and second and first != second:
            raise LowVRAMError(
                f"price={price} and electricity={electricity} are in two currencies.", "Write both in the same."
            )
        grams, unit = _amount("carbon", carbon or USUAL_GRID, "kWh", "400g/kWh")
        if unit not in ("g", "kg"):
            raise LowVRAMError(f"carbon={carbon} is not understood.", "Write grams of CO2 as in carbon=400g/kWh.")
        return cls(
            per_hour=per_hour,
            per_kwh=per_kwh,
            grams_per_kwh=grams * (1000 if unit == "kg" else 1),
            currency=first or second,
        )

    def money(self, card_hours: float, kwh: float) -> float:
        """What so many hours of one card, and so much electricity, cost."""
        return card_hours * self.per_hour + kwh * self.per_kwh

    def co2_grams(self, kwh: float) -> float:
        """Grams of CO2 of so much electricity."""
        return kwh * self.grams_per_kwh

    def __str__(self) -> str:
        rent = f"{amount(self.per_hour, self.currency)}/h, " if self.per_hour else ""
        paid = f"{amount(self.per_kwh, self.currency)}/kWh" if self.per_kwh else "electricity in the rent"
        return f"{rent}{paid}, {self.grams_per_kwh:g} g CO2/kWh"


def amount(value: float, currency: str = "") -> str:
    """Money in words, with as many digits as count: 4,642, 12.30, $0.0021, under $0.001."""
    if 0 < value < 0.001:
        return f"under {amount(0.001, currency)}"
    digits = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
    return f"{digits} {currency}" if currency.isalpha() else f"{currency}{digits}"


def hours(value: float) -> str:
    """Hours of a card in words: 12 s, 41 min, 3.4 h, 2,808 h."""
    if value < 0.025:
        return f"{_digits(value * 3600)} s"
    return f"{_digits(value * 60)} min" if value < 1.5 else f"{_digits(value)} h"


def energy(kwh: float) -> str:
    """Energy in words: 12 kWh, 0.41 kWh, 3.4 Wh."""
    return f"{_digits(kwh)} kWh" if kwh >= 0.1 else f"{_digits(kwh * 1000)} Wh"


def co2(grams: float) -> str:
    """CO2 in words: 4.6 kg CO2, 164 g CO2."""
    return f"{_digits(grams / 1000)} kg CO2" if grams >= 1000 else f"{_digits(grams)} g CO2"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _amount(name: str, said: str, per: str, example: str) -> tuple[float, str]:
    """The number and the unit or currency of "0.40/h", "$0.40/h", "0.40 EUR/h", "400g/kWh"."""
    match = _AMOUNT.fullmatch(said)
    if match is None or match["per"].lower() != per.lower() or (match["before"] and match["after"]):
        raise LowVRAMError(f"{name}={said} is not understood.", f"Write it as {name}={example}.")
    return float(match["number"]), match["before"] or match["after"]
