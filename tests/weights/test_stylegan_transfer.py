"""Training that begins with a published StyleGAN2."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pickles import write
from tiny import TINY

from lowvram import Trainer, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.models.stylegan2 import Discriminator, Generator, freeze_layers
from lowvram.weights import stylegan_pickle

G = {"z_dim": 24, "w_dim": 20, "mapping_layers": 3, "channel_base": 256, "channel_max": 16}
D = {"channel_base": 256, "channel_max": 16, "mbstd_group_size": 2}
MAPPING, SIZES = {"num_layers": 3}, {"channel_base": 256, "channel_max": 16}
COMMON = {"img_resolution": 16, "img_channels": 3, "c_dim": 0}
SHAPED_BY_FILE = ("model.z_dim", "model.w_dim", "model.mapping_layers", "model.channel_base", "model.channel_max")


def networks() -> dict:
    torch.manual_seed(5)
    g, g_ema, d = Generator(16, **G), Generator(16, **G), Discriminator(16, **D)
    g_ema.mapping.w_avg.normal_()
    g_kwargs = {
        **COMMON,
        "z_dim": 24,
        "w_dim": 20,
        "mapping_kwargs": MAPPING,
        "synthesis_kwargs": {**SIZES, "num_fp16_res": 3},
    }
    d_kwargs = {**COMMON, **SIZES, "epilogue_kwargs": {"mbstd_group_size": 2}, "block_kwargs": {"freeze_layers": 0}}
    return {"G": (g, g_kwargs), "D": (d, d_kwargs), "G_ema": (g_ema, g_kwargs)}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable:
    """recipe("x=1") is the tiny recipe that begins with a pickle of other widths."""
    path = write(tmp_path / "published.pkl", networks())

    def make(*overrides: str) -> object:
        kept = [o for o in TINY if not o.startswith(SHAPED_BY_FILE)]
        return load_recipe("faces32", [*kept, f"out={tmp_path / 'run'}", f"weights={path}", *overrides])

    return make


def same(network: torch.nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_shape_and_every_number_come_from_the_file(recipe) -> None:
    settings = recipe()
    assert (settings.model.z_dim, settings.model.w_dim, settings.model.mapping_layers) == (24, 20, 3)
    assert (settings.model.channel_base, settings.model.channel_max, settings.model.mbstd_group_size) == (256, 16, 2)
    trainer = Trainer(settings, quiet=True)
    for name, (network, _) in networks().items():
        assert same(trainer.task.networks[name], network.state_dict()), name
    step = next(iter(trainer))
    assert step is not None
    assert not same(trainer.task.networks["G"], networks()["G"][0].state_dict())


def test_frozen_layers_keep_every_bit_and_the_rest_learns(recipe, tmp_path) -> None:
    settings = recipe("freeze_d=5", "augment.mode=none")
    trainer = Trainer(settings, quiet=True)
    for _, _ in zip(range(3), trainer, strict=False):
        pass
    before, after = networks()["D"][0].state_dict(), trainer.task.networks["D"].state_dict()
    frozen = ("b16.fromrgb.", "b16.conv0.", "b16.conv1.", "b16.skip.", "b8.conv0.")
    for key, value in after.items():
        if key.startswith(frozen) or "resample_filter" in key:
            assert torch.equal(value, before[key]), key
        else:
            assert not torch.equal(value, before[key]), key


def test_a_run_goes_on_from_its_checkpoint_and_not_from_the_file(recipe, tmp_path) -> None:
    settings = recipe("freeze_d=2", "kimg=0.016", "snapshot_kimg=0.016")
    Trainer(settings, quiet=True).fit()
    trained = {
        k: v.clone()
        for k, v in Trainer(replace(settings, resume="auto"), quiet=True).task.networks["G"].state_dict().items()
    }
    assert not same(networks()["G"][0], trained)
    (tmp_path / "published.pkl").unlink()
    longer = Trainer(replace(settings, resume="auto", kimg=0.032), quiet=True)
    assert same(longer.task.networks["G"], trained)
    longer.fit()


def test_contradictions_name_what_to_change(recipe, tmp_path, tiny) -> None:
    with pytest.raises(LowVRAMError, match=r"model\.z_dim=8 is not the 24"):
        recipe("model.z_dim=8")
    with pytest.raises(LowVRAMError, match=r"images of 16 pixels, and resolution=32"):
        recipe("resolution=32")
    with pytest.raises(LowVRAMError, match=r"freeze_d=100: the discriminator has 7 layers"):
        Trainer(recipe("freeze_d=100"), quiet=True)
    with pytest.raises(LowVRAMError, match="StyleGAN2 and Stable Diffusion"):
        load_recipe("faces64_vae", [f"weights={tmp_path / 'published.pkl'}"])
    with pytest.raises(LowVRAMError, match="can't be read"):
        tiny(f"weights={tmp_path / 'none.pkl'}")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("G", {"img_resolution": 16, "architecture": "orig"}, "architecture=orig"),
        ("G", {"magnitude_ema_beta": 0.99}, "magnitude_ema_beta=0.99, which is not known"),
        ("D", {"resample_filter": [1, 2, 1]}, r"resample_filter=\[1, 2, 1\]"),
        ("D", {"channel_max": 8}, "model.channel_max is 16 in one network and 8 in D"),
    ],
)
def test_networks_of_another_kind_are_refused(name, change, said, tmp_path, tiny) -> None:
    changed = networks()
    network, kwargs = changed[name]
    changed[name] = (network, {**kwargs, **change})
    with pytest.raises(LowVRAMError, match=said):
        tiny(f"weights={write(tmp_path / 'a.pkl', changed)}")


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path) -> None:
    from lowvram.weights import stylegan2

    path = write(tmp_path / "a.pkl", networks())
    published = stylegan_pickle.read(path)["G"]
    state = dict(published.state)
    state["synthesis.b8.conv0.wieght"] = state.pop("synthesis.b8.conv0.weight")
    state["mapping.fc0.bias"] = torch.zeros(3)
    network = Generator(16, **G)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(LowVRAMError) as error:
        stylegan2.load(path, "G", replace(published, state=state), network)
    assert "synthesis.b8.conv0.weight is missing (there is" in str(error.value)
    assert "mapping.fc0.bias has shape [3], not [20]" in str(error.value)
    assert same(network, before)


def test_freezing_counts_from_the_image_and_keeps_keys() -> None:
    d = Discriminator(16, **D)
    keys = list(d.state_dict())
    freeze_layers(d, 5)
    assert set(d.state_dict()) == set(keys)
    trained = {name.rpartition(".")[0] for name, _ in d.named_parameters()}
    assert {"b8.conv1", "b8.skip", "b4.conv", "b4.fc"} <= trained
    assert not trained & {"b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0"}
