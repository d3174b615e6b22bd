"""Low-rank training that goes on from a file, or on top of files that stay frozen; and scales of several files."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fine_tuning import CALM, batches, largest_difference, make_pictures, networks, run_task, trainer_for
from tiny_pipelines import make_pipeline
from torch import Tensor

from lowvram import LowVRAMError, convert
from lowvram.adapters import lora, lora_files
from lowvram.convert import ConvertOptions
from lowvram.tasks import load_weights, published
from lowvram.weights.pipeline import open_pipeline

PROMPT: dict[str, Any] = {"seed": 5, "prompts": ["a red cat"], "steps": 2}


class Home:
    """A pipeline, images, and LoRA files for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = make_pictures(folder / "pictures")
        self.weights = make_pipeline(folder / "sd1", "sd1")
        self._runs = 0

    def trainer(self, *words: str, out: Path | None = None) -> Any:
        self._runs += 1
        out = out or self.folder / f"run{self._runs}"
        return trainer_for("sd15_lora", self.weights, f"data.path={self.pictures}", f"out={out}", *words)

    def file(
        self, name: str, *, layout: Any = "diffusers", seed: int = 0, text: bool = False, dora: bool = False
    ) -> Path:
        """A LoRA with something in it: rank 4 and alpha 2 in the UNet, rank 3 and alpha 6 in the text encoder."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return path
        pipeline = open_pipeline(self.weights)
        torch.manual_seed(seed)
        made = {"unet": lora.add(published.unet(pipeline), rank=4, alpha=2, targets=["attention"], dora=dora)}
        if text:
            encoder = load_weights(self.weights, device="cpu").condition._encoders([0]).encoders[0]  # type: ignore[attr-defined]
            made["text_encoder"] = lora.add(encoder, rank=3, alpha=6, targets=["attention"], dora=dora)
        for adapters in made.values():
            for parameter in adapters.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape) * parameter.abs().mean().clamp(min=0.5)
        alphas = {part: {path: rank.alpha for path, rank in a.ranks.items()} for part, a in made.items()}
        states = {part: adapters.state_dict() for part, adapters in made.items()}
        lora_files.write(path, states, alpha=alphas, layout=layout)
        return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


def by_files(home: Home, *files: Path, scale: str | None = None) -> Tensor:
    names = "|".join(map(str, files))
    return load_weights(names, base=home.weights, scale=scale, device="cpu").sample(1, **PROMPT)


def alike(one: Tensor, other: Tensor) -> bool:
    """But for the order of additions, and rounding of what is merged."""
    return int((one.int() - other.int()).abs().max()) <= 1


FILES: dict[str, dict[str, Any]] = {
    "diffusers": {},
    "kohya with text": {"layout": "kohya", "text": True, "seed": 1},
    "dora": {"dora": True, "seed": 2},
}


@pytest.mark.parametrize("kind", FILES)
def test_training_goes_on_from_a_file(kind: str, home: Home) -> None:
    options = FILES[kind]
    file = home.file(kind.replace(" ", "_"), **options)
    text = options.get("text", False)
    words = [f"lora.begin={file}", *(["text.train=true"] if text else []), "ema.enabled=true"]
    trainer = home.trainer(*words)
    read = lora_files.read(file)
    for part, adapters in trainer.task.tuned.adapters.items():
        assert {rank.rank for rank in adapters.ranks.values()} == {3 if part != "unet" else 4}
        assert {rank.alpha for rank in adapters.ranks.values()} == {6.0 if part != "unet" else 2.0}
        ours = sorted(float(p.abs().sum()) for key, p in adapters.named_parameters() if "lora_B" in key)
        theirs = sorted(float(layer.up.abs().sum()) for layer in read.parts[part].values())
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert set(trainer.task.tuned.adapters) == set(read.parts)
    said = trainer.recipe.lora
    assert (said.rank, said.alpha, said.dora) == (4, 2.0, options.get("dora", False))
    # Before the first step it is the base with the file, the average too; then it is trained.
    wanted = by_files(home, file)
    assert alike(trainer.sample(1, **PROMPT), wanted)
    assert not alike(load_weights(home.weights, device="cpu").sample(1, **PROMPT), wanted)
    begun = networks(trainer)
    for batch in batches(trainer, 2):
        trainer.train_step(batch)
    ended = networks(trainer)
    assert begun.keys() == ended.keys() and all(not torch.equal(begun[key], ended[key]) for key in begun)


def test_a_run_keeps_what_it_was_begun_with(home: Home, tmp_path: Path) -> None:
    """Moved and resumed without the file; the export has the file's rank and alpha."""
    file = shutil.copy(home.file("diffusers"), tmp_path / "mine.safetensors")
    words = ("kimg=0.004", "optimizer.lr=0.01", "lora.dropout=0.1")
    home.trainer(f"lora.begin={file}", *words, out=tmp_path / "run").fit()
    other = home.file("another", seed=7)
    shutil.copy(other, file)
    with pytest.raises(LowVRAMError, match=r"lora\.begin: .*mine\.safetensors is not the file"):
        home.trainer(f"lora.begin={file}", *words, "kimg=0.006", "resume=auto", out=tmp_path / "run")
    Path(file).unlink()
    before = networks(resumed := home.trainer(*words, "kimg=0.006", "resume=auto", out=tmp_path / "run"))
    resumed.fit()
    assert largest_difference(before, networks(resumed)) > 0
    (tmp_path / "run").rename(tmp_path / "moved")
    convert.main(ConvertOptions(run=str(tmp_path / "moved"), to="lora", out=str(tmp_path / "new.safetensors")))
    new = lora_files.read(tmp_path / "new.safetensors")
    assert {(layer.rank.rank, layer.alpha) for layer in new.parts["unet"].values()} == {(4, 2.0)}
    assert alike(run_task(tmp_path / "moved").sample(1, **PROMPT), by_files(home, tmp_path / "new.safetensors"))


