"""Does fine-tuning move a pipeline's images towards a new style? On a CPU, and without any download.

    python -m benchmarks.fine_tuning out=FOLDER [parts=full,lora,textual_inversion,dreambooth] [kimg=1.5]
        [base=PIPELINE] [images=64] [samples=128] [pretrain_kimg=12] [autoencoder_kimg=6] [faces=2000]

A small pipeline is made first: an autoencoder is trained, a UNet and a CLIP text encoder of random weights are written
beside it as a folder, and both learn the built-in faces on white and on coloured paper, with their captions
(benchmarks.fine_tuning_base). From its export each part learns a few faces on violet paper, which it was never shown:

    full, lora          by captions in which the paper is not named
    textual_inversion   by a new word that stands where the colour of the paper was
    dreambooth          of a quarter of them, as "a sks person", with and without images of "a person" beside them

Samples on the captions are then compared with the faces that were learned from, and with others on violet paper that
were not, as the autoencoder gives both back: by sliced Wasserstein and Frechet distance and by their mean colours. The
floor is that between two halves of these faces. Sliced Wasserstein distance is blind to a tint, so nothing is claimed
by it. After dreambooth samples of "a person" are compared with what the pipeline made of them before.

FOLDER gets fine_tuning.json, of the schema of benchmarks.record, a grid of samples of each network, the pictures, the
pipeline (base, which another call may begin with) and all runs. The command fails where a part is not nearer to the
style than before, or prior preservation keeps the class no better. On a quiet core it should take some twelve minutes,
two thirds of them for the pipeline.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import fine_tuning_base as pipelines
from benchmarks import record
from lowvram import load_recipe
from lowvram.config import command
from lowvram.data import open_dataset
from lowvram.errors import LowVRAMError
from lowvram.metrics.evaluation import evaluate_images
from lowvram.sampling.grids import save_grid, save_png
from lowvram.tasks import Task, load_run, load_weights

PARTS = ("full", "lora", "textual_inversion", "dreambooth")
MEASURES = ("swd_mean", "frechet_lite0", "colour")
CLAIMED = ("frechet_lite0", "colour")  # patches are normalised by channel before swd: it can't see a tint

_STYLE = "violet"
_WORD, _INITIAL = "<mine>", "grey"  # the new word, and one that it begins as
_INSTANCE, _CLASS = "a sks person", "a person"
_FEATURE_SIZE = 96  # of small pictures a larger one tells no more, and takes longer
_SLICE = 64

# What each training has beside the recipe: a network so small takes larger steps than the published ones.
_TUNING: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("sd15_finetune", ("optimizer.lr=3e-4",)),
    "lora": ("sd15_lora", ("optimizer.lr=3e-3", "optimizer.schedule=constant", "lora.rank=8")),
    "textual_inversion": (
        "sd15_textual_inversion",
        (
            "optimizer.lr=2e-2",
            "embedding.vectors=2",
            f"embedding.token='{_WORD}'",
            f"embedding.initial={_INITIAL}",
            f"text.prefix='{_WORD} paper, '",
        ),
    ),
    "dreambooth": (
        "sd15_dreambooth",
        ("optimizer.lr=3e-4", f"text.prompt='{_INSTANCE}'", f"prior.prompt='{_CLASS}'"),
    ),
    "dreambooth_alone": ("sd15_dreambooth", ("optimizer.lr=3e-4", f"text.prompt='{_INSTANCE}'", "prior.prompt=null")),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was asked for."""

    out: str = field(metadata=_help("the folder to write"))
    parts: str = field(default=",".join(PARTS), metadata=_help("some of these"))
    kimg: float = field(default=1.5, metadata=_help("of each fine-tuning"))
    base: str | None = field(default=None, metadata=_help("FOLDER/base of another call, in place of its making"))
    images: int = field(default=64, metadata=_help("to learn from"))
    samples: int = field(default=128, metadata=_help("that are compared"))
    pretrain_kimg: float = field(default=12, metadata=_help("of the pipeline that is made"))
    autoencoder_kimg: float = field(default=6, metadata=_help("of its autoencoder"))
    faces: int = field(default=2000, metadata=_help("that these learn from"))
    seed: int = field(default=0, metadata=_help("of weights, samples and the order of images"))

    def chosen(self) -> list[str]:
        """The parts that were asked for. Raises LowVRAMError for one that is not known."""
        parts = [word.strip() for word in self.parts.split(",") if word.strip()]
        for part in parts:
            if part not in PARTS:
                raise LowVRAMError(f"parts={part} is not known.", f"Use some of {', '.join(PARTS)}.")
        return parts


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Folders of faces in the new style, none of which the pipeline was made of, and the captions of the first."""

    few: Path
    instances: Path
    unseen: Path
    captions: list[str]


def draw(options: Options) -> Pictures:
    """The faces to learn from, some of them without captions, and others to compare with."""
    home, first = Path(options.out), options.faces
    few, instances, unseen = home / "few", home / "instances", home / "unseen"
    paper = pipelines.NEW_PAPER
    captions = pipelines.draw(few, range(first, first + options.images), paper=lambda _: (_STYLE, paper), named=False)
    some = range(first, first + max(1, options.images // 4))
    pipelines.draw(instances, some, paper=lambda _: (_STYLE, paper), captioned=False)
    rest = range(first + options.images, first + options.images + options.samples)
    pipelines.draw(unseen, rest, paper=lambda _: (_STYLE, paper), named=False)
    return Pictures(few=few, instances=instances, unseen=unseen, captions=captions)


def train(options: Options, name: str, base: Path, pictures: Pictures) -> tuple[Task, float]:
    """Fine-tune the pipeline; what samples with the result, and the seconds that the training took."""
    recipe, own = _TUNING[name]
    home = Path(options.out)
    data = pictures.instances if name.startswith("dreambooth") else pictures.few
    words = [
        *(f"weights={base}", f"data.path={data}", f"out={home / 'runs' / name}", f"kimg={options.kimg}"),
        *(f"prior.images={options.images}", f"seed={options.seed}", "batch=8", "device=cpu"),
        *pipelines.common(home),
    ]
    print(f"{name}: {options.kimg:g} kimg", flush=True)
    seconds = pipelines.train(load_recipe(recipe, [*words, *own]))
    return load_run(home / "runs" / name, device="cpu"), seconds


def sampled(task: Task, prompts: Sequence[str], options: Options, *, seed: int) -> Tensor:
    """Samples on the prompts in turn: uint8 [samples, 3, R, R]."""
    batches = []
    for start in range(0, options.samples, _SLICE):
        count = min(_SLICE, options.samples - start)
        batches.append(task.sample(count, seed, start=start, prompts=prompts, micro_batch=_SLICE, **pipelines.SAMPLING))
    return torch.cat(batches)


def distances(images: Tensor, real: Path) -> dict[str, dict[str, float]]:
    """From the pictures of a folder, as many as both have: {"values", "floor"}, each by measure.

    colour: between the means of red, green and blue, each 0 to 255.
    """
    others = open_dataset(real, resolution=pipelines.RESOLUTION)
    count = min(len(images), len(others))
    metrics = ("swd", "frechet")
    found = evaluate_images(
        images[:count].split(_SLICE), others, n=count, metrics=metrics, feature_size=_FEATURE_SIZE, progress=False
    )
    reals = torch.stack([others[index] for index in range(count)])

    def plain(values: dict[str, float], first: Tensor, second: Tensor) -> dict[str, float]:
        frechet = next(value for name, value in values.items() if name.startswith("frechet"))
        means = [some.float().mean(dim=(0, 2, 3)) for some in (first, second)]
        colour = float((means[0] - means[1]).norm())
        return dict(zip(MEASURES, (values["swd_mean"], frechet, colour), strict=True))

    return {"values": plain(found.values, images[:count], reals), "floor": plain(found.floor, reals[0::2], reals[1::2])}


@dataclass
class Study:
    """The measurements of one call, and what they are compared with."""

    options: Options
    pictures: Pictures
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """The folder that is written."""
        return Path(self.options.out)

    def towards(self, name: str, task: Task, prompts: Sequence[str], seconds: float = 0.0) -> None:
        """Measure how far samples on the prompts are from the new style."""
        images = sampled(task, prompts, self.options, seed=self.options.seed)
        references = {name: self.home / name for name in ("learned", "held_out")}
        self._add(name, images, references, seconds)

    def give_back(self, task: Task) -> None:
        """Write the references as the autoencoder gives them back: what it can't do is no fault of fine-tuning."""
        for name, folder in (("learned", self.pictures.few), ("held_out", self.pictures.unseen)):
            own = open_dataset(folder, resolution=pipelines.RESOLUTION)
            (self.home / name).mkdir()
            for start in range(0, len(own), _SLICE):
                some = torch.stack([own[index] for index in range(start, min(start + _SLICE, len(own)))])
                for number, image in enumerate(pipelines.given_back(task, some)):
                    save_png(image, self.home / name / f"{start + number:05d}.png")

    def kept(self, name: str, task: Task) -> None:
        """Measure how far samples of the class are from what the pipeline made of it, which comes first."""
        before = self.home / "class_before"
        if not before.is_dir():
            before.mkdir(parents=True)
            for number, image in enumerate(
                sampled(task, [_CLASS], self.options, seed=self.options.seed + 1)  # others than those compared
            ):
                save_png(image, before / f"{number:05d}.png")
        images = sampled(task, [_CLASS], self.options, seed=self.options.seed)
        self._add(name, images, {"class_before": before}, 0.0)

    def _add(self, name: str, images: Tensor, references: dict[str, Path], seconds: float) -> None:
        save_grid(images[:_SLICE], self.home / f"{name}.png")
        found = {reference: distances(images, folder) for reference, folder in references.items()}
        for reference, each in found.items():
            print(f"{name:<22}{reference:<14}" + "".join(f"{each['values'][m]:>12.4g}" for m in MEASURES), flush=True)
        self.points.append(
            record.point(
                "fine_tuning",
                name,
                recipe=_TUNING[name][0] if name in _TUNING else None,
                details={
                    "kimg": self.options.kimg if seconds else 0,
                    "training_seconds": seconds,
                    "samples": self.options.samples,
                    "images": self.options.images,
                }
                | found,
            )
        )


