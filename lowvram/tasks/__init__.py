"""What is trained. A task builds networks, phases and a sampler; the trainer runs them, whichever task it is."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import bars, standin
from lowvram import checkpoint as checkpoints
from lowvram.data import ImageSet, open_dataset
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.kernels import dispatch
from lowvram.phase import Phase
from lowvram.run import Run
from lowvram.settings import Settings, StableDiffusionSettings

Place = Callable[[nn.Module, torch.device], object]


class Task(ABC):
    """Networks, phases and sampler of one kind of model.

    After `__init__` a task can sample; after `prepare_training` it can also be trained.

    Attributes:
        networks: all that a checkpoint holds, by the name of its file; averaged ones too.
        sampling_networks: the names of those that sampling needs.
        optional_networks: the names of those that a resumed checkpoint may lack, for a setting has switched them on.
        phases: in the order in which a step runs them.
        optimizers: by name; phases may share one.
        averages: updated by the trainer after each step.
        own_precision: the networks choose their own 16-bit layers, so that autocast is not for them.
        group: how many samples belong together in a batch (see Phase.group).
        say: shows the user a line.
        sample_options: what `sample` can be told beside its own arguments.
    """

    networks: dict[str, nn.Module]
    sampling_networks: tuple[str, ...]
    optional_networks: tuple[str, ...] = ()
    phases: list[Phase]
    optimizers: dict[str, torch.optim.Optimizer]
    averages: list[ExponentialMovingAverage]
    group: int = 1
    own_precision: bool = False
    sample_options: tuple[str, ...] = ()

    def __init__(self, settings: Settings, device: torch.device, folder: Path | None = None) -> None:
        """folder: of the run, for tasks that keep something beside the checkpoints; None while there is none."""
        self.settings = settings
        self.device = device
        self.folder = folder
        self.say: Callable[[str], None] = bars.say

    @property
    def half_dtype(self) -> torch.dtype | None:
        """The 16-bit type of networks that choose their own precision; None: they are fp32, or don't choose."""
        return None

    @classmethod
    def earlier(cls, settings: Settings, folder: Path | None) -> Settings | None:
        """The recipe that must be trained before this one can, if there is such and no run of it is done."""
        return None

    @classmethod  # noqa: B027 - a task may have nothing to prepare
    def prepare_data(
        cls,
        settings: Settings,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
        place: Place | None = None,
    ) -> None:
        """Write what training reads from the disk, where it is not there yet. Called in one process, before making one.

        folder: of the run, which may not be there yet. place: see `prepare_sampling`, where that is needed for it.
        """

    @cached_property
    def _dataset(self) -> ImageSet:
        return open_images(self.settings)

    def dataset(self) -> ImageSet:
        """The data set of the recipe, opened at the first call."""
        return self._dataset

    def items(self) -> ImageSet:
        """What batches are read from: the images, unless the task has made something else of them."""
        return self.dataset()

    def example(self, n: int) -> Tensor:
        """n samples on the device, of the shape and type that `items` gives, for trials and plans."""
        shape = (n, 3, self.settings.resolution, self.settings.resolution)
        images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return images if standin.active() else images.random_(0, 256)

    def write_beside(self, folder: Path) -> None:  # noqa: B027 - a task may have nothing to write
        """Write into the run's folder what it keeps once, beside its checkpoints."""

    @classmethod
    def with_shape_of_weights(cls, settings: Settings) -> Settings:
        """The recipe with the networks' shape as in the file that `settings.weights` names.

        Raises:
            LowVRAMError: it can't be read, or contradicts what the user set.
        """
        raise _no_weights(settings)

    def load_weights(self, path: Path) -> None:
        """Begin with the weights of a file, once `prepare_training` has made the networks.

        Raises:
            LowVRAMError: they don't fit, or this kind of task takes none.
        """
        raise _no_weights(self.settings)

    def prepare_sampling(self, place: Place | None = None) -> None:  # noqa: B027 - they may be there already
        """Bring networks to the device once their weights are loaded, to sample from them alone.

        place: brings one there that the device may not hold whole; None: `Module.to`.
        """

    @abstractmethod
    def prepare_training(self) -> None:
        """Build what only training needs: phases, optimizers, averages."""

    def end_step(self, step: int) -> None:  # noqa: B027 - a task may have nothing to do
        """Called after each step's updates, with the number of steps done."""

    def tensors(self) -> dict[str, Tensor]:
        """State beside networks and optimizers, for checkpoints."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - nor anything to load
        """Restore what `tensors` gave."""

    def resident(self) -> list[Tensor]:
        """What else is on the device throughout the training, beside networks and optimizers."""
        return list(self.tensors().values())

    def status(self) -> dict[str, float]:
        """Numbers worth showing beside the losses."""
        return {}

    @abstractmethod
    def sample(
        self,
        n: int,
        seed: int = 0,
        *,
        micro_batch: int | None = None,
        start: int = 0,
        **options: Any,
    ) -> Tensor:
        """Images start ... start + n - 1, uint8 [n, C, H, W] on the CPU. Image i depends on the seed and i alone.

        micro_batch: images at a time; None: as the training's memory allows. options: of `sample_options`.
        """

    @abstractmethod
    def interpolate(
        self, seed: int = 0, *, keyframes: int = 8, frames_per_keyframe: int = 30, **options: Any
    ) -> Iterator[Tensor]:
        """Frames of a looping path through the latent space, each uint8 [C, H, W].

        options: rows and cols of walks side by side, micro_batch, and what `sample` takes.
        """


def _no_weights(settings: Settings) -> LowVRAMError:
    return LowVRAMError(
        f"weights={settings.weights} is for StyleGAN2 and Stable Diffusion, and the recipe trains "
        f"task={settings.task}.",
        "Leave weights out, or use a recipe such as faces256 or sd15_lora.",
    )


def task_class(settings: Settings) -> type[Task]:
    """The kind of task that a recipe names."""
    task: type[Task] = import_module(f"lowvram.tasks.{settings.task}").TASK
    return task


def build_task(settings: Settings, device: torch.device, folder: Path | None = None) -> Task:
    """The task that a recipe names, with freshly initialised networks on the device. folder: of its run.

    Networks choose their kernels by the recipe's setting from now on, in this process.

    Raises:
        LowVRAMError: kernels=triton can't run there; or what the task finds wrong.
    """
    dispatch.use(settings.kernels)
    dispatch.runs_triton("auto", torch.empty(0, device=device))  # before there is a run folder
    return task_class(settings)(settings, device, folder)


def open_images(settings: Settings, *, resolution: int | None = None) -> ImageSet:
    """The data set of a recipe, at its own resolution or another."""
    data = settings.data
    return open_dataset(
        data.path,
        resolution=resolution or settings.resolution,
        labels=data.labels,
        max_images=data.max_images,
        on_bad_file=data.on_bad_file,
        bad_file_limit=data.bad_file_limit,
        builtin_count=data.builtin_count,
    )


def load_run(
    run_folder: str | Path,
    *,
    checkpoint: str | int = "latest",
    device: str = "auto",
    base: str | Path | None = None,
    place: Place | None = None,
    prepared: bool = True,
) -> Task:
    """A trained run, ready to sample from: its averaged networks, in evaluation mode.

    Args:
        run_folder: the folder that training wrote.
        checkpoint: a step, or "latest" for the newest good one.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        base: the published weights that a fine-tuned run stands on, where they lie elsewhere than at its training.
        place: see `Task.prepare_sampling`.
        prepared: False leaves the networks on the host, with the weights as they were trained: to be written elsewhere.
    """
    run = Run.open(run_folder)
    path = run.find_checkpoint(checkpoint)
    settings = run.settings
    if base is not None:
        if settings.weights is None:
            raise LowVRAMError(f"run={run_folder} stands on no other weights.", "Leave base out.")
        settings = replace(settings, weights=str(base))
    if settings.task == "stable_diffusion" and not _is_there(settings.weights):
        raise LowVRAMError(
            f"the run stands on {settings.weights}, which is not there.", "Say where those weights are: base=PATH."
        )
    if not prepared and isinstance(settings, StableDiffusionSettings) and settings.base == "nf4":
        settings = replace(settings, base="auto")  # packed weights can't be written
    task = build_task(settings, pick_device(device), run.folder)
    saved = checkpoints.read(path, only=task.sampling_networks)
    for name in task.sampling_networks:
        load_network(task.networks[name], saved.tensors.get(name, {}), name, path)
        task.networks[name].eval()
    if prepared:
        task.prepare_sampling(place)
    return task


def _is_there(weights: str | None) -> bool:
    return weights is not None and (weights == "random" or Path(weights).expanduser().exists())


def load_weights(
    path: str | Path,
    *,
    device: str = "auto",
    base: str | Path | None = None,
    scale: float | str | None = None,
    predict: str | None = None,
    place: Place | None = None,
    prepared: bool = True,
) -> Task:
    """Weights in files, ready to sample from: published ones, or what `lowvram.convert` made of a run.

    Args:
        path: of StyleGAN2 a pickle or .safetensors; of Stable Diffusion a folder, a single file, a LoRA or the
            embedding of a word, or several of these with | between them.
        device, place, prepared: as of `load_run`.
        base: the pipeline that a LoRA or a word stands on. scale: how much LoRAs count (1); or "0.8|0.5", one number
            for each LoRA.
        predict: what the UNet does, eps or v, where its file does not say so.

    Raises:
        LowVRAMError: they can't be read, or are of something else.
    """
    from lowvram.tasks import adapted
    from lowvram.tasks.stylegan2 import StyleGAN2Task

    paths = [Path(part.strip()).expanduser() for part in str(path).split("|")]
    if len(paths) == 1 and adapted.kind_of(paths[0]) == "stylegan":
        if base is not None:
            raise LowVRAMError(f"weights={path} stand on no other weights.", "Leave base out.")
        if scale is not None:
            raise LowVRAMError(f"scale={scale} is for LoRAs, and weights={path} are none.", "Leave scale out.")
        return StyleGAN2Task.of_weights(paths[0], pick_device(device))
    where = None if base is None else Path(base).expanduser()
    task = adapted.open_weights(paths, pick_device(device), base=where, scale=scale, predict=predict)
    if prepared:
        task.prepare_sampling(place)
    return task


def load_network(
    network: nn.Module,
    tensors: dict[str, Tensor],
    name: str,
    path: Path,
    load: Callable[[nn.Module, dict[str, Tensor]], object] = nn.Module.load_state_dict,
) -> None:
    """Load a network's weights, or say which of them don't fit. load: how, for networks that are wrapped."""
    try:
        load(network, tensors)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if len(str(error).splitlines()) > 1 else str(error)
        raise LowVRAMError(
            f"the weights {name} in {path} don't fit the recipe: {detail}",
            "Resume with the recipe that the run was begun with, or start a new run.",
        ) from error


def load_json(path: Path) -> dict[str, Any]:
    """A configuration file. Raises LowVRAMError where it is missing, broken, or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise LowVRAMError(
            f"{path} can't be read: {str(error)[:200]}.", "Give a folder whose config.json is whole."
        ) from None
    return values


def pick_device(name: str) -> torch.device:
    """A device by its setting.

    Raises:
        LowVRAMError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LowVRAMError(
            f"device={name} is not there: torch sees {torch.cuda.device_count()} GPUs.", "Use device=cpu."
        )
    return device
