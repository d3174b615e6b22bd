"""Every metric in one pass over the generated images, and the same between two halves of the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.bars import bar
from lowvram.errors import LowVRAMError
from lowvram.metrics.features import (
    INCEPTION_FILES,
    EfficientNetLite0,
    FeatureExtractor,
    InceptionV3,
    RandomConv,
    find_inception,
)
from lowvram.metrics.frechet import frechet_distance
from lowvram.metrics.precision_recall import precision_recall
from lowvram.metrics.real import (
    FeatureSummary,
    Halves,
    Images,
    read_statistics,
    real_batches,
    statistics_path,
    write_statistics,
)
from lowvram.metrics.sliced_wasserstein import PatchDescriptors, sliced_wasserstein

METRICS = ("frechet", "precision_recall", "swd", "fid")
BACKBONES = ("efficientnet_lite0", "random_conv")  # whose features frechet and precision_recall are of
FEWEST_IMAGES = 8  # so that each half has more than the neighbours of precision and recall
# Precision and recall need each image's features and all distances between them: 51 MB, and seconds, for this many.
PRECISION_RECALL_IMAGES = 10_000
SWD_IMAGES = 2_048
_BATCH_BYTES = 2**24

InSlices = Callable[[Callable[[int | None], Tensor], int, str], Tensor]


@dataclass(kw_only=True)
class Evaluation:
    """What was measured.

    values: by metric; lower is closer, but for precision and recall (0 to 1), where higher is better.
    floor: the same between two halves of the real images, floor_images each: no generator is closer to the data than
        the data are to themselves.
    not_computed: the metrics that could not be taken, with the reason and the remedy.
    notes: what to know before comparing the values with others.
    """

    values: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    generated_images: int
    real_images: int
    floor_images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Lines to print."""
        width = max(map(len, [*self.values, *self.not_computed, "metric"])) + 2
        lines = [f"  {'metric':<{width}}{'generated':>12}" + ("   real halves" if self.floor else "")]
        for name, value in self.values.items():
            floor = f"{self.floor[name]:>14.4g}" if name in self.floor else ""
            lines.append(f"  {name:<{width}}{value:>12.4g}{floor}")
        lines += [f"  {name:<{width}}not computed: {reason}" for name, reason in self.not_computed.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_counts(n: int, real: Images) -> None:
    """Raise LowVRAMError where there are too few images to measure anything."""
    if n < FEWEST_IMAGES:
        raise LowVRAMError(
            f"n={n} images are too few to measure.", f"Use {FEWEST_IMAGES} or more, better 1,000 or more."
        )
    if len(real) < FEWEST_IMAGES:
        raise LowVRAMError(
            f"{real.name} has {len(real)} images, too few to measure.", f"Give it {FEWEST_IMAGES} or more."
        )


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The names, if all are known."""
    return _known("metrics", names, METRICS)


def check_backbones(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, if all are known."""
    return tuple(dict.fromkeys(_known("backbone", names, BACKBONES)))


def _known(option: str, names: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(names)
    for name in names:
        if name not in known:
            raise LowVRAMError(f"{option}={name} is not known.", f"Use some of {', '.join(known)}.")
    if not names:
        raise LowVRAMError(f"{option} names nothing to measure.", f"Use some of {', '.join(known)}.")
    return names


def evaluate_images(
    generated: Iterable[Tensor],
    real: Images,
    *,
    n: int,
    metrics: Iterable[str] = METRICS,
    floor: bool = True,
    mirror: bool = False,
    backbones: Iterable[str] = BACKBONES[:1],
    feature_size: int = 224,
    inception: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    in_slices: InSlices | None = None,
) -> Evaluation:
    """Compare n generated images with up to n of the real ones. No more than a batch of either is held.

    Args:
        generated: uint8 batches [B, 3, R, R], n images or more together.
        real: a data set; which of its images are used is fixed, and their statistics are kept on disk.
        metrics: some of METRICS.
        floor: also measure between two halves of the real images.
        mirror: compare with mirrored real images too, as a generator trained with mirroring should.
        backbones: some of BACKBONES. frechet and precision_recall are taken of each, with its name in theirs.
        feature_size: pixels that images are resized to for EfficientNet-Lite0; another size is another metric.
        inception: the weights for FID; otherwise torch hub's cache is looked at. Never downloaded.
        device: where features are computed. workers: processes that read real images.
        in_slices: calls what it is given with None, or when memory runs out with the number of images to take at a
            time, of the number given next. None: memory must suffice.

    Raises:
        LowVRAMError: an unknown metric or backbone, too few images, inception is no file or another network's.
    """
    wanted, judges = check_metrics(metrics), check_backbones(backbones)
    check_counts(n, real)
    n_real = min(n, len(real))
    result = Evaluation(generated_images=n, real_images=n_real, floor_images=n_real // 2)
    extractors = _extractors(wanted, judges, feature_size, inception, device, result)
    if not extractors and "swd" not in wanted:
        return result  # only FID was asked for, and can't be had
    if in_slices is not None:
        extractors = [_Sliced(extractor, in_slices) for extractor in extractors]
    keep = {e.name: PRECISION_RECALL_IMAGES if e.name != "inception" else 0 for e in extractors}
    batch = batch_size(real.resolution)

    fake_patches, real_patches = (PatchDescriptors(SWD_IMAGES if "swd" in wanted else 0) for _ in range(2))
    halves = _real(real, extractors, keep, n_real, real_patches, mirror, batch, workers, progress)
    fakes = {e.name: FeatureSummary(e.dim, keep[e.name]) for e in extractors}
    for images in _shown(_first(generated, n), n, "generated images", progress):
        for extractor in extractors:
            fakes[extractor.name].update(extractor(images))
        fake_patches.update(images)

    measures = [m for e in extractors for m in _feature_measures(e.name, wanted, fakes[e.name], halves[e.name], floor)]
    if "swd" in wanted:
        measures += _patch_measures(fake_patches, real_patches, floor)
    with bar(len(measures), "distances", "metric", shown=progress) as shown:
        for measure in measures:
            values, floors = measure()
            result.values |= values
            result.floor |= floors
            shown.update()
    if "swd" in wanted:
        _add_mean(result.values)
        _add_mean(result.floor)
    _add_notes(result, extractors, min(fake_patches.count, real_patches.count) if "swd" in wanted else None)
    return result


def batch_size(resolution: int) -> int:
    """Images at a time: up to 50, and up to 16 MB."""
    return max(1, min(50, _BATCH_BYTES // (3 * resolution**2)))


class _Sliced:
    """An extractor that goes on with fewer images at a time when memory runs out."""

    def __init__(self, extractor: FeatureExtractor, in_slices: InSlices) -> None:
        self.name, self.version, self.dim = extractor.name, extractor.version, extractor.dim
        self._extractor, self._in_slices = extractor, in_slices
        self._size: int | None = None  # None: all

    def __call__(self, images: Tensor) -> Tensor:
        def run(smaller: int | None) -> Tensor:
            self._size = smaller or self._size
            return torch.cat([self._extractor(part) for part in images.split(self._size or len(images))])

        return self._in_slices(run, min(self._size or len(images), len(images)), "taking features")


Measured = tuple[dict[str, float], dict[str, float]]  # values, floors


def _extractors(
    wanted: tuple[str, ...],
    backbones: tuple[str, ...],
    feature_size: int,
    inception: str | None,
    device: torch.device | str,
    result: Evaluation,
) -> list[FeatureExtractor]:
    extractors: list[FeatureExtractor] = []
    weights = find_inception(inception) if "fid" in wanted else None
    if "frechet" in wanted or "precision_recall" in wanted:
        if "efficientnet_lite0" in backbones:
            extractors.append(EfficientNetLite0(device, feature_size))
        if "random_conv" in backbones:
            extractors.append(RandomConv(device))
    if weights is not None:
        extractor = InceptionV3(weights, device)
        extractors.append(extractor)
        if not extractor.is_published:
            result.notes.append(f"{weights.name} is not the file that FID is defined by: compare fid with care.")
    elif "fid" in wanted:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        result.not_computed["fid"] = (
            f"the weights of Inception are not at hand. Put {INCEPTION_FILES[0]} (published with torch-fidelity 0.2) "
            f"in {folder}, or give inception=PATH."
        )
    return extractors


def _real(
    real: Images,
    extractors: list[FeatureExtractor],
    keep: dict[str, int],
    n: int,
    descriptors: PatchDescriptors,
    mirror: bool,
    batch: int,
    workers: int,
    progress: bool,
) -> dict[str, Halves]:
    """Statistics of the real images by extractor, as kept or taken now; and their patches, which are cheap."""
    known: dict[str, Halves] = {}
    paths = {e.name: statistics_path(real, e, n, keep[e.name], mirror=mirror) for e in extractors}
    for extractor in extractors:
        kept = read_statistics(paths[extractor.name], extractor.dim, n, keep[extractor.name])
        if kept is not None:
            known[extractor.name] = kept
    missing = [e for e in extractors if e.name not in known]
    taken = {e.name: Halves(e.dim, keep[e.name]) for e in missing}
    needed = n if missing else min(n, descriptors.limit)
    if needed:
        batches = real_batches(real, needed, mirror=mirror, batch=batch, workers=workers)
        for images in _shown(batches, needed, "real images", progress):
            for extractor in missing:
                taken[extractor.name].update(extractor(images))
            descriptors.update(images)
    for name, halves in taken.items():
        write_statistics(paths[name], halves)
    return known | taken


def _feature_measures(
    name: str, wanted: tuple[str, ...], fake: FeatureSummary, real: Halves, floor: bool
) -> Iterator[Callable[[], Measured]]:
    metric = "fid" if name == "inception" else f"frechet_{name}"
    first, second = real.parts

    def frechet() -> Measured:
        value = {metric: frechet_distance(fake.gaussian, real.gaussian)}
        return value, {metric: frechet_distance(first.gaussian, second.gaussian)} if floor else {}

    def neighbours() -> Measured:
        names = (f"precision_{name}", f"recall_{name}")
        count = min(len(fake.features), len(real.features))
        values = precision_recall(fake.features[:count], real.features[:count])
        floors = precision_recall(first.features, second.features) if floor else ()
        return dict(zip(names, values, strict=True)), dict(zip(names, floors, strict=False))

    if metric == "fid" or "frechet" in wanted:
        yield frechet
    if metric != "fid" and "precision_recall" in wanted:
        yield neighbours


def _patch_measures(fake: PatchDescriptors, real: PatchDescriptors, floor: bool) -> Iterator[Callable[[], Measured]]:
    fakes, reals = fake.levels(), real.levels()

    def at(resolution: int) -> Measured:
        key, level = f"swd_{resolution}", reals[resolution]
        value = {key: sliced_wasserstein(fakes[resolution], level)}
        return value, {key: sliced_wasserstein(level[0::2], level[1::2])} if floor else {}

    for resolution in reals:
        yield lambda resolution=resolution: at(resolution)  # type: ignore[misc]


def _add_mean(values: dict[str, float]) -> None:
    levels = [value for name, value in values.items() if name.startswith("swd_")]
    if levels:
        values["swd_mean"] = sum(levels) / len(levels)


def _add_notes(result: Evaluation, extractors: list[FeatureExtractor], swd_images: int | None) -> None:
    fewest = min(result.generated_images, result.real_images)
    for extractor in extractors:
        if fewest < 2 * extractor.dim:
            result.notes.append(
                f"{fewest:,} images are few for the {extractor.dim:,} features of {extractor.name}: the Frechet "
                "distance comes out too large. Compare it only with distances of the same number of images."
            )
    if "fid" in result.values and result.generated_images < 50_000:
        result.notes.append(
            f"fid is usually quoted for 50,000 generated images, this is of {result.generated_images:,}."
        )
    if swd_images is not None:
        result.notes.append(f"swd (times 1000) is of {swd_images:,} images a side, 128 patches of 7x7 each and level.")
    if result.floor:
        result.notes.append(f"real halves: {result.floor_images:,} real images against {result.floor_images:,} others.")


def _first(batches: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    left = n
    for images in batches:
        yield images[:left]
        left -= len(images[:left])
        if not left:
            return
    raise LowVRAMError(f"{n - left} images were generated where n={n} are needed.", "Generate n images.")


def _shown(batches: Iterable[Tensor], total: int, what: str, progress: bool) -> Iterator[Tensor]:
    with bar(total, what, "img", shown=progress) as shown:
        for images in batches:
            yield images
            shown.update(len(images))
