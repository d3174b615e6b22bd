"""The autoencoder that a diffusion run stands on: found, trained first if need be, copied beside the run, and used.

A run keeps a copy in its own folder (autoencoder/config.json and weights, as a `vae` folder of diffusers has them), so
that it can be moved and sampled from alone.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowvram import checkpoint as checkpoints
from lowvram import standin
from lowvram.config import load_recipe
from lowvram.data import latents as cache
from lowvram.data.bucketed import BucketedSet
from lowvram.data.image_cache import cache_root
from lowvram.data.latents import LatentSet, Variants
from lowvram.data.masks import open_masks
from lowvram.ema import on_device
from lowvram.errors import LowVRAMError
from lowvram.marks import digests
from lowvram.models.autoencoder import Autoencoder, decode_safely, sample_latents
from lowvram.models.tiling import encode_tiled
from lowvram.receipt.ledger import Receipt
from lowvram.receipt.stands_on import StandsOn, shown
from lowvram.run import OUTPUTS, Run
from lowvram.settings import AutoencoderSettings, DiffusionSettings, StableDiffusionSettings
from lowvram.tasks import load_json, open_images, published
from lowvram.tasks.autoencoder import TILE_PIXELS, AutoencoderTask, save, to_pixels, to_range

Record = TypeVar("Record")
LatentSettings = DiffusionSettings | StableDiffusionSettings

BESIDE = "autoencoder"  # the folder of the copy within a run
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MEASURED_LATENTS = 2048  # whose spread sets the scale of latents
_ENCODED_PIXELS = 1024  # images to this size are encoded whole: each tile would have norms of its own
_LARGER = 9 / 8  # several crops are cut from pictures so much larger
_KERNELS = 1.25  # with the workspace of convolutions, and what the allocator rounds up

_NO_HOST_MEMORY = "can't allocate memory"  # of torch's allocator for CPUs, whose error has no type of its own

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Codec:
    """An autoencoder on the host, brought to the device while it is used.

    scaled: whether its scale and shift are known; those of one trained here are measured on the first latents.
    of_run: the run of lowvram that trained it, where that is known.
    """

    autoencoder: Autoencoder
    scaled: bool
    of_run: StandsOn | None = None
    _said: bool = field(default=False, init=False, repr=False)  # that images are decoded in tiles

    def encode(self, images: Tensor, device: torch.device) -> Tensor:
        """uint8 [n, 3, H, W] -> moments [n, 2 C, h, w] on the device; in halves where memory runs out."""
        try:
            with torch.no_grad():
                return encode_tiled(self.autoencoder, to_range(images.to(device)), tile_pixels=_ENCODED_PIXELS)
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self.encode(half, device) for half in images.chunk(2)])

    def decode(self, z: Tensor, device: torch.device, micro_batch: int, *, whole: bool = True) -> Tensor:
        """Scaled latents [n, C, h, w] -> uint8 images [n, 3, H, W] on the CPU; the autoencoder is moved for it.

        Images larger than a tile are decoded whole where memory suffices, else in tiles, whose norms differ a little;
        a plan counts on tiles.

        micro_batch: images at a time, at most, and no more than have the pixels of a tile: the decoder's activations
        at full resolution are larger than anything that the denoiser needs.
        whole: whether images larger than a tile may be; otherwise they come in tiles however much memory there is.
        """
        pixels = z.shape[2] * z.shape[3] * self.autoencoder.factor**2
        micro_batch = max(1, min(micro_batch, TILE_PIXELS**2 // pixels))
        if standin.active():  # the next ones take the memory of the first
            z = z[:micro_batch]
        out = []
        with torch.no_grad(), on_device(self.autoencoder, device):
            whole = whole and self._decodes_whole(z[:micro_batch], device)
            for part in z.split(micro_batch):
                latents = self.autoencoder.unscale(part.to(device))
                images = self._whole(latents) if whole else None
                if images is None:
                    whole = False
                    images = decode_safely(self.autoencoder, latents, tile_pixels=TILE_PIXELS)
                out.append(to_pixels(images).cpu())
        return torch.cat(out)

    def _decodes_whole(self, z: Tensor, device: torch.device) -> bool:
        """Whether latents of more than a tile [b, C, h, w] are decoded whole; smaller ones are anyway."""
        height, width = z.shape[2:]
        if standin.active() or max(height, width) * self.autoencoder.factor <= TILE_PIXELS:
            return False
        needed = _KERNELS * len(z) * self.autoencoder.decoding_bytes(height, width)
        room = _room_bytes(device)
        if needed > room:
            self._say_tiles(z, f"whole it takes {needed / 2**30:.1f} GiB, and {room / 2**30:.1f} are free")
        return needed <= room

    def _whole(self, latents: Tensor) -> Tensor | None:
        """Unscaled latents decoded whole; None where memory runs out all the same."""
        try:
            return decode_safely(self.autoencoder, latents)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and _NO_HOST_MEMORY not in str(error):
                raise
            self._say_tiles(latents, "out of memory when it was tried whole")
        if latents.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _say_tiles(self, z: Tensor, why: str) -> None:
        if not self._said:
            height, width = (side * self.autoencoder.factor for side in z.shape[2:])
            _log.warning("decoding %dx%d in tiles of %d: %s", width, height, TILE_PIXELS, why)
        self._said = True

    def to_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """As `Autoencoder.to_latents`, which needs no weights."""
        return self.autoencoder.to_latents(moments, noise)

    def measure(self, latents: LatentSet) -> None:
        """Set scale and shift so that latents have mean 0 and standard deviation 1 (arXiv 2112.10752, appendix G)."""
        step = max(1, len(latents) // _MEASURED_LATENTS)
        each = [torch.from_numpy(latents.moments(i)) for i in range(0, len(latents), step)]
        moments = torch.cat([of_one.flatten(1) for of_one in each], dim=1)[None]  # [1, 2 C, pixels]: shapes may differ
        mean = sample_latents(moments, None)
        variance = moments.float().chunk(2, dim=1)[1].exp()
        self.autoencoder.shift_factor = float(mean.mean())
        self.autoencoder.scaling_factor = float((mean.var() + variance.mean()).rsqrt())
        self.scaled = True


def _room_bytes(device: torch.device) -> int:
    """Memory for activations: half of what is free on the host; of a card, within the bound on this process."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // 2
    held = torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    bound = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return held - torch.cuda.memory_allocated(device) + max(0, min(free, bound - held))


