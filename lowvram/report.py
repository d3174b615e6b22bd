"""`python -m lowvram.report run=FOLDER`: a run's page; of several runs, a page with them side by side."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from lowvram.config import command
from lowvram.errors import LowVRAMError


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class ReportOptions:
    """Write the page of a run, RUN/report.html: one file with everything in it, to open in a browser or to send.

    Training writes it too, with each checkpoint. Run folders can be named without run=, and of several one page shows
    what differed, curves over images, hours and energy, and samples side by side:

      python -m lowvram.report outputs/a outputs/b out=compare.html
    """

    run: str | None = field(default=None, metadata=_help("the run folder that training wrote"))
    out: str | None = field(
        default=None, metadata=_help("where the page goes (RUN/report.html; of several runs comparison.html here)")
    )


def main(options: ReportOptions, folders: list[str]) -> None:
    """Write a page and say where. Raises LowVRAMError for what is no run folder, or can't be compared."""
    from lowvram import pages

    runs = [*([] if options.run is None else [options.run]), *folders]
    if not runs:
        raise LowVRAMError("run is missing.", "Add run=FOLDER, or several folders to compare.")
    out = None if options.out is None else Path(options.out).expanduser()
    try:
        one = len(runs) == 1
        path = pages.write(runs[0], out=out) if one else pages.compare(runs, out or Path("comparison.html"))
    except OSError as error:
        where = out or runs[0]
        raise LowVRAMError(f"the page can't be written: {error}.", f"Look at {where}, or choose out=FILE.") from error
    print(f"lowvram: wrote {path}")


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The folders among the words of a command line, and the options.

    A folder's name may hold "=", as outputs/lr=0.1 of a sweep: what comes before it is then no option's name.
    """
    options = (*(item.name for item in fields(ReportOptions)), "debug")

    def is_folder(word: str) -> bool:
        name, equals, _ = word.partition("=")
        if word.startswith("-") or word == "help":
            return False
        return not equals or (name not in options and Path(word).is_dir())

    return [word for word in words if is_folder(word)], [word for word in words if not is_folder(word)]


if __name__ == "__main__":
    found, sys.argv[1:] = split(sys.argv[1:])
    command(ReportOptions, lambda options: main(options, found), "report")
