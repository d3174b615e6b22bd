"""What every recipe has, whichever network it trains. conf/config.yaml explains each setting."""

import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from lowvram.errors import LowVRAMError
from lowvram.receipt.rates import Rates
from lowvram.settings.checks import at_least, check_resolution, fraction, one_of, parse_bytes

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
KERNELS = ("auto", "reference", "triton")
LOGGERS = ("none", "tensorboard", "wandb")
MEMORY_CHOICES = {
    "activations": ("keep", "recompute", "offload"),
    "optimizer": ("adam", "adam8bit", "paged_adam", "paged_adam8bit", "lion8bit", "adafactor"),
    "update": ("after", "fused", "deferred"),
    "state": ("device", "host"),
    "weights": ("device", "stream"),
    "weights_dtype": ("fp32", "bf16"),
    "frozen": ("device", "stream"),
    "ema": ("device", "host"),
    "attention": ("sdpa", "xformers", "math"),
    "fsdp": ("none", "shard", "offload"),
}

Self = TypeVar("Self", bound="Settings")


@dataclass(kw_only=True)
class DataSettings:
    """Where images come from and how they are read (conf/config.yaml explains each)."""

    path: str | None
    labels: bool
    mirror: bool
    max_images: int | None
    builtin_count: int
    workers: int
    on_bad_file: str
    bad_file_limit: int
    buckets: bool = False  # run folders from before there were any mean this, here and below
    masks: str | None = None

    def __post_init__(self) -> None:
        one_of("data.on_bad_file", self.on_bad_file, ("skip", "error"))
        at_least("data.workers", self.workers, 0)
        at_least("data.bad_file_limit", self.bad_file_limit, 0)
        at_least("data.builtin_count", self.builtin_count, 1)
        if self.max_images is not None:
            at_least("data.max_images", self.max_images, 1)


@dataclass(kw_only=True)
class MemorySettings:
    """How memory is saved; lowvram.memory.policy holds what the values mean and which go together.

    policy: auto plans for the card that is there, recipe goes by the settings below, and the path of a plan.json or of
    a policy by that. activations by phase; optimizer, update, state, weights and weights_dtype by optimizer. frozen:
    where the weights are that no update changes. resident: the share of what streams that stays on the device.
    """

    activations: dict[str, str]
    recompute_every: int
    optimizer: dict[str, str]
    update: dict[str, str]
    state: dict[str, str]
    weights: dict[str, str]
    weights_dtype: dict[str, str]
    ema: str
    attention: str
    fsdp: str
    policy: str = "auto"  # run folders from before there was one mean this, here and below
    frozen: str = "device"
    resident: float = 0.0

    def __post_init__(self) -> None:
        if self.policy not in ("auto", "recipe") and not self.policy.endswith(".json"):
            raise LowVRAMError(f"memory={self.policy} is not known.", "Use auto, recipe, or the path of a plan.json.")
        at_least("memory.recompute_every", self.recompute_every, 1)
        fraction("memory.resident", self.resident)
        for name, values in {**self.by_optimizer(), "activations": self.activations}.items():
            for key, value in values.items():
                one_of(f"memory.{name}.{key}", value, MEMORY_CHOICES[name])
        for name in ("ema", "attention", "fsdp", "frozen"):
            one_of(f"memory.{name}", getattr(self, name), MEMORY_CHOICES[name])

    def by_optimizer(self) -> dict[str, dict[str, str]]:
        """The settings that each optimizer has."""
        return {name: getattr(self, name) for name in ("optimizer", "update", "state", "weights", "weights_dtype")}


@dataclass(kw_only=True)
class MarkSettings:
    """What images that are written carry of where they come from (conf/config.yaml explains each)."""

    enabled: bool = True  # run folders from before there were marks mean these
    watermark: bool = False
    certificate: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise LowVRAMError(
                f"mark.certificate={self.certificate} and mark.key={self.key}: a signature needs both.",
                "Give mark.certificate=chain.pem mark.key=key.pem.",
            )
        if not self.enabled and (self.watermark or self.certificate is not None):
            raise LowVRAMError(
                "mark.enabled=false stands against a watermark or a certificate.", "Leave one of them out."
            )


