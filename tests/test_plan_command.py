"""`python -m lowvram.plan` as a user runs it, on a machine without a GPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run
from example_plans import a_cost, a_plan
from PIL import Image
from tiny import TINY

from lowvram import config
from lowvram import plan as command
from lowvram.planner import costs, layout, recipe
from lowvram.planner.plan import Plan
from lowvram.receipt.rates import Rates

RECIPE = ["recipe=faces32", *TINY, "batch=16"]
HELD = ["memory.weights.G=device", "memory.weights.D=device", "memory.ema=device"] + [
    f"memory.{setting}" for name in "GD" for setting in (f"update.{name}=after", f"state.{name}=device")
]
# Groups of 64 leave nothing to cut, and nothing else may be saved.
TOO_LARGE = ["recipe=faces32", *TINY, "resolution=64", "batch=64", "model.mbstd_group_size=64", *HELD]
TOO_LARGE += ["model.channel_base=16384", "model.channel_max=128", "loss.path_length_every=0", "augment.mode=none"]
TOO_LARGE += [f"memory.activations.{name}=keep" for name in ("G", "D", "R1")]


Plans = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Plans:
    """Runs the command in this process: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def plan(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowvram.plan", *words])
        with pytest.raises(SystemExit) as end:
            command.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return plan


def test_from_a_shell(tmp_path: Path) -> None:
    done = run("lowvram.plan", *RECIPE, "vram=6GB", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "faces32 fits vram=6GB on an RTX 2060" in done.stdout
    folder = tmp_path / "plans" / "faces32-6GB"
    assert json.loads((folder / "plan.json").read_text())["fits"] is True
    with Image.open(folder / "plan.png") as picture:
        assert picture.size == (1600, 900)


@pytest.mark.slow
def test_settings_that_are_named_stay(plans: Plans, tmp_path: Path) -> None:
    words = ["vram=6GB", "card=3060", "micro_batch.G=4", "memory.activations.D=recompute", "memory.ema=host"]
    status, _, _ = plans(*RECIPE, *words, "out=here")
    assert status == 0
    plan = Plan.load(tmp_path / "here" / "plan.json")
    assert plan.card == "RTX 3060"
    assert plan.policy.phase("G").micro_batch == 4
    assert plan.policy.phase("D").activations == "recompute"
    assert plan.policy.ema == "host"
    assert plan.changes == ()


def test_what_does_not_fit_ends_with_3(plans: Plans, tmp_path: Path) -> None:
    status, out, _ = plans(*TOO_LARGE, "vram=0.8GB", "out=here")
    assert status == 3
    plan = Plan.load(tmp_path / "here" / "plan.json")
    assert not plan.fits
    assert plan.needs
    assert plan.smallest_vram_bytes > 0.8 * 2**30
    assert "does not fit" in out.splitlines()[0]
    again, _, _ = plans(*TOO_LARGE, f"vram={-(-plan.smallest_vram_bytes // 2**20)}MB")
    assert again == 0  # the smallest budget is one


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["vram=6"], "vram=6 has no unit", "vram=6GB"),
        (["vram=-1GB"], "vram=-1GB is not a size", "vram=6GB"),
        (["vram=900GB"], "more than any card has", "vram=8GB"),
        (["vram=12GB", "card=3070"], "more than the RTX 3070 has", "vram=8GB"),
        (["vram=6GB", "card=voodoo2"], "card=voodoo2 is not known", "RTX 2060"),
        (["vram=0.3GB"], "leaves nothing to train with", "at the very least"),
        (["vram=6GB", "allow=[magic]"], "allow=magic is not known", "fd_r1"),
        (["vram=6GB", "memory.weights.G=stream"], "memory.weights.G is named", "memory.weights.D"),
        (["vram=6GB", "processes=two"], "processes=two is not a number", "processes=2"),
        (["vram=6GB", "price=cheap"], "price=cheap is not understood", "price=0.40/h"),
        (["vram=6GB", "price=0.40/kWh"], "price=0.40/kWh is not understood", "price=0.40/h"),
        (["vram=6GB", "price=$1/h", "electricity=1 EUR/kWh"], "two currencies", "the same"),
        (["vram=6GB", "grid=clean/kWh"], "carbon=clean/kWh is not understood", "400g/kWh"),
        (["vram=6GB", "costs=maybe"], "costs=maybe is neither true nor false", "costs=true"),
        (["vram=6GB", "proposal=1"], "proposal=1 is neither true nor false", "proposal=true"),
        (["vram=6GB", "proposal=true", f"aim={'x' * 1001}"], "aim has 1001 letters", "1000 at most"),
        (["vram=6GB", "processes=3"], "don't divide among 3 processes", "fewer processes"),
        (["vram=6GB", "--card=3070"], "--card=3070 is not understood", "name=value"),
        (["vram=6GB", "bach=8"], "no setting bach", "batch"),
    ],
)
def test_nonsense(plans: Plans, words: list[str], problem: str, remedy: str, tmp_path: Path) -> None:
    status, _, said = plans(*RECIPE, *words)
    assert status == 2
    assert problem in said
    assert remedy in said
    assert not (tmp_path / "plans").exists()