def run(options: Options) -> list[dict[str, Any]]:
    """Make, train and measure; the points, the pipeline's before those of what became of it."""
    parts = options.chosen()
    home = Path(options.out)
    if (home / "runs").exists():
        raise LowVRAMError(f"out={options.out} has trainings already.", "Remove it, or choose another.")
    if options.base is None:
        base = pipelines.make(
            home,
            faces=options.faces,
            autoencoder_kimg=options.autoencoder_kimg,
            kimg=options.pretrain_kimg,
            seed=options.seed,
        )
    else:
        base = Path(options.base)
    study = Study(options, draw(options))
    captions = study.pictures.captions
    before = load_weights(base, device="cpu")
    study.give_back(before)
    study.towards("before", before, captions)
    if "textual_inversion" in parts:
        study.towards("before_word", before, [f"{_INITIAL} paper, {text}" for text in captions])
    if "dreambooth" in parts:
        study.towards("before_instance", before, [_INSTANCE])
        study.kept("before_class", before)
    del before
    prompts: dict[str, list[str]] = {
        "full": captions,
        "lora": captions,
        "textual_inversion": [f"{_WORD} paper, {text}" for text in captions],
        "dreambooth": [_INSTANCE],
        "dreambooth_alone": [_INSTANCE],
    }
    for name in _trainings(parts):
        task, seconds = train(options, name, base, study.pictures)
        study.towards(name, task, prompts[name], seconds)
        if name.startswith("dreambooth"):
            study.kept(f"{name}_class", task)
    return study.points


