"""What a plan costs, in a sentence, and what the same training takes on other cards, as a table."""

from lowvram.planner import costs
from lowvram.planner.costs import CardCost
from lowvram.planner.layout import (
    Column,
    ascii_only,
    clipped,
    co2,
    count_of_hours,
    duration,
    energy,
    gb,
    laid,
    money,
    three,
    wrapped,
)
from lowvram.planner.plan import Plan


def of_plan(plan: Plan) -> str:
    """The sum, what it is made of, and the rates, with the settings that change them."""
    rates, sums = plan.rates, []
    if rates.per_hour:
        each = f" of {plan.processes} cards" if plan.processes > 1 else ""
        hour = money(rates.per_hour, rates.currency)
        rent = money(rates.money(plan.hours * plan.processes, 0.0), rates.currency)
        sums.append(f"{rent} for {count_of_hours(plan.hours)} hours{each} at {hour}/h (price=)")
    if rates.per_kwh:
        kwh = money(rates.per_kwh, rates.currency)
        paid = money(rates.money(0.0, plan.kwh), rates.currency)
        sums.append(f"{paid} for {energy(plan.kwh)} at {kwh}/kWh (electricity=)")
    elif rates.per_hour:
        sums.append("electricity in the rent (electricity=)")
    else:
        sums.append("electricity free (electricity=)")
    emitted = f"{co2(plan.co2_grams)} at {rates.grams_per_kwh:g}g/kWh (grid=)"
    return f"{'; '.join(sums)}; {emitted}. Of the cards alone, without the rest of the machine"


def lines(plan: Plan, width: int) -> list[str]:
    """A row for each card, and what the words and the columns mean. Where it is too narrow, columns are left out."""
    rows = plan.costs
    columns: dict[str, Column] = {
        "card": (("", "card", ""), "<", [clipped(row.card) for row in rows]),
        "may use": (("", "may use", "GB"), ">", [gb(row.usable_bytes) for row in rows]),
        "needs": (
            ("", "needs", "GB"),
            ">",
            [gb(row.needed_bytes, up=True) if row.needed_bytes else "-" for row in rows],
        ),
        "speed": (("", "speed", "images/s"), ">", [three(row.images_per_second) if row.fits else "-" for row in rows]),
        "time": (("", "time", ""), ">", [duration(row.hours) if row.fits else "no fit" for row in rows]),
        "energy": (("", "energy", ""), ">", [energy(row.kwh) if row.fits else "-" for row in rows]),
        "emits": (("", "emits", ""), ">", [co2(plan.rates.co2_grams(row.kwh)) if row.fits else "-" for row in rows]),
    }
    if plan.rates.per_kwh:
        columns["electricity"] = (("elec-", "tricity", ""), ">", [_electricity(plan, row) for row in rows])
    if plan.rates.per_hour:
        columns["rent"] = (("as dear", "at a rent", "of"), ">", [_rent(plan, row) for row in rows])
    columns["marks"] = (("", "", ""), "<", [", ".join(_marks(plan, row)) for row in rows])
    table = laid(list(columns.values()))
    for name in ("", "may use", "emits", "speed", "energy", "needs"):
        if max(map(len, table)) <= width:
            break
        columns.pop(name, None)
        table = laid(list(columns.values()), " ")
    each = f"{plan.processes} of each, " if plan.processes > 1 else ""
    budget = "" if plan.vram_bytes is None else f"; the {ascii_only(plan.card)} within {gb(plan.vram_bytes)} GB"
    heading = f"The same training on other cards ({each}the fastest way for each, in all of its memory{budget})"
    notes = [line for note in _notes(plan) for line in wrapped(note, width)]
    return [*wrapped(heading, width), *table, *notes]


def _electricity(plan: Plan, row: CardCost) -> str:
    return money(plan.rates.money(0.0, row.kwh), plan.rates.currency) if row.fits else "-"


def _rent(plan: Plan, row: CardCost) -> str:
    if row.card == plan.card:
        return f"{money(plan.rates.per_hour, plan.rates.currency)}/h" if row.fits else "-"
    rent = costs.break_even(plan, row)
    return "-" if rent is None else f"{money(rent, plan.rates.currency)}/h"


def _marks(plan: Plan, row: CardCost) -> list[str]:
    marks = {
        "this plan": row.card == plan.card,
        "smallest": row == costs.smallest(plan.costs),
        "cheapest" if plan.rates.per_kwh and not plan.rates.per_hour else "thriftiest": row
        == costs.thriftiest(plan.costs),
        "quickest": row == costs.quickest(plan.costs),
        "changed": row.fits and bool(row.changes),
    }
    return [word for word, holds in marks.items() if holds]


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.rates.per_hour and plan.fits:
        notes.append(
            f"The price is the {ascii_only(plan.card)}'s. Another card makes the whole training cheaper where its hour "
            "costs less than the rent beside it. Thriftiest: the least energy."
        )
    elif plan.rates.per_kwh:
        notes.append("Electricity is all that is counted: not what a card costs to buy, nor to rent (price=).")
    changed = {change: None for row in plan.costs if row.fits for change in row.changes}
    if changed:
        notes.append(f"Changed: fits only with changed maths, {' '.join(map(ascii_only, changed))}.")
    return notes