@pytest.mark.slow
def test_what_is_allowed_is_used_only_if_nothing_fits_without(plans: Plans, tmp_path: Path) -> None:
    """R1 needs the most here, and nothing else may be saved: by finite differences it needs less."""
    words = [
        "recipe=faces32",
        *TINY,
        "resolution=64",
        "batch=64",
        "model.channel_base=16384",
        "model.channel_max=128",
        *HELD,
    ]
    words += [f"micro_batch.{name}=64" for name in ("G", "path_length", "D", "R1")]
    words += [f"memory.activations.{name}=keep" for name in ("G", "path_length", "D", "R1")]
    words += ["loss.path_length_every=0", "augment.mode=none"]
    status, _, _ = plans(*words, "vram=6GB", "allow=[fd_r1]", "out=roomy")
    roomy = Plan.load(tmp_path / "roomy" / "plan.json")
    assert (status, roomy.changes) == (0, ())
    assert max(roomy.phases, key=lambda phase: phase.live_bytes).name == "R1"
    tight = f"vram={(roomy.needed_bytes >> 20) - 1}MB"
    assert plans(*words, tight, "out=exact")[0] == 3
    status, out, _ = plans(*words, tight, "allow=[fd_r1]", "out=changed")
    assert status == 0
    changed = Plan.load(tmp_path / "changed" / "plan.json")
    assert changed.changes == ("loss.r1_kind=finite_difference",)
    assert "loss.r1_kind=finite_difference" in out


