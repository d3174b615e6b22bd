"""about.json: what a run was trained with and on, session by session, as far as recipe.yaml does not say it."""

import functools
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAME = "about.json"
_MOST_BYTES = 2**20
_MOST_RECORDS = 200
_MOST_TEXT = 300


@dataclass(frozen=True, kw_only=True)
class About:
    """Versions, the machine and the data of a session; "" and 0 for what is not known.

    commit: of the clone that lowvram was imported from, with "+changes" where files differ from it. device: that it
    trained on. images: in the data set. begun, ended: UTC, ISO 8601; begun as the receipt has it, and ended
    is "" as long as it trains, and for ever where it was killed. kimg: thousands of images seen when this was noted.
    """

    python: str = ""
    lowvram: str = ""
    torch: str = ""
    cuda: str = ""
    commit: str = ""
    system: str = ""
    device: str = ""
    data: str = ""
    images: int = 0
    begun: str = ""
    ended: str = ""
    kimg: float = 0.0


def here(*, data: str = "", images: int = 0, device: Any = None) -> About:
    """This process. device: a torch.device; without one the usual card. Asks nothing of torch that isn't imported."""
    torch = sys.modules.get("torch")
    kind = getattr(device, "type", "cuda")
    cuda = torch is not None and kind == "cuda" and torch.cuda.is_available()
    return About(
        python=platform.python_version(),
        lowvram=_version("lowvram"),
        torch=_version("torch"),
        cuda=str(torch.version.cuda or "") if torch is not None else "",
        commit=_commit(),
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if cuda and torch is not None else "CPU",
        data=data[:_MOST_TEXT],
        images=images,
    )


def note(folder: Path, record: About) -> None:
    """Add a record; one of the same begin takes the place of the last. Raises OSError where the disk says no."""
    have = read(folder)
    if have and have[-1] == record:
        return
    if have and record.begun and have[-1].begun == record.begun:
        have.pop()
    path = folder / NAME
    partial = path.with_name(path.name + ".partial")
    values = [asdict(one) for one in [*have, record][-_MOST_RECORDS:]]
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read(folder: Path) -> list[About]:
    """The records, oldest first; none where there is no such file, or something else in it."""
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return []
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(values, list):
        return []
    return [_record(one) for one in values[-_MOST_RECORDS:] if isinstance(one, dict)]


def _record(values: dict[str, Any]) -> About:
    found: dict[str, Any] = {}
    for item in fields(About):
        value = values.get(item.name)
        if item.type is str and isinstance(value, str):
            found[item.name] = value[:_MOST_TEXT]
        elif item.type is int and type(value) is int and 0 <= value < 2**60:
            found[item.name] = value
        elif item.type is float and isinstance(value, int | float) and 0 <= value < 2**60:
            found[item.name] = float(value)
    return About(**found)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@functools.cache
def _commit() -> str:
    clone = Path(__file__).parent.parent.parent
    if not (clone / ".git").exists():  # installed from a wheel
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(clone), "--no-optional-locks", *words],
            capture_output=True, text=True, timeout=5, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lowvram")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
