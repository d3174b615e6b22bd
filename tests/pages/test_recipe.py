"""The command on a page: what it composes is what was trained."""

import json
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from example_runs import Page, run_folder, session
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lowvram import pages
from lowvram.config import load_recipe, settings_from, settings_values, short_forms
from lowvram.pages import folder as folders
from lowvram.pages import recipe
from lowvram.receipt.ledger import Receipt
from lowvram.run import Run
from lowvram.settings import flatten

_TEXTS = ["Bücher", "2024_01", "true", "null", "1e3", "-5", ".5", "nan", "Inf", "6GB", "a b", "", "'", "a,b", "[x]"]
_TEXTS += [
    'a "red" hat',
    "${x}",
    "\\${oc.env:HOME}",
    "back\\",
    'back\\"',
    "\\\\",
    "a\tb",
    "one\ntwo",
    "data/of-me/x.zip",
]


def composed(command: str) -> dict[str, Any]:
    """Settings, dotted, that a command of a page composes, read by a shell's rules."""
    words = shlex.split(command)
    at = words.index("lowvram.train")
    return flatten(settings_values(load_recipe(words[at + 1].removeprefix("recipe="), words[at + 2 :])))


def text_run(folder: Path, name: str, **changes: Any) -> Path:
    """A run of a recipe with settings that no command line was needed for."""
    values = flatten(settings_values(load_recipe(name))) | changes
    nested: dict[str, Any] = {}
    for name, value in values.items():
        inner = nested
        *groups, last = name.split(".")
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    Run(folder, settings_from(nested), is_new=True).prepare()
    (folder / "recipe.yaml").write_text(json.dumps(nested))  # as it is, with ${ and all
    return folder


@pytest.mark.parametrize("text", _TEXTS)
def test_a_text_is_read_back(text: str) -> None:
    assert read_back(recipe.hydra_value(text)) == text
    assert read_back(recipe.hydra_value([text, "a", text])) == [text, "a", text]


@given(st.one_of(st.text(max_size=6), st.text(alphabet="\\\"'${} xe1._/-,[]:#\n", max_size=8)))
def test_whatever_a_text_holds_it_is_read_back(text: str) -> None:
    assert read_back(recipe.hydra_value(text)) == text


def read_back(value: str) -> Any:
    """What Hydra and then OmegaConf make of a value on a command line."""
    parsed = OverridesParser.create().parse_override(f"x={value}").value()
    unquoted = json.loads(json.dumps(parsed, default=lambda quoted: quoted.text))
    return OmegaConf.to_container(OmegaConf.create({"x": unquoted}), resolve=True)["x"]  # type: ignore[index, call-overload]


def test_the_command_composes_the_same_settings(tmp_path: Path) -> None:
    changes = {"text.clip": '${x} of "mine"', "data.path": "/photos 'of' me, all", "vram": "6GB", "optimizer.lr": 0.001}
    run = text_run(tmp_path / "run", "faces256_text", **changes)
    said = recipe.command(folders.read(run))
    assert "recipe=faces256_text" in said and short_forms(shlex.split(said)) == shlex.split(said)
    assert composed(said) == flatten(settings_values(load_recipe("faces256_text"))) | changes
    (code,) = Page(pages.write(run)).all("pre")
    assert "".join(code.itertext()) == said


def test_lists_and_prompts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Stable Diffusion, whose weights are looked at in composing: here there are none."""
    shape = SimpleNamespace(with_shape_of_weights=lambda settings: settings)
    monkeypatch.setattr("lowvram.tasks.task_class", lambda _: shape)
    usual = flatten(settings_values(load_recipe("sd15_lora")))
    for prompt in ("null", 'a "cat", 2024_01', "${oc.env:HOME}"):
        changes = {"weights": "my model", "sampling.prompts": _TEXTS, "text.prompt": prompt, "data.path": "2024_01"}
        run = text_run(tmp_path / f"run {len(prompt)}", "sd15_lora", **changes)
        said = recipe.command(folders.read(run))
        assert "recipe=sd15_lora" in said
        assert composed(said) == usual | changes


def test_a_text_that_no_page_can_hold_is_left_to_the_file(tmp_path: Path) -> None:
    run = text_run(tmp_path / "run", "faces256_text", **{"data.path": "bell\a"})
    assert f"recipe={run}/recipe.yaml" in recipe.command(folders.read(run))


@pytest.mark.parametrize("name", ["run", "a,b 'c'"])
def test_a_recipe_of_ones_own_is_named_by_its_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path(name), "contributor=Ada", "mark.certificate=mine.pem", "mark.key=secret.pem")
    path = Path(name) / "recipe.yaml"
    lines = path.read_text().replace("recipe: faces32", "recipe: mine").replace("resume: null", "resume: auto")
    path.write_text(lines.replace("seed: 0", "seed: 7"))
    said = recipe.command(folders.read(name))
    copied, _, command = said.rpartition(" && ")
    if copied:
        subprocess.run(shlex.split(copied), check=True)
    else:
        assert f"recipe={tmp_path.resolve()}/run/recipe.yaml" in command
    again = composed(command)
    assert (again["seed"], again["resume"], again["out"], again["contributor"]) == (7, None, "again", "")
    assert again["mark.certificate"] is None and again["mark.key"] is None and again["kimg"] == 16


def test_where_a_key_lies_is_not_told(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "mark.certificate=mine.pem", "mark.key=secret.pem")
    other = run_folder(tmp_path / "other")
    assert "secret.pem" not in pages.write(run).read_text() and "mine.pem" not in pages.write(run).read_text()
    assert "secret.pem" not in pages.compare([run, other], tmp_path / "c.html").read_text()


def test_what_a_lora_file_has_is_not_said_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run")
    usual = {"task": "stylegan2", "lora.begin": None, "lora.rank": 8, "lora.alpha": None, "lora.dora": False}
    monkeypatch.setattr(recipe, "usual_settings", lambda _: usual)
    for begin, said in (("mine.safetensors", "lora.begin=mine.safetensors"), (None, "lora.rank=4 lora.alpha=2")):
        (run / "recipe.yaml").write_text(
            json.dumps({"task": "stylegan2", "recipe": "x", "lora": {"begin": begin, "rank": 4, "alpha": 2.0}})
        )
        assert recipe.command(folders.read(run)) == f"python -m lowvram.train recipe=x {said}"


def test_a_run_of_several_cards_is_launched_on_as_many(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    Receipt((session(1, 0, 8000), session(2, 8000, 16000, cards=4))).write(run)
    assert recipe.command(folders.read(run)).startswith(
        "accelerate launch --num_processes 4 -m lowvram.train recipe=faces32 kimg=16"
    )