@pytest.mark.slow
def test_a_card_of_several(tmp_path: Path) -> None:
    """Each holds a part of the batch, and of the weights if they are sharded. Not in a process that has a group."""
    words = ["vram=6GB", "card=3060", "memory.fsdp=shard", "processes=2", "out=here"]
    done = run("lowvram.plan", *RECIPE, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on each of 2 RTX 3060" in done.stdout
    plan = Plan.load(tmp_path / "here" / "plan.json")
    assert (plan.policy.fsdp, plan.processes) == ("shard", 2)
    assert plan.phases[0].samples == 8


def test_a_proposal_says_what_the_plan_says(plans: Plans, tmp_path: Path) -> None:
    words = ["vram=6GB", "card=3060", "price=$0.40/h", "grid=50g/kWh", "kimg=25000", *HELD]
    words += ["loss.path_length_every=0", "augment.mode=none"]
    words += [f"memory.activations.{name}=keep" for name in ("G", "D", "R1")]
    aim = "aim=To see, in a week: what is 'enough'?"
    status, out, said = plans(*RECIPE, *words, "proposal=true", aim, "out=here")
    assert status == 0, said
    assert "and proposal.md" in out and "The same training on other cards" in out
    plan = Plan.load(tmp_path / "here" / "plan.json")
    assert plan.rates == Rates(per_hour=0.4, per_kwh=0.0, grams_per_kwh=50.0, currency="$")
    assert plan.money == plan.hours * 0.4 and plan.co2_grams == plan.kwh * 50
    page = (tmp_path / "here" / "proposal.md").read_text(encoding="utf-8")
    assert "To see, in a week: what is 'enough'?" in page
    assert f"| {layout.duration(plan.hours)} | {layout.energy(plan.kwh)} | ${plan.money:.2f} |" in page
    assert f"cost ${plan.money:.2f}, {layout.co2(plan.co2_grams)}" in out.replace("\n", " ")
    assert "40 drawn faces" in page
    quickest = costs.quickest(plan.costs)
    assert quickest is not None and quickest.card in page


def test_what_does_not_fit_is_not_proposed(plans: Plans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = (a_cost("RTX 2060", fits=False), a_cost("L4"))
    plan = a_plan(live_bytes=7 * 2**30, reserved_bytes=7 * 2**30, fits=False, costs=rows)
    monkeypatch.setattr(recipe, "plan_recipe", lambda *_, **__: plan)
    status, out, _ = plans(*RECIPE, "vram=6GB", "proposal=true", "out=here")
    assert status == 3
    assert "There is no proposal" in out and "L4" in out
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["plan.json", "plan.png"]


def test_smaller_images_are_those_of_the_next_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(recipe, "plan_recipe", lambda settings, **where: asked.append((settings, where)))
    given = config.load_recipe("faces256", config.short_forms(["vram=6GB", "price=$0.40/h", "kimg=1"]))
    command._smaller(given, "RTX 2060", 2)
    settings, where = asked[0]
    assert (settings.recipe, settings.vram, settings.price, settings.kimg) == ("faces128", "6GB", "$0.40/h", 1)
    assert where == {"card": "RTX 2060", "processes": 2}
    for name in ("faces32", "sd15_finetune", "faces256_vae"):
        assert command._smaller(config.load_recipe(name), "RTX 2060", 1) is None
    assert len(asked) == 1


def test_less_than_one_block(plans: Plans) -> None:
    wide = ["recipe=faces32", "model.channel_base=65536", "model.channel_max=4096"]
    status, _, said = plans(*wide, "vram=0.8GB")
    assert status == 2
    assert "less than the weights of one block" in said


def test_no_recipe(plans: Plans) -> None:
    status, _, said = plans("vram=6GB")
    assert status == 2
    assert "recipe=NAME" in said


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lowvram.plan", "--help"])
    command.main()
    said = capsys.readouterr().out
    for word in ("card=", "allow=", "out=", "costs=", "proposal=", "aim=", "price=", "grid=", "Exits with 0"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "phases"),
    [
        (
            ["recipe=faces64_ldm", "condition=text", "network=dit", "dit.dim=64", "dit.depth=2", "dit.heads=2"],
            ["denoiser"],
        ),
        (["recipe=faces64_vae", "loss.adversarial_weight=0.1"], ["autoencoder", "discriminator"]),
    ],
)
def test_latent_diffusion_is_planned_without_data_or_autoencoder(
    words: list[str], phases: list[str], plans: Plans, tmp_path: Path
) -> None:
    """In the precision that the card would train in; what samples are decoded by is part of their memory."""
    status, _, said = plans(*words, "vram=6GB", "card=2060", "data.path=not-here.zip", "out=here")
    assert status == 0, said
    plan = Plan.load(tmp_path / "here" / "plan.json")
    assert plan.policy.precision == "fp16"
    parts = {phase.name: phase for phase in plan.phases}
    assert [name for name in parts if parts[name].every] == [*phases, "average"]
    assert parts["sampling"].live_bytes > parts["average"].live_bytes
