"""How often is the watermark found where it is, and where it is not?

    python -m benchmarks.marks [out=FOLDER] [photos=FOLDER] [parts=unmarked,many,marked,films] [unmarked=40] [many=400]
        [marked=8]

Unmarked pictures, as many of each kind: drawn faces, noise, and squares of photographs (those of a folder, else the
samples that scikit-image ships, where it is installed). `lowvram.marks.watermark.detect` looks for the watermark in
each, at its own size and at the usual ones; in many more (these are the first of them) at their own size alone,
256x256. Chance is also asked more often than there are pictures: the blocks of each are compared with 20,000 random
patterns of as many ones, of which none is in any.

Marked ones, at 256, 512 and 1024 pixels: saved as PNG, JPEG and WebP, scaled down and up, cut, or drawn over, and
looked into as a stranger's file. How much the watermark changes a picture is told in dB.

Films, at 256 and 512 pixels: a walk from face to face, a look that wanders over a photograph; as lowvram writes them
(WebP, MP4), and the MP4 anew at the rates of x264 that others choose (crf 23 and 28; half the size). Unmarked ones of
256 pixels are looked into and compared as pictures are. This part needs the extra video.

FOLDER (outputs/benchmarks/marks) gets marks.json, of the schema of benchmarks.record; of one that is there the points
of other parts stay. Some nine CPU minutes, and as many for the films.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks import record
from lowvram.config import command
from lowvram.data.peeps import render_png
from lowvram.errors import LowVRAMError
from lowvram.marks import frames, watermark
from lowvram.sampling.animation import save_animation

Pixels = NDArray[np.uint8]  # [H, W, 3]
Make = Callable[..., Iterator[Pixels]]  # of so many pictures, of a size

PARTS = ("unmarked", "many", "marked", "films")
SIZES = (256, 512, 1024)
CODINGS = {
    "crf_23": ["-crf", "23"],
    "crf_28": ["-crf", "28"],
    "crf_23_half": ["-crf", "23", "-vf", "scale=iw/2:ih/2"],
}
_FRAMES, _FPS = 24, 12  # of a film
_PATTERNS = 20_000
_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
_PHOTOS += ("camera.png", "coins.png", "brick.png", "grass.png", "gravel.png", "moon.png", "ihc.png", "page.png")
_PHOTOS += ("motorcycle_left.png", "color.png", "text.png", "cell.png")


def _saved(format: str, quality: int) -> Callable[[Pixels], Pixels]:
    def save(pixels: Pixels) -> Pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format, quality=quality)
        return np.asarray(Image.open(buffer).convert("RGB"))

    return save


def _scaled(factor: float) -> Callable[[Pixels], Pixels]:
    def scale(pixels: Pixels) -> Pixels:
        size = round(pixels.shape[1] * factor), round(pixels.shape[0] * factor)
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

    return scale


def _drawn_over(pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).rectangle((0, 0, image.width, image.height // 4), fill=(20, 20, 20))
    return np.asarray(image)


def _cut(pixels: Pixels) -> Pixels:
    edge = pixels.shape[0] // 20
    return np.ascontiguousarray(pixels[edge:-edge, edge:-edge])


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "png": lambda pixels: pixels,
    "jpeg_90": _saved("JPEG", 90),
    "jpeg_75": _saved("JPEG", 75),
    "webp_90": _saved("WEBP", 90),
    "webp_75": _saved("WEBP", 75),
    "half": _scaled(0.5),
    "three_quarters": _scaled(0.75),
    "drawn_over": _drawn_over,
    "cut": _cut,
}


@dataclass(kw_only=True)
class Options:
    """How often the invisible watermark is found where it is, and where it is not."""

    out: str = field(default="outputs/benchmarks/marks", metadata={"help": "the folder to write to"})
    photos: str | None = field(default=None, metadata={"help": "a folder of photographs (scikit-image's samples)"})
    parts: str = field(default="unmarked,many,marked,films", metadata={"help": "some of these"})
    many: int = field(default=400, metadata={"help": "of each kind, looked into at their own size alone"})
    unmarked: int = field(default=40, metadata={"help": "pictures of each kind without a watermark"})
    marked: int = field(default=8, metadata={"help": "of each kind and size with one; half as many at 1024"})


def main(options: Options) -> None:
    """Measure, print and write. Raises LowVRAMError where there is no photograph to measure on."""
    kinds = {"faces": _faces, "noise": _noise, "photos": _photos(options.photos)}
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise LowVRAMError(f"parts={options.parts} is not known.", f"Use some of {','.join(PARTS)}.")
    path = Path(options.out) / "marks.json"
    for point in _points(options, kinds, parts):  # each is kept at once: a run that is ended loses the next one alone
        earlier = record.read(path)["points"] if path.is_file() else []
        record.write(path, [p for p in earlier if p["name"] != point["name"]] + [point], device="cpu")
    print(f"wrote {path}")


def _points(options: Options, kinds: dict[str, Make], parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    if "unmarked" in parts:
        for name, make in kinds.items():
            yield false_alarms(name, ([pixels] for pixels in make(options.unmarked)))
    if "many" in parts:
        yield from (own_size(name, make(options.many)) for name, make in kinds.items())
    for size in SIZES if "marked" in parts else ():
        for name in ("faces", "photos"):
            count = max(1, options.marked // 2 if size == SIZES[-1] else options.marked)
            yield detections(f"{name}_{size}", kinds[name](count, size))
    for name, walk in (("faces", _face_walks), ("photos", partial(_photo_walks, kinds["photos"]))):
        if "films" in parts:
            yield false_alarms(f"films_{name}", _written_films(walk(options.unmarked, 256)))
            for size in SIZES[:2]:
                yield film_detections(f"films_{name}_{size}", walk(options.marked, size))


def false_alarms(name: str, pictures: Iterator[Sequence[Pixels]]) -> dict[str, Any]:
    """The point of pictures, or films by some frames, without a watermark: how many were taken for marked ones."""
    rng = np.random.default_rng(0)
    own = np.array(watermark.pattern())
    others = np.array([rng.permutation(own) for _ in range(_PATTERNS)])
    scores, highest = [], []
    for looked_at in pictures:
        reading = watermark.detect(*looked_at)
        assert reading is not None
        scores.append(reading.score)
        bits = np.mean([watermark.block_bits(pixels) for pixels in looked_at], axis=0)
        highest.append(watermark.agreement(bits, others))
    chance = np.concatenate(highest)
    details = {
        "pictures": len(scores),
        "found": sum(score >= watermark.THRESHOLD for score in scores),
        "threshold": watermark.THRESHOLD,
        "highest": round(max(scores), 3),
        "random_patterns": len(chance),
        "random_found": int((chance >= watermark.THRESHOLD).sum()),
        "random_highest": round(float(chance.max()), 3),
    }
    print(f"unmarked {name}: {details}", flush=True)
    return record.point("marks", f"unmarked_{name}", details=details)


def own_size(name: str, pictures: Iterator[Pixels]) -> dict[str, Any]:
    """The point of pictures without a watermark that are looked into as they are."""
    scores = [watermark.score(pixels) for pixels in pictures]
    details = {
        "pictures": len(scores),
        "found": sum(score >= watermark.THRESHOLD for score in scores),
        "threshold": watermark.THRESHOLD,
        "highest": round(max(scores), 3),
    }
    print(f"many unmarked {name}: {details}", flush=True)
    return record.point("marks", f"many_unmarked_{name}", details=details)


def detections(name: str, pictures: Iterator[Pixels]) -> dict[str, Any]:
    """The point of marked pictures: the share that is found after each change, and the lowest score."""
    found: dict[str, list[float]] = {change: [] for change in CHANGES}
    noise = []
    for pixels in pictures:
        marked = watermark.embed(pixels)
        error = float(((marked.astype(np.float64) - pixels) ** 2).mean())
        noise.append(10 * np.log10(255**2 / max(error, 1e-9)))
        for change, apply in CHANGES.items():
            reading = watermark.detect(apply(marked))
            found[change].append(0.0 if reading is None else reading.score)
    details: dict[str, Any] = {"pictures": len(noise), "psnr_db": round(float(np.mean(noise)), 1)}
    for change, scores in found.items():
        share = sum(score >= watermark.THRESHOLD for score in scores) / len(scores)
        details[change] = {"found": round(share, 3), "lowest": round(min(scores), 2)}
    print(f"marked {name}: {details}", flush=True)
    return record.point("marks", f"marked_{name}", details=details)


def film_detections(name: str, films: Iterator[list[Pixels]]) -> dict[str, Any]:
    """The point of marked films: the share that is found after each way to write them, and the lowest score."""
    found: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        for walk in films:
            marked = [watermark.embed(pixels) for pixels in walk]
            for change, path in _ways(marked, Path(folder)):
                reading = watermark.detect(*_looked_at(path))
                found.setdefault(change, []).append(0.0 if reading is None else reading.score)
    details: dict[str, Any] = {"films": len(found["mp4"])}
    for change, scores in found.items():
        share = sum(score >= watermark.THRESHOLD for score in scores) / len(scores)
        details[change] = {"found": round(share, 3), "lowest": round(min(scores), 2)}
    print(f"marked {name}: {details}", flush=True)
    return record.point("marks", f"marked_{name}", details=details)


def _written_films(films: Iterator[list[Pixels]]) -> Iterator[list[Pixels]]:
    """What is looked at of films without a watermark that were written as MP4."""
    with TemporaryDirectory() as folder:
        for walk in films:
            _write_film(walk, Path(folder, "film.mp4"))
            yield _looked_at(Path(folder, "film.mp4"))


def _ways(walk: list[Pixels], folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of a film as lowvram writes it, and as others may write it anew."""
    import imageio.v2 as imageio

    for format in ("webp", "mp4"):
        _write_film(walk, folder / f"film.{format}")
        yield format, folder / f"film.{format}"
    for name, arguments in CODINGS.items():
        writer = imageio.get_writer(
            folder / "anew.mp4",
            format="FFMPEG", fps=_FPS, codec="libx264", quality=None, macro_block_size=2, output_params=arguments,
        )  # fmt: skip
        with imageio.get_reader(folder / "film.mp4", format="FFMPEG") as reader, writer:
            for frame in reader:
                writer.append_data(frame)
        yield name, folder / "anew.mp4"