@pytest.mark.slow
def test_a_branch_of_a_run_has_its_files(home: Home, tmp_path: Path) -> None:
    file = shutil.copy(home.file("diffusers"), tmp_path / "mine.safetensors")
    home.trainer(f"lora.stack={file}", "kimg=0.002", out=tmp_path / "run").fit()
    Path(file).unlink()
    words = (f"lora.stack={file}", "kimg=0.004", f"resume={tmp_path / 'run'}")
    home.trainer(*words, out=tmp_path / "branch").fit()
    kept = [folder / "lora_stack_0.safetensors" for folder in (tmp_path / "run", tmp_path / "branch")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lora.begin={plain}", "lora.rank=8"], ("lora.rank=8", "lora.begin=", "which has 4")),
        (["lora.begin={plain}", "lora.alpha=4"], ("lora.alpha=4", "which has 2")),
        (["lora.begin={plain}", "lora.dora=true"], ("lora.dora=True", "which has False")),
        (["lora.begin={plain}", "lora.targets=[all]"], ("lora.targets=['all']", "not in both")),
        (["lora.begin={text}"], ("text_encoder", "text.train=false", "Use text.train=true")),
        (["lora.begin={home}/nowhere.safetensors"], ("nowhere.safetensors",)),
        (["lora.begin={plain}", "train=full"], ("lora.begin=", "train=full")),
        (["lora.stack={plain}", "lora.dora=true"], ("DoRA", "lora.stack=")),
        (["lora.stack={plain}|{dora}"], ("lora.stack=", "is DoRA", "Name it first")),
        (["lora.stack={plain}", "lora.stack_scale=0.5|1"], ("lora.stack_scale=0.5|1", "2 numbers, for 1 LoRA file")),
        (["lora.stack={plain}", "lora.stack_scale=much"], ("lora.stack_scale=much is no number",)),
        (["lora.stack_scale=1"], ("lora.stack_scale=1 without lora.stack",)),
    ],
)
def test_files_that_are_refused(words: list[str], says: tuple[str, ...], home: Home, tmp_path: Path) -> None:
    files = {"plain": home.file("diffusers"), "dora": home.file("dora", dora=True, seed=2), "home": home.folder}
    files["text"] = home.file("kohya_with_text", **FILES["kohya with text"])
    with pytest.raises(LowVRAMError) as error:
        home.trainer(*(word.format(**files) for word in words), out=tmp_path / "never")
    for word in says:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 2 and not (tmp_path / "never").exists()


def test_values_of_the_file_may_be_named(home: Home) -> None:
    file = home.file("diffusers")
    words = ("lora.rank=4", "lora.alpha=2", "lora.targets=[attention]", "lora.dora=false")
    assert home.trainer(f"lora.begin={file}", *words).recipe.lora.rank == 4


