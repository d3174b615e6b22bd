"""Sweeps: a benchmark over any settings, by Hydra's grammar and launchers, that can be stopped and gone on with.

    python -m benchmarks.train_step -m recipe=faces256,faces256_ldm vram=4GB,6GB,8GB [out=FOLDER] [redo=true]
    python -m benchmarks.train_step -m 'recipe=glob(faces*,exclude=*text)' 'batch=range(4,17,4)'
    python -m benchmarks.denoiser_step -m recipe=faces256_ldm,faces512_ldm precision=bf16,fp16 --timeout 600

A point is one combination of values. Each runs the same command without -m, in a process of its own, one after the
other, and leaves a file of the schema of benchmarks.record in FOLDER (outputs/benchmarks/NAME unless given), for
benchmarks.report and benchmarks.compare. What a point printed is in FOLDER/.sweep/.

The same command goes on where it was stopped: a point whose file is there, of the same settings and the same options
(--steps and so on), is kept, whatever commit it is of; redo=true measures all anew. A folder is of one machine.

A point that fails (it does not fit, is killed, takes longer than --timeout) is recorded with its error, tried again the
next time, and stops no other. The command exits with the number of failed points, 100 for more; 120 if the command
itself is wrong, so that nothing was run; 130 when it is stopped.

On a cluster: `pip install -e ".[slurm]"`, and

    python -m benchmarks.train_step -m recipe=faces256 vram=4GB,6GB hydra/launcher=submitit_slurm \\
        hydra.launcher.partition=gpu hydra.launcher.gres=gpu:1 hydra.launcher.timeout_min=30

makes a job of each point and waits for all of them. FOLDER and the working directory have to be there on every node.
Any other launcher plugin of Hydra does too.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from benchmarks import points as shown
from benchmarks import record
from lowvram import config
from lowvram.errors import LowVRAMError

MOST_FAILED, MISTAKE, STOPPED = 100, 120, 130
_FOLDER = Path("outputs/benchmarks")
_OWN = ("out", "redo")
_WORK = ".sweep"  # within the folder: what points printed, and what Hydra and its launchers write


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination. words: recipe=NAME and the settings, in an order of their own; label: what differs."""

    benchmark: str
    words: tuple[str, ...]
    label: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> str | None:
        """Its name."""
        return next((word.removeprefix("recipe=") for word in self.words if word.startswith("recipe=")), None)

    @property
    def overrides(self) -> list[str]:
        """The settings besides the recipe."""
        return [word for word in self.words if not word.startswith("recipe=")]

    @property
    def key(self) -> str:
        """The name of its file, in letters, digits and hyphens: the same for the same settings, in whatever sweep."""
        digest = hashlib.sha256(json.dumps([self.benchmark, *self.words]).encode()).hexdigest()[:8]
        told = " ".join([self.benchmark, self.recipe or "", *self.overrides])
        return f"{record.slug(told)[:100].strip('-')}-{digest}"

    def command(self, file: Path) -> list[str]:
        """What measures it into a file, from a shell too."""
        options = [word for name, value in self.options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", f"benchmarks.{self.benchmark}", *self.words, *options, "--json", str(file)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """-m and --timeout, for a benchmark that can be swept."""
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: settings may have several values")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of a sweep: the most that a point may take")


def recipe_and_overrides(words: list[str], usual: str) -> tuple[str, list[str]]:
    """The recipe among the words, the usual one where none is, and the other words."""
    recipe = next((word.removeprefix("recipe=") for word in words if word.startswith("recipe=")), usual)
    return recipe, [word for word in words if not word.startswith("recipe=")]


def main(benchmark: str, options: argparse.Namespace, asked: dict[str, Any]) -> NoReturn:
    """Run the sweep of a command's words and leave. asked: the benchmark's own options, as it would be told them."""
    try:
        if options.json:
            raise LowVRAMError("--json is for a single point.", "A sweep writes a file for each: out=FOLDER.")
        failed = sweep(benchmark, options.settings, asked, timeout_seconds=options.timeout)
    except LowVRAMError as error:
        print(f"lowvram: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("lowvram: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(STOPPED)
    sys.exit(min(failed, MOST_FAILED))


def sweep(benchmark: str, words: list[str], asked: dict[str, Any], *, timeout_seconds: float | None = None) -> int:
    """Run all points that are not there yet; returns how many of all failed.

    Raises:
        LowVRAMError: the words are not understood, no point can be composed, or the folder is of another machine.
    """
    words = config.short_forms(words)
    own = {word.split("=", 1)[0]: word.split("=", 1)[1] for word in words if word.split("=")[0] in _OWN}
    for_hydra = [word for word in words if word.startswith(("hydra/", "hydra."))]
    folder = Path(own.get("out") or _FOLDER / benchmark).resolve()
    found = points(benchmark, [w for w in words if w.split("=")[0] not in _OWN and w not in for_hydra], asked)
    here = next((w.split("=", 1)[1] for w in for_hydra if w.startswith("hydra/launcher=")), "basic") == "basic"
    redo = own.get("redo", "false").lower() in ("true", "1", "yes")
    wrong = _mistakes(found)
    kept = {} if redo else {p.key: there for p in found if (there := measured(p, folder)) is not None}
    for point in found if here else ():
        if point.key in kept:
            _check_machine(point, kept[point.key], folder)
    (folder / _WORK).mkdir(parents=True, exist_ok=True)
    waiting = []
    for point in found:
        if point.key in kept:
            print(f"{point.label}: kept, of commit {kept[point.key]['environment']['commit']}", flush=True)
        elif point.key in wrong:
            _record_failure(point, folder, wrong[point.key])
        else:
            (folder / f"{point.key}.json").unlink(missing_ok=True)  # so that what is there afterwards is new
            waiting.append(point)
    problem = None
    if waiting:
        with _stopped_by_signals():
            problem = _launch(waiting, folder, for_hydra, timeout_seconds)
    failed = [point for point in found if measured(point, folder) is None]
    for point in failed:
        if not (folder / f"{point.key}.json").exists():  # a job that a cluster ended
            _record_failure(point, folder, problem or "it left no result")
    print(table(found, folder))
    print(f"{len(found) - len(failed)} of {len(found)} points are in {folder}", flush=True)
    return len(failed)


# Which points.


def points(benchmark: str, words: list[str], asked: dict[str, Any]) -> list[Point]:
    """All combinations of the words' values, the last word's changing fastest, as Hydra's own sweeper has them.

    Raises:
        LowVRAMError: a word is not understood.
    """
    choices: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise LowVRAMError(f"{word} is not understood.", "Settings are given as name=value, or name=value,value.")
    with config.friendly_errors(), hydra.initialize_config_module("lowvram.conf", version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for override in parser.parse_overrides(words):
            name = override.get_key_element()
            if not override.is_sweep_override():
                choices[name] = [override.input_line or f"{name}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                choices[name] = [f"{name}={value}" for value in override.sweep_string_iterator()]
            else:
                raise LowVRAMError(f"{override.input_line} has no end of values.", "Use name=a,b,c or range(...).")
    empty = [name for name, values in choices.items() if not values]
    if empty:
        raise LowVRAMError(f"{empty[0]} has no values.", "Nothing matches its pattern, or its range is empty.")
    swept = {name for name, values in choices.items() if len(values) > 1} | {"recipe"}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [
        Point(
            benchmark=benchmark,
            words=tuple(sorted(words.values())),
            label=" ".join(word for name, word in words.items() if name in swept) or benchmark,
            options=asked,
        )
        for words in combinations
    ]


def _mistakes(found: list[Point]) -> dict[str, str]:
    """Points whose settings are wrong, and how. Where all are it is a mistake of the command, and raised."""
    wrong: dict[str, LowVRAMError] = {}
    for point in found:
        try:
            if point.recipe is not None:
                config.load_recipe(point.recipe, point.overrides)
        except LowVRAMError as error:
            wrong[point.key] = error
    if len(wrong) == len(found):
        raise next(iter(wrong.values()))
    return {key: error.problem for key, error in wrong.items()}


def measured(point: Point, folder: Path) -> dict[str, Any] | None:
    """The file of a point that was measured with these options; None: not there, or it failed."""
    try:
        content = record.read(folder / f"{point.key}.json")
        ones = content["points"]
        asked = [one["details"].get("options") == point.options and not one["error"] for one in ones]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if asked and all(asked) else None


def _check_machine(point: Point, there: dict[str, Any], folder: Path) -> None:
    was = there["environment"]["hardware"]["device"]
    now = _environment(_device_word(point))["hardware"]["device"]
    if was != now:
        raise LowVRAMError(
            f"{point.label} in {folder} was measured on {was}, and this is {now}.",
            "Give another folder (out=FOLDER), or measure all anew with redo=true.",
        )


def _device_word(point: Point) -> str:
    words = [word.removeprefix("device=") for word in point.words if word.startswith("device=")]
    return words[-1] if words else "auto"


@functools.cache
def _environment(device: str) -> dict[str, Any]:
    """`record.environment`, asked in another process: this one must hold nothing of a card."""
    code = "import json, sys; from benchmarks import record; from lowvram.tasks import pick_device; "
    code += "print(json.dumps(record.environment(pick_device(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=False)
    if done.returncode and device != "cpu":
        return _environment("cpu")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Running them.


def _launch(waiting: list[Point], folder: Path, for_hydra: list[str], timeout_seconds: float | None) -> str | None:
    """Hand the points to Hydra's launcher; returns what it failed with, if it did.

    To it a point is a name: what is in it need not be composed twice, and may be wrong.
    """
    by_key = {point.key: point for point in waiting}
    keys = list(by_key)
    work = str(folder / _WORK).replace("$", "\\$")
    node = {
        "defaults": ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}],
        "point": None,
        "hydra": {
            "output_subdir": None,
            "run": {"dir": work},
            "sweep": {"dir": work, "subdir": "."},
            "job": {"name": f"lowvram-{waiting[0].benchmark}", "chdir": False},
        },
    }
    ConfigStore.instance().store(name="benchmark_sweep", node=node)

    def job(composed: Any) -> None:
        number = f"{keys.index(composed.point) + 1}/{len(keys)}"
        run_point(by_key[composed.point], folder, number=number, timeout_seconds=timeout_seconds)

    words = sys.argv
    sys.argv = [words[0], "--multirun", *for_hydra, f"point={','.join(keys)}"]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to us
    try:
        hydra.main(config_path=None, config_name="benchmark_sweep", version_base="1.3")(job)()
    except HydraException as error:
        text = " ".join(str(error).split())
        remedy = (
            'pip install "lowvram[slurm]" brings submitit_slurm.' if "launcher" in text else "Mend the hydra words."
        )
        raise LowVRAMError(text.split(" Available options")[0], remedy) from error
    except Exception as error:  # a launcher's own, such as a job that a cluster ended: other points have their files
        return f"the launcher failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
    finally:
        sys.argv = words
    return None


def run_point(point: Point, folder: Path, *, number: str = "", timeout_seconds: float | None = None) -> None:
    """Measure a point in a process of its own; a failure is recorded."""
    file, log = folder / f"{point.key}.json", folder / _WORK / f"{point.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            point.command(file),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that it can be ended with the processes that it started
        )
        try:
            process.wait(timeout_seconds)
            error = None if process.returncode == 0 else _last_words(log, process.returncode)
        except subprocess.TimeoutExpired:
            error = f"it took longer than {timeout_seconds:g} seconds"
        finally:
            if process.poll() is None:
                _end(process)
    if error is None and measured(point, folder) is None:
        error = "it left no result"
    if error is not None:
        _record_failure(point, folder, error)
    said = error or "; ".join(_in_words(one) for one in record.read(file)["points"])
    print(f"{number} {point.label}: {said}".strip(), flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _last_words(log: Path, status: int) -> str:
    """What a process that failed said of it: the problem of its LowVRAMError, else its last line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("lowvram: ") for line in lines if line.startswith("lowvram: ")]
    return (said or lines or [f"exit status {status}"])[-1][:300]


