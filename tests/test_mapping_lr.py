"""The mapping network's own step size: what it changes, and what it must not."""

from pathlib import Path

import pytest
import torch
from tiny import TINY
from tiny_diffusion import settings_of

from lowvram import Trainer
from lowvram.config import settings_from, settings_values
from lowvram.convert import ConvertOptions, main
from lowvram.errors import LowVRAMError
from lowvram.tasks import load_run, load_weights
from lowvram.weights import stylegan2 as weights

# A calm Adam (large eps) would not be invariant to the gradient's scale; augmentation would only take time.
_RECIPE = (*TINY, "augment.mode=none", "loss.path_length_every=0", "kimg=0.024", "snapshot_kimg=0.024")


def recipe(out: Path, *overrides: str):
    return settings_of("faces32", [*_RECIPE, f"out={out}", *overrides])


def steps(trainer: Trainer, count: int) -> Trainer:
    for _, _ in zip(range(count), trainer, strict=False):
        pass
    return trainer


def effective(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights and biases that the mapping multiplies and adds."""
    found = {}
    for name, layer in network.mapping.named_children():
        found[f"{name}.weight"] = (layer.weight * layer.weight_gain).detach().clone()
        found[f"{name}.bias"] = (layer.bias * layer.bias_gain).detach().clone()
    return found


def moved(trainer: Trainer, before: dict[str, torch.Tensor]) -> float:
    """By how much the mapping's weights changed, root mean square."""
    after = effective(trainer.task.G)
    changes = torch.cat([(after[name] - before[name]).flatten() for name in before if name.endswith("weight")])
    return float(changes.square().mean().sqrt())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file of a run of three steps."""
    folder = tmp_path_factory.mktemp("published")
    Trainer(recipe(folder / "run"), quiet=True).fit()
    path = folder / "published.safetensors"
    main(ConvertOptions(to="stylegan", run=str(folder / "run"), out=str(path)))
    return path


def test_the_mapping_moves_by_the_share_and_computes_the_same(tmp_path: Path) -> None:
    distances, first = {}, {}
    z = torch.randn(4, 16)
    for lr in (0.01, 0.002, 0.04):
        trainer = Trainer(recipe(tmp_path / str(lr), f"optimizer.mapping_lr={lr}"), quiet=True)
        first[lr] = trainer.task.G.mapping(z)
        before = effective(trainer.task.G)
        distances[lr] = moved(steps(trainer, 1), before)
    for lr in (0.002, 0.04):
        torch.testing.assert_close(first[lr], first[0.01], rtol=1e-4, atol=1e-5)
        assert distances[lr] / distances[0.01] == pytest.approx(lr / 0.01, rel=0.02)


def test_published_weights_compute_the_same_and_come_back_as_they_were(published: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path / "run", f"weights={published}", "optimizer.mapping_lr=0.003"), quiet=True)
    plain = load_weights(published, device="cpu")
    z = torch.randn(4, 16)
    ws = trainer.task.G_ema.mapping(z)
    torch.testing.assert_close(ws, plain.networks["G_ema"].mapping(z), rtol=1e-4, atol=1e-5)
    before = weights.read(published)
    for name in ("G", "G_ema", "D"):
        state = trainer.task.networks[name].state_dict()
        again = weights.published(trainer.recipe, name, state).state
        for key, value in before[name].state.items():
            if key.startswith("mapping.fc"):
                assert not torch.equal(state[key], value) or not value.any()
                torch.testing.assert_close(again[key], value, rtol=1e-6, atol=0)
            else:
                assert torch.equal(again[key], value), key


def test_a_run_is_sampled_exported_and_resumed_at_its_own_scale(published: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path / "run", f"weights={published}", "optimizer.mapping_lr=0.003", "freeze_d=2")
    Trainer(settings, quiet=True).fit()
    of_run = load_run(tmp_path / "run", device="cpu")
    main(ConvertOptions(to="stylegan", run=str(tmp_path / "run"), out=str(tmp_path / "again.safetensors")))
    of_file = load_weights(tmp_path / "again.safetensors", device="cpu")
    one, other = (task.sample(4, seed=1).int() for task in (of_run, of_file))
    assert (one - other).abs().max() <= 1 and one.float().std() > 1
    words = ("kimg=0.032", "resume=auto", "freeze_d=2", f"weights={published}")
    with pytest.raises(LowVRAMError, match=r"mapping_lr=0\.01, and the run was begun with 0\.003"):
        Trainer(recipe(tmp_path / "run", *words, "optimizer.mapping_lr=0.01"), quiet=True)
    Trainer(recipe(tmp_path / "run", *words), quiet=True).fit()


def test_average_w_and_noise_go_on_from_the_published_ones(published: Path, tmp_path: Path) -> None:
    """Truncation and the fixed noise of published networks are part of what they draw."""
    state = weights.read(published)["G_ema"].state
    trainer = Trainer(recipe(tmp_path / "run", f"weights={published}"), quiet=True)
    names = [name for name in state if name.endswith(("w_avg", "noise_const", "noise_strength"))]
    assert len(names) == 1 + 2 * 5 and state["mapping.w_avg"].any()
    average = trainer.task.G_ema.state_dict()
    assert all(torch.equal(average[name], state[name]) for name in names)
    now = trainer.task.sample(2, seed=3, truncation_psi=0.5, noise_mode="const")
    assert torch.equal(
        now, load_weights(published, device="cpu").sample(2, seed=3, truncation_psi=0.5, noise_mode="const")
    )
    own = weights.read(published)["G"].state["mapping.w_avg"]
    beta, distance = trainer.recipe.ema.w_avg_beta, []
    for _ in range(2):
        steps(trainer, 1)
        distance.append(float((trainer.task.G.mapping.w_avg - own).norm()))
    # It moves on from where it was, by the share of a step, and does not start anew from zero.
    assert 0 < distance[0] < 20 * (1 - beta) * float(own.norm() + 4) and distance[1] > distance[0] / 2
    constant = weights.read(published)["G"].state["synthesis.b8.conv1.noise_const"]
    assert torch.equal(trainer.task.G.synthesis.b8.conv1.noise_const, constant)


@pytest.mark.parametrize("value", ["0", "-0.01", "2"])
def test_what_is_no_share_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match="mapping_lr="):
        recipe(tmp_path, f"optimizer.mapping_lr={value}")


def test_runs_from_before_there_was_a_choice_mean_the_published_one(tmp_path: Path) -> None:
    values = settings_values(recipe(tmp_path))
    del values["optimizer"]["mapping_lr"]
    assert settings_from(values).optimizer.mapping_lr == 0.01
