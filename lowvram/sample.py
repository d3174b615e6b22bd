"""`python -m lowvram.sample run=FOLDER`: images of a trained run, or of weights, as files or a looping animation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowvram.config import command
from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from torch import Tensor

    from lowvram.marks.mark import Mark
    from lowvram.settings.base import MarkSettings

Result = TypeVar("Result")

_GRID_PIXELS = 8192  # a side of grid.png at most
_WALK_PIXELS = 512  # about the side of an animation, unless n is given
_MOST_WALKS = 16


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class SampleOptions:
    """Write what a trained run makes: one PNG for each image and grid.png, or with interpolate=true a looping walk."""

    run: str | None = field(default=None, metadata=_help("the run folder that training wrote"))
    weights: str | None = field(
        default=None,
        metadata=_help("in place of run: published weights, or what convert wrote; several, with |"),
    )
    base: str | None = field(
        default=None, metadata=_help("Stable Diffusion: the weights that a LoRA, a word or a run stands on")
    )
    scale: str | None = field(
        default=None, metadata=_help("with weights: how much a LoRA counts (1); for several 0.8|0.5, in their order")
    )
    predict: str | None = field(
        default=None, metadata=_help("with weights: what a Stable Diffusion 2.x predicts, eps or v (as its file says)")
    )
    vram: str | None = field(default=None, metadata=_help("memory of the card, such as 6GB (what the card has)"))
    n: int | None = field(default=None, metadata=_help("images (16); with interpolate, walks side by side"))
    seed: int = field(default=0, metadata=_help("image i depends on the seed and i alone"))
    out: str | None = field(default=None, metadata=_help("folder to write to (samples in RUN or in outputs/WEIGHTS)"))
    truncation: float | None = field(
        default=None, metadata=_help("StyleGAN2: 1 for full variety, 0.7 for safer images, 0 for the average")
    )
    noise: str | None = field(default=None, metadata=_help("StyleGAN2, FastGAN: const, random or none"))
    prompt: str | None = field(default=None, metadata=_help("text; several, in turn, with | between them"))
    negative: str | None = field(default=None, metadata=_help("text that guidance leads away from"))
    size: str | None = field(default=None, metadata=_help("diffusion: width x height, such as 768x512"))
    classes: str | None = field(default=None, metadata=_help("numbers or names, such as 3 or red,blue (all in turn)"))
    steps: int | None = field(default=None, metadata=_help("diffusion: of the sampler (as the recipe says)"))
    sampler: str | None = field(
        default=None, metadata=_help("diffusion: euler, heun, dpmpp_2m, ddim or euler_ancestral")
    )
    spacing: str | None = field(default=None, metadata=_help("diffusion: of the steps: karras, uniform or trailing"))
    guidance: float | None = field(
        default=None, metadata=_help("diffusion: 1 as trained, above: more of the condition")
    )
    init: str | None = field(default=None, metadata=_help("diffusion: an image to make variations of"))
    strength: float | None = field(default=None, metadata=_help("how much of init is changed: 0.6, or 1 with a mask"))
    mask: str | None = field(default=None, metadata=_help("an image of init's size, white where it is made anew"))
    checkpoint: str = field(default="latest", metadata=_help("a step's number, or latest"))
    device: str = field(default="auto", metadata=_help("auto, cpu, cuda or cuda:N"))
    micro_batch: int | None = field(default=None, metadata=_help("images at a time (as the run's memory allows)"))
    interpolate: bool = field(default=False, metadata=_help("write a looping walk through the latent space"))
    format: str | None = field(
        default=None, metadata=_help("of images png, jpg or webp (png); of the animation webp or mp4 (webp)")
    )
    quality: int | None = field(default=None, metadata=_help("of jpg (95) and webp (95, the animation 90): 1 to 100"))
    seconds: float = field(default=8.0, metadata=_help("length of the animation"))
    fps: int = field(default=24, metadata=_help("frames a second"))
    mark: bool | None = field(
        default=None,
        metadata=_help(
            "false: files say nothing of where they come from; true: recipe, checkpoint, seed and that a model made "
            "them, but no prompt (as the run says: true)"
        ),
    )
    watermark: bool | None = field(
        default=None, metadata=_help("also an invisible mark in the pixels, 256x256 or more (as the run says: false)")
    )
    certificate: str | None = field(
        default=None, metadata=_help("also sign each file (C2PA) with your own PEM certificate chain (as the run says)")
    )
    key: str | None = field(default=None, metadata=_help("the certificate's key, as PEM"))

    def __post_init__(self) -> None:
        if (self.run is None) == (self.weights is None):
            raise LowVRAMError(
                "sample needs a run or weights, one of them.", "Write run=outputs/faces32, or weights=stylegan2.pkl."
            )
        for name in ("scale", "predict"):
            if self.run is not None and getattr(self, name) is not None:
                raise LowVRAMError(f"{name}={getattr(self, name)} is for weights, not for a run.", "Leave it out.")
        if self.predict not in (None, "eps", "v"):
            raise LowVRAMError(f"predict={self.predict} is not known.", "Use eps or v.")
        for name in ("n", "micro_batch", "fps", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LowVRAMError(f"{name}={value} is too small.", "Use 1 or more.")
        if not 0 < self.seconds <= 3600:
            raise LowVRAMError(f"seconds={self.seconds} is no length for an animation.", "Use 8, or up to 3600.")
        if self.truncation is not None and not -10 <= self.truncation <= 10:
            raise LowVRAMError(f"truncation={self.truncation} is out of range.", "Use a value from 0 to 1.")
        if self.noise not in (None, "const", "random", "none"):
            raise LowVRAMError(f"noise={self.noise} is not known.", "Use one of const, random, none.")
        known = ("webp", "mp4") if self.interpolate else ("png", "jpg", "webp")
        if self.format is not None and self.format not in known:
            what = "with interpolate=true " if self.interpolate else ""
            raise LowVRAMError(f"format={self.format} {what}is not known.", f"Use one of {', '.join(known)}.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise LowVRAMError(f"quality={self.quality} is out of range.", "Use a value from 1 to 100.")
        if (self.certificate is None) != (self.key is None):
            raise LowVRAMError(
                f"certificate={self.certificate} and key={self.key}: a signature needs both.",
                "Give certificate=chain.pem key=key.pem.",
            )
        if self.mark is False and (self.watermark or self.certificate is not None):
            raise LowVRAMError("mark=false stands against a watermark or a certificate.", "Leave one of them out.")
        if self.quality is not None and self.format in ((None, "png"), ("mp4",))[self.interpolate]:
            raise LowVRAMError(f"quality={self.quality} is for jpg and webp.", "Leave it out, or add format=jpg.")


def main(options: SampleOptions) -> None:
    """Sample a run. Raises LowVRAMError for what is missing, unknown or in the way."""
    from lowvram.run import Run
    from lowvram.tasks import load_run, load_weights

    _check_out(options.out)
    with ExitStack() as stack:
        place = _place(options, stack)
        if options.weights is not None:
            run, found = Path("outputs") / Path(options.weights.split("|")[0]).stem, None
            task = load_weights(
                options.weights,
                device=options.device,
                base=options.base,
                scale=options.scale,
                predict=options.predict,
                place=place,
            )
        else:
            run = Path(options.run or "").expanduser()
            found = Run.open(run).find_checkpoint(options.checkpoint)
            step = found.name.removeprefix("step-")
            task = load_run(run, checkpoint=step, device=options.device, base=options.base, place=place)
        path = _written(options, task, run, _mark(options, task, found))
    print(f"lowvram: wrote {path}")


def _place(options: SampleOptions, stack: ExitStack) -> Callable[[Any, Any], Any]:
    """Cap the card; what brings networks there, whole if that leaves room, else block by block.

    stack: what they need is held until it closes.
    """
    from lowvram.memory.guard import cap
    from lowvram.memory.sampling import place_within
    from lowvram.settings import parse_bytes
    from lowvram.tasks import pick_device

    vram_bytes = None if options.vram is None else parse_bytes("vram", options.vram)
    capped = cap(vram_bytes, pick_device(options.device))
    for message in capped.messages:
        print(f"lowvram: {message}")

    return partial(place_within, capped, stack)


def _mark(options: SampleOptions, task: Any, checkpoint: Path | None) -> Mark | None:
    """What the files say of where they come from: as the options have it, or else the run. checkpoint: of a run."""
    from lowvram.marks.mark import make_mark
    from lowvram.marks.origin import COMPOSITE
    from lowvram.marks.runs import origin_of_run, origin_of_weights
    from lowvram.settings.base import MarkSettings

    saved = MarkSettings() if checkpoint is None else task.settings.mark
    if options.mark is False:  # also of a run that was trained to sign: that is what off means
        saved = MarkSettings(enabled=False)
    elif options.mark:
        saved = replace(saved, enabled=True)
    saved = _without_lost_key(saved, options)
    named: dict[str, Any] = {"watermark": options.watermark, "certificate": options.certificate, "key": options.key}
    settings = replace(saved, **{name: value for name, value in named.items() if value is not None})
    if not settings.enabled:
        return None
    if checkpoint is not None:
        origin = origin_of_run(task.settings, task.sampling_networks, checkpoint)
    else:
        origin = origin_of_weights((options.weights or "").split("|"), options.base)
    init = None if options.init is None else Path(options.init).expanduser()
    if init is not None:
        origin = replace(origin, source=COMPOSITE)
    return make_mark(settings, replace(origin, seed=options.seed), init)


def _without_lost_key(saved: MarkSettings, options: SampleOptions) -> MarkSettings:
    """What the run says of marks, without its certificate where that is on another machine."""
    paths = [Path(path).expanduser() for path in (saved.certificate, saved.key) if path is not None]
    if not saved.enabled or options.certificate or options.key or all(path.is_file() for path in paths):
        return saved
    print(f"lowvram: {paths[0]}, by which the run signs, or its key is not here: these images are not signed")
    return replace(saved, certificate=None, key=None)


def _written(options: SampleOptions, task: Any, run: Path, mark: Mark | None) -> str:
    chosen = named_options(options, task)
    write = animate if options.interpolate else images
    try:
        return write(options, task, run, chosen, mark)
    except OSError as error:
        raise LowVRAMError(
            f"the samples can't be written: {error}", "Free some space, or choose another out=FOLDER."
        ) from error


def named_options(options: SampleOptions, task: Any) -> dict[str, Any]:
    """What was asked of the sampling, under the names that `task.sample` has for it.

    Raises:
        LowVRAMError: an option that this kind of run knows nothing of.
    """
    names = {"truncation": "truncation_psi", "noise": "noise_mode", "prompt": "prompts"}
    asked: tuple[str, ...] = ("truncation", "noise", "prompt", "classes", "steps", "sampler", "spacing", "guidance")
    asked += ("negative", "size", "init", "strength", "mask")
    chosen = {name: getattr(options, name) for name in asked}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name in chosen:
        if names.get(name, name) not in task.sample_options:
            known = ", ".join(given for given in asked if names.get(given, given) in task.sample_options)
            raise LowVRAMError(
                f"{name} is nothing that a run of {task.settings.task} knows.", f"It knows {known or 'none'}."
            )
    if "classes" in chosen:
        chosen["classes"] = pick_classes(options.classes, task)
    if options.prompt is not None:
        chosen["prompt"] = [text.strip() for text in options.prompt.split("|")]
    if options.size is not None:
        chosen["size"] = _parsed_size(options.size)
    chosen |= _pictures(options, task)
    return {names.get(name, name): value for name, value in chosen.items()}


def _parsed_size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    if not by or not width.strip().isdigit() or not height.strip().isdigit():
        raise LowVRAMError(f"size={text} is no size.", "Write width x height, such as size=768x512.")
    return int(width), int(height)


def _pictures(options: SampleOptions, task: Any) -> dict[str, Any]:
    """The images of init and mask, uint8 [3, R, R] and [1, R, R]: their centre square at the run's resolution."""
    import torch

    from lowvram.data.dataset import BadImageError
    from lowvram.data.decode import decode_square
    from lowvram.data.images import upright_size

    sizes, read = {}, {}
    for name in ("init", "mask"):
        path = getattr(options, name)
        if path is None:
            continue
        try:
            data = Path(path).expanduser().read_bytes()
            sizes[name] = upright_size(io.BytesIO(data), path)
            pixels = decode_square(data, file=path, resolution=task.settings.resolution).pixels
        except (OSError, BadImageError) as error:
            raise LowVRAMError(f"{name}={path} can't be read: {error}.", "Give a PNG, JPEG or WebP image.") from error
        read[name] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    if len(sizes) == 2 and sizes["init"] != sizes["mask"]:
        raise LowVRAMError(
            "mask is {}x{} pixels and init {}x{}.".format(*sizes["mask"], *sizes["init"]),
            "Give a mask of the size of the image.",
        )
    if "mask" in read:
        read["mask"] = read["mask"][:1]
    return read


