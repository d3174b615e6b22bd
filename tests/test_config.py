"""Recipes, overrides, and what users type wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from lowvram import LowVRAMError, load_recipe
from lowvram.config import (
    recipe_names,
    register_settings,
    settings_from,
    settings_values,
    to_settings,
    train_help,
)
from lowvram.resume import INVOCATION
from lowvram.run import Run
from lowvram.settings import parse_bytes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_composes_and_names_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.recipe == name
    assert name in train_help()
    assert settings_from(settings_values(recipe)) == recipe


def test_the_recipes_that_are_promised() -> None:
    assert {"faces32", "faces64", "faces128", "faces256", "faces512", "faces1024", "classes32"} <= set(recipe_names())
    paper = load_recipe("faces256")
    assert (paper.resolution, paper.batch, paper.model.channel_base, paper.model.mbstd_group_size) == (
        256,
        64,
        16384,
        8,
    )


def test_overrides_win_and_are_remembered_by_name() -> None:
    recipe = load_recipe("faces64", ["batch=8", "data.path=x.zip", "vram=6GB"])
    assert (recipe.batch, recipe.data.path, recipe.vram) == (8, "x.zip", "6GB")
    assert recipe.overrides == ["batch", "data.path", "vram"]


def test_a_recipe_file_stands_on_a_built_in_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [faces64, _self_]\nbatch: 8\nmodel: {z_dim: 32}\n")
    recipe = load_recipe(str(path), ["kimg=3"])
    assert (recipe.recipe, recipe.resolution, recipe.batch, recipe.model.z_dim, recipe.kimg) == ("mine", 64, 8, 32, 3)
    assert recipe.model.channel_base == load_recipe("faces64").model.channel_base


def test_a_recipe_file_may_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("resolution: 128\n")
    assert load_recipe(str(path)).resolution == 128


def test_a_changed_recipe_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for resolution in (32, 64):
        path.write_text(f"resolution: {resolution}\n")
        assert load_recipe(str(path)).resolution == resolution


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("6GB", 6 * 2**30), ("6 GiB", 6 * 2**30), ("5.5gb", 11 * 2**29), ("6144MB", 6 * 2**30), ("512 MiB", 2**29)],
)
def test_vram_counts_as_on_the_box(text: str, wanted: int) -> None:
    assert parse_bytes("vram", text) == wanted


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        (["batc=3"], "batc", "batch"),
        (["model.z_dims=3"], "model.z_dims", "model.z_dim"),
        (["z_dim=3"], "z_dim", "model.z_dim"),
        (["batch=six"], "six", "type"),
        (["vram=6"], "vram=6", "vram=6GB"),
        (["vram=6XB"], "6XB", "6GB"),
        (["vram=0GB"], "0GB", "6GB"),
        (["resolution=48"], "resolution=48", "32 or 64"),
        (["resolution=2048"], "resolution=2048", "1024"),
        (["resolution=0"], "resolution=0", "16"),
        (["batch=6"], "batch=6", "batch=4 or 8"),
        (["batch=-4"], "batch=-4", "1 or more"),
        (["micro_batch.D=6"], "micro_batch.D=6", "Use 4 or 8"),
        (["micro_batch.R1=12"], "micro_batch.R1=12", "4, 8, 16"),
        (["micro_batch.path_length=3"], "micro_batch.path_length=3", "1, 2, 4, 8"),
        (["logger=tensorbord"], "tensorbord", "tensorboard"),
        (["precision=fp8"], "fp8", "bf16"),
        (["augment.mode=adda"], "adda", "ada"),
        (["augment.pipeline=bgz"], "bgz", "bgc"),
        (["augment.p=1.5"], "augment.p=1.5", "fraction"),
        (["kimg=0"], "kimg=0", "thousands"),
        (["loss.r1_kind=exakt"], "loss.r1_kind=exakt", "exact, finite_difference"),
        (["loss.r1_sigma=0"], "loss.r1_sigma=0", "0.01"),
        (["loss.r1_sigma=-0.01"], "loss.r1_sigma=-0.01", "0.01"),
        (["loss.r1_sigma=2"], "loss.r1_sigma=2", "0.01"),
        (["loss.r1_sigma=nan"], "loss.r1_sigma=nan", "0.01"),
        (["optimizer.lr=0"], "optimizer.lr=0", "0.0025"),
        (["optimizer.beta2=1"], "beta2=1", "0.99"),
        (["data.on_bad_file=stop"], "stop", "skip, error"),
        (["device=gpu"], "gpu", "cuda"),
        (["task=gan"], "task", ""),
    ],
)
def test_wrong_values_are_named_with_a_remedy(overrides: list[str], problem: str, remedy: str) -> None:
    with pytest.raises(LowVRAMError) as error:
        load_recipe("faces32", overrides)
    assert problem in error.value.problem
    assert remedy in error.value.remedy


def test_a_saved_recipe_from_before_the_kinds_of_r1_has_the_exact_one() -> None:
    recipe = load_recipe("faces32")
    values = settings_values(recipe)
    del values["loss"]["r1_kind"], values["loss"]["r1_sigma"]
    assert settings_from(values) == recipe
    assert recipe.loss.r1_kind == "exact"


def test_unknown_recipes_get_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(LowVRAMError, match="faces256"):
        load_recipe("face256")
    with pytest.raises(LowVRAMError, match=r"mine\.yaml"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "typo.yaml").write_text("resolution: 32\nbatchs: 3\n")
    with pytest.raises(LowVRAMError, match="batchs"):
        load_recipe(str(tmp_path / "typo.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(LowVRAMError, match=r"broken\.yaml"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_a_micro_batch_above_the_batch_is_the_batch() -> None:
    assert load_recipe("faces256", ["batch=8"]).batch == 8


def test_a_recipe_file_sets_nothing_of_hydras(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(
        "defaults: [faces32, _self_]\nhydra: {callbacks: {x: {_target_: os.getcwd}}}\n"
    )
    with pytest.raises(LowVRAMError, match="sets hydra"):
        load_recipe(str(tmp_path / "theirs.yaml"))


@pytest.mark.parametrize("name", ["faces32", "faces64_vae", "faces64_ldm", "sd15_dreambooth"])
def test_the_settings_of_a_run_are_a_recipe_too(name: str) -> None:
    words = ["batch=4", "vram=7GB", "data.path=my photos/a (1).zip", "price=1/h", "out=elsewhere"]
    saved = load_recipe(name, words)
    as_recipe = register_settings(saved, without=INVOCATION)
    with initialize_config_module("lowvram.conf", version_base="1.3"):
        composed = compose("config", overrides=[f"recipe={as_recipe}", "kimg=3"])
    again = to_settings(composed, ["kimg=3"], of_run=True)
    assert (again.kimg, again.price, again.out, again.overrides) == (3, None, None, ["kimg"])
    as_saved = replace(again, kimg=saved.kimg, price="1/h", out="elsewhere", overrides=saved.overrides)
    assert as_saved == saved


@pytest.mark.parametrize("path", ["Bücher", "2024_01", "1e3", "true", "a b", "photos.zip", "1,2", "ü,1"])
def test_a_path_is_the_text_that_was_typed(path: str) -> None:
    assert load_recipe("faces32", [f"data.path={path}"]).data.path == path


def test_texts_of_a_run_mean_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder may be anybody's: what it says must not bring this machine's secrets into it."""
    monkeypatch.setenv("LOWVRAM_SECRET", "hunter2")
    said = "${oc.env:LOWVRAM_SECRET}"
    Run.new(load_recipe("faces32", [f"out={tmp_path / 'run'}"])).prepare()
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text().replace("contributor: ''", f"contributor: 'a \\{said} {said}'"))
    settings = Run.open(tmp_path / "run").settings
    assert settings.contributor == f"a \\{said} {said}"
    name = register_settings(settings, without=())
    with initialize_config_module("lowvram.conf", version_base="1.3"):
        composed = compose("config", overrides=[f"recipe={name}"])
    assert to_settings(composed, []).contributor == settings.contributor
