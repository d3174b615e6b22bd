"""How good is what each recipe makes after so much time? Curves of quality, of several recipes beside each other.

    python -m benchmarks.time_to_quality recipe=faces32,faces32_fast seconds=300 [option=value ...] [setting=value ...]

Each recipe trains for the same time (seconds=) or on as many images (kimg=). On the way, at first more often, its
averaged generator is measured: Frechet distance, precision and recall on features of EfficientNet-Lite0 and on those of
a network that was never trained, and the sliced Wasserstein distance, each beside what two halves of the real images
are apart. Any other setting, such as batch=16 or vram=6GB, goes to all recipes, which must be of the same images.

The clock counts training alone, the first step's loading of kernels included. It stands still while a trainer is made
(and what it stands on is trained or encoded), while samples are drawn and measured, and while anything is saved. Energy
is counted with it. Recipes take turns from one measurement to the next, so that a busy machine hurts all alike; each is
a process of its own (benchmarks.quality_worker), which has a peak of memory and a random state of its own. Those that
wait keep their memory: a card must have room for all. What a run's own metrics say of time has the waiting in it.

OUT gets quality.json (of the schema of benchmarks.record, written after each measurement), curves.png, samples.png and
the runs. Exit code 1: a training failed, or a measurement.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import quality_pictures as pictures
from benchmarks import quality_table as table
from benchmarks import record
from benchmarks.quality_worker import Worker
from lowvram.config import command, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.memory.recovery import free_memory, is_out_of_memory
from lowvram.metrics.evaluation import BACKBONES, Evaluation, batch_size, check_counts, evaluate_images
from lowvram.metrics.features import EfficientNetLite0, RandomConv
from lowvram.metrics.real import Images, real_indices
from lowvram.sampling.grids import save_grid
from lowvram.settings import Settings
from lowvram.tasks import open_images, pick_device

METRICS = ("frechet", "precision_recall", "swd")
WRITTEN = ("quality.json", "curves.png", "samples.png")
_SAME = ("resolution", "data.path", "data.builtin_count", "data.max_images", "data.mirror")
_KIMG_WITHOUT_END = 1_000_000
_MOST_POINTS = 100


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class Options:
    """Train recipes for the same time and measure what they make on the way. Settings of a recipe go to all of them."""

    recipe: str = field(metadata=_help("names or .yaml files of recipes, with commas between"))
    seconds: float | None = field(default=None, metadata=_help("of training, for each recipe"))
    kimg: float | None = field(default=None, metadata=_help("in place of seconds: thousands of images, for each"))
    points: int = field(default=8, metadata=_help("measurements of each; early ones are closer together"))
    n: int = field(default=2000, metadata=_help("images generated for each measurement, and as many real ones"))
    feature_size: int = field(default=224, metadata=_help("input of EfficientNet-Lite0; 96 is six times as quick"))
    shown: int = field(default=16, metadata=_help("samples of each measurement in the picture"))
    measure_on: str = field(default="cpu", metadata=_help("cpu; or cuda, where it has room beside the trainings"))
    out: str = field(default="outputs/benchmarks/time_to_quality", metadata=_help("the folder to write"))

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.kimg is None):
            raise LowVRAMError("Needed is either seconds or kimg, as the length of each training.", "Add seconds=300.")
        for name, least in (("seconds", 0.1), ("kimg", 0.001), ("points", 1), ("n", 8), ("shown", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise LowVRAMError(f"{name}={value} is too small or has no end.", f"Use {least} or more.")
        if self.points > _MOST_POINTS:
            raise LowVRAMError(f"points={self.points} are too many to measure.", f"Use {_MOST_POINTS} or fewer.")
        if self.shown > min(self.n, 64):
            raise LowVRAMError(f"shown={self.shown} is more than n, or than fits.", f"Use {min(self.n, 64)} or less.")
        if not self.recipes:
            raise LowVRAMError("recipe names nothing to train.", "Add recipe=faces32 or several, with commas between.")

    @property
    def recipes(self) -> dict[str, str]:
        """What the recipes are called here, and how they were given.

        Raises:
            LowVRAMError: two have one name.
        """
        found: dict[str, str] = {}
        for word in filter(None, (word.strip() for word in self.recipe.split(","))):
            name = Path(word).stem
            if name in found:
                raise LowVRAMError(f"recipe={word}: there are two of the name {name}.", "Give the file another name.")
            found[name] = word
        return found

    def goals(self) -> list[float]:
        """When to measure, in the unit of `seconds` or `kimg`: the squares of evenly spaced numbers."""
        length = self.seconds or self.kimg or 0.0
        return [length * (n / self.points) ** 2 for n in range(1, self.points + 1)]


@dataclass
class Course:
    """What is known of one recipe's training: points, and a few of the images of each (None where there are no values).

    failed: it can't go on. done: it has its recipe's length.
    """

    name: str
    given: str
    worker: Worker | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    images: list[Tensor | None] = field(default_factory=list)
    failed: bool = False
    done: bool = False

    @property
    def measured(self) -> int:
        """How many points there are up to the last one that has values."""
        return max((n for n, point in enumerate(self.points, 1) if not point["error"]), default=0)


def check_same_images(recipes: Mapping[str, Settings]) -> None:
    """Raise LowVRAMError where recipes are of different images, whose distances can't be compared."""
    (first, one), *others = recipes.items()
    for name, other in others:
        for setting in _SAME:
            values = [_setting(settings, setting) for settings in (one, other)]
            if values[0] != values[1]:
                raise LowVRAMError(
                    f"{setting} is {values[0]} in {first} and {values[1]} in {name}: they can't be compared.",
                    f"Add {setting}=VALUE for all.",
                )


