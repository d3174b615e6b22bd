"""Decode, crop and resize a set of images once, into a zip that trains without any of that work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import zipfile
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram.data.dataset import BadImageError, ImageSet
from lowvram.data.open import open_dataset
from lowvram.errors import LowVRAMError

# Keyword arguments of PIL's save. WebP lossless is about half the size of PNG and ten times slower to write.
_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
_PER_FOLDER = 1000


@dataclass(kw_only=True)
class PrepareOptions:
    """Write the images of a folder or zip, cropped to their centre square and resized, into one zip for training."""

    source: str = field(metadata={"help": "a folder (read recursively) or a zip; builtin means the drawn faces"})
    dest: str = field(metadata={"help": "the zip to write"})
    resolution: int = field(metadata={"help": "pixels a side"})
    labels: bool = field(default=False, metadata={"help": "keep class labels, from dataset.json or folder names"})
    max_images: int | None = field(default=None, metadata={"help": "take a fixed random choice of this many"})
    format: str = field(default="png", metadata={"help": "png, webp (lossless) or jpg (quality 95)"})
    on_bad_file: str = field(default="skip", metadata={"help": "skip leaves bad files out and lists them; or error"})
    workers: int | None = field(default=None, metadata={"help": "processes; null means one for each core"})
    overwrite: bool = field(default=False, metadata={"help": "replace dest where it exists"})


@dataclass(kw_only=True)
class _Outcome:
    """One image, encoded; or why it cannot be."""

    data: bytes = b""
    bad: str = ""
    enlarged: bool = False


@dataclass(kw_only=True)
class PrepareReport:
    """What was written: images, "file: reason" of each bad file, and how many images were enlarged."""

    written: int = 0
    bad: list[str] = field(default_factory=list)
    enlarged: int = 0


def main(options: PrepareOptions) -> PrepareReport:
    """Prepare a zip as the options say, print what was done, and return it.

    dest is written under another name and renamed when complete. Raises LowVRAMError for wrong options, a source
    without a usable image, a dest that exists, and a disk that is full.
    """
    dest = _check(options)
    builtin = options.source == "builtin" and not Path("builtin").exists()
    images = open_dataset(
        None if builtin else options.source,
        resolution=options.resolution,
        labels=options.labels,
        max_images=options.max_images,
    )
    # The name keeps its .zip, so that a leftover of a killed run is known for what it is.
    temporary = dest.with_name(f".{dest.stem}.{os.getpid()}.partial.zip")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        report = _write_zip(images, temporary, options)
        temporary.replace(dest)
    except OSError as error:
        raise LowVRAMError(
            f"{dest} cannot be written: {error.strerror or error}", "Free some space, or choose another dest."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _print_report(report, images, dest)
    return report


def _check(options: PrepareOptions) -> Path:
    dest = Path(options.dest).expanduser()
    if options.format not in _FORMATS:
        raise LowVRAMError(f"format={options.format} is not known", f"Use one of {', '.join(_FORMATS)}.")
    if options.on_bad_file not in ("skip", "error"):
        raise LowVRAMError(f"on_bad_file={options.on_bad_file} is neither skip nor error", "Use one of the two.")
    if options.workers is not None and options.workers < 0:
        raise LowVRAMError(f"workers={options.workers} must not be negative", "0 works in this process.")
    if dest.suffix.lower() != ".zip":
        raise LowVRAMError(f"dest={options.dest} does not end in .zip", f"Use dest={options.dest}.zip.")
    if dest.is_dir():
        raise LowVRAMError(f"dest={options.dest} is a folder", "Give the name of a zip file to write.")
    if dest.exists():
        if dest.samefile(Path(options.source).expanduser()):
            raise LowVRAMError(f"dest={options.dest} is the source itself", "Choose another dest.")
        if not options.overwrite:
            raise LowVRAMError(f"dest={options.dest} exists", "Choose another name, or add overwrite=true.")
    return dest


def _write_zip(images: ImageSet, path: Path, options: PrepareOptions) -> PrepareReport:
    from tqdm import tqdm

    report = PrepareReport()
    labels: list[tuple[str, int]] = []
    outcomes = _encode_all(images, options)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        contextlib.closing(outcomes),
        tqdm(outcomes, total=len(images), unit="image", desc=Path(options.dest).name, disable=None) as progress,
    ):
        for index, outcome in enumerate(progress):
            if outcome.bad and options.on_bad_file == "error":
                raise LowVRAMError(f"in {images.name}, {outcome.bad}", "Remove the file, or set on_bad_file=skip.")
            if outcome.bad:
                report.bad.append(outcome.bad)
                continue
            name = f"{report.written // _PER_FOLDER:05d}/img{report.written:08d}.{options.format}"
            # A fixed date, so that the same images make the same file.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), outcome.data)
            labels.append((name, images.label(index)))
            report.written += 1
            report.enlarged += outcome.enlarged
        if not report.written:
            raise LowVRAMError(
                f"none of the {len(images)} images of {images.name} can be used, the first: {report.bad[0]}",
                "Check that source names a folder or zip of PNG, JPEG or WebP images.",
            )
        if options.labels:
            content = json.dumps({"labels": labels, "class_names": images.class_names})
            archive.writestr(zipfile.ZipInfo("dataset.json", (1980, 1, 1, 0, 0, 0)), content)
    return report


def _encode_all(images: ImageSet, options: PrepareOptions) -> Generator[_Outcome, None, None]:
    """Each image in its order, encoded by `workers` processes."""
    workers = options.workers if options.workers is not None else (os.cpu_count() or 1)
    workers = 0 if workers == 1 or len(images) < 64 else workers
    if workers == 0:
        yield from (_encode(images, options.format, index) for index in range(len(images)))
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(images, options.format))
    try:
        yield from pool.map(_encode_in_worker, range(len(images)), chunksize=8)
    except BrokenProcessPool as error:
        raise LowVRAMError(
            "a worker process died, perhaps for want of memory", "Use fewer with workers=1, or 0."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(images: ImageSet, format_name: str, index: int) -> _Outcome:
    from PIL import Image

    try:
        picture = images.load(index)
    except BadImageError as bad:
        return _Outcome(bad=str(bad))
    buffer = io.BytesIO()
    Image.fromarray(picture.pixels).save(buffer, **_FORMATS[format_name])
    return _Outcome(data=buffer.getvalue(), enlarged=picture.enlarged)


_job: tuple[ImageSet, str] | None = None  # of a worker process: what it works on


def _start_worker(images: ImageSet, format_name: str) -> None:
    global _job
    _job = (images, format_name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers


def _encode_in_worker(index: int) -> _Outcome:
    assert _job is not None
    return _encode(*_job, index)


def _print_report(report: PrepareReport, images: ImageSet, dest: Path) -> None:
    size_mb = dest.stat().st_size / 1e6
    classes = f", {images.num_classes} classes" if images.num_classes else ""
    print(f"{dest}: {report.written} images of {images.resolution}x{images.resolution}{classes}, {size_mb:.1f} MB")
    if report.enlarged:
        print(f"{report.enlarged} images were smaller than {images.resolution}x{images.resolution} and were enlarged")
    for line in report.bad:
        print(f"left out {line}", file=sys.stderr)
    if report.bad:
        print(f"{len(report.bad)} bad files were left out", file=sys.stderr)