# Where it comes from.


def find(settings: LatentSettings, folder: Path | None) -> Path | None:
    """The autoencoder: the copy in the run's folder, what `latent.path` names, or a finished run of `latent.recipe`.

    Where training goes on from another run, in whose latents the denoiser is at home: that run's copy.
    """
    homes = [] if folder is None else [folder]
    if settings.resume not in (None, "auto"):
        begun = Path(settings.resume).expanduser()  # a run, or RUN/checkpoints/STEP
        homes += [begun, begun.parent.parent]
    for home in homes:
        if (home / BESIDE / "config.json").is_file():
            return home / BESIDE
    if settings.latent.path is not None:
        return Path(settings.latent.path).expanduser()
    if isinstance(settings, StableDiffusionSettings):  # its weights have one
        return None
    return next((run.folder for run, done in _runs(settings) if done), None)


def is_own(path: Path, folder: Path | None) -> bool:
    """Whether this is the copy in a run's folder."""
    return folder is not None and path == folder / BESIDE


def to_train(settings: DiffusionSettings, folder: Path | None) -> AutoencoderSettings | None:
    """The recipe of the autoencoder that must be trained first: from the start, or on from where it was stopped."""
    if find(settings, folder) is not None:
        return None
    wanted = _wanted(settings)
    begun = next((run.folder for run, done in _runs(settings) if not done), None)
    if begun is not None:
        return replace(wanted, out=str(begun), resume="auto")
    if settings.out is not None:  # beside the run
        number, home = 1, Path(settings.out).expanduser().parent
        while (home / _numbered(wanted.recipe, number)).exists():
            number += 1
        return replace(wanted, out=str(home / _numbered(wanted.recipe, number)))
    return wanted


