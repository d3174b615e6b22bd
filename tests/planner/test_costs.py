"""What a training costs: the sums, the rates, the table of cards, and that each card is really planned for."""

from dataclasses import replace
from typing import Any

import pytest
from example_plans import GIB, a_cost, a_plan
from tiny import TINY

from lowvram.config import load_recipe
from lowvram.planner import cards, cost_table, costs, table
from lowvram.planner.plan import Plan
from lowvram.planner.recipe import _on_quick_costs, _trains_like, plan_recipe
from lowvram.planner.tracing import Structure
from lowvram.receipt.rates import Rates

# Little to choose from, so that a search takes no time.
HELD = [f"memory.{name}=device" for name in ("weights.G", "weights.D", "state.G", "state.D", "ema")]
HELD += ["memory.update.G=after", "memory.update.D=after", "loss.path_length_every=0", "augment.mode=none"]
HELD += [f"memory.activations.{name}=keep" for name in ("G", "D", "R1")]
SMALL = [*TINY, *HELD, "model.num_fp16_res=1"]

ROWS = (
    a_cost("RTX 2060", usable_bytes=6 * GIB, hours=564.0, kwh=58.0, images_per_second=12.3),
    a_cost("RTX 3050", fits=False, usable_bytes=2 * GIB, needed_bytes=3 * GIB),
    a_cost("GTX 1660 Super", usable_bytes=5 * GIB, hours=900.0, kwh=96.0),
    a_cost("L4", usable_bytes=22 * GIB, hours=200.0, kwh=10.0),
    a_cost("H200", usable_bytes=129 * GIB, hours=20.0, kwh=12.0, changes=("loss.r1_kind=finite_difference",)),
)


def make_plan(**changes: Any) -> Plan:
    return replace(a_plan(live_bytes=4 * GIB, reserved_bytes=4 * GIB, costs=ROWS), **changes)


def row_of(lines: list[str], card: str) -> str:
    return next(line for line in lines if line.startswith(f"{card} "))


def test_a_published_sum() -> None:
    """9 days 18 hours on eight cards at $2.48 an hour are $4,642."""
    rates = Rates.of("$2.48/h", None, None)
    plan = make_plan(hours=234.0, processes=8, rates=rates)
    assert plan.money == pytest.approx(4642.56)
    assert "cost $4,643" in table.headline(plan)
    assert "$4,643 for 234 hours of 8 cards at $2.48/h" in cost_table.of_plan(plan)


@pytest.mark.parametrize(
    ("words", "money", "co2_grams"),
    [
        ((None, None, None), 58 * 0.30, 58 * 400),
        (("0.40/h", None, None), 564 * 0.40, 58 * 400),  # the rent has the electricity in it
        (("0.40/h", "0.10/kWh", None), 564 * 0.40 + 5.8, 58 * 400),
        ((None, "0.10/kWh", None), 5.8, 58 * 400),
        ((None, None, "50g/kWh"), 58 * 0.30, 58 * 50),
        (("0/h", "0/kWh", "0g/kWh"), 0.0, 0.0),
    ],
)
def test_each_rate_changes_what_it_must(words: tuple[str | None, ...], money: float, co2_grams: float) -> None:
    plan = make_plan(rates=Rates.of(*words))
    assert plan.money == pytest.approx(money)
    assert plan.co2_grams == pytest.approx(co2_grams)
    said = cost_table.of_plan(plan)
    for setting in ("electricity=", "grid="):
        assert setting in said
    assert ("price=" in said) == (plan.rates.per_hour > 0)


def test_a_currency_that_ascii_has_not_is_written_in_letters() -> None:
    plan = make_plan(rates=Rates.of("\u20ac0.40/h", None, None))
    assert "cost 225.60 EUR" in str(plan).replace("\n", " ")
    assert str(plan).isascii()


def test_at_the_rent_beside_it_another_card_costs_as_much() -> None:
    for rates in (Rates.of("0.40/h", None, None), Rates.of("0.40/h", "0.10/kWh", None)):
        plan = make_plan(rates=rates, processes=2, hours=564.0)
        rent = costs.break_even(plan, ROWS[3])
        assert rent is not None
        theirs = replace(rates, per_hour=rent).money(ROWS[3].hours * 2, ROWS[3].kwh)
        assert theirs == pytest.approx(plan.money)
    dear = Rates(per_hour=0.001, per_kwh=9.0)
    assert costs.break_even(make_plan(rates=dear), ROWS[2]) is None  # its electricity alone costs more
    assert costs.break_even(make_plan(), ROWS[3]) is None  # no price was given
    assert costs.break_even(make_plan(rates=Rates(per_hour=1.0)), ROWS[1]) is None


def test_the_table_on_cards_of_ones_own() -> None:
    lines = cost_table.lines(make_plan(), 100)
    assert row_of(lines, "RTX 2060").endswith("17.40 this plan, smallest")
    assert row_of(lines, "GTX 1660 Super").endswith("28.80")
    assert row_of(lines, "L4").endswith("3.00 cheapest")
    assert row_of(lines, "H200").endswith("3.60 quickest, changed")
    assert "the RTX 2060 within" in " ".join(lines[:2])
    assert row_of(lines, "RTX 3050").split()[2:] == ["2.00", "3.00", "-", "no", "fit", "-", "-", "-"]
    assert "loss.r1_kind=finite_difference" in lines[-1]
    assert not any("rent of" in line for line in lines)


