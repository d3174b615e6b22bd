"""Does a published StyleGAN2 move towards a new style from a few pictures, and sooner than from nothing?

    python -m benchmarks.transfer [--out FOLDER] [--style tinted|sketch|negative] [--images 60] [--pretrain-kimg 6]
        [--kimg 2] [--weights FILE] [--freeze-d 4] [--generated 512] [setting=value ...]

A generator learns the built-in faces (recipe faces32) and is written as a file of weights. From it, FreezeD fine-tunes
on a few faces in another style; beside it the same recipe begins with random weights. Then samples of the generator
before, of the fine-tuned and of the other one are compared with faces in that style that none of them was shown
(sliced Wasserstein distance, Frechet distance of features and of coarse pixels; the floor is that between two halves of
them). Settings go to all trainings. --weights takes what an earlier run wrote, weights.safetensors, in place of the
first training.

FOLDER (outputs/benchmarks/transfer) gets transfer.json, of the schema of benchmarks.record, a grid of samples of each
generator, the pictures and the weights. The command fails where the fine-tuned generator is not the nearest by all.
On a quiet CPU it takes some ten minutes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from benchmarks import record
from lowvram import Trainer, load_recipe
from lowvram.config import report_errors
from lowvram.data import ImageSet, open_dataset
from lowvram.errors import LowVRAMError
from lowvram.metrics.evaluation import evaluate_images
from lowvram.metrics.frechet import Gaussian, frechet_distance
from lowvram.sampling.grids import save_grid
from lowvram.settings import StyleGAN2Settings
from lowvram.tasks import Task, load_run, load_weights
from lowvram.weights import stylegan2 as weights

RECIPE = "faces32"
NAMES = ("before", "transfer", "scratch")
_NETWORKS = ("G_ema", "G", "D")
_FEATURE_SIZE = 96  # of small pictures a larger one tells no more, and takes longer
_SLICE = 64
_COARSE = 4  # pixels a side


def sketch(faces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dark lines where brightness changes, on yellowish paper. uint8 [H, W, 3] -> the same."""
    grey = faces.astype(np.float32).mean(axis=2) / 255
    down, right = np.gradient(grey)
    ink = np.clip(4 * np.hypot(down, right), 0, 1)[:, :, None]
    paper, line = np.array([240, 226, 190], np.float32), np.array([60, 40, 90], np.float32)
    return np.round(paper * (1 - ink) + line * ink).astype(np.uint8)


