"""Typed settings of a recipe, and the checks that span several of them.

Values and their explanations live in conf/ (one YAML line and comment each); this file gives them types and refuses
combinations that can't work. It imports neither torch nor Hydra, so that `--help` stays quick.
"""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lowvram.errors import LowVRAMError

TASKS = ("stylegan2",)
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
LOGGERS = ("none", "tensorboard", "wandb")
AUGMENT_MODES = ("none", "fixed", "ada")
PIPELINES = ("blit", "geom", "color", "filter", "noise", "cutout", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc")
R1_KINDS = ("exact", "finite_difference")
PHASES = ("G", "path_length", "D", "R1")
MEMORY_CHOICES = {
    "activations": ("keep", "recompute", "offload"),
    "optimizer": ("adam", "adam8bit", "paged_adam", "paged_adam8bit", "lion8bit", "adafactor"),
    "update": ("after", "fused", "deferred"),
    "state": ("device", "host"),
    "weights": ("device", "stream"),
    "weights_dtype": ("fp32", "bf16"),
    "ema": ("device", "host"),
    "attention": ("sdpa", "xformers", "math"),
    "fsdp": ("none", "shard", "offload"),
}

_UNITS_BYTES = {"gb": 2**30, "gib": 2**30, "mb": 2**20, "mib": 2**20}


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

    def __post_init__(self) -> None:
        _one_of("data.on_bad_file", self.on_bad_file, ("skip", "error"))
        _at_least("data.workers", self.workers, 0)
        _at_least("data.bad_file_limit", self.bad_file_limit, 0)
        _at_least("data.builtin_count", self.builtin_count, 1)
        if self.max_images is not None:
            _at_least("data.max_images", self.max_images, 1)


@dataclass(kw_only=True)
class ModelSettings:
    """Shape of the StyleGAN2 networks."""

    z_dim: int
    w_dim: int
    mapping_layers: int
    channel_base: int
    channel_max: int
    num_fp16_res: int
    conv_clamp: float | None
    mbstd_group_size: int

    def __post_init__(self) -> None:
        for name in ("z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max", "mbstd_group_size"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _at_least("model.num_fp16_res", self.num_fp16_res, 0)


@dataclass(kw_only=True)
class LossSettings:
    """The objective: logistic loss, lazy R1, lazy path length (arXiv 1912.04958)."""

    r1_gamma: float | None
    r1_every: int
    path_length_weight: float
    path_length_every: int
    path_length_batch_shrink: int
    path_length_decay: float
    style_mixing: float
    r1_kind: str = "exact"  # defaults, because runs from before these two settings have none in their recipe
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        for name in ("r1_every", "path_length_every"):
            _at_least(f"loss.{name}", getattr(self, name), 0)
        _at_least("loss.path_length_batch_shrink", self.path_length_batch_shrink, 1)
        _at_least("loss.path_length_weight", self.path_length_weight, 0)
        _fraction("loss.style_mixing", self.style_mixing)
        _fraction("loss.path_length_decay", self.path_length_decay)
        if self.r1_gamma is not None:
            _at_least("loss.r1_gamma", self.r1_gamma, 0)
        _one_of("loss.r1_kind", self.r1_kind, R1_KINDS)
        if not 0 < self.r1_sigma <= 1:
            raise LowVRAMError(
                f"loss.r1_sigma={self.r1_sigma} must lie in (0, 1]: images lie in [-1, 1].", "A usual value is 0.01."
            )


@dataclass(kw_only=True)
class OptimizerSettings:
    """Adam, for the generator and the discriminator."""

    lr: float
    lr_d: float | None
    beta1: float
    beta2: float
    eps: float

    def __post_init__(self) -> None:
        for name in ("lr", "eps") + (("lr_d",) if self.lr_d is not None else ()):
            if getattr(self, name) <= 0:
                raise LowVRAMError(
                    f"optimizer.{name}={getattr(self, name)} must be above 0.", "A usual value is 0.0025."
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise LowVRAMError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).", "Use 0 and 0.99.")


@dataclass(kw_only=True)
class EmaSettings:
    """The averaged generator that samples are drawn from."""

    half_life_kimg: float
    rampup: float | None
    w_avg_beta: float

    def __post_init__(self) -> None:
        _at_least("ema.half_life_kimg", self.half_life_kimg, 0)
        _fraction("ema.w_avg_beta", self.w_avg_beta)


@dataclass(kw_only=True)
class AugmentSettings:
    """Discriminator augmentation (ADA, arXiv 2006.06676)."""

    mode: str
    pipeline: str
    p: float
    target: float
    interval: int
    adjust_kimg: float

    def __post_init__(self) -> None:
        _one_of("augment.mode", self.mode, AUGMENT_MODES)
        _one_of("augment.pipeline", self.pipeline, PIPELINES)
        _fraction("augment.p", self.p)
        _fraction("augment.target", self.target)
        _at_least("augment.interval", self.interval, 1)
        if self.adjust_kimg <= 0:
            raise LowVRAMError(f"augment.adjust_kimg={self.adjust_kimg} must be above 0.", "The paper uses 500.")


@dataclass(kw_only=True)
class MicroBatchSettings:
    """Images of one process in memory at a time, for each phase; None is the whole batch."""

    G: int | None
    path_length: int | None
    D: int | None
    R1: int | None


@dataclass(kw_only=True)
class MemorySettings:
    """How memory is saved; lowvram.memory.policy holds what the values mean and which go together.

    policy: auto plans for the card that is there, recipe goes by the settings below, and the path of a plan.json or of
    a policy by that. activations by phase; optimizer, update, state, weights and weights_dtype by optimizer.
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
    policy: str = "auto"  # run folders from before there was one mean this

    def __post_init__(self) -> None:
        if self.policy not in ("auto", "recipe") and not self.policy.endswith(".json"):
            raise LowVRAMError(f"memory={self.policy} is not known.", "Use auto, recipe, or the path of a plan.json.")
        _at_least("memory.recompute_every", self.recompute_every, 1)
        for name, values in {**self.by_optimizer(), "activations": self.activations}.items():
            for key, value in values.items():
                _one_of(f"memory.{name}.{key}", value, MEMORY_CHOICES[name])
        for name in ("ema", "attention", "fsdp"):
            _one_of(f"memory.{name}", getattr(self, name), MEMORY_CHOICES[name])

    def by_optimizer(self) -> dict[str, dict[str, str]]:
        """The settings that each optimizer has."""
        return {name: getattr(self, name) for name in ("optimizer", "update", "state", "weights", "weights_dtype")}


@dataclass(kw_only=True)
class Settings:
    """A whole recipe. Made by `load_recipe`; see conf/config.yaml and conf/task/ for what each setting means."""

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
    model: ModelSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    ema: EmaSettings
    augment: AugmentSettings
    micro_batch: MicroBatchSettings
    memory: MemorySettings
    overrides: list[str] = field(default_factory=list)  # the settings that the user named, in dotted form

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        _at_least("batch", self.batch, 1)
        _at_least("keep", self.keep, 1)
        _at_least("grid", self.grid, 1)
        _at_least("seed", self.seed, 0)
        for name in ("kimg", "snapshot_kimg", "log_kimg"):
            if getattr(self, name) <= 0:
                raise LowVRAMError(f"{name}={getattr(self, name)} must be above 0.", "It counts thousands of images.")
        _one_of("task", self.task, TASKS)
        _one_of("logger", self.logger, LOGGERS)
        _one_of("precision", self.precision, PRECISIONS)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device):
            raise LowVRAMError(f"device={self.device} is not known.", "Use auto, cpu, cuda or cuda:N.")
        if self.vram is not None:
            parse_bytes("vram", self.vram)
        self._check_batches()

    def _check_batches(self) -> None:
        group = self.model.mbstd_group_size
        if self.batch % group:
            raise LowVRAMError(
                f"batch={self.batch} must be a multiple of model.mbstd_group_size={group}.",
                f"Use batch={_near_multiple(self.batch, group)}, "
                f"or model.mbstd_group_size={_divisor(self.batch, group)}.",
            )
        shrink = self.loss.path_length_batch_shrink
        if self.batch // shrink < 1:
            raise LowVRAMError(
                f"loss.path_length_batch_shrink={shrink} leaves nothing of batch={self.batch}.",
                f"Use a value up to {self.batch}.",
            )
        for phase in PHASES:
            micro = getattr(self.micro_batch, phase)
            if micro is None:
                continue
            _at_least(f"micro_batch.{phase}", micro, 1)
            whole = self.phase_batch(phase)
            if micro >= whole:  # "at most so many": a smaller batch needs no other recipe
                continue
            if phase in ("D", "R1", "G") and micro % group:
                raise LowVRAMError(
                    f"micro_batch.{phase}={micro} must be a multiple of model.mbstd_group_size={group}, or the "
                    "discriminator sees other groups than in the full batch.",
                    f"Use {_near_multiple(micro, group)}, or model.mbstd_group_size={_divisor(micro, group)}.",
                )
            if whole % micro:
                fits = [n for n in range(1, whole + 1) if whole % n == 0 and (phase == "path_length" or n % group == 0)]
                raise LowVRAMError(
                    f"micro_batch.{phase}={micro} does not divide the phase's batch of {whole}.",
                    f"Use one of {', '.join(map(str, fits))}.",
                )

    def phase_batch(self, phase: str) -> int:
        """Images that a phase uses in one step, over all processes."""
        return self.batch // self.loss.path_length_batch_shrink if phase == "path_length" else self.batch

    @property
    def r1_gamma(self) -> float:
        """The R1 weight: as set, or the usual 0.0002 * resolution^2 / batch."""
        if self.loss.r1_gamma is not None:
            return self.loss.r1_gamma
        return 0.0002 * self.resolution**2 / self.batch


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a size such as "6GB", which means 6 x 2^30 bytes as on a card's box; a bare number is refused."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or (match[2] and match[2].lower() not in _UNITS_BYTES):
        raise LowVRAMError(
            f"{name}={text} is not a size.", f"Write it with its unit, such as {name}=6GB or {name}=5500MB."
        )
    if not match[2]:
        raise LowVRAMError(f"{name}={text} has no unit.", f"Write {name}={match[1]}GB.")
    size_bytes = int(float(match[1]) * _UNITS_BYTES[match[2].lower()])
    if size_bytes <= 0:
        raise LowVRAMError(f"{name}={text} must be above 0.", f"Write the memory of your card, such as {name}=6GB.")
    return size_bytes


def check_resolution(resolution: int) -> None:
    """Raise LowVRAMError unless the resolution is a power of two from 16 to 1024."""
    if resolution < 16 or resolution > 1024 or resolution & (resolution - 1):
        below = min(1024, max(16, 2 ** (max(resolution, 1).bit_length() - 1)))
        near = sorted({below, min(1024, below * 2)})
        raise LowVRAMError(
            f"resolution={resolution} is not a power of two from 16 to 1024.", f"Use {' or '.join(map(str, near))}."
        )


def nearest(name: str, names: list[str]) -> str:
    """A phrase with the names most like `name`, for an error's remedy."""
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(sorted(names))}."


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LowVRAMError(f"{name}={value} is not known.", f"Use one of {', '.join(allowed)}.")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise LowVRAMError(f"{name}={value} is too small.", f"Use {least} or more.")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise LowVRAMError(f"{name}={value} must lie in [0, 1].", "Give it as a fraction, such as 0.5.")


def _near_multiple(value: int, group: int) -> str:
    below = value // group * group
    return " or ".join(str(n) for n in (below, below + group) if n > 0)


def _divisor(value: int, at_most: int) -> int:
    return max(n for n in range(1, at_most + 1) if value % n == 0)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
