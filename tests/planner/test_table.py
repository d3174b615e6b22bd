"""The plan's table: what it says, that it adds up, and that it stays in its columns."""

import re
from dataclasses import replace
from typing import Any

import pytest
from example_plans import GIB, a_phase, a_plan

from lowvram.planner import table
from lowvram.planner.log import CATEGORIES
from lowvram.planner.plan import Alternative, PhasePlan, Plan


def make_phase(name: str, live_gib: float, *, every: int, activations: str = "keep") -> PhasePlan:
    parts = dict(zip(CATEGORIES, (0.25, 0.125, 0.5, 0.125), strict=False))
    parts["activations"] = live_gib - sum(parts.values())
    return a_phase(
        name,
        int(live_gib * GIB),
        every=every,
        activations=activations,
        reserved_bytes=int((live_gib + 0.25) * GIB),
        by_category={category: int(gib * GIB) for category, gib in parts.items()},
        peak_op=f"aten.op_of_{name}",
        peak_module=f"{name}.b256",
        seconds=0.125 * live_gib,
    )


def make_plan(**changes: Any) -> Plan:
    average = replace(make_phase("average", 1.0, every=1), samples=0, micro_batch=0, activations="")
    whole = a_plan(
        make_phase("G", 3.0, every=1, activations="recompute"),
        make_phase("path_length", 3.5, every=4, activations="offload"),
        make_phase("D", 2.0, every=1),
        make_phase("R1", 4.0, every=16),
        average,
        replace(make_phase("sampling", 1.5, every=0), samples=16),
        live_bytes=4 * GIB,
        reserved_bytes=int(4.25 * GIB),
        margin_bytes=GIB // 4,
        kwh=58.2,
        host_bytes=int(1.5 * GIB),
        smallest_vram_bytes=int(3.501 * GIB),
        alternatives=(
            Alternative(
                what="micro_batch.G=32, memory.activations.R1=keep",
                device_bytes=int(6.4 * GIB),
                images_per_second=13.0,
                why="needs 0.4GB more than the budget",
            ),
            Alternative(
                what="memory.activations.G=keep", device_bytes=5 * GIB, images_per_second=11.8, why="4% slower"
            ),
        ),
        settings={"micro_batch.G": "8", "memory.activations.G": "recompute"},
        notes=("fp16 with loss scaling: this card has no bf16",),
    )
    return replace(whole, **changes)


def row(said: str, name: str) -> list[str]:
    return next(line.split() for line in said.splitlines() if line.startswith(f"{name} "))


def test_a_plan_that_fits() -> None:
    said = str(make_plan())
    lines = said.splitlines()
    assert " ".join(lines[:2]).rstrip() == (
        "faces256 fits vram=6GB on an RTX 2060: 4.94GB of 6GB, 12.3 images/s, 25000 kimg in 23.5 days, 58 kWh, "
        "cost 17.46, 23 kg CO2"
    )
    assert "micro_batch.G=8 memory.activations.G=recompute" in said
    assert " ".join(row(said, "R1")) == "R1 16 8 x 8 keep 0.25 0.12 0.50 0.12 3.00 0.00 4.00 4.25 0.500"
    assert row(said, "average")[:4] == ["average", "1", "-", "-"]
    assert row(said, "sampling")[:5] == ["sampling", "-", "8", "x", "2"]
    assert "4.25 reserved (4.00 live) + 0.06 workspaces + 0.38 CUDA context = 4.69 GB" in said
    assert "+ 0.25 margin = 4.94 GB of 6.00 GB: 1.06 GB headroom" in said
    assert "4.00 GB live in R1, at aten.op_of_R1, module R1.b256" in said
    assert re.search(r"^RAM +1.50 GB", said, re.M)
    assert re.search(r"^smallest card +RTX 2060; budget vram=3.51GB", said, re.M)  # rounded up: it has to fit
    assert re.search(r"^micro_batch.G=32 +6.40 +13.0  needs 0.4GB more than the budget$", said, re.M)
    assert re.search(r"^memory.activations.G=keep +5.00 +11.8  4% slower$", said, re.M)
    assert "this card has no bf16" in said
    assert "data sheet" in said and "measured on this card" in str(make_plan(card_measured=True))


