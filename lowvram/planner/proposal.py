"""A page that asks for compute: what is to be trained, on what, at what cost, at what risk, and what less would give.

Markdown for people who decide on hardware and need not know the field. What only the author knows is left as [a blank].
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.errors import LowVRAMError
from lowvram.memory.guard import in_gb
from lowvram.planner import calibration, cards, costs
from lowvram.planner.costs import CardCost
from lowvram.planner.layout import co2, count_of_hours, duration, energy, three
from lowvram.planner.plan import Plan
from lowvram.receipt.rates import amount
from lowvram.settings import Settings

if TYPE_CHECKING:
    from lowvram.data.dataset import ImageSet

_WHAT = {
    "stylegan2": "a generator of images (StyleGAN2: one network draws images out of random numbers, a second one "
    "learns to tell them from real ones, and each improves the other)",
    "r3gan": "a generator of images (R3GAN: one network draws images out of random numbers, a second one learns which "
    "of two is real, and each improves the other)",
    "projected_gan": "a generator of images (a projected GAN: one network draws images out of random numbers, a second "
    "one looks through a network that knows pictures already and learns to tell them from real ones)",
    "autoencoder": "an autoencoder (a network that stores an image in few numbers and restores it: the first half of "
    "latent diffusion)",
    "diffusion": "a generator of images by diffusion (a network that learns to take noise away, step by step)",
    "stable_diffusion": "published Stable Diffusion weights, tuned to our images and captions",
}
_MOST_AIM = 1000  # letters; more is no page


def text(plan: Plan, settings: Settings, *, aim: str = "", data: str, smaller: Plan | None = None) -> str:
    """The page, for a plan that fits.

    Args:
        settings: of the recipe that was planned.
        aim: what it is for; left as a blank where empty.
        data: what is known of the images, see `of_data`.
        smaller: the plan of a recipe of smaller images on the same card.

    Raises:
        LowVRAMError: the plan does not fit, or the aim is too long.
    """
    if not plan.fits:
        raise LowVRAMError(
            f"{plan.recipe} does not fit, so that there is nothing to propose.",
            "Plan for a card that it fits: card=NAME.",
        )
    check_aim(aim)
    sections = {
        "Aim": _aim(aim, settings),
        "Data": [data],
        "Plan": _plan(plan, settings),
        "Cost": _cost(plan),
        "Risks": _risks(plan, settings),
        "What a smaller budget gives": _less(plan, smaller),
    }
    lines = _head(plan)
    for name, said in sections.items():
        lines += ["", f"## {name}", "", *said]
    return "\n".join(lines) + "\n"


def check_aim(aim: str) -> None:
    """Raise LowVRAMError for an aim that one page has no room for."""
    if len(aim) > _MOST_AIM:
        raise LowVRAMError(f"aim has {len(aim)} letters.", f"Say it in {_MOST_AIM} at most: the proposal is one page.")


def of_data(settings: Settings) -> str:
    """What is known of a recipe's images, looked up without opening any of them."""
    size = f"used at {settings.resolution}x{settings.resolution} pixels"
    if settings.data.path is None:
        count = min(settings.data.builtin_count, settings.data.max_images or settings.data.builtin_count)
        faces = "drawn faces that come with the software, Open Peeps"
        return f"{count:,} {faces}, {size}. Licence and consent: CC0 (public domain); no real person is shown."
    name = f"`{_inline(Path(settings.data.path).name)}`"
    rights = "Licence and consent: [who made the images, under which licence, how the people shown agreed]."
    try:
        images = _opened(settings)
    except LowVRAMError:
        return f"[number] images in {name} (not at hand when this was written), {size}. {rights}"
    return f"{len(images):,} images in {name}, {size}. {rights}"


def _opened(settings: Settings) -> "ImageSet":
    from lowvram.data.open import open_dataset

    return open_dataset(settings.data.path, resolution=settings.resolution, max_images=settings.data.max_images)


def _head(plan: Plan) -> list[str]:
    cards = f"{plan.processes} {_inline(plan.card)} cards" if plan.processes > 1 else f"one {_inline(plan.card)}"
    currency = "" if plan.rates.currency else " [currency]"
    return [
        f"# Request for compute: {_inline(plan.recipe)}",
        "",
        "[your name], [course or group], [date]",
        "",
        f"**Asked for:** {cards} (graphics card) for {duration(plan.hours)}, at a cost of "
        f"{_money(plan, plan.money)}{currency}, and [a reserve, such as a third more].",
    ]


def _aim(aim: str, settings: Settings) -> list[str]:
    said = _inline(aim) or "[what you want to find out or make, and for whom, in two sentences]"
    return [said, "", f"What is trained: {_WHAT.get(settings.task, settings.task)}."]


