"""What a run cost: the sums of its receipt, its sessions, who lent the machines, and how energy was known."""

from collections.abc import Iterator
from dataclasses import dataclass

from lowvram.pages.charts import Chart, Line, chart
from lowvram.pages.folder import Content
from lowvram.pages.words import count, images, number, span
from lowvram.receipt.account import in_words
from lowvram.receipt.ledger import Session, Totals
from lowvram.receipt.rates import amount, co2, energy

_MOST_SESSIONS = 50
_ENERGY_BY = {
    "NVML": "measured by the card's own counter (NVML)",
    "RAPL": "measured by the processor's own counter (RAPL)",
    "estimate": "estimated, for nothing on the machine measures it",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The section. sums: (name, value). sessions, contributors: rows of words. notes: sentences."""

    sums: tuple[tuple[str, str], ...]
    contributors: tuple[tuple[str, ...], ...]
    sessions: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    charts: tuple[Chart, ...]


def cost(content: Content) -> Cost:
    """What a run's page says of it; sums come from receipt.json, or the last line of metrics.jsonl without one."""
    receipt = content.receipt
    by_whom = receipt.by_contributor()
    watts, energies = content.metrics.series("watts"), content.metrics.series("kwh")
    curves = (
        chart("Power", "kimg", "watts", [Line(label="power", points=watts)], from_zero=True),
        chart(
            "Energy up to then", "kimg", "kWh", [Line(label="energy", points=energies)], from_zero=True, smooth=False
        ),
    )
    return Cost(
        sums=tuple(_sums(receipt.totals()) if receipt.sessions else _sums_of_metrics(content)),
        contributors=tuple((name or "not named", *_row(totals)) for name, totals in by_whom.items())
        if len(by_whom) > 1
        else (),
        sessions=tuple(_session(session) for session in receipt.sessions[-_MOST_SESSIONS:]),
        notes=tuple(_notes(content)),
        charts=tuple(one for one in curves if one is not None),
    )


def money(totals: Totals) -> str:
    """What it cost, in each currency."""
    return " + ".join(amount(value, currency) for currency, value in totals.money.items()) or "0"


def _row(totals: Totals) -> tuple[str, ...]:
    return (
        count(totals.images),
        span(3600 * totals.card_hours),
        energy(totals.kwh),
        money(totals),
        co2(totals.co2_grams),
    )


def _sums(totals: Totals) -> Iterator[tuple[str, str]]:
    yield "Card time", span(3600 * totals.card_hours)
    yield "Energy", energy(totals.kwh)
    yield "Money", money(totals)
    yield "Emissions", co2(totals.co2_grams)
    if totals.images_per_kwh is not None:
        yield "Images per kWh", number(totals.images_per_kwh)
    yield "Sessions", str(totals.sessions)


def _sums_of_metrics(content: Content) -> Iterator[tuple[str, str]]:
    found = content.metrics
    hours, kwh = found.last("card_hours"), found.last("kwh")
    seconds = found.last("seconds")
    if hours is not None:
        yield "Card time", span(3600 * hours)
    elif seconds is not None:
        yield "Time in training steps", span(seconds)
    if kwh is not None:
        yield "Energy", energy(kwh)
    if (paid := found.last("cost")) is not None:
        currency = found.rows[-1].get("currency", "") if found.rows else ""
        yield "Money", amount(paid, currency if isinstance(currency, str) else "")
    if (grams := found.last("co2_g")) is not None:
        yield "Emissions", co2(grams)
    if (per := found.last("images_per_kwh")) is not None:
        yield "Images per kWh", number(per)


def _session(session: Session) -> tuple[str, ...]:
    cards = f"{session.cards} x {session.machine}" if session.cards > 1 else session.machine
    return (
        session.begun[:16].replace("T", " "),
        session.contributor or "not named",
        f"{cards}{f', vram={session.vram}' if session.vram else ''}",
        f"{images(session.first_image / 1000)} to {images(session.last_image / 1000)}",
        span(session.seconds),
        energy(session.kwh),
        amount(session.rates.money(session.card_hours, session.kwh), session.currency),
    )


def _notes(content: Content) -> Iterator[str]:
    receipt, plan = content.receipt, content.plan
    if plan is not None and plan.fits:
        yield (
            f"The plan expected {span(3600 * plan.hours)} and {energy(plan.kwh)} on {plan.card or 'the card'} for all "
            f"{images(plan.kimg)}."
        )
        yield from plan.published
    if content.stands_on is not None:
        took = in_words(content.stands_on.receipt) if content.stands_on.receipt.sessions else "not known"
        yield f"It stands on {content.stands_on.name()}, which is not in these sums; what that took: {took}."
    if not receipt.sessions:
        yield "There is no receipt: what the run took is not known further than this."
        return
    for by in receipt.totals().energy_by:
        yield f"Energy was {_ENERGY_BY.get(by, by)}."
    first = min(session.first_image for session in receipt.sessions)
    if first:
        yield f"What the run took up to {images(first / 1000)} was not recorded; the sums count from there."
    rates = list(dict.fromkeys(str(session.rates) for session in receipt.sessions))
    yield f"Rates: {'; then '.join(rates[:10])}."
    if len(receipt.sessions) > _MOST_SESSIONS:
        yield f"The newest {_MOST_SESSIONS} of {len(receipt.sessions)} sessions are shown."
    if receipt.totals().images > content.kimg * 1000:
        yield "Steps that were lost, and taken again, count each time that they were taken."
