"""`python -m lowvram.evaluate run=FOLDER`: how close a run's images come to its data."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.config import command
from lowvram.errors import LowVRAMError
from lowvram.sample import sample_batches

if TYPE_CHECKING:
    from lowvram.metrics.evaluation import Evaluation

_ALL = "frechet,precision_recall,swd,fid"
_DIFFUSION = ("steps", "sampler", "guidance")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class EvaluateOptions:
    """Measure how close the images of a run's averaged generator come to the run's data set.

    Prints a table, writes RUN/metrics/evaluation-STEP-....json and renews the run's page. Statistics of the real images
    are kept in the user's cache folder (or $LOWVRAM_CACHE), so that a second evaluation takes about half the time.
    """

    run: str = field(metadata=_help("the run folder that training wrote"))
    n: int = field(default=10_000, metadata=_help("generated images; up to as many real ones"))
    seed: int = field(default=0, metadata=_help("of the generated images"))
    truncation: float = field(
        default=1.0, metadata=_help("StyleGAN2: 1 measures what was learned; less trades recall for precision")
    )
    noise: str = field(default="random", metadata=_help("StyleGAN2: random, const or none"))
    steps: int | None = field(default=None, metadata=_help("diffusion: of the sampler (as the recipe says)"))
    sampler: str | None = field(default=None, metadata=_help("diffusion: as lowvram.sample knows them"))
    guidance: float | None = field(default=None, metadata=_help("diffusion: 1 measures what was learned"))
    metrics: str = field(default=_ALL, metadata=_help("some of these"))
    floor: bool = field(default=True, metadata=_help("also measure between two halves of the real images"))
    backbone: str = field(
        default="efficientnet_lite0",
        metadata=_help("whose features frechet and precision_recall are of: this, random_conv (untrained), or both"),
    )
    feature_size: int = field(default=224, metadata=_help("input of EfficientNet-Lite0; 96 is six times as quick"))
    inception: str | None = field(default=None, metadata=_help("weights for FID (looked for in torch hub's cache)"))
    checkpoint: str = field(default="latest", metadata=_help("a step's number, or latest"))
    device: str = field(default="auto", metadata=_help("auto, cpu, cuda or cuda:N"))
    micro_batch: int | None = field(default=None, metadata=_help("images generated at a time"))

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise LowVRAMError(f"micro_batch={self.micro_batch} is too small.", "Use 1 or more.")
        if self.noise not in ("const", "random", "none"):
            raise LowVRAMError(f"noise={self.noise} is not known.", "Use one of const, random, none.")


def main(options: EvaluateOptions) -> None:
    """Evaluate a run. Raises LowVRAMError for what is missing or unknown."""
    from lowvram import pages
    from lowvram.run import Run
    from lowvram.tasks import load_run

    folder = Path(options.run).expanduser()
    checkpoint = Run.open(folder).find_checkpoint(options.checkpoint)
    step = int(checkpoint.name.removeprefix("step-"))
    task = load_run(folder, checkpoint=str(step), device=options.device)
    metrics, backbones = (_words(names) for names in (options.metrics, options.backbone))
    result = evaluate(
        task,
        n=options.n,
        seed=options.seed,
        truncation=options.truncation,
        noise_mode=options.noise,
        metrics=metrics,
        floor=options.floor,
        backbones=backbones,
        feature_size=options.feature_size,
        inception=options.inception,
        micro_batch=options.micro_batch,
        **{name: value for name in _DIFFUSION if (value := getattr(options, name)) is not None},
    )
    truncated = f", truncation {options.truncation:g}," if "truncation_psi" in task.sample_options else ""
    print(
        f"lowvram: {folder} at step {step}: {result.generated_images:,} generated images{truncated} against "
        f"{result.real_images:,} of {task.dataset().name}"
    )
    print(result.table())
    asked = {name: getattr(options, name) for name in ("seed", "truncation", "noise", "checkpoint", *_DIFFUSION)}
    kimg = json.loads((checkpoint / "state.json").read_text())["images_seen"] / 1000
    record = {"run": str(folder), "step": step, "kimg": kimg, **asked, **result.as_dict()}
    name = (
        f"evaluation-{step:08d}-n{options.n}-seed{options.seed}-truncation{options.truncation:g}{_more(options)}.json"
    )
    print(f"lowvram: wrote {_write(folder / 'metrics', name, record)}")
    with contextlib.suppress(OSError):  # the numbers are safe; the page comes with `lowvram.report`, too
        print(f"lowvram: wrote {pages.write(folder)}")


def _words(names: str) -> list[str]:
    return [word.strip() for word in names.split(",") if word.strip()]


def _more(options: EvaluateOptions) -> str:
    """What else was asked for than is usual, as a few digits, so that no evaluation takes another's place."""
    usual = {field.name: field.default for field in fields(EvaluateOptions)}
    names = ("noise", "metrics", "floor", "backbone", "feature_size", "inception", *_DIFFUSION)
    asked = {name: _in_order(name, getattr(options, name)) for name in names}
    asked = {name: value for name, value in asked.items() if value != _in_order(name, usual[name])}
    return f"-{hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:8]}" if asked else ""


