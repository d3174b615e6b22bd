"""A plan as text that a person reads at once, in ASCII, for any console.

Bytes are shown in GB of 2^30, as `vram=6GB` is meant.
"""

from collections.abc import Callable, Sequence

from lowvram.memory.guard import in_gb
from lowvram.planner import cost_table
from lowvram.planner.layout import (
    Column,
    ascii_only,
    clipped,
    co2,
    duration,
    energy,
    gb,
    labelled,
    laid,
    money,
    three,
    wrapped,
)
from lowvram.planner.log import CATEGORIES
from lowvram.planner.plan import PhasePlan, Plan

_LEAST_WIDTH = 80
# Headers of a column, line by line; the last one is its unit.
_CATEGORY_HEADERS = {
    "weights": ("", "weights"),
    "gradients": ("gradi-", "ents"),
    "optimizer": ("opti-", "mizer"),
    "average": ("aver-", "age"),
    "activations": ("activa-", "tions"),
    "temporary": ("tempo-", "rary"),
}


def text(plan: Plan, width: int = 100) -> str:
    """The whole answer, in lines of at most `width` columns (80 at least)."""
    width = max(_LEAST_WIDTH, width)
    parts = [wrapped(headline(plan), width), _said(plan, width), *_phase_tables(plan, width), _sums(plan, width)]
    if plan.costs:
        parts.append(cost_table.lines(plan, width))
    if plan.alternatives:
        parts.append(_alternatives(plan, width))
    if plan.notes:
        parts.append(_bullets("Notes", plan.notes, width))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def headline(plan: Plan) -> str:
    """The answer in one sentence."""
    return f"{title(plan)}: {figures(plan)}"


def title(plan: Plan) -> str:
    """Whether it fits: "faces256 fits vram=6GB on an RTX 2060"."""
    card = ascii_only(plan.card)
    each = f"each of {plan.processes}" if plan.processes > 1 else _article(card)
    where = f"on {each} {card}" if card else ""
    if plan.vram_bytes is None:
        verb = "without a budget" if plan.fits else "does not fit"
    else:
        verb = f"{'fits' if plan.fits else 'does not fit'} vram={in_gb(plan.vram_bytes)}"
    return f"{ascii_only(plan.recipe)} {verb} {where}".rstrip()


def figures(plan: Plan) -> str:
    """What follows the title: memory, speed, time and cost, or the smallest budget where it does not fit."""
    if not plan.fits:
        return f"it takes vram={in_gb(plan.smallest_vram_bytes, up=True)} at least"
    budget = "" if plan.vram_bytes is None else f" of {in_gb(plan.vram_bytes)}"
    speed = f"{three(plan.images_per_second)} images/s"
    length = f"{plan.kimg:g} kimg in {duration(plan.hours)}"
    price = f"{energy(plan.kwh)}, cost {money(plan.money, plan.rates.currency)}, {co2(plan.co2_grams)}"
    return f"{in_gb(plan.needed_bytes)}{budget}, {speed}, {length}, {price}"


def peak_phase(plan: Plan) -> PhasePlan | None:
    """The phase in which most bytes are alive; None without phases."""
    return max(plan.phases, key=lambda phase: phase.live_bytes, default=None)


def _said(plan: Plan, width: int) -> list[str]:
    """What is done, what it changes, and what would have to change."""
    words = " ".join(f"{name}={value}" for name, value in plan.settings.items())
    lines = labelled("settings", words or ("nothing: the plain run fits" if plan.fits else "nothing"), width)
    speed = "measured on this card" if plan.card_measured else "estimated from the card's data sheet"
    lines += labelled("speed", speed, width)
    if plan.fits:
        lines += labelled("cost", cost_table.of_plan(plan), width)
        for n, said in enumerate(plan.published):
            lines += labelled("published" if n == 0 else "", f"- {said}", width)
    if plan.changes:
        lines += labelled("changed maths", "; ".join(plan.changes), width)
    for n, need in enumerate(plan.needs):
        lines += labelled("to make it fit" if n == 0 else "", f"- {need}", width)
    return lines