@dataclass(kw_only=True)
class Settings:
    """A whole recipe; made by `load_recipe`. Each task adds its own settings in a class of its own.

    micro_batch: a dataclass with a field for each phase: samples of one process in memory at a time; None: all.
    """

    recipe: str
    task: str
    resolution: int
    batch: int
    kimg: float
    snapshot_kimg: float
    log_kimg: float
    seed: int
    vram: str | None
    out: str | None
    resume: str | None
    keep: int
    grid: int
    logger: str
    precision: str
    device: str
    debug: bool
    data: DataSettings
    micro_batch: Any
    memory: MemorySettings
    kernels: str = "auto"  # run folders from before there was a choice mean this, here and below
    weights: str | None = None
    price: str | None = None
    electricity: str | None = None
    carbon: str | None = None
    contributor: str = ""
    mark: MarkSettings = field(default_factory=MarkSettings)
    overrides: list[str] = field(default_factory=list)  # the settings that the user named, in dotted form

    def __post_init__(self) -> None:
        self.check_resolution()
        at_least("batch", self.batch, 1)
        at_least("keep", self.keep, 1)
        at_least("grid", self.grid, 1)
        at_least("seed", self.seed, 0)
        for name in ("kimg", "snapshot_kimg", "log_kimg"):
            if getattr(self, name) <= 0:
                raise LowVRAMError(f"{name}={getattr(self, name)} must be above 0.", "It counts thousands of images.")
        one_of("logger", self.logger, LOGGERS)
        one_of("precision", self.precision, PRECISIONS)
        one_of("kernels", self.kernels, KERNELS)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device):
            raise LowVRAMError(f"device={self.device} is not known.", "Use auto, cpu, cuda or cuda:N.")
        if self.vram is not None:
            parse_bytes("vram", self.vram)
        Rates.of(self.price, self.electricity, self.carbon)
        if len(self.contributor) > 200:
            raise LowVRAMError(f"contributor has {len(self.contributor)} letters.", "A name has 200 at most.")
        if self.data.buckets and self.task not in ("diffusion", "stable_diffusion"):
            raise LowVRAMError(
                f"data.buckets=true is for latent diffusion alone, and task={self.task} learns from squares.",
                "Leave data.buckets out.",
            )
        if self.data.masks is not None and self.task != "stable_diffusion":
            raise LowVRAMError(
                f"data.masks={self.data.masks} is for fine-tuning Stable Diffusion, and the recipe trains "
                f"task={self.task}.",
                "Leave data.masks out.",
            )
        for phase, micro in self.micro_batches().items():
            self._check_micro_batch(phase, micro)

    def check_resolution(self) -> None:
        """Raise LowVRAMError unless images of that size can be trained on."""
        check_resolution(self.resolution)

    def phase_names(self) -> list[str]:
        """The phases that the recipe trains, in the order of a step."""
        return list(self.micro_batches())

    def phase_batch(self, phase: str) -> int:
        """Images that a phase uses in one step, over all processes."""
        return self.batch

    def phase_group(self, phase: str) -> int:
        """Samples of a phase that stay together in a micro-batch, see `Phase.group`."""
        return 1

    def micro_batches(self) -> dict[str, int | None]:
        """The micro-batch of each phase, also of those that are switched off."""
        return asdict(self.micro_batch)

    def with_micro_batches(self: Self, sizes: dict[str, int | None]) -> Self:
        """A copy with other micro-batches for the phases that are given one."""
        given = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, micro_batch=replace(self.micro_batch, **given))

    def at_full_cost(self: Self) -> Self:
        """The recipe at the time when its steps take most memory and time, which is what plans are for."""
        return self

    def changed(self: Self, allow: Collection[str]) -> Iterator[tuple[Self, tuple[str, ...]]]:
        """The recipe with changes of what is trained, of those that were allowed, each time with one more of them.

        Yields the changed recipe, and the changes in words, as settings.
        """
        yield from ()

    def _check_micro_batch(self, phase: str, micro: int | None) -> None:
        if micro is None:
            return
        at_least(f"micro_batch.{phase}", micro, 1)
        whole, group = self.phase_batch(phase), self.phase_group(phase)
        if micro >= whole:  # "at most so many": a smaller batch needs no other recipe
            return
        if whole % micro:
            fits = [n for n in range(1, whole + 1) if whole % n == 0 and n % group == 0]
            raise LowVRAMError(
                f"micro_batch.{phase}={micro} does not divide the phase's batch of {whole}.",
                f"Use one of {', '.join(map(str, fits))}.",
            )
