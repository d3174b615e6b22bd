"""Memory: what the plan predicted for each phase, what was measured, and both over a step against the budget.

Bytes of a prediction are those of one process' card; those measured, too. On a CPU what is measured is the whole
process, which no plan predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowvram.errors import LowVRAMError
from lowvram.pages.charts import Axis, Chart, Level, Line, chart
from lowvram.pages.folder import Content
from lowvram.pages.words import gigabytes
from lowvram.settings import parse_bytes

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan, Timeline

_GB = 2**30
_NARROWEST, _LETTER = 280, 8  # pixels, of the plot on a phone and of a letter
_FAR = 2.5  # a budget so many times above the memory would flatten it, and is only named


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """One phase. Sizes in words, "" where not known; shares: of the longest bar, in percent."""

    name: str
    predicted: str
    measured: str
    reserved: str
    predicted_share: float
    measured_share: float
    what: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """Memory over the steps that were traced, by what holds it, as areas on each other; numbers are as in a chart.

    areas: (name, path, bytes at the peak). spans: (percent, name) of phases with room for their name. edges: percent.
    measured: a path at each phase's measured peak, "" where there is none.
    """

    title: str
    areas: tuple[tuple[str, str, str], ...]
    spans: tuple[tuple[float, str], ...]
    edges: tuple[float, ...]
    measured: str
    y_ticks: tuple[tuple[float, str], ...]
    levels: tuple[tuple[float, str], ...]
    said: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The section. sentences: the result in words."""

    sentences: tuple[str, ...]
    phases: tuple[PhaseMemory, ...]
    step: Step | None
    over_time: Chart | None
    planned: tuple[tuple[str, str], ...]
    on_gpu: bool


def memory(content: Content) -> Memory:
    """What a run's page says of it."""
    found, plan = content.metrics, content.plan
    on_gpu = _on_gpu(content)
    budget = _budget(content)
    phases = [name.partition("/")[2] for name in found.names("peak_allocated_bytes/")]
    kind = "in tensors, by phase" if on_gpu else "of the process (resident)"
    series = [(name, f"peak_allocated_bytes/{name}") for name in phases[:8]]
    if not on_gpu:  # the peak of the process since its start, whichever phase runs
        series, phases = [("process", "peak_allocated_bytes")], []
    lines = [
        Line(label=name, points=[(x, y / _GB) for x, y in found.series(key)], colour=n)
        for n, (name, key) in enumerate(series)
    ]
    levels = _levels(content, budget) if on_gpu else []
    return Memory(
        sentences=tuple(_sentences(content, budget, on_gpu)),
        phases=tuple(_phases(content, phases)),
        step=_step(plan, content) if plan is not None and plan.timeline is not None and len(plan.timeline) else None,
        over_time=chart(f"Peak memory {kind}", "kimg", "GB", lines, levels=levels, from_zero=True, smooth=False),
        planned=tuple(plan.settings.items()) if plan is not None else (),
        on_gpu=on_gpu,
    )


def _on_gpu(content: Content) -> bool:
    """Torch's allocator reserves more than it hands out; of a process on a CPU the two are one number."""
    if content.about:
        return content.about[-1].device != "CPU"
    found = content.metrics
    return found.last("peak_allocated_bytes") != found.last("peak_reserved_bytes")


def _budget(content: Content) -> int | None:
    if content.plan is not None and content.plan.vram_bytes is not None:
        return content.plan.vram_bytes
    try:
        return parse_bytes("vram", content.text("vram")) if content.text("vram") else None
    except LowVRAMError:
        return None


def _levels(content: Content, budget: int | None) -> list[Level]:
    out = []
    highest = content.metrics.highest("peak_allocated_bytes") or 0
    if budget is not None and budget <= _FAR * max(highest, 1):
        out.append(Level(label=f"budget {gigabytes(budget)}", value=budget / _GB))
    if content.plan is not None:
        out.append(Level(label="predicted peak", value=content.plan.live_bytes / _GB))
    return out


def _sentences(content: Content, budget: int | None, on_gpu: bool) -> list[str]:
    found, plan = content.metrics, content.plan
    out = []
    allocated, reserved = found.highest("peak_allocated_bytes"), found.highest("peak_reserved_bytes")
    device = found.highest("device_bytes")
    if plan is not None:
        within = f" of {gigabytes(plan.vram_bytes)}" if plan.vram_bytes is not None else ""
        out.append(
            f"Predicted for {plan.card or 'the card'}: {gigabytes(plan.device_bytes)} on the card{within} "
            f"({gigabytes(plan.live_bytes)} in tensors, {gigabytes(plan.reserved_bytes)} reserved by the allocator), "
            f"and a margin of {gigabytes(plan.margin_bytes)}."
        )
    if allocated is not None and reserved is not None and on_gpu:
        out.append(
            f"Measured: {gigabytes(allocated)} in tensors, {gigabytes(reserved)} reserved by the allocator"
            + (f", {gigabytes(device)} in use on the whole card, other programs included." if device else ".")
        )
        if plan is not None and plan.live_bytes:
            more = (allocated - plan.live_bytes) / plan.live_bytes * 100
            out.append(f"In tensors that is {abs(more):.1f}% {'more' if more > 0 else 'less'} than predicted.")
    elif allocated is not None:
        out.append(
            f"Measured: {gigabytes(allocated)}, the most that the process held in the computer's memory. "
            "The run trained without a GPU, so there is no card's memory to hold against a budget."
        )
    if plan is None:
        out.append("There is no plan.json: the run was not planned, so nothing was predicted.")
    if budget is not None and plan is None and on_gpu:
        out.append(f"The budget was {gigabytes(budget)}.")
    return out