def _phase_tables(plan: Plan, width: int) -> list[list[str]]:
    """One table; two where it is too wide, the second for the categories."""
    if not plan.phases:
        return []
    name: Column = (("", "", "phase"), "<", [clipped(phase.name) for phase in plan.phases])
    runs: list[Column] = [
        (("", "every", "steps"), ">", [str(phase.every) if phase.every else "-" for phase in plan.phases]),
        (("micro-", "batch", "images"), ">", [_micro_batch(phase) for phase in plan.phases]),
        (("", "activa-", "tions"), "<", [clipped(phase.activations or "-") for phase in plan.phases]),
    ]
    categories: list[Column] = [
        _in_gb_column(*_CATEGORY_HEADERS[category], plan, _of_category(category)) for category in CATEGORIES
    ]
    ends: list[Column] = [
        _in_gb_column("", "live", plan, lambda phase: phase.live_bytes),
        _in_gb_column("re-", "served", plan, lambda phase: phase.reserved_bytes),
        (("", "time", "s"), ">", [three(phase.seconds) for phase in plan.phases]),
    ]
    for gap in ("  ", " "):
        together = laid([name, *runs, *categories, *ends], gap)
        if max(map(len, together)) <= width:
            return [["Peak of each phase, by what holds the memory", *together]]
    return [
        ["Peak of each phase", *laid([name, *runs, *ends])],
        ["What holds the memory there", *laid([name, *categories])],
    ]


def _of_category(category: str) -> Callable[[PhasePlan], int]:
    return lambda phase: phase.by_category[category]


def _in_gb_column(above: str, below: str, plan: Plan, size: Callable[[PhasePlan], int]) -> Column:
    return (above, below, "GB"), ">", [gb(size(phase)) for phase in plan.phases]


def _sums(plan: Plan, width: int) -> list[str]:
    """How the device's memory adds up, where the peak is, and what the smallest card would be."""
    parts = (
        f"{gb(plan.reserved_bytes)} reserved ({gb(plan.live_bytes)} live) + {gb(plan.workspace_bytes)} workspaces "
        f"+ {gb(plan.context_bytes)} CUDA context = {gb(plan.device_bytes)} GB"
    )
    lines = labelled("on the device", parts, width)
    needed = f"+ {gb(plan.margin_bytes)} margin = {gb(plan.needed_bytes)} GB"
    headroom = plan.headroom_bytes
    if plan.vram_bytes is not None and headroom is not None:
        left = f"{gb(headroom)} GB headroom" if headroom >= 0 else f"{gb(-headroom, up=True)} GB too much"
        needed += f" of {gb(plan.vram_bytes)} GB: {left}"
    lines += labelled("", needed, width)
    peak = peak_phase(plan)
    if peak is not None:
        module = f", module {ascii_only(peak.peak_module)}" if peak.peak_module else ""
        said = f"{gb(peak.live_bytes)} GB live in {ascii_only(peak.name)}, at {ascii_only(peak.peak_op) or '?'}{module}"
        lines += labelled("peak", said, width)
    if plan.host_bytes:
        lines += labelled("RAM", f"{gb(plan.host_bytes)} GB of the computer's memory", width)
    smallest = f"vram={in_gb(plan.smallest_vram_bytes, up=True)}"
    card = ascii_only(plan.smallest_card or "")
    lines += labelled("smallest card", f"{card}; budget {smallest}" if card else f"none known; {smallest}", width)
    return lines


def _alternatives(plan: Plan, width: int) -> list[str]:
    """Those that lost, with what spoke against each."""
    spare = width - len("   device    speed  ") - 2
    whole = [a.what.replace(", ", " ") for a in plan.alternatives]
    longest_word = max(len(word) for what in whole for word in what.split() or [""])  # a setting is not broken
    wide = max(len("Instead"), min(longest_word, spare - 16), min(max(map(len, whole)), spare // 2))
    rows: list[tuple[str, str, str, str]] = [
        ("Instead", "device", "speed", "lost because"),
        ("", "GB", "images/s", ""),
        ("-" * wide, "------", "--------", "-" * min(spare - wide, max(12, *(len(a.why) for a in plan.alternatives)))),
    ]
    for other, changed in zip(plan.alternatives, whole, strict=True):
        whats = wrapped(changed, wide)
        whys = wrapped(other.why, spare - wide)
        for n in range(max(len(whats), len(whys))):
            what, why = (part[n] if n < len(part) else "" for part in (whats, whys))
            sizes = (gb(other.device_bytes), three(other.images_per_second)) if n == 0 else ("", "")
            rows.append((what, *sizes, why))
    return [f"{what:<{wide}}  {size:>6}  {speed:>8}  {why}".rstrip() for what, size, speed, why in rows]


def _bullets(heading: str, items: Sequence[str], width: int) -> list[str]:
    return [heading, *(line for item in items for line in wrapped(f"- {item}", width, "  "))]


def _micro_batch(phase: PhasePlan) -> str:
    """So many images at a time, so many times: 8 x 4."""
    if not phase.micro_batch:
        return "-"
    return f"{min(phase.micro_batch, phase.samples)} x {phase.micro_batches}"


def _article(name: str) -> str:
    """An RTX 2060, a T4: letters that are spelt out begin with a vowel more often."""
    spelt = name.split(" ")[0].isupper()
    return "an" if name[:1] in ("AEFHILMNORSX" if spelt else "AEIOUaeiou") else "a"
