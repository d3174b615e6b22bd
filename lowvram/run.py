"""The run folder: settings, metrics, sample grids and checkpoints, in a form that can be moved and read by others.

recipe.yaml          the settings, complete
metrics.jsonl        one JSON object a line
receipt.json         what it took, and on whose machines (see lowvram.receipt.ledger); stands_on.json: the same of a run
                     that it stands on (see lowvram.receipt.stands_on)
plan.json, plan.png  how the training was made to fit the card, where it was planned
report.html          the run's page; about.json: versions, data and state of each session (see lowvram.pages)
metrics/             what lowvram.evaluate found
reals.png            images of the data set
fakes_000000.png     samples, named by the thousands of images seen
checkpoints/         step-XXXXXXXX folders (see lowvram.checkpoint)
"""

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from lowvram import checkpoint
from lowvram.config import settings_from, settings_values
from lowvram.errors import LowVRAMError
from lowvram.settings import Settings

OUTPUTS = Path("outputs")


class Run:
    """A run folder. `Run.new` names one, `Run.open` finds one; `prepare` makes it on the disk."""

    def __init__(self, folder: Path, settings: Settings, *, is_new: bool = False) -> None:
        self.folder = folder
        self.settings = settings
        self.is_new = is_new

    @classmethod
    def new(cls, settings: Settings) -> "Run":
        """The folder that `settings.out` names, or the next free outputs/RECIPE. Nothing is written yet.

        Raises:
            LowVRAMError: `out` exists and holds something.
        """
        folder = Path(settings.out).expanduser() if settings.out else _free(OUTPUTS / settings.recipe)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise _exists(folder)
        return cls(folder, settings, is_new=True)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in a folder that training made.

        Raises:
            LowVRAMError: there is none, or its recipe.yaml can't be read.
        """
        folder = Path(folder).expanduser()
        path = folder / "recipe.yaml"
        if not path.is_file():
            near = sorted(str(p.parent) for p in OUTPUTS.glob("*/recipe.yaml"))
            raise LowVRAMError(f"run={folder} is not a run folder.", f"Found: {', '.join(near) or 'none in outputs/'}.")
        try:
            values = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(values, dict)
        except (OSError, YAMLError, UnicodeDecodeError, AssertionError) as error:
            raise LowVRAMError(f"{path} can't be read: {error}", "Restore it, or start a new run.") from error
        return cls(folder, settings_from({str(k): v for k, v in values.items()}))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def find_checkpoint(self, which: str | int = "latest") -> Path:
        """The newest good checkpoint, or the one of a step.

        Raises:
            LowVRAMError: there is none.
        """
        have = [int(p.name.removeprefix("step-")) for p in checkpoint.candidates(self.checkpoints)]
        if which == "latest":
            path = checkpoint.latest_good(self.checkpoints)
        else:
            if not str(which).isdigit():
                raise LowVRAMError(f"checkpoint={which} is no step.", "Give a step's number, or latest.")
            path = self.checkpoints / f"step-{int(which):08d}"
        if path is None or not path.is_dir():
            steps = ", ".join(map(str, sorted(have))) or "no step yet"
            raise LowVRAMError(f"{self.folder} has no good checkpoint for {which}.", f"It has: {steps}.")
        return path

    def prepare(self) -> None:
        """Make the folder and write recipe.yaml.

        Raises:
            LowVRAMError: it can't be made.
        """
        text = OmegaConf.to_yaml(OmegaConf.create(settings_values(self.settings)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.is_new:
                (self.folder / "recipe.yaml").touch(exist_ok=False)  # two runs begun at once don't share a folder
            _write_whole(self.folder / "recipe.yaml", text)
            self.is_new = False
        except FileExistsError as error:
            raise _exists(self.folder) from error
        except OSError as error:
            problem = f"the run folder {self.folder} can't be written: {error.strerror}."
            raise LowVRAMError(problem, "Choose another out=FOLDER.") from error

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that a resumed run takes again, and a last line that was cut short."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        _write_whole(path, "".join(kept))

    def grid_path(self, images_seen: int) -> Path:
        """Where a sample grid goes: fakes_KIMG.png, by the nearest kimg; a later one of that takes its place."""
        return self.folder / f"fakes_{round(images_seen / 1000):06d}.png"


def _exists(folder: Path) -> LowVRAMError:
    return LowVRAMError(
        f"out={folder} exists already.", "Add resume=auto to go on with it, or choose another out=FOLDER."
    )


def newest(recipe: str) -> Path | None:
    """The newest of outputs/RECIPE, outputs/RECIPE-2 and on."""
    if not OUTPUTS.is_dir():
        return None
    pattern = re.compile(re.escape(recipe) + r"(?:-(\d+))?$")
    found = [(int(m[1] or 1), p) for p in OUTPUTS.iterdir() if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    return max(found)[1] if found else None


def _free(wanted: Path) -> Path:
    latest = newest(wanted.name)
    if latest is None:
        return wanted
    number = int(latest.name.removeprefix(wanted.name).lstrip("-") or 1)
    return wanted.with_name(f"{wanted.name}-{number + 1}")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