def _setting(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


class Comparison:
    """All trainings, measured in turns."""

    def __init__(self, options: Options, words: Sequence[str]) -> None:
        self.options, self.words = options, list(words)
        self.out = Path(options.out).expanduser()
        if (self.out / "runs").exists():
            raise LowVRAMError(f"out={self.out} has trainings already.", "Remove it, or choose another.")
        self.overrides = {name: self._overrides(name, given) for name, given in options.recipes.items()}
        settings = {name: load_recipe(given, self.overrides[name]) for name, given in options.recipes.items()}
        check_same_images(settings)
        first = next(iter(settings.values()))
        self.mirror, self.resolution = first.data.mirror, first.resolution
        self.real: Images = open_images(first)
        check_counts(options.n, self.real)
        self.measure_on = _device(options.measure_on)
        EfficientNetLite0(self.measure_on, options.feature_size)  # raises what it would raise after the first training
        RandomConv(self.measure_on)
        self.courses = [Course(name, given) for name, given in options.recipes.items()]
        self.width = max(map(len, options.recipes))
        self.floor: dict[str, float] = {}
        self.environment: dict[str, Any] = {}
        self.on_gpu = False

    def _overrides(self, name: str, given: str) -> list[str]:
        length = [f"kimg={self.options.kimg}"] if self.options.kimg is not None else []
        if not length and not _has_schedule(load_recipe(given, self.words)):
            length = [f"kimg={_KIMG_WITHOUT_END}"]
        return [*self.words, *length, f"snapshot_kimg={_KIMG_WITHOUT_END}", f"out={self.out / 'runs' / name}"]

    def run(self) -> list[dict[str, Any]]:
        """Train and measure; all points. What is measured is written at once."""
        with ExitStack() as stack:
            for course in self.courses:
                print(f"preparing {course.name}", flush=True)
                self._start(course, stack)
            for turn, goal in enumerate(self.options.goals()):
                # Whoever came first comes last the next time.
                for course in self.courses[:: -1 if turn % 2 else 1]:
                    if not (course.failed or course.done):
                        self._measure(course, turn, goal)
                self._draw()
            for course in self.courses:
                self._finish(course)
        return self.points()

    def points(self) -> list[dict[str, Any]]:
        """Of all recipes, one after the other."""
        return [point for course in self.courses for point in course.points]

    def _start(self, course: Course, stack: ExitStack) -> None:
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        try:
            course.worker = Worker(course.given, self.overrides[course.name])
        except LowVRAMError as error:
            self._failed(course, 0, error.problem)
            return
        stack.callback(course.worker.close)
        self.environment = course.worker.environment["environment"]
        self.on_gpu = course.worker.environment["device"] == "cuda"

    def _measure(self, course: Course, turn: int, goal: float) -> None:
        """Train a recipe up to a goal, and add the point."""
        assert course.worker is not None
        by_time = self.options.seconds is not None
        file = self.out / f".{course.name}.npy"
        try:
            try:
                took = course.worker.ask(
                    "train", seconds=goal if by_time else None, images=None if by_time else math.ceil(goal * 1000)
                )
                course.done = took["done"]
                course.worker.ask("sample", n=self.options.n, path=str(file))
            except LowVRAMError as error:
                self._failed(course, turn, error.problem)
                return
            self._add(course, turn, took, torch.from_numpy(np.load(file, mmap_mode="c")))  # read as it is needed
        finally:
            file.unlink(missing_ok=True)

    def _add(self, course: Course, turn: int, took: Mapping[str, Any], images: Tensor) -> None:
        """Add the point of images uint8 [n, 3, R, R], which is an error where they can't be measured."""
        measured: Evaluation | None = None
        problem = ""
        try:
            measured = self._evaluate(images)
        except LowVRAMError as error:
            problem = error.problem
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            problem = (str(error) or repr(error)).splitlines()[0][:300]
        if measured is None:  # the training may go on
            free_memory(self.measure_on)  # of what the error held
            self._without_values(course, turn, f"it could not be measured: {problem}")
            return
        course.images.append(images[: self.options.shown].clone())
        save_grid(images[: self.options.shown], self.out / f"{course.name}-{turn + 1:02d}.png")
        course.points.append(self._point(course, turn, took, measured))
        self._print(course.points[-1])
        self._write()

    def _finish(self, course: Course) -> None:
        """Let a training save what it has made."""
        if course.worker is None or course.failed:
            return
        try:
            course.worker.ask("finish")
        except LowVRAMError as error:
            self._failed(course, self.options.points - 1, error.problem)

    def _evaluate(self, images: Tensor) -> Evaluation:
        found = evaluate_images(
            images.split(batch_size(self.resolution)),
            self.real,
            n=self.options.n,
            metrics=METRICS,
            backbones=BACKBONES,
            floor=not self.floor,  # it is always the same
            mirror=self.mirror,
            feature_size=self.options.feature_size,
            device=self.measure_on,
            progress=False,
        )
        self.floor = self.floor or found.floor
        return found

    def _point(self, course: Course, turn: int, took: Mapping[str, Any], measured: Evaluation) -> dict[str, Any]:
        kwh = took["joules"] / 3.6e6
        peak = took["reserved_bytes"]
        return record.point(
            "time_to_quality",
            self._name(turn),
            recipe=course.name,
            overrides=self._asked(),
            images_per_second=took["images"] / took["seconds"],
            allocated_bytes=took["allocated_bytes"] if self.on_gpu else None,
            reserved_bytes=peak if self.on_gpu else None,
            energy_joules_per_image=took["joules"] / took["images"],
            details={
                "seconds": took["seconds"],
                "kimg": took["images"] / 1000,
                "kwh": kwh,
                "images_per_kwh": took["images"] / kwh if kwh > 0 else None,
                "energy_by": took["energy_by"],
                "peak_bytes": peak,
                "peak_is": took["peak_is"],
                "ended": took["done"],
                "generated": measured.generated_images,
                "real": measured.real_images,
                "values": measured.values,
                "floor": self.floor,
            },
        )

    def _failed(self, course: Course, turn: int, problem: str) -> None:
        course.failed = True
        self._without_values(course, turn, problem)

    def _without_values(self, course: Course, turn: int, problem: str) -> None:
        course.images.append(None)
        course.points.append(
            record.point(
                "time_to_quality", self._name(turn), recipe=course.name, overrides=self._asked(), error=problem
            )
        )
        print(f"{course.name} failed: {problem}", flush=True)
        self._write()

    def _print(self, point: Mapping[str, Any]) -> None:
        if len([one for one in self.points() if not one["error"]]) == 1:
            print("\n".join(table.header(point, self.width)))
        print(table.row(point, self.width), flush=True)

    def _name(self, turn: int) -> str:
        return f"{turn + 1} of {self.options.points}"

    def _asked(self) -> list[str]:
        length = "seconds" if self.options.seconds is not None else "kimg"
        return [*self.words, f"{length}={getattr(self.options, length):g}"]

    def _write(self) -> None:
        device = torch.device("cpu")
        measured_in = self.environment or record.environment(device)
        record.write(self.out / "quality.json", self.points(), device=device, measured_in=measured_in)

    def _draw(self) -> None:
        done = {course.name: [p for p in course.points if not p["error"]] for course in self.courses}
        done = {name: points for name, points in done.items() if points}
        if not done:
            return
        pictures.draw_curves(done, self.out / "curves.png")
        sampled = {course.name: course.points[: course.measured] for course in self.courses if course.measured}
        shown = {course.name: course.images for course in self.courses if course.measured}
        real = torch.stack([self.real[i] for i in real_indices(len(self.real), self.options.shown)])
        unit = "s" if self.options.seconds is not None else "kimg"
        times = [f"{table.brief(goal)} {unit}" for goal in self.options.goals()]
        pictures.draw_samples(sampled, shown, real, self.out / "samples.png", times=times)


def _device(name: str) -> torch.device:
    """The device of measure_on=. Raises LowVRAMError where it is not there."""
    with suppress(RuntimeError, LowVRAMError):
        device = pick_device(name)
        if device.type in ("cpu", "cuda"):
            return device
    raise LowVRAMError(f"measure_on={name} is not there.", "Use cpu; or cuda or cuda:N, where torch sees that GPU.")


def _has_schedule(settings: Settings) -> bool:
    """Whether the size of a recipe's steps depends on its length, which therefore must stay."""
    optimizer = getattr(settings, "optimizer", None)
    return getattr(optimizer, "schedule", "constant") != "constant"


def main() -> None:
    """Entry of the command."""
    own = {option.name for option in fields(Options)} | {"debug"}
    words = [word for word in sys.argv[1:] if "=" in word and word.split("=")[0] not in own]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in words]  # what `command` is to understand
    if any(word in ("-h", "--help", "help") for word in sys.argv[1:]):
        print(__doc__)
    command(Options, partial(compare, words=words), "benchmarks.time_to_quality")


def compare(options: Options, words: Sequence[str] = ()) -> None:
    """The whole benchmark. words: settings of all recipes."""
    comparison = Comparison(options, words)
    try:
        points = comparison.run()
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what was measured is in {comparison.out}")
    print("\n".join(["", *table.floor(comparison.floor), *table.sooner(points)]))
    print(f"wrote {', '.join(name for name in WRITTEN if (comparison.out / name).exists())} in {comparison.out}")
    if errors := [point for point in points if point["error"]]:
        sys.exit("\n".join(f"{point['recipe']}: {point['error']}" for point in errors))


if __name__ == "__main__":
    main()
