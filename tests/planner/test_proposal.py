"""The page that asks for compute: its figures are the plan's, its blanks are marked, and it stays one page."""

import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_plans import GIB, a_cost, a_plan

from lowvram.config import load_recipe
from lowvram.errors import LowVRAMError
from lowvram.planner import calibration, cards, proposal
from lowvram.planner.plan import Plan
from lowvram.receipt.rates import Rates

ROWS = (
    a_cost("RTX 2060", usable_bytes=6 * GIB, hours=564.0, kwh=58.0),
    a_cost("GTX 1660 Super", usable_bytes=5 * GIB, hours=900.0, kwh=96.0),
    a_cost("H200", usable_bytes=129 * GIB, hours=20.0, kwh=12.0),
)
SETTINGS = load_recipe("faces256")


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {"costs": ROWS, "published": ("41 days on one V100",), **changes}
    return replace(a_plan(live_bytes=4 * GIB, reserved_bytes=4 * GIB), **values)


def page(plan: Plan, **options: Any) -> str:
    return proposal.text(plan, SETTINGS, **{"data": "70,000 images", **options})


def section(said: str, name: str) -> str:
    return said.split(f"## {name}\n")[1].split("\n## ")[0]


def test_the_figures_are_those_of_the_plan() -> None:
    smaller = make_plan(recipe="faces128", hours=400.0, kwh=40.0, rates=Rates.of("$0.40/h", None, None))
    said = page(make_plan(rates=Rates.of("$0.40/h", None, None)), aim="To see.", smaller=smaller)
    assert "| 23.5 days | 58 kWh | $225.60 | 23 kg CO2 |" in section(said, "Cost")  # 564 hours, 400 g for each kWh
    assert "564 card hours at $0.40; electricity is in the rent" in section(said, "Cost")
    assert "41 days on one V100" in section(said, "Cost")
    assert "**Asked for:** one RTX 2060 (graphics card) for 23.5 days, at a cost of $225.60" in said
    assert "25,000,000 images" in section(said, "Plan") and "12.3 images a second" in section(said, "Plan")
    assert "4.64GB of the 6GB" in section(said, "Plan")
    less = section(said, "What a smaller budget gives")
    assert "half the length takes 11.8 days and costs $112.80" in less
    assert "GTX 1660 Super" not in less  # it has as much memory, takes longer and draws more
    assert "least energy and quickest:** H200: 20.0 hours, 12 kWh, cheaper than this plan if rented" in less
    assert "recipe `faces128` on the same card, 25,000,000 images: 16.7 days, 40 kWh, $160.00" in less
    assert "To see." in section(said, "Aim")


def test_electricity_of_ones_own_card() -> None:
    said = page(make_plan(rates=Rates.of(None, "0.20 EUR/kWh", "50g/kWh")))
    assert "electricity, 58 kWh at 0.20 EUR a kWh" in said and "50 g a kWh" in said
    assert "| 23.5 days | 58 kWh | 11.60 EUR | 2.9 kg CO2 |" in said
    assert "H200: 20.0 hours, 12 kWh, 2.40 EUR." in said
    free = page(make_plan(rates=Rates.of(None, "0/kWh", None)))
    assert "The money is nothing; electricity is free" in free


def test_eight_cards() -> None:
    said = page(make_plan(processes=8, hours=234.0, rates=Rates.of("$2.48/h", None, None)))
    assert "8 RTX 2060 cards" in said and "1,872 card hours at $2.48" in said
    assert "$4,643" in said and "on each card" in said


def test_blanks_are_marked() -> None:
    said = page(make_plan(), data=proposal.of_data(load_recipe("faces256", ["data.path=photos.zip"])))
    blanks = re.findall(r"(?<!\\)\[([^\]]+)\]", said)
    for word in ("your name", "date", "what you want to find out", "currency", "reserve", "number", "licence"):
        assert any(word in blank for blank in blanks), word
    assert "currency" not in page(make_plan(rates=Rates.of("$1/h", None, None)))
    assert "what you want" not in page(make_plan(), aim="Faces.")


def test_it_is_one_page() -> None:
    rates = Rates.of("$0.40/h", "0.30/kWh", None)
    said = page(make_plan(rates=rates), aim="word " * 40, smaller=make_plan(recipe="faces128"))
    assert len(said.splitlines()) < 60
    assert len(said.split()) < 560  # of which the aim has 40
    assert [line for line in said.splitlines() if line.startswith("# ")] == [said.splitlines()[0]]


def test_words_of_the_author_stay_words() -> None:
    said = page(make_plan(card="RTX|2060", recipe="x`\n# y"), aim="<script>[a](b)</script>\n# Big | \ud800")
    assert "<script" not in said.replace("\\<script", "")
    assert not re.search(r"^# (Big|y)", said, re.M)
    said.encode("utf-8")
    with pytest.raises(LowVRAMError, match="aim has 1001 letters"):
        page(make_plan(), aim="x" * 1001)


def test_what_does_not_fit_is_not_proposed() -> None:
    with pytest.raises(LowVRAMError, match="does not fit"):
        page(make_plan(fits=False, vram_bytes=GIB))


def test_how_sure_the_estimate_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration, "cache_root", lambda: tmp_path)
    assert "no training on such a card was measured" in page(make_plan())
    assert "card's speed was measured, but" in page(make_plan(card_measured=True, card="Unheard of"))
    card = cards.find("RTX 2060")
    assert calibration.save(card, replace(calibration.default(card), measurements=3))
    assert "corrected by 3 earlier measurements" in page(make_plan())


def test_what_is_known_of_the_images(tmp_path: Path) -> None:
    built_in = proposal.of_data(SETTINGS)
    assert built_in.startswith("10,000 drawn faces") and "CC0" in built_in and "[" not in built_in
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for n in range(3):
            archive.writestr(f"{n}.png", b"not opened")
        archive.writestr("notes.txt", b"")
    of_zip = proposal.of_data(load_recipe("faces256", [f"data.path={tmp_path / 'faces.zip'}"]))
    assert of_zip.startswith("3 images in `faces.zip`, used at 256x256 pixels")
    assert str(tmp_path) not in of_zip
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        assert proposal.of_data(load_recipe("faces256", [f"data.path={tmp_path / name}"])).startswith("[number] images")
