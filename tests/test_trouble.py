"""Signs of trouble, on statistics that are made so; and one on a training that is made to go wrong."""

import json
from pathlib import Path

import pytest
import torch
from tiny import TINY
from torch import Tensor

from lowvram import Trainer, load_recipe
from lowvram.phase import MicroBatch
from lowvram.tasks.trouble import AGAIN_KIMG, PATIENCE_KIMG, Signs, small_pixels

BATCH, DIM = 250, 6


class Story:
    """A training told by its statistics."""

    def __init__(self) -> None:
        self.said: list[str] = []
        words = {"weaken": "Lower optimizer.lr_d", "widen": "widen it"}
        self.signs = Signs(BATCH, torch.device("cpu"), self.said.append, **words)
        self._random = torch.Generator().manual_seed(0)

    def go_on(self, kimg: float, *, spread: float = 1.0, right: float = 0.7, at: float = 0.0) -> "Story":
        """Images made spread so far round `at`; real ones lie round 0 with a deviation of 1."""
        for _ in range(round(kimg * 1000 / BATCH)):
            real = torch.randn(BATCH, DIM, generator=self._random)
            fake = torch.randn(BATCH, DIM, generator=self._random) * spread + at
            micro = MicroBatch(images=real, labels=real, seeds=torch.arange(BATCH))
            shares = torch.full((BATCH,), right)
            self.signs.report(micro, (real, fake), (shares, shares))
            self.signs.take({name: total / BATCH for name, total in micro.reported.items()})
            self.signs.look()
        return self


def test_a_healthy_training_is_told_in_numbers_and_not_warned_of() -> None:
    story = Story().go_on(60)
    assert story.said == []
    assert story.signs.values["diversity"] == pytest.approx(1, abs=0.05)
    assert story.signs.values["d_right"] == pytest.approx(0.7, abs=1e-3)
    assert story.signs.values["feature_distance"] < 0.1


def test_a_young_generator_is_given_time() -> None:
    assert Story().go_on(PATIENCE_KIMG - 2, spread=0.01, right=1.0, at=5).said == []


def test_collapse_is_a_fall_or_a_state() -> None:
    fallen = Story().go_on(30).go_on(5, spread=0.5)
    assert len(fallen.said) == 1
    assert "as much as real ones do (once 10" in fallen.said[0]
    assert fallen.signs.values["diversity"] == pytest.approx(0.25, abs=0.01)
    assert Story().go_on(30, spread=0.2).said[0].startswith("warning: collapse?")
    assert Story().go_on(40, spread=0.5).said == []  # never was more diverse
    assert Story().go_on(5, spread=2.5).go_on(30).said == []  # was, when it was young, more than the data are


def test_a_discriminator_that_won_is_warned_of_now_and_then() -> None:
    story = Story().go_on(PATIENCE_KIMG + 10, right=0.999)
    assert len(story.said) == 1
    assert "is right on 99.9%" in story.said[0]
    assert "optimizer.lr_d" in story.said[0]
    assert len(story.go_on(AGAIN_KIMG, right=0.999).said) == 2


def test_features_that_stand_still_far_away() -> None:
    assert "standstill" in Story().go_on(65, at=3).said[0]
    assert "standstill" in Story().go_on(65, at=0.7).said[0]
    assert Story().go_on(65, at=0.05).said == []  # where they should be
    moving = Story()
    for step in range(65):
        moving.go_on(1, at=3 - step * 0.02)
    assert moving.said == []


def test_what_is_resumed_warns_as_what_was_not() -> None:
    whole = Story().go_on(30).go_on(10, spread=0.5)
    first = Story().go_on(30)
    resumed = Story()
    resumed.signs.load({name: tensor.clone() for name, tensor in first.signs.tensors().items()})
    resumed._random = first._random
    resumed.go_on(10, spread=0.5)
    assert resumed.said == whole.said
    assert resumed.signs.values == whole.signs.values
    Story().signs.load({})  # of a run from before there were signs


def test_small_pixels_are_the_picture_in_little() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, :4, :4] = 1
    small: Tensor = small_pixels(images)
    assert small.shape == (2, 3 * 64)
    assert small[1, 0] == 1
    assert small.sum() == 1


def test_a_training_of_stylegan2_tells_them(tmp_path: Path) -> None:
    lines = numbers_of(
        tmp_path, "faces32", *TINY, "batch=40", "kimg=1.04", "loss.path_length_every=0", "optimizer.lr=1e-9"
    )
    assert "diversity" not in lines[0]  # of too few images
    values = lines[-1]
    assert values["diversity"] > 0
    assert 0 <= values["d_right"] <= 1
    assert values["feature_distance"] > 0.3  # of a generator that has learned nothing


def numbers_of(folder: Path, recipe: str, *overrides: str) -> list[dict[str, float]]:
    """The metrics of a run."""
    Trainer(load_recipe(recipe, [*overrides, f"out={folder / 'run'}"]), quiet=True).fit()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
