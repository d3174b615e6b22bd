"""Published costs: beside recipes that do the same work, and nowhere else."""

import pytest

from lowvram.config import load_recipe
from lowvram.planner import published

# Seconds for 1000 images on V100 and A100, as published for each configuration.
SECONDS = {
    "auto 128": (12.51, 6.79),
    "auto 256": (20.84, 12.53),
    "auto 512": (71.59, 41.06),
    "auto 1024": (141.83, 90.39),
    "paper 256": (4.01, 2.47),
    "paper 512": (9.11, 5.28),
    "paper 1024": (18.56, 11.75),
}


@pytest.mark.parametrize("one", published.CONFIGURATIONS, ids=lambda one: one.name)
def test_days_and_seconds_agree(one: published.Configuration) -> None:
    for days, seconds in zip((one.v100_days, one.a100_days), SECONDS[one.name], strict=True):
        assert days == pytest.approx(seconds * 25_000 * one.gpus / 86_400, abs=0.06)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("faces128", ["auto 128", "3.6 card-days"]),
        ("faces256", ["paper 256", "9.3 card-days", "under $900", "not stated"]),
        ("faces512", ["paper 512", "21.1 card-days"]),
        ("faces1024", ["paper 1024", "41 days", "9 days 18 hours on eight V100", "$2.48", "$4,642"]),
        ("sd15_finetune", ["$50 to $400", "$300,000"]),
    ],
)
def test_the_same_work(recipe: str, words: list[str]) -> None:
    said = published.figures(load_recipe(recipe))
    for word in words:
        assert any(word in one for one in said), word
    others = {"128", "256", "512", "1024"} - {recipe.removeprefix("faces")}
    assert not any(f"{size}x{size}" in one for size in others for one in said)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("faces32", []),
        ("faces64", []),
        ("faces256", ["model.channel_base=8192"]),
        ("faces256", ["model.channel_max=256"]),
        ("faces256_ldm", []),
        ("sd15_lora", []),
        ("sd15_textual_inversion", []),
    ],
)
def test_other_work_has_none(recipe: str, changes: list[str]) -> None:
    assert published.figures(load_recipe(recipe, changes)) == ()