def test_a_budget_makes_no_card_smaller() -> None:
    """The card that was planned for is a large one, though little of it may be used."""
    rows = (a_cost("RTX 3060", usable_bytes=4 * GIB), a_cost("RTX 2060", usable_bytes=int(5.7 * GIB)))
    smallest = costs.smallest(rows)
    assert smallest is not None and smallest.card == "RTX 2060"


def test_a_price_is_of_the_card_that_was_asked_for() -> None:
    lines = cost_table.lines(make_plan(rates=Rates.of("0.40/h", None, None)), 100)
    assert "0.40/h" in row_of(lines, "RTX 2060")
    assert row_of(lines, "L4").split()[-2:] == ["1.13/h", "thriftiest"]  # 564 hours x 0.40 / 200 hours
    assert row_of(lines, "H200").split()[-3:-2] == ["11.28/h"]
    assert not any(line.endswith("cheapest") for line in lines)  # which nobody knows


def test_nothing_fits_anywhere() -> None:
    rows = (a_cost("RTX 2060", fits=False), a_cost("H200", fits=False, needed_bytes=None))
    plan = make_plan(fits=False, vram_bytes=4 * GIB, costs=rows, rates=Rates.of("0.40/h", None, None))
    assert (costs.smallest(rows), costs.quickest(rows), costs.thriftiest(rows)) == (None, None, None)
    said = str(plan)
    assert "no fit" in row_of(said.splitlines(), "H200")
    assert not any(word in said for word in ("quickest", "thriftiest", "cost  ", "0.40/h"))


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("price", [None, "0.40 EUR/h"])
def test_lines_stay_within_the_width(width: int, price: str | None) -> None:
    long = a_cost("NVIDIA GeForce RTX 3070 Laptop GPU", hours=12_345.6, kwh=1234.5)
    plan = make_plan(costs=(*ROWS, long), rates=Rates.of(price, "0.30/kWh", None))
    lines = cost_table.lines(plan, width)
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if "GPU" in line or "Lapt" in line or "NVIDIA" in line]) == 1


@pytest.fixture(scope="module")
def planned() -> Plan:
    """All cards, with a rent for the one that was asked for."""
    settings = load_recipe("faces32", [*SMALL, "vram=6GB", "price=$0.40/h"])
    return plan_recipe(settings, card="RTX 2060", costs="each")


def test_every_card_has_its_row(planned: Plan) -> None:
    assert [row.card for row in planned.costs] == [card.name for card in cards.CARDS]
    own = next(row for row in planned.costs if row.card == "RTX 2060")
    assert (own.hours, own.kwh, own.needed_bytes) == (planned.hours, planned.kwh, planned.needed_bytes)
    assert own.usable_bytes == 6 * GIB  # the budget
    assert planned.rates == Rates(per_hour=0.4, per_kwh=0.0, currency="$")
    assert Plan.from_json(planned.to_json()).costs == planned.costs


@pytest.mark.parametrize("card", [pytest.param("T4", marks=pytest.mark.slow), "RTX 4060"])
def test_a_row_is_what_planning_for_the_card_says(card: str, planned: Plan) -> None:
    """Of the same kind of card and of another, which runs other kernels: a search of its own, not a scaled time."""
    row = next(row for row in planned.costs if row.card == card)
    alone = plan_recipe(load_recipe("faces32", SMALL), card=card)
    assert (row.fits, row.needed_bytes) == (alone.fits, alone.needed_bytes)
    assert (row.hours, row.kwh) == (alone.hours, alone.kwh)
    assert row.images_per_second == alone.images_per_second


def test_a_quick_look_takes_what_was_recorded_for_the_plan(planned: Plan) -> None:
    """The same memory without another recording; of cards with other kernels another time, which a note says."""
    plan = plan_recipe(load_recipe("faces32", [*SMALL, "vram=6GB", "price=$0.40/h"]), card="RTX 2060", costs="quick")
    assert [row.card for row in plan.costs] == [row.card for row in planned.costs]
    assert {row.card: row.fits for row in plan.costs} == {row.card: row.fits for row in planned.costs}
    alike = ("GTX 1660 Super", "RTX 2060", "T4")
    assert [row for row in plan.costs if row.card in alike] == [row for row in planned.costs if row.card in alike]
    assert any("RTX 2060's kernels" in note and "costs=true" in note for note in plan.notes)


def test_cards_that_would_train_in_another_precision_are_left_out_of_a_quick_look() -> None:
    fp32, bf16, fp16 = (Structure(precision=precision) for precision in ("fp32", "bf16", "fp16"))
    assert _trains_like(fp16, bf16)
    assert _trains_like(Structure(triton=True), fp32)
    assert not _trains_like(fp32, bf16)
    assert not _trains_like(Structure(attention="xformers"), fp32)
    notes = list(_on_quick_costs("RTX 4060", bf16, {"RTX 4060": bf16, "P40": fp32}))
    assert notes == ["costs=true tells of P40 too, which would train in another precision"]
