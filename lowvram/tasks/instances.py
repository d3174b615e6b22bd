"""The images that weights are fine-tuned on, and, for prior preservation, images of their class that the weights made.

DreamBooth (arXiv 2208.12242, section 3.2): beside one's own few images the network trains on what it made of the class
before, so that it keeps the class. Both have the same share of an epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvram.bars import bar
from lowvram.data import ImageSet
from lowvram.data.bucketed import BucketedSet
from lowvram.data.caption_variants import TEMPLATED
from lowvram.data.captions import Captions, read_captions
from lowvram.data.latents import LatentSet
from lowvram.data.repeated import JoinedSet, RepeatedSet, repeats_of_folders
from lowvram.data.size_ids import size_ids
from lowvram.errors import LowVRAMError
from lowvram.marks.mark import make_mark
from lowvram.marks.runs import origin_of_weights
from lowvram.sampling.grids import save_png
from lowvram.settings import StableDiffusionSettings
from lowvram.settings.base import MarkSettings
from lowvram.tasks import Place, codec
from lowvram.tasks.codec import Codec

CLASS_IMAGES = "class_images"  # the folder within a run
_AT_ONCE = 4  # that are lost at most where making them is interrupted


@dataclass(kw_only=True)
class Instances:
    """Images and captions in one order, which labels are indices of.

    items: what batches are read from. images: the user's, as pictures. own: how many are the user's; those after are
    of the class. size_ids: int64 [N, variants, 6]. labelled: labels of items tell the variant too, as
    image * variants + variant.
    """

    items: ImageSet
    images: ImageSet
    captions: Sequence[str]
    own: int
    size_ids: NDArray[np.int64] | None
    labelled: bool

    def images_of(self, labels: Tensor) -> Tensor:
        """The index of the image that each label is of, int64 [b]."""
        return labels // self.size_ids.shape[1] if self.labelled and self.size_ids is not None else labels


def open_all(
    settings: StableDiffusionSettings,
    own: Codec,
    device: torch.device,
    folder: Path | None,
    say: Callable[[str], None],
) -> Instances:
    """The recipe's images as latents, made where they are not kept, and their captions."""
    latents = codec.latents(settings, own, device)
    said = settings.text
    latents.labels = np.arange(len(latents))
    latents.labels_variants = settings.family == "sdxl" and settings.latent.crops > 1
    captions = read_captions(latents, missing=said.missing, prompt=TEMPLATED if settings.templated else said.prompt)
    found = Instances(
        items=latents,
        images=latents.images,
        captions=captions,
        own=len(latents),
        size_ids=_size_ids(settings, latents),
        labelled=latents.labels_variants,
    )
    if isinstance(latents.images, BucketedSet):
        say(latents.images.summary())
    repeats = repeats_of_folders(latents)
    if any(count != 1 for count in repeats):
        say(f"an epoch shows images up to {max(repeats):,} times, as their folders' names say (10_dog: 10 times)")
        found.items = RepeatedSet(found.items, repeats)
    if settings.prior.prompt is None:
        return found
    made = class_settings(settings, folder)
    of_class = codec.latents(made, own, device)
    of_class.labels_variants = found.labelled
    captions = Captions.joined(captions, read_captions(of_class, prompt=settings.prior.prompt))
    return Instances(
        items=JoinedSet(found.items, of_class),
        images=found.images,
        captions=captions,
        own=found.own,
        labelled=found.labelled,
        size_ids=None if found.size_ids is None else np.concatenate([found.size_ids, _size_ids(made, of_class)]),
    )


def _size_ids(settings: StableDiffusionSettings, latents: LatentSet) -> NDArray[np.int64] | None:
    if settings.family != "sdxl":
        return None
    return size_ids(latents.images, variants=latents.variants, larger=codec.larger_resolution(settings))


def class_settings(settings: StableDiffusionSettings, folder: Path | None) -> StableDiffusionSettings:
    """The recipe on the images of the class."""
    place = settings.prior.folder or (None if folder is None else str(folder / CLASS_IMAGES))
    if place is None:
        raise LowVRAMError("there is no run folder for the images of the class.", "Give prior.folder.")
    data = replace(settings.data, path=place, max_images=settings.prior.images, masks=None, buckets=False)
    return replace(settings, data=data)


def make_class_images(
    settings: StableDiffusionSettings,
    folder: Path,
    task: Callable[[], Any],
    say: Callable[[str], None],
    on_device: Place | None,
) -> None:
    """Sample the images of the class that are not there yet; a run that was interrupted goes on with the next.

    task: makes what samples from the weights as they are. on_device: see `Task.prepare_sampling`.
    """
    place = Path(str(class_settings(settings, folder).data.path)).expanduser()
    names = [f"{number:05d}.png" for number in range(settings.prior.images)]
    endings = (".png", ".jpg", ".jpeg", ".webp")  # those that were begun, and cut off, have another
    there = {path.name for path in place.glob("*") if path.suffix.lower() in endings}
    if len(there) >= settings.prior.images:
        return
    missing = [number for number, name in enumerate(names) if name not in there]
    say(f"making {len(missing)} images of {settings.prior.prompt!r} in {place}, once")
    weights = [] if settings.weights is None else [settings.weights]
    # Trained on as they are: without what a watermark, or a signature, would add.
    origin = replace(origin_of_weights(weights), seed=settings.seed)
    mark = make_mark(MarkSettings(enabled=settings.mark.enabled), origin)
    sampler = task()
    sampler.prepare_sampling(on_device)
    place.mkdir(parents=True, exist_ok=True)
    with bar(len(missing), "class images", "img") as progress:
        for first in range(0, settings.prior.images, _AT_ONCE):
            wanted = [number for number in missing if first <= number < first + _AT_ONCE]
            if not wanted:
                continue
            count = wanted[-1] - wanted[0] + 1
            images = sampler.sample(count, seed=settings.seed, start=wanted[0], prompts=[settings.prior.prompt])
            for number in wanted:
                partial = place / f".{names[number]}.partial"
                save_png(images[number - wanted[0]], partial, mark and mark.of(index=number))
                partial.replace(place / names[number])
            progress.update(len(wanted))