def _write_film(walk: list[Pixels], path: Path) -> None:
    tensors = (torch.from_numpy(pixels).permute(2, 0, 1) for pixels in walk)
    save_animation(tensors, path, format=path.suffix[1:], fps=_FPS)


def _looked_at(path: Path) -> list[Pixels]:
    if path.suffix == ".mp4":
        return frames.of_mp4(path)
    with Image.open(path) as image:
        return frames.of_image(image)


def _face_walks(count: int, size: int) -> Iterator[list[Pixels]]:
    """From each face to the next."""
    faces = list(_faces(count + 1, size))
    for one, other in pairwise(faces):
        parts = np.linspace(0, 1, _FRAMES)
        yield [(one * (1 - part) + other * part).round().astype(np.uint8) for part in parts]


def _photo_walks(photos: Make, count: int, size: int) -> Iterator[list[Pixels]]:
    """Down and to the right over a photograph that is a quarter larger."""
    for photo in photos(count, size + size // 4):
        starts = [index * (size // 4) // _FRAMES for index in range(_FRAMES)]
        yield [np.ascontiguousarray(photo[at : at + size, at : at + size]) for at in starts]


def _faces(count: int, size: int = 256) -> Iterator[Pixels]:
    for index in range(count):
        yield np.asarray(Image.open(io.BytesIO(render_png(index, size))).convert("RGB"))


def _noise(count: int, size: int = 256) -> Iterator[Pixels]:
    """By turns white and, scaled up from fewer pixels, smooth."""
    rng = np.random.default_rng(1)
    for index in range(count):
        side = size >> index % 4
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        yield np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _photos(folder: str | None) -> Callable[..., Iterator[Pixels]]:
    paths = _photo_paths(folder)

    def squares(count: int, size: int = 256) -> Iterator[Pixels]:
        """Squares at random of each photograph in turn, half as large as it at least."""
        rng = np.random.default_rng(2)
        for index in range(count):
            with Image.open(paths[index % len(paths)]) as image:
                side = int(min(image.size) * rng.uniform(0.5, 1.0)) if index >= len(paths) else min(image.size)
                left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
                square = image.convert("RGB").crop((left, top, left + side, top + side))
            yield np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))

    return squares


def _photo_paths(folder: str | None) -> Sequence[Path]:
    if folder is not None:
        found = sorted(p for p in Path(folder).expanduser().iterdir() if p.suffix.lower() in (".jpg", ".png", ".webp"))
    else:
        try:
            import skimage
        except ImportError as error:
            raise LowVRAMError(
                "there are no photographs to measure on.", "Give photos=FOLDER, or pip install scikit-image."
            ) from error
        data = Path(skimage.__file__).parent / "data"
        found = [data / name for name in _PHOTOS if (data / name).is_file()]
    if not found:
        raise LowVRAMError(f"photos={folder} holds no photograph.", "Give a folder of JPEG, PNG or WebP files.")
    return found


if __name__ == "__main__":
    command(Options, main, "benchmarks.marks")
