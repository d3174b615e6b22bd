"""What is seen while training runs: messages, the progress bar, the trackers, and what a CPU will take."""

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lowvram.config import settings_values
from lowvram.data.bucketed import shape_numbers
from lowvram.errors import LowVRAMError
from lowvram.memory.apply import Applied
from lowvram.phase import Phase
from lowvram.run import Run
from lowvram.settings import Settings, flatten
from lowvram.tasks import Task


class Progress:
    """Messages, and a bar on a terminal or a line at each log interval elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: Any = None

    def say(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.quiet:
            tqdm.write(f"lowvram: {message}", file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def bar(self, images_seen: int, total_images: int) -> Iterator[None]:
        """Show a bar over the run's images within."""
        terminal = sys.stderr.isatty() and not self.quiet
        self._bar = tqdm(
            total=total_images / 1000,
            initial=images_seen / 1000,
            disable=not terminal,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}| {n:.2f}/{total:g} kimg [{elapsed}<{remaining}]{postfix} {desc}",
            mininterval=0.2,
        )
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    def phase(self, name: str) -> None:
        """Show which phase runs, so that a long step does not look frozen."""
        if self._bar is not None:
            self._bar.set_description_str(name, refresh=False)
            self._bar.update(0)

    def advance(self, images_seen: int) -> None:
        """Move the bar to a count of images."""
        if self._bar is not None:
            self._bar.update(images_seen / 1000 - self._bar.n)

    def show(self, values: dict[str, Any], cost: str, *, on_gpu: bool) -> None:
        """Show the values of a log interval. cost: up to now, in words."""
        losses = " ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        memory = f"{values['peak_allocated_bytes'] / 2**30:.2f}"
        if on_gpu:
            reserved, device = (values[f"{kind}_bytes"] / 2**30 for kind in ("peak_reserved", "device"))
            memory = f"peak {memory} of {reserved:.2f} GiB reserved, {device:.2f} on the card"
        else:
            memory = f"RSS {memory} GiB"
        p = f" p {values['augment_p']:.3f}" if "augment_p" in values else ""
        text = f"{values['s_per_kimg']:.1f} s/kimg, {losses}{p}, {memory}, {cost}"
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif self._bar is not None and not self.quiet:
            left = duration(max(0.0, self._bar.total - values["kimg"]) * values["s_per_kimg"])
            print(f"{values['kimg']:8.2f} kimg  {text}, {left} left", flush=True)


class Trackers:
    """TensorBoard or Weights & Biases through accelerate, imported only when asked for."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._tracker: Any = None
        if settings.logger == "none":
            return
        from accelerate import tracking

        if settings.logger == "tensorboard":
            self._tracker = tracking.TensorBoardTracker(run_name="tensorboard", logging_dir=str(run.folder))
        else:
            self._tracker = tracking.WandBTracker(run_name="lowvram", name=run.folder.name, dir=str(run.folder))
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        shown = {k: v for k, v in flatten(settings_values(settings)).items() if isinstance(v, int | float | str | bool)}
        self._tracker.store_init_configuration(shown)

    @staticmethod
    def check(settings: Settings) -> None:
        """Raise LowVRAMError if the recipe's logger is not installed."""
        if settings.logger != "none" and importlib.util.find_spec(settings.logger) is None:
            raise LowVRAMError(
                f"logger={settings.logger} needs a package that is not installed.",
                f'pip install "lowvram[{settings.logger}]", or logger=none.',
            )

    def log(self, values: dict[str, Any]) -> None:
        """Send a line of metrics."""
        if self._tracker is not None:
            numbers = {k: v for k, v in values.items() if k != "step" and not isinstance(v, str)}
            self._tracker.log(numbers, step=values["step"])

    def finish(self) -> None:
        """Flush and close."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def estimate_cpu_cost(task: Task, settings: Settings, applied: Applied, images_seen: int) -> str:
    """Time each phase on a few images, and say what the rest of the run will take on this CPU.

    Nothing is updated: gradients are dropped, and a phase's random numbers depend on its samples alone.
    """
    per_kimg = sum(
        _seconds_per_image(task, phase, applied)
        / phase.every
        * phase.samples
        / settings.batch
        * 1000
        / applied.world_size
        for phase in task.phases
    )
    rest = settings.kimg - images_seen / 1000
    line = (
        f"no GPU: about {duration(per_kimg)} for each kimg on this CPU, {duration(per_kimg * rest)} for {rest:g} kimg"
    )
    quick = ("faces64_ldm", "a quarter of an hour") if settings.task == "diffusion" else ("faces32", "ten minutes")
    if per_kimg * rest > 3600 and settings.task != "autoencoder" and settings.recipe != quick[0]:
        line += f"; recipe={quick[0]} makes faces in {quick[1]}. Training all the same; Ctrl-C stops and saves"
    return line


def _seconds_per_image(task: Task, phase: Phase, applied: Applied) -> float:
    """Forward and backward of one group of images; where that is quick, again with a whole micro-batch, warmed up."""
    items = task.items()
    shapes = shape_numbers(items)  # of several, the commonest: a batch is of one shape
    alike = np.arange(len(items)) if shapes is None else np.flatnonzero(shapes == np.bincount(shapes).argmax())
    seconds = 0.0
    for count in (task.group, phase.micro_batch or phase.samples):
        read = [items.read(int(alike[i % len(alike)])) for i in range(max(count, task.group))]
        images = torch.stack([torch.tensor(item.array) for item in read])
        labels = torch.tensor([item.label for item in read])
        with applied.running(phase, collect=False):
            micro = next(phase.micro_batches(images, labels, torch.arange(len(read)), 0, 0))
            begun = time.perf_counter()
            for loss in applied.losses(phase, micro):
                loss.backward()
            seconds = (time.perf_counter() - begun) / len(micro)
        for parameter in phase.parameters():
            parameter.grad = None
        if seconds * len(micro) > 1:
            break
    return seconds


def duration(seconds: float) -> str:
    """Seconds in words, such as "12 s", "5 min", "3.4 h", "12 days" or "1.9 years"."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * 1.5:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