def _wanted(settings: DiffusionSettings) -> AutoencoderSettings:
    """The autoencoder's recipe on the data and the device of the diffusion recipe."""
    recipe = settings.latent.recipe
    assert recipe is not None
    found = load_recipe(recipe)
    if not isinstance(found, AutoencoderSettings):
        raise LowVRAMError(f"latent.recipe={recipe} trains no autoencoder.", "Use one such as faces256_vae.")
    _check_shape(f"recipe {recipe}", found.model.latent_channels, found.factor, settings)
    data = replace(settings.data, labels=False, buckets=False, mirror=found.data.mirror, workers=found.data.workers)
    same = {name: getattr(settings, name) for name in ("device", "vram", "seed", "debug", "logger")}
    return replace(found, data=data, **same)


def _runs(settings: DiffusionSettings) -> Iterator[tuple[Run, bool]]:
    """Runs of the wanted autoencoder, the newest first, and whether each has come to its end."""
    wanted = _wanted(settings)
    home = OUTPUTS if settings.out is None else Path(settings.out).expanduser().parent
    found = [path.parent for path in home.glob(f"{wanted.recipe}*/recipe.yaml")]
    for folder in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        run = Run.open(folder)
        if not isinstance(run.settings, AutoencoderSettings) or not _alike(run.settings, wanted):
            continue
        path = checkpoints.latest_good(run.checkpoints)
        if path is None:
            continue
        seen = checkpoints.read(path, only=()).numbers["images_seen"]
        yield run, seen >= round(run.settings.kimg * 1000)


def _alike(run: AutoencoderSettings, wanted: AutoencoderSettings) -> bool:
    """Whether a run is of the same network on the same data, however long it was trained."""
    parts = [
        (s.recipe, s.resolution, s.model, s.data.path, s.data.max_images, s.data.builtin_count) for s in (run, wanted)
    ]
    return parts[0] == parts[1]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def load(path: Path, settings: LatentSettings) -> Codec:
    """Read an autoencoder onto the CPU.

    path: a run of lowvram; a `vae` folder of diffusers, or the folder of a whole pipeline.

    Raises:
        LowVRAMError: it is none of these, is broken, or its latents are not those of the recipe.
    """
    if (path / "recipe.yaml").is_file():
        codec = _of_run(path)
    else:
        codec = _of_folder(path / "vae" if (path / "vae" / "config.json").is_file() else path)
        if path.name == BESIDE:
            codec.of_run = _known(lambda: StandsOn.read(path.parent))
    _check_shape(str(path), codec.autoencoder.latent_channels, codec.autoencoder.factor, settings)
    codec.autoencoder.eval().requires_grad_(False)
    return codec


def _check_shape(name: str, channels: int, factor: int, settings: LatentSettings) -> None:
    for what, has, wants in (
        ("channels", channels, settings.latent.channels),
        ("factor", factor, settings.latent.factor),
    ):
        if has != wants:
            raise LowVRAMError(
                f"the autoencoder of {name} has latents with {what}={has}, and the recipe says latent.{what}={wants}.",
                f"Use latent.{what}={has}, or another autoencoder.",
            )


def _of_run(folder: Path) -> Codec:
    run = Run.open(folder)
    if not isinstance(run.settings, AutoencoderSettings):
        raise LowVRAMError(f"{folder} is a run of {run.settings.task}, not of an autoencoder.", "Give another.")
    task = AutoencoderTask(run.settings, torch.device("cpu"))
    path = run.find_checkpoint()
    saved = checkpoints.read(path, only=task.sampling_networks)
    task.average.load_state_dict(saved.tensors["autoencoder_ema"])
    try:
        receipt = Receipt.read(folder)
    except LowVRAMError as error:  # no reason not to train or sample
        _log.warning("what %s took is not known: %s", folder, error.problem)
        receipt = None
    of_run = StandsOn(
        run=shown(folder.absolute().name),
        recipe=shown(run.settings.recipe),
        checkpoint=digests.of_checkpoint(path, task.sampling_networks),
        receipt=receipt or Receipt(),
    )
    return Codec(autoencoder=task.average, scaled=False, of_run=of_run)


