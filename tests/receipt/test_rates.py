"""Prices as users write them, and amounts in words."""

import pytest

from lowvram.errors import LowVRAMError
from lowvram.receipt.rates import Rates, amount, co2, energy, hours


@pytest.mark.parametrize(
    ("price", "electricity", "carbon", "expected"),
    [
        (None, None, None, (0.0, 0.30, 400.0, "")),
        ("0.40/h", None, None, (0.40, 0.0, 400.0, "")),  # the rent has the electricity in it
        ("$0.40/h", None, None, (0.40, 0.0, 400.0, "$")),
        ("0.40 EUR/h", "0.10 EUR/kWh", "35g/kWh", (0.40, 0.10, 35.0, "EUR")),
        ("0.40€ / h", None, "0.4kg/kWh", (0.40, 0.0, 400.0, "€")),
        (None, "£0.25/kwh", "0 g/kWh", (0.0, 0.25, 0.0, "£")),
        ("0/h", None, None, (0.0, 0.30, 400.0, "")),
    ],
)
def test_rates_are_read_as_written(
    price: str | None, electricity: str | None, carbon: str | None, expected: tuple[float, float, float, str]
) -> None:
    rates = Rates.of(price, electricity, carbon)
    assert (rates.per_hour, rates.per_kwh, rates.grams_per_kwh, rates.currency) == expected


@pytest.mark.parametrize(
    ("price", "electricity", "carbon", "named"),
    [
        ("0.40", None, None, "price=0.40"),
        ("0.40/kWh", None, None, "price=0.40/kWh"),
        ("-1/h", None, None, "price=-1/h"),
        ("$0.40 EUR/h", None, None, "price="),
        ("nan/h", None, None, "price=nan/h"),
        ("1e9/h", None, None, "price=1e9/h"),
        ("9" * 10_000 + "/h", None, None, "price="),
        (None, "cheap", None, "electricity=cheap"),
        (None, None, "400/kWh", "carbon=400/kWh"),
        (None, None, "400lb/kWh", "carbon=400lb/kWh"),
        ("$1/h", "1 EUR/kWh", None, "two currencies"),
    ],
)
def test_what_is_not_understood_is_named(
    price: str | None, electricity: str | None, carbon: str | None, named: str
) -> None:
    with pytest.raises(LowVRAMError, match=named.replace("$", r"\$")) as error:
        Rates.of(price, electricity, carbon)
    assert error.value.remedy


def test_costs_of_hours_and_energy() -> None:
    rates = Rates.of("$2.48/h", None, None)
    assert rates.money(234 * 8, 1000) == pytest.approx(4642.56)  # nine days 18 hours on eight cards
    assert Rates.of(None, "0.30/kWh", "400g/kWh").money(100, 2) == pytest.approx(0.6)
    assert rates.co2_grams(2.5) == 1000
    assert str(rates) == "$2.48/h, electricity in the rent, 400 g CO2/kWh"
    assert str(Rates.of(None, None, None)) == "0.30/kWh, 400 g CO2/kWh"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (amount(4642.56, "$"), "$4,643"),
        (amount(12.3, "EUR"), "12.30 EUR"),
        (amount(0.0021, "$"), "$0.0021"),
        (amount(1.8e-5, "$"), "under $0.001"),
        (amount(0), "0.00"),
        (energy(12.4), "12 kWh"),
        (energy(0.41), "0.41 kWh"),
        (energy(0.0034), "3.4 Wh"),
        (co2(4600), "4.6 kg CO2"),
        (co2(164), "164 g CO2"),
        (hours(12 / 3600), "12 s"),
        (hours(41 / 60), "41 min"),
        (hours(3.42), "3.4 h"),
        (hours(2808), "2,808 h"),
    ],
)
def test_amounts_in_words(said: str, expected: str) -> None:
    assert said == expected