def _record_failure(point: Point, folder: Path, error: str) -> None:
    failure = record.point(
        point.benchmark,
        "step",
        recipe=point.recipe,
        overrides=point.overrides,
        error=error,
        details={"options": point.options},
    )
    environment = _environment(_device_word(point))
    record.write(folder / f"{point.key}.json", [failure], device="cpu", measured_in=environment)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Within, being told to end is as Control-C is: the point that runs is ended too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


# Shown.


def table(found: list[Point], folder: Path) -> str:
    """All points, for people."""
    width = max(len(point.label) for point in found) + 2
    rows = []
    for point in found:
        try:
            ones = record.read(folder / f"{point.key}.json")["points"]
        except (OSError, ValueError):
            ones = []
        rows += [f"{point.label:<{width}}{_in_words(one)}" for one in ones]
    return "\n".join(rows)


def _in_words(point: dict[str, Any]) -> str:
    if point["error"]:
        return f"failed: {point['error']}"
    words = [] if point["name"] == "step" else [f"{point['name']}:"]
    if point["images_per_second"]:
        words.append(f"{point['images_per_second']:.2f} images/s")
    return " ".join([*words, *peaks_in_words(point)])


def peaks_in_words(point: dict[str, Any]) -> list[str]:
    """The peaks that a point has, such as "812MB allocated"."""
    peaks = {kind: point["memory"][f"{kind}_bytes"] for kind in ("allocated", "reserved", "device")}
    return [f"{shown.size(size_bytes)} {kind}" for kind, size_bytes in peaks.items() if size_bytes is not None]