def _trainings(parts: Sequence[str]) -> list[str]:
    return [name for name in _TUNING if name.removesuffix("_alone") in parts]


def shortcomings(points: Sequence[dict[str, Any]]) -> list[str]:
    """Claims of the benchmark that the points do not bear out, in words."""
    by_name = {point["name"]: point["details"] for point in points}
    begins = {
        "textual_inversion": "before_word",
        "dreambooth": "before_instance",
        "dreambooth_alone": "before_instance",
    }
    wrong = []
    for name in _trainings(PARTS):
        for reference in ("learned", "held_out"):
            for measure in CLAIMED:
                if name in by_name and not _of(by_name[name], reference, measure) < _of(
                    by_name[begins.get(name, "before")], reference, measure
                ):
                    wrong.append(f"{name} is no nearer to the style by {measure} ({reference})")
    if "dreambooth" in by_name:
        for measure in CLAIMED:
            kept, alone = (
                _of(by_name[f"{name}_class"], "class_before", measure) for name in ("dreambooth", "dreambooth_alone")
            )
            if not kept < alone:
                wrong.append(f"prior preservation keeps the class no better by {measure}")
    return wrong


def _of(details: dict[str, Any], reference: str, measure: str) -> float:
    return float(details[reference]["values"][measure])


def table(points: Sequence[dict[str, Any]]) -> str:
    """The distances, lower is nearer, and the floors."""
    rows = [f"{'':<24}{'compared with':<16}" + "".join(f"{m:>16}" for m in MEASURES) + f"{'seconds':>10}"]
    floors: dict[str, dict[str, float]] = {}
    for point in points:
        details = point["details"]
        for reference, found in details.items():
            if isinstance(found, dict):
                floors[reference] = found["floor"]
                row = f"{point['name']:<24}{reference:<16}" + "".join(f"{found['values'][m]:>16.4g}" for m in MEASURES)
                rows.append(row + f"{details['training_seconds']:>10.0f}")
    for reference, floor in floors.items():
        rows.append(f"{'floor':<24}{reference:<16}" + "".join(f"{floor[m]:>16.4g}" for m in MEASURES))
    return "\n".join(rows)


def prove(options: Options) -> None:
    """Run, print the table, write the points; ends with an error where a claim is not borne out."""
    points = run(options)
    print(table(points))
    path = Path(options.out) / "fine_tuning.json"
    record.write(path, points, device="cpu")
    print(f"wrote {path}")
    if wrong := shortcomings(points):
        sys.exit("; ".join(wrong))


def main() -> None:
    """Entry of the command."""
    if any(word in ("-h", "--help", "help") for word in sys.argv[1:]):
        print(__doc__)
        return
    work: Callable[[Options], None] = prove
    command(Options, work, "benchmarks.fine_tuning")


if __name__ == "__main__":
    main()