@pytest.mark.parametrize(
    "train_text", [pytest.param(False, marks=pytest.mark.slow), True], ids=["text kept", "text trained"]
)
def test_files_stay_frozen_under_what_is_trained(train_text: bool, home: Home, tmp_path: Path) -> None:
    one, two = home.file("kohya_with_text", **FILES["kohya with text"]), home.file("diffusers")
    scale = "0.8|0.5"
    words = [f"lora.stack={one}|{two}", f"lora.stack_scale={scale}", "lora.rank=2", "kimg=0.004", "optimizer.lr=0.01"]
    words += ["text.train=true"] if train_text else []
    trainer = home.trainer(*words, out=tmp_path / "run")
    under = by_files(home, one, two, scale=scale)
    assert alike(trainer.sample(1, **PROMPT), under)
    stacked = [p for name, p in trainer.task.tuned.unet.named_parameters() if ".file" in name]
    before = [p.detach().clone() for p in stacked]
    assert stacked and not any(p.requires_grad for p in stacked)
    trainer.fit()
    assert all(torch.equal(p, was) for p, was in zip(stacked, before, strict=True))
    made = trainer.sample(1, **PROMPT)
    assert not alike(made, under)
    # The run, the new file on the same stack, and all of it merged into a pipeline sample the same.
    assert alike(run_task(tmp_path / "run").sample(1, **PROMPT), made)
    run = str(tmp_path / "run")
    convert.main(ConvertOptions(run=run, to="lora", out=str(tmp_path / "new.safetensors")))
    new = lora_files.read(tmp_path / "new.safetensors")
    assert new.rank == 2 and set(new.parts) == {"unet"} | ({"text_encoder"} if train_text else set())
    assert alike(by_files(home, one, two, tmp_path / "new.safetensors", scale="0.8|0.5|1"), made)
    convert.main(ConvertOptions(run=run, to="diffusers", out=str(tmp_path / "merged")))
    assert alike(load_weights(tmp_path / "merged", device="cpu").sample(1, **PROMPT), made)


@pytest.mark.parametrize(
    "technique", ["memory.frozen=stream memory.activations.denoiser=recompute", "memory.update.denoiser=deferred"]
)
def test_a_stack_under_memory_policies(technique: str, home: Home) -> None:
    usual = [f"lora.stack={home.file('diffusers')}", "lora.rank=2", *CALM]
    ended = []
    for words in ([], technique.split()):
        trainer = home.trainer(*usual, *words)
        for batch in batches(trainer, 2):
            trainer.train_step(batch)
        ended.append(networks(trainer))
    assert largest_difference(*ended) == 0


# Scales of several files.


@pytest.mark.slow
def test_each_file_has_its_scale(home: Home, tmp_path: Path) -> None:
    one, two = home.file("kohya_with_text", **FILES["kohya with text"]), home.file("diffusers")
    plain, both = by_files(home, one), by_files(home, one, two)
    assert alike(by_files(home, one, two, scale="1|0"), plain) and not alike(plain, both)
    assert alike(by_files(home, one, two, scale="1"), both)
    mixed = by_files(home, one, two, scale="0.8|0.5")
    assert not alike(mixed, by_files(home, one, two, scale="0.5|0.8"))
    assert alike(by_files(home, two, one, scale="0.5|0.8"), mixed)
    out = tmp_path / "merged"
    weights = {"weights": f"{one}|{two}", "base": str(home.weights)}
    convert.main(ConvertOptions(**weights, scale="0.8|0.5", to="diffusers", out=str(out)))
    assert alike(load_weights(out, device="cpu").sample(1, **PROMPT), mixed)


@pytest.mark.parametrize(
    ("scale", "says"),
    [("0.8|0.5|1", "3 numbers, for 2 LoRA files"), ("a|b", "is no number"), ("nan", "is no number"), ("", "no number")],
)
def test_scales_that_are_refused(scale: str, says: str, home: Home) -> None:
    with pytest.raises(LowVRAMError, match=says.replace("|", r"\|")):
        by_files(home, home.file("kohya_with_text", **FILES["kohya with text"]), home.file("diffusers"), scale=scale)
    with pytest.raises(LowVRAMError, match="there is none"):
        load_weights(home.weights, scale="0.5", device="cpu")
    for options in ({"run": "x", "to": "diffusers"}, {"weights": str(home.file("diffusers")), "to": "lora"}):
        with pytest.raises(LowVRAMError, match="is for LoRAs that are merged"):
            ConvertOptions(**options, scale="0.5", out="never.safetensors")