def images(options: SampleOptions, task: Any, run: Path, chosen: dict[str, Any], mark: Mark | None = None) -> str:
    """Write n images, each as it is made, and a grid of as many as fit. Returns what was written, in words."""
    import torch

    from lowvram.bars import bar
    from lowvram.sampling.grids import QUALITY, save_grid, save_image

    n = 16 if options.n is None else options.n
    digits = max(5, len(str(n - 1)))
    format = options.format or "png"
    how: dict[str, Any] = {"format": format, "quality": options.quality or QUALITY}
    names = [f"seed{options.seed:04d}_{i:0{digits}d}.{format}" for i in range(n)]
    grid = f"grid.{format}"
    resolution = task.settings.resolution
    if mark is not None:
        mark.check(*chosen.get("size", (resolution, resolution)))
    most = max(1, _GRID_PIXELS // resolution) ** 2
    shown: list[Tensor] = []
    batches = sample_batches(
        task,
        n,
        options.seed,
        batch=min(16, options.micro_batch or 16),
        micro_batch=options.micro_batch,
        **chosen,
    )
    first = next(batches)  # before the folder is made, so that a refused option leaves nothing behind
    out = _make_out(options.out, run, [*names, grid])
    done = 0
    with bar(n, "samples", "img") as progress:
        for batch in _chain(first, batches):
            for image in batch:
                save_image(image, out / names[done], mark=mark and mark.of(index=done), **how)
                done += 1
            shown.append(batch[: max(0, most - (done - len(batch)))])
            progress.update(len(batch))
    save_grid(torch.cat(shown), out / grid, mark=mark and mark.of(images=min(n, most)), **how)
    limited = f" (the first {most:,})" if n > most else ""
    return f"{n:,} images and {grid}{limited} to {out}"


def animate(options: SampleOptions, task: Any, run: Path, chosen: dict[str, Any], mark: Mark | None = None) -> str:
    """Write a looping walk. Returns what was written, in words."""
    from lowvram.bars import bar
    from lowvram.sampling.animation import QUALITY, check_animation, save_animation
    from lowvram.sampling.grids import grid_shape

    resolution = task.settings.resolution
    rows, cols = grid_shape(options.n or min(_MOST_WALKS, max(1, _WALK_PIXELS // resolution) ** 2))
    keyframes = max(2, round(options.seconds))  # a new face each second
    per_keyframe = max(1, round(options.seconds * options.fps / keyframes))
    total = keyframes * per_keyframe
    format = options.format or "webp"
    check_animation(format, total, rows * resolution, cols * resolution)
    if mark is not None:
        mark = mark.of(images=rows * cols)
        mark.check(cols * resolution, rows * resolution)
    frames = all_frames(
        task,
        options.seed,
        walks=rows * cols,
        micro_batch=options.micro_batch,
        keyframes=keyframes,
        frames_per_keyframe=per_keyframe,
        rows=rows,
        cols=cols,
        **chosen,
    )
    name = f"interpolation_seed{options.seed:04d}.{format}"
    out = _make_out(options.out, run, [name])
    with bar(total, "frames", "frame") as progress:
        how: dict[str, Any] = {"format": format, "quality": options.quality or QUALITY, "mark": mark}
        save_animation(_counted(frames, progress), out / name, fps=total / options.seconds, **how)
    return f"{total} frames of {rows}x{cols} walks, {options.seconds:g} s, to {out / name}"


def sample_batches(
    task: Any, n: int, seed: int, *, batch: int, micro_batch: int | None = None, **options: Any
) -> Iterator[Tensor]:
    """Images 0 ... n - 1 of a task, in uint8 batches [batch, C, R, R]; fewer at a time once memory runs out."""
    from lowvram.bars import say
    from lowvram.memory.recovery import halving

    size = micro_batch  # None: as the task thinks best

    def some(smaller: int | None, start: int, count: int) -> Tensor:
        nonlocal size
        size = smaller or size
        images: Tensor = task.sample(count, seed, start=start, micro_batch=size, **options)
        return images

    for start in range(0, n, batch):
        count = min(batch, n - start)
        yield halving(partial(some, start=start, count=count), min(size or count, count), task.device, say, "sampling")


def all_frames(task: Any, seed: int, *, walks: int, micro_batch: int | None, **options: Any) -> Iterator[Tensor]:
    """The frames of `task.interpolate`, which is called at once; fewer images at a time once memory runs out.

    Frames can't be begun in the middle: those that were shown are made again, unseen. Most often it is the first one
    that fails.
    """
    from lowvram.bars import say
    from lowvram.memory.recovery import halving

    size, shown = micro_batch, 0  # size None: as the task thinks best
    frames: Iterator[Tensor] = iter(())

    def begin(smaller: int | None) -> None:
        nonlocal size, frames
        size = smaller or size
        frames = task.interpolate(seed, **options, **({"micro_batch": size} if size else {}))
        frames = islice(frames, shown, None)

    def next_frame(smaller: int | None) -> Tensor | None:
        if smaller is not None:
            begin(smaller)
        return next(frames, None)

    def rest() -> Iterator[Tensor]:
        nonlocal shown
        while (frame := sliced(next_frame)) is not None:
            yield frame
            shown += 1

    def sliced(run: Callable[[int | None], Result]) -> Result:
        return halving(run, min(size or walks, walks), task.device, say, "the animation")

    sliced(begin)
    return rest()


def pick_classes(text: str | None, task: Any) -> list[int] | None:
    """Classes as given on the command line: numbers, or names of the run's data set, with commas between them."""
    if text is None:
        return None
    words = [word.strip(" '\"") for word in text.split(",") if word.strip()]
    if not words:
        raise LowVRAMError(f"classes={text} names no class.", "Give numbers or names, or leave classes out.")
    if all(word.lstrip("-").isdigit() for word in words):
        return [int(word) for word in words]
    names = list(task.dataset().class_names)
    for word in words:
        if word not in names and not word.isdigit():
            known = f"Known: {', '.join(names)}." if names else "This run has no class names: leave classes out."
            raise LowVRAMError(f"class {word} is not known.", known)
    return [names.index(word) if word in names else int(word) for word in words]


def _check_out(out: str | None) -> None:
    if out is not None and Path(out).expanduser().exists() and not Path(out).expanduser().is_dir():
        raise LowVRAMError(f"out={out} is a file.", "Give a folder.")


def _make_out(out: str | None, run: Path, names: list[str]) -> Path:
    """The folder to write to. Nothing that is there is overwritten."""
    if out is None:
        number, folder = 1, run / "samples"
        while folder.exists():
            number += 1
            folder = run / f"samples-{number}"
    else:
        folder = Path(out).expanduser()
        there = next((name for name in names if (folder / name).exists()), None)
        if there is not None:
            raise LowVRAMError(f"out={out} holds {there} already.", "Remove it, or choose another out=FOLDER.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LowVRAMError(f"out={folder} can't be made: {error.strerror}.", "Choose another out=FOLDER.") from error
    return folder


def _counted(frames: Iterator[Tensor], progress: Any) -> Iterator[Tensor]:
    for frame in frames:
        yield frame
        progress.update()


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


if __name__ == "__main__":
    command(SampleOptions, main, "sample")