def _in_order(name: str, value: Any) -> Any:
    """The value of an option; of a list of names, in whose order nothing lies, the names in a fixed one."""
    return sorted(set(_words(value))) if name in ("metrics", "backbone") else value


def evaluate(
    task: Any,
    *,
    n: int = 10_000,
    seed: int = 0,
    truncation: float = 1.0,
    noise_mode: str = "random",
    metrics: list[str] | None = None,
    floor: bool = True,
    backbones: Iterable[str] = ("efficientnet_lite0",),
    feature_size: int = 224,
    inception: str | None = None,
    micro_batch: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Compare a task's images with its data set: those that it generates, or an autoencoder's reconstructions.

    task: from `lowvram.tasks.load_run`, or a trainer's. Class-conditional ones draw classes as often as the data does.
    metrics: some of lowvram.metrics.evaluation.METRICS, or None for all. See `evaluate_images` for the rest.
    """
    from lowvram.bars import say
    from lowvram.memory.recovery import halving
    from lowvram.metrics.evaluation import METRICS, batch_size, check_counts, check_metrics, evaluate_images
    from lowvram.metrics.real import real_indices

    sampling: dict[str, Any] = {"truncation_psi": truncation, "noise_mode": noise_mode}
    for name, usual in (("truncation_psi", 1.0), ("noise_mode", "random")):
        if name not in task.sample_options and sampling.pop(name) != usual:
            raise LowVRAMError(f"{name} is nothing that a run of {task.settings.task} knows.", "Leave it out.")
    for name in options:
        if name not in task.sample_options:
            raise LowVRAMError(f"{name} is nothing that a run of {task.settings.task} knows.", "Leave it out.")
    wanted = check_metrics(METRICS if metrics is None else metrics)
    dataset, data = task.dataset(), task.settings.data
    check_counts(n, dataset)
    if dataset.labels is not None and "classes" in task.sample_options:
        sampling["classes"] = [int(dataset.labels[i]) for i in real_indices(len(dataset), len(dataset))]
    generated = sample_batches(
        task,
        n,
        seed,
        batch=batch_size(dataset.resolution),
        micro_batch=micro_batch,
        **sampling,
        **options,
    )
    return evaluate_images(
        generated,
        dataset,
        n=n,
        metrics=wanted,
        floor=floor,
        backbones=backbones,
        mirror=data.mirror,
        feature_size=feature_size,
        inception=inception,
        device=task.device,
        workers=data.workers,
        progress=progress,
        in_slices=lambda run, whole, what: halving(run, whole, task.device, say, what),
    )


def _write(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """Write a JSON file in the folder, whole or not at all."""
    partial = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(folder / name)
    except OSError as error:
        raise LowVRAMError(
            f"{folder / name} can't be written: {error.strerror}.", "Free some space; the numbers are above."
        ) from error
    return folder / name


if __name__ == "__main__":
    command(EvaluateOptions, main, "evaluate")
