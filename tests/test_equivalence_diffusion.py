"""test_equivalence.py for latent diffusion: a UNet told classes, a transformer with the text encoder that is trained
along, and the autoencoder against its discriminator. Whatever is done to save memory, the same networks are trained.

The step size grows through these runs and the gradient's norm is bounded, so that what is applied late is applied with
the step size and bound of its own step.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cache
from itertools import islice

import pytest
from tiny_diffusion import CALM, MODELS, ldm_recipe, save_vae, vae_recipe
from torch import Tensor

from lowvram import LowVRAMError, Trainer
from lowvram.settings import Settings

STEPS = 4
REORDERED = 1e-6  # largest difference of a weight when sums are made in another order
UNBOUND = "optimizer.clip_norm=null"  # which `fused` needs

PHASES = {"unet": ["denoiser"], "dit": ["denoiser"], "autoencoder": ["autoencoder", "discriminator"]}

# Settings of every phase (micro_batch, memory.activations) or optimizer (the others), and what they may change.
TECHNIQUES: dict[str, tuple[dict[str, str], tuple[str, ...], float]] = {
    "recompute": ({"memory.activations": "recompute"}, (), 0.0),
    "recompute every second": ({"memory.activations": "recompute"}, ("memory.recompute_every=2",), 0.0),
    "offload, average on the host": ({"memory.activations": "offload"}, ("memory.ema=host",), 0.0),
    "micro-batches": ({"micro_batch": "2"}, (), REORDERED),
    "deferred, state on the host": ({"memory.update": "deferred", "memory.state": "host"}, (), 0.0),
    "deferred, micro-batches": ({"memory.update": "deferred", "micro_batch": "4"}, (), REORDERED),
    "fused": ({"memory.update": "fused"}, (UNBOUND,), 0.0),
    "streamed": ({"memory.weights": "stream", "memory.update": "deferred"}, (), 0.0),
    "streamed, micro-batches, recompute": (
        {
            "memory.weights": "stream",
            "memory.update": "deferred",
            "micro_batch": "4",
            "memory.activations": "recompute",
        },
        (),
        REORDERED,
    ),
    "streamed, fused": ({"memory.weights": "stream", "memory.update": "fused"}, (UNBOUND,), 0.0),
    "math attention": ({}, ("memory.attention=math",), REORDERED),
    "sharded": ({}, ("memory.fsdp=shard",), REORDERED),
}

# Those that have more to do with one model than with the others, and are dear, are tried with it alone.
ONLY = {
    "recompute every second": "unet",
    "deferred, micro-batches": "unet",
    "streamed, fused": "dit",
    "math attention": "dit",
    "sharded": "dit",
    "bf16 autocast": "unet",
}

# How far all weights may end from the plain run's, relative to the distance that those moved: 2-norms.
NARROW: dict[str, tuple[dict[str, str], tuple[str, ...], float]] = {
    "bf16 weights": ({"memory.weights_dtype": "bf16"}, (), 0.35),
    "bf16 weights, 8 bit, streamed": (
        {
            "memory.weights_dtype": "bf16",
            "memory.optimizer": "adam8bit",
            "memory.weights": "stream",
            "memory.update": "deferred",
        },
        (),
        0.35,
    ),
    "bf16 autocast": ({}, ("precision=bf16",), 0.05),
}

Run = Callable[..., tuple[dict[str, Tensor], list[dict[str, float]]]]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    trainer.applied.settle()
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, network in trainer.task.networks.items()
        for key, tensor in trainer.applied.full_state(network).items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(model, setting, ...): weights and losses after some steps; run(model, ..., count=0): how they begin."""
    home = tmp_path_factory.mktemp("runs")
    vae = save_vae(home / "vae")

    def recipe(model: str, *overrides: str) -> Settings:
        out = tmp_path_factory.mktemp("run") / "run"
        words = [*CALM, "kimg=10", "optimizer.warmup_kimg=0.04", "optimizer.clip_norm=0.5", *overrides]
        return vae_recipe(out, *words) if model == "autoencoder" else ldm_recipe(out, vae, *MODELS[model], *words)

    @cache
    def make(model: str, *overrides: str, count: int = STEPS) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        trainer = Trainer(recipe(model, *overrides), quiet=True)
        with closing(trainer.loader.iterate(0)) as batches:
            losses = [trainer.train_step(batch).losses for batch in islice(batches, count)]
        return weights(trainer), losses

    return make


def overrides(model: str, settings: dict[str, str], more: tuple[str, ...]) -> list[str]:
    """Settings for each phase or optimizer of a model. The discriminator's two terms can't be fused: it is deferred."""
    words = [*more]
    for name, value in settings.items():
        for phase in PHASES[model]:
            unfused = value == "fused" and phase == "discriminator"
            words.append(f"{name}.{phase}={'deferred' if unfused else value}")
    return words


def cases(techniques: Iterable[str]) -> list[tuple[str, str]]:
    return [(technique, model) for technique in techniques for model in PHASES if ONLY.get(technique, model) == model]


@pytest.mark.parametrize(("technique", "model"), cases(TECHNIQUES))
def test_the_same_is_trained_under(technique: str, model: str, run: Run) -> None:
    settings, more, tolerance = TECHNIQUES[technique]
    found, losses = run(model, *overrides(model, settings, more))
    wanted, wanted_losses = run(model, *(word for word in more if word == UNBOUND))
    for one, other in zip(losses, wanted_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert found.keys() == wanted.keys()
    assert max(float((found[key].double() - wanted[key].double()).abs().max()) for key in found) <= tolerance


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[key].double() - other[key].double()).square().sum()) for key in one) ** 0.5


@pytest.mark.parametrize(("technique", "model"), cases(NARROW))
def test_narrow_weights_stay_near_the_plain_run(technique: str, model: str, run: Run) -> None:
    settings, more, tolerance = NARROW[technique]
    found, losses = run(model, *overrides(model, settings, more))
    wanted, wanted_losses = run(model)
    start, _ = run(model, count=0)
    for one, other in zip(losses, wanted_losses, strict=True):
        assert one == pytest.approx(other, rel=0.05)
    assert 0 < distance(found, wanted) <= tolerance * distance(wanted, start)


@pytest.mark.parametrize("model", PHASES)
def test_the_runs_tell_settings_apart(model: str, run: Run) -> None:
    """The bound on the gradient is met, and a step size that did not grow would show."""
    plain, _ = run(model)
    for word in (UNBOUND, "optimizer.warmup_kimg=0"):
        other, _ = run(model, word)
        assert max(float((plain[key].double() - other[key].double()).abs().max()) for key in plain) > 100 * REORDERED


@pytest.mark.parametrize(
    ("model", "words", "names"),
    [
        ("unet", ["memory.update.denoiser=fused"], ("memory.update.denoiser=fused", "clip_norm=0.5")),
        (
            "autoencoder",
            ["memory.update.discriminator=fused", UNBOUND],
            ("memory.update.discriminator=fused", "2 parts"),
        ),
        ("dit", ["memory.weights.denoiser=stream"], ("memory.weights.denoiser=stream", "memory.update.denoiser=after")),
        ("dit", ["micro_batch.denoiser=3"], ("micro_batch.denoiser=3", "batch of 8")),
    ],
)
def test_settings_that_exclude_each_other_are_both_named(
    model: str, words: list[str], names: tuple[str, ...], run: Run
) -> None:
    with pytest.raises(LowVRAMError) as error:
        run(model, *words)
    for name in names:
        assert name in str(error.value)