def negative(faces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As a film has it. uint8 [H, W, 3] -> the same."""
    return 255 - faces


def tinted(faces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As printed on violet paper. uint8 [H, W, 3] -> the same."""
    return np.round(faces * (np.array([150, 100, 220], np.float32) / 255)).astype(np.uint8)


STYLES: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "tinted": tinted,
    "sketch": sketch,
    "negative": negative,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was asked for."""

    out: Path
    style: str = "tinted"
    images: int = 60
    pretrain_kimg: float = 6
    kimg: float = 2
    weights: Path | None = None
    freeze_d: int = 4
    generated: int = 512
    metrics: tuple[str, ...] = ("swd", "frechet")
    settings: tuple[str, ...] = ()

    def recipe(self, name: str, *words: str) -> StyleGAN2Settings:
        """The recipe of one training; what was asked for goes before what it usually has."""
        out = self.out / "runs" / name
        found = load_recipe(RECIPE, ["log_kimg=0.25", "snapshot_kimg=1000", *words, *self.settings, f"out={out}"])
        assert isinstance(found, StyleGAN2Settings)
        return found


def prepare(options: Options) -> tuple[StyleGAN2Settings, Path, ImageSet]:
    """Faces in the new style, none of which the first training sees: its recipe, the few to learn from, and the others.

    The others are as many as are generated, in a folder of their own.
    """
    pretraining = options.recipe("pretraining", f"kimg={options.pretrain_kimg}")
    resolution, first = pretraining.resolution, pretraining.data.builtin_count
    faces = open_dataset(None, resolution=resolution, builtin_count=first + options.images + options.generated)
    change = STYLES[options.style]
    few, others = options.out / "few", options.out / "unseen"
    for folder, start, count in ((few, first, options.images), (others, first + options.images, options.generated)):
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(start, start + count):
            Image.fromarray(change(faces.load(index).pixels)).save(folder / f"{index:06d}.png")
    return pretraining, few, open_dataset(others, resolution=resolution)


def train(settings: StyleGAN2Settings) -> tuple[Trainer, float]:
    """A training to its end, and the seconds that it took."""
    print(f"training {settings.out}: {settings.kimg:g} kimg", flush=True)
    trainer = Trainer(settings, quiet=True)
    begun = time.perf_counter()
    trainer.fit()
    return trainer, time.perf_counter() - begun


def write_weights(trainer: Trainer, path: Path) -> None:
    """The networks of a run as a published file has them."""
    settings = trainer.recipe
    assert isinstance(settings, StyleGAN2Settings)
    states = {name: trainer.task.networks[name].state_dict() for name in _NETWORKS}
    weights.write(path, {name: weights.published(settings, name, state) for name, state in states.items()})


def measure(task: Task, unseen: ImageSet, options: Options, name: str) -> dict[str, Any]:
    """How far samples are from the style, and a grid of some."""
    count = options.generated
    batches = [task.sample(min(_SLICE, count - start), seed=0, start=start) for start in range(0, count, _SLICE)]
    save_grid(batches[0], options.out / f"{name}.png")
    found = evaluate_images(
        batches, unseen, n=count, metrics=options.metrics, feature_size=_FEATURE_SIZE, progress=False
    )
    samples, others = torch.cat(batches), torch.stack([unseen[index] for index in range(count)])
    return {
        "values": {"frechet_pixels": pixel_distance(samples, others)} | found.values,
        "floor": {"frechet_pixels": pixel_distance(others[::2], others[1::2])} | found.floor,
    }


def pixel_distance(some: torch.Tensor, others: torch.Tensor) -> float:
    """Frechet distance of pictures at 4x4 pixels: of layout and colours. uint8 [n, 3, R, R] each.

    Features of ImageNet hardly tell one blurred picture from another, and these generators learn for minutes.
    """
    both = [Gaussian.empty(3 * _COARSE**2) for _ in range(2)]
    for gaussian, images in zip(both, (some, others), strict=True):
        gaussian.update(F.adaptive_avg_pool2d(images.float() / 255, _COARSE).flatten(1))
    return frechet_distance(*both)


def run(options: Options) -> list[dict[str, Any]]:
    """Train and measure; the points, in the order of NAMES."""
    if (options.out / "runs").exists():
        raise LowVRAMError(f"out={options.out} has trainings already.", "Remove it, or choose another.")
    if options.style not in STYLES:
        raise LowVRAMError(f"style={options.style} is not known.", f"Use one of {', '.join(STYLES)}.")
    pretraining, few, unseen = prepare(options)
    file, seconds = options.weights, {"before": 0.0}
    if file is None:
        file = options.out / "weights.safetensors"
        trainer, seconds["before"] = train(pretraining)
        write_weights(trainer, file)
        del trainer
    found = {"before": measure(load_weights(file, device=pretraining.device), unseen, options, "before")}
    # With so few pictures the discriminator soon knows them by heart: augmented, as ADA is for.
    words = [f"kimg={options.kimg}", f"data.path={few}", "augment.mode=ada", "augment.p=0.2", "augment.adjust_kimg=20"]
    trainings = {"transfer": [f"weights={file}", f"freeze_d={options.freeze_d}"], "scratch": []}
    for name, own in trainings.items():
        trained, seconds[name] = train(options.recipe(name, *words, *own))
        del trained
        task = load_run(options.out / "runs" / name, device=pretraining.device)
        found[name] = measure(task, unseen, options, name)
    asked = {
        "style": options.style,
        "images": options.images,
        "freeze_d": options.freeze_d,
        "pretrain_kimg": None if options.weights else options.pretrain_kimg,
        "generated": options.generated,
    }
    return [
        record.point(
            "transfer",
            name,
            recipe=RECIPE,
            overrides=options.settings,
            details={"kimg": 0 if name == "before" else options.kimg, "training_seconds": seconds[name]}
            | asked
            | found[name],
        )
        for name in NAMES
    ]


def nearest(points: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Which generator is nearest to the style, by the mean of each distance."""
    values = {point["name"]: point["details"]["values"] for point in points}
    measures = [name for name in values["before"] if name == "swd_mean" or name.startswith("frechet")]
    return {measure: min(NAMES, key=lambda name: values[name][measure]) for measure in measures}


def table(points: Sequence[dict[str, Any]]) -> str:
    """The distances, and the floor: lower is nearer."""
    measures = list(points[0]["details"]["values"])
    rows = [f"{'':<12}" + "".join(f"  {measure:>10}" for measure in measures)]
    columns = {point["name"]: point["details"]["values"] for point in points} | {"floor": points[0]["details"]["floor"]}
    for name, values in columns.items():
        rows.append(f"{name:<12}" + "".join(f"  {values.get(m, float('nan')):>{max(10, len(m))}.4g}" for m in measures))
    return "\n".join(rows)


def main(words: Sequence[str] | None = None) -> None:
    """Entry of the command."""
    usual = Options(out=Path("outputs/benchmarks/transfer"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of all trainings")
    parser.add_argument("--out", type=Path, default=usual.out, help="the folder to write")
    parser.add_argument("--style", choices=STYLES, default=usual.style)
    parser.add_argument("--images", type=int, default=usual.images, help="that are learned from")
    parser.add_argument("--pretrain-kimg", type=float, default=usual.pretrain_kimg, help="of built-in faces")
    parser.add_argument("--kimg", type=float, default=usual.kimg, help="of the fine-tuning, and of that from nothing")
    parser.add_argument("--weights", type=Path, help="to begin with, in place of the first training")
    parser.add_argument("--freeze-d", type=int, default=usual.freeze_d, help="layers of D that stay")
    parser.add_argument("--generated", type=int, default=usual.generated, help="images that are compared")
    parser.add_argument("--metrics", default=",".join(usual.metrics), help="of lowvram.evaluate, separated by commas")
    asked = vars(parser.parse_args(words))
    asked["metrics"], asked["settings"] = tuple(asked["metrics"].split(",")), tuple(asked["settings"])
    options = Options(**asked)

    def work() -> None:
        points = run(options)
        print(table(points))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record.write(options.out / "transfer.json", points, device=device)
        best = nearest(points)
        print(f"wrote {options.out / 'transfer.json'}")
        if set(best.values()) != {"transfer"}:
            sys.exit(f"the fine-tuned generator is not the nearest by all: {best}")

    report_errors(work, [])


if __name__ == "__main__":
    main()