def _known(read: Callable[[], Record]) -> Record | None:
    """A record of what was; a spoilt one is no reason not to train or sample, and is told of where it is shown."""
    try:
        return read()
    except LowVRAMError:
        return None


def _of_folder(folder: Path) -> Codec:
    config, weights = folder / "config.json", folder / _WEIGHTS
    remedy = f"Give a run of lowvram, or a folder with config.json and {_WEIGHTS}."
    if not config.is_file() or not weights.is_file():
        raise LowVRAMError(f"latent.path={folder} holds no autoencoder.", remedy)
    network = Autoencoder.from_config(load_json(config))
    try:
        with safe_open(weights, "pt") as file:  # a hostile header is refused before anything is allocated
            names = set(file.keys())
        missing = sorted(set(network.state_dict()) ^ names)
        if missing:
            raise LowVRAMError(
                f"{weights} does not fit its config.json: {missing[0]} and {len(missing) - 1} more.", remedy
            )
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise LowVRAMError(f"{weights} can't be read: {str(error)[:200]}.", remedy) from error
    return Codec(autoencoder=network, scaled=True)


def pretended(settings: DiffusionSettings) -> Codec:
    """An autoencoder of the right shape with no weights to speak of, for plans where there is none yet."""
    latent = settings.latent
    if latent.path is not None and (config := _config_of(Path(latent.path).expanduser())) is not None:
        return Codec(autoencoder=Autoencoder.from_config(load_json(config)), scaled=True)
    return Codec(autoencoder=AutoencoderTask(_wanted(settings), torch.device("cpu")).average, scaled=True)


def of_pipeline(pipeline: published.Source) -> Codec:
    """The autoencoder of published weights."""
    network = published.autoencoder(pipeline)
    network.eval().requires_grad_(False)
    return Codec(autoencoder=network, scaled=True)


def _config_of(path: Path) -> Path | None:
    """The config.json of a `vae` folder, or of a pipeline's; none for a run of lowvram."""
    found = (folder / "config.json" for folder in (path / "vae", path))
    return next((config for config in found if config.is_file()), None)


def write_beside(codec: Codec, folder: Path) -> None:
    """Copy it into a run's folder, where there is none yet, and what is known of the run that trained it."""
    if not (folder / BESIDE / "config.json").is_file():
        if codec.of_run is not None:  # first: the copy, which is written in any case, tells that all is there
            codec.of_run.write(folder)
        save(codec.autoencoder, folder / BESIDE)


# The latents of a data set.


def larger_resolution(settings: LatentSettings) -> int:
    """Of the pictures that all crops but the first are cut from."""
    return round(settings.resolution * _LARGER)


def latents(settings: LatentSettings, codec: Codec, device: torch.device) -> LatentSet:
    """The latents of the recipe's images: read where they are kept, made where they are not.

    With text each image's label is its own index, that of its caption. With `data.buckets` images are of several
    shapes, `LatentSet.images` is a BucketedSet, and sides of latents are multiples of the denoiser's grain.
    """
    latent = settings.latent
    larger = None
    if latent.crops > 1:
        wide = replace(settings, data=replace(settings.data, labels=False))
        larger = open_images(wide, resolution=larger_resolution(settings))
    images, picture_sizes = open_images(settings), None
    if settings.data.buckets:
        images = BucketedSet(images, multiple=latent.factor * settings.grain, min_images=settings.batch)
        picture_sizes = images.picture_sizes
    folder = Path(latent.folder).expanduser() if latent.folder else cache_root() / "latents"
    with on_device(codec.autoencoder, device):
        return cache.build(
            folder,
            images,
            lambda pixels: codec.encode(pixels, device),
            key={
                "autoencoder": cache.hash_weights(codec.autoencoder.state_dict()),
                "norm_groups": codec.autoencoder.norm_num_groups,
            },
            variants=Variants(mirror=settings.data.mirror, crops=latent.crops),
            larger=larger,
            masks=None if settings.data.masks is None else open_masks(images, settings.data.masks),
            picture_sizes=picture_sizes,
            batch=max(1, 2**19 // settings.resolution**2) if device.type == "cuda" else 16,
        )