def _plan(plan: Plan, settings: Settings) -> list[str]:
    budget = in_gb(plan.vram_bytes) if plan.vram_bytes else f"{_inline(plan.card)}'s"
    each = " on each card" if plan.processes > 1 else ""
    words = " ".join(f"{name}={value}" for name, value in plan.settings.items())
    how = f"It fits by these settings: `{_inline(words)}`." if words else "It needs no special settings."
    if plan.changes:
        how += f" The training method is changed to make it fit: `{_inline(' '.join(plan.changes))}`."
    speed = "from measured speeds of this card" if plan.card_measured else "worked out from the card's data sheet"
    return [
        f"- **Length:** {1000 * plan.kimg:,.0f} images are shown, repeats counted, {settings.batch} at a time.",
        f"- **Memory:** {in_gb(plan.needed_bytes, up=True)}{each} of the {budget} of graphics memory. {how}",
        f"- **Speed:** {three(plan.images_per_second)} images a second, {speed}.",
        f"- **Software:** lowvram, recipe `{_inline(plan.recipe)}`. The plan was made without training anything; "
        "`plan.json` has all of it.",
    ]


def _cost(plan: Plan) -> list[str]:
    rates, of = plan.rates, []
    if rates.per_hour:
        of.append(f"rent, {count_of_hours(plan.hours * plan.processes)} card hours at {_money(plan, rates.per_hour)}")
    if rates.per_kwh:
        of.append(f"electricity, {energy(plan.kwh)} at {_money(plan, rates.per_kwh)} a kWh")
    free = "electricity is in the rent" if rates.per_hour else "electricity is free"
    made = f"{' and '.join(of) or 'nothing'}{'' if rates.per_kwh else f'; {free}'}"
    return [
        "| Time | Energy | Money | CO2 |",
        "|---|---|---|---|",
        f"| {duration(plan.hours)} | {energy(plan.kwh)} | {_money(plan, plan.money)} | {co2(plan.co2_grams)} |",
        "",
        f"- The money is {made}. CO2 is reckoned at {rates.grams_per_kwh:g} g a kWh.",
        "- Counted is the graphics card alone, not the computer around it.",
        *(f"- For comparison, as published: {_inline(said)}." for said in plan.published),
    ]


def _risks(plan: Plan, settings: Settings) -> list[str]:
    lost = min(settings.snapshot_kimg, plan.kimg) * 1000 / plan.images_per_second / 3600
    count = _measurements(plan.card)
    if count:
        sure = f"Speed and memory were corrected by {count} earlier measurement{'s' * (count > 1)} on such a card."
    elif plan.card_measured:
        sure = "The card's speed was measured, but no training on it yet."
    else:
        sure = (
            "Time and cost come from a data sheet; no training on such a card was measured, so a reserve is asked for."
        )
    return [
        f"- **The estimate is wrong.** {sure} The first minutes of training show the true speed and memory.",
        "- **Memory runs out.** The step is then repeated in smaller pieces; if none fits, training stops and says so.",
        f"- **The computer stops.** It resumes exactly from what was last saved; at most {duration(lost)} get lost.",
        "- **The images are not good enough.** Quality can't be promised. Samples are drawn on the way, to stop early.",
    ]


def _measurements(card: str) -> int:
    """How many trainings on such a card its constants were corrected by."""
    try:
        return calibration.load(cards.find(card)).measurements
    except LowVRAMError:
        return 0


def _less(plan: Plan, smaller: Plan | None) -> list[str]:
    half = f"half the length takes {duration(plan.hours / 2)} and costs {_money(plan, plan.money / 2)}"
    lines = [f"- **Less time:** {half}; the images will likely be less good."]
    picks = {"the smallest that does it": costs.smallest, "least energy": costs.thriftiest, "quickest": costs.quickest}
    found: dict[str, tuple[CardCost, list[str]]] = {}
    for word, pick in picks.items():
        row = pick(plan.costs)
        if row is not None and row.card != plan.card:
            found.setdefault(row.card, (row, []))[1].append(word)
    for row, said in found.values():
        changed = f"; the training method is changed, {_inline(' '.join(row.changes))}" if row.changes else ""
        lines.append(
            f"- **Another card, {' and '.join(said)}:** {_inline(row.card)}: {duration(row.hours)}, {energy(row.kwh)}"
            f"{_price(plan, row)}{changed}."
        )
    if smaller is not None and smaller.fits:
        lines.append(
            f"- **Smaller images:** recipe `{_inline(smaller.recipe)}` on the same card, {1000 * smaller.kimg:,.0f} "
            f"images: {duration(smaller.hours)}, {energy(smaller.kwh)}, {_money(smaller, smaller.money)}."
        )
    return lines


def _price(plan: Plan, row: CardCost) -> str:
    """What another card costs, as far as that is known: its rent is not."""
    rent = costs.break_even(plan, row)
    if rent is not None:
        return f", cheaper than this plan if rented below {_money(plan, rent)} an hour"
    if plan.rates.per_hour or not plan.rates.per_kwh:
        return ""
    return f", {_money(plan, plan.rates.money(0.0, row.kwh))}"


def _money(plan: Plan, value: float) -> str:
    return _inline(amount(value, plan.rates.currency))


def _inline(said: str) -> str:
    """Somebody's words on one line, without what Markdown or HTML would take for more than words."""
    plain = said.encode("utf-8", "replace").decode()  # a word of a command line may be no text
    plain = re.sub(r"[\x00-\x1f\x7f]+", " ", plain).replace("`", "'")
    return re.sub(r"([<>|\[\]])", r"\\\1", plain).strip()