def _phases(content: Content, measured: Sequence[str]) -> list[PhaseMemory]:
    found = content.metrics
    planned = {phase.name: phase for phase in content.plan.phases} if content.plan is not None else {}
    rows = []
    longest = 1.0
    for name in list(dict.fromkeys([*measured, *planned]))[:40]:
        allocated = found.highest(f"peak_allocated_bytes/{name}") or 0.0
        reserved = found.highest(f"peak_reserved_bytes/{name}") or 0.0
        longest = max(longest, allocated, planned[name].live_bytes if name in planned else 0)
        rows.append((name, allocated, reserved))
    return [
        PhaseMemory(
            name=name,
            predicted=gigabytes(planned[name].live_bytes) if name in planned else "",
            measured=gigabytes(allocated) if allocated else "",
            reserved=gigabytes(reserved) if reserved else "",
            predicted_share=100 * planned[name].live_bytes / longest if name in planned else 0.0,
            measured_share=100 * allocated / longest,
            what=_what(content, name),
        )
        for name, allocated, reserved in rows
    ]


def _what(content: Content, name: str) -> str:
    """How a phase was made to fit: images at a time, and what becomes of its activations."""
    phase = next((p for p in content.plan.phases if p.name == name), None) if content.plan is not None else None
    if phase is None or not phase.micro_batch:
        return ""
    return f"{min(phase.micro_batch, phase.samples)} images at a time, activations: {phase.activations or 'none'}"


def _step(plan: "Plan", content: Content) -> Step:
    timeline = plan.timeline
    assert timeline is not None
    total = timeline.bytes.sum(axis=0)
    on_gpu = _on_gpu(content)
    measured = {name: content.metrics.highest(f"peak_allocated_bytes/{name}") for name, _, _ in timeline.marks}
    seen = [size for size in measured.values() if size] if on_gpu else []
    highest = max(int(total.max()), *(int(size) for size in seen), 1) if seen else max(int(total.max()), 1)
    levels: list[tuple[str, float]] = []
    if plan.vram_bytes is not None and plan.vram_bytes <= _FAR * highest:
        levels.append((f"budget {gigabytes(plan.vram_bytes)}", plan.vram_bytes))
    top = max([highest, *(value for _, value in levels)]) * 1.06
    axis = Axis.of(0.0, top / _GB)
    scale = 1000 / (axis.high * _GB)
    points = len(timeline)
    peak = int(total.argmax())
    names = [name for name, begin, end in timeline.marks if end > begin]
    steps = max(names.count(name) for name in names)  # the second has the optimizer's state from its start
    return Step(
        title=f"Predicted memory over {'a step' if steps == 1 else f'{steps} steps'}, by what holds it",
        areas=_areas(timeline, scale, peak),
        spans=tuple(
            (50 * (begin + end) / points, name)
            for name, begin, end in timeline.marks
            if (end - begin) / points * _NARROWEST > _LETTER * len(name)
        ),
        edges=tuple(100 * begin / points for _, begin, end in timeline.marks[1:] if end > begin),
        measured=_measured(timeline, measured, scale) if seen else "",
        y_ticks=tuple((100 - 100 * axis.share(value), label) for value, label in axis.ticks()),
        levels=tuple((100 - value * scale / 10, label) for label, value in levels),
        said=f"Predicted memory: at most {gigabytes(int(total.max()))} in tensors. "
        + "; ".join(
            f"{name} {gigabytes(size)}" for name, size in zip(_categories(), timeline.bytes[:, peak], strict=True)
        )
        + " at that point.",
    )


def _areas(timeline: "Timeline", scale: float, peak: int) -> tuple[tuple[str, str, str], ...]:
    """The tallest sum first, so that each next one covers what is not its own."""
    points = len(timeline)
    edges = 1000 - timeline.bytes.cumsum(axis=0) * scale  # [CATEGORIES, T]
    areas = []
    for name, rows, sizes in zip(_categories(), edges.tolist(), timeline.bytes, strict=True):
        steps = "".join(f"V{row:.1f}H{1000 * (n + 1) / points:.1f}" for n, row in enumerate(rows))
        areas.append((name, f"M0 1000{steps}V1000Z", gigabytes(int(sizes[peak]))))
    return tuple(reversed(areas))


def _measured(timeline: "Timeline", sizes: dict[str, float | None], scale: float) -> str:
    points = len(timeline)
    return "".join(
        f"M{1000 * begin / points:.1f} {1000 - size * scale:.1f}H{1000 * end / points:.1f}"
        for name, begin, end in timeline.marks
        if (size := sizes.get(name)) and end > begin
    )


def _categories() -> tuple[str, ...]:
    from lowvram.planner.log import CATEGORIES  # with numpy: only where there is a plan

    return CATEGORIES