def test_every_number_has_its_unit() -> None:
    lines = str(make_plan()).splitlines()
    below = next(n for n, line in enumerate(lines) if line.startswith("-----"))
    assert lines[below - 1].split() == ["phase", "steps", "images", "tions", *["GB"] * 8, "s"]
    widths = [len(dashes) for dashes in lines[below].split()]
    assert len(widths) == 13
    joined = " ".join(lines[below - 3 : below])
    for word in (
        "every",
        "micro-",
        "weights",
        "gradi-",
        "opti-",
        "aver-",
        "activa-",
        "tempo-",
        "live",
        "served",
        "time",
    ):
        assert word in joined


def test_a_plan_that_does_not_fit() -> None:
    plan = make_plan(
        vram_bytes=3 * GIB, fits=False, smallest_card=None, needs=("a budget of 3.51GB", "batch=32"), alternatives=()
    )
    lines = str(plan).splitlines()
    assert lines[0] == "faces256 does not fit vram=3GB on an RTX 2060: it takes vram=3.51GB at least"
    assert "to make it fit - a budget of 3.51GB" in lines and "               - batch=32" in lines
    assert "4.94 GB of 3.00 GB: 1.94 GB too much" in str(plan)
    assert "none known; vram=3.51GB" in str(plan)
    assert "images/s" not in str(plan)
    over = make_plan(vram_bytes=int(4.9374 * GIB), fits=False)
    assert "0.01 GB too much" in str(over)  # never 0.00


def test_the_plain_run_and_no_budget() -> None:
    plan = make_plan(settings={}, vram_bytes=None, phases=(), host_bytes=0, notes=(), changes=("R1 is left out",))
    said = str(plan)
    assert said.startswith("faces256 without a budget on an RTX 2060: 4.94GB, 12.3 images/s")
    assert "nothing: the plain run fits" in said
    assert "headroom" not in said and "RAM" not in said and "Notes" not in said and "peak " not in said
    assert re.search("^changed maths +R1 is left out", said, re.M)


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("RTX 3060", "an RTX 3060"),
        ("T4", "a T4"),
        ("L4", "an L4"),
        ("GTX 1660", "a GTX 1660"),
        ("NVIDIA X", "an NVIDIA X"),
    ],
)
def test_cards_have_their_article(card: str, named: str) -> None:
    assert f"on {named}:" in table.headline(make_plan(card=card))


@pytest.mark.parametrize(
    ("hours", "kwh", "said"),
    [
        (0.5, 0.04, "30 minutes, 40 Wh, cost 0.012, 16 g CO2"),
        (13.25, 2.5, "13.2 hours, 2.5 kWh"),
        (48, 120.4, "2.0 days, 120 kWh, cost 36.12, 48 kg CO2"),
    ],
)
def test_times_and_energies(hours: float, kwh: float, said: str) -> None:
    assert said in table.headline(make_plan(hours=hours, kwh=kwh))


@pytest.mark.parametrize("width", [120, 100, 80, 20])
def test_lines_stay_within_the_width(width: int) -> None:
    long = make_phase("a_phase_with_a_very_long_name_indeed", 123.0, every=16)
    plan = make_plan(phases=(*make_plan().phases, replace(long, peak_module="a.b." * 60, seconds=12345.6)))
    said = table.text(plan, width)
    assert max(map(len, said.splitlines())) <= max(80, width)
    assert "micro_batch.G=8" in said.split()
    assert {"memory.activations.G=recompute", "micro_batch.G=32", "memory.activations.R1=keep"} <= set(said.split())
    assert ("What holds the memory there" in said) == (width < 100 or "by what holds" not in said)
    for name in ("path_length", "sampling", "a_phase_with_a_very_lo.."):
        assert f"\n{name} " in said


def test_only_ascii_and_no_control_characters() -> None:
    plan = make_plan(
        recipe="größe\x1b[31m",
        card="RTX\n2060",
        notes=("tab\tand ✓", "\ud800"),
        settings={"a\x07": "é"},
        phases=(replace(make_plan().phases[0], name="Gä", peak_op="\x00op", peak_module="é"),),
    )
    said = str(plan)
    assert said.isascii() and said.replace("\n", "").isprintable()
    assert said.startswith("gr??e?[31m fits vram=6GB on an RTX?2060")
