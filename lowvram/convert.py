"""`python -m lowvram.convert run=FOLDER to=FORMAT out=PATH`: a run, or weights, as files that other programs load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lowvram.config import command
from lowvram.errors import LowVRAMError

FORMATS = ("diffusers", "single_file", "lora", "embedding", "stylegan")
DTYPES = ("fp32", "fp16", "bf16")
_NETWORKS = ("G_ema", "G", "D")
_PIPELINES = ("diffusers", "single_file")
_OF_TRAINED = {"full": _PIPELINES, "lora": ("lora", *_PIPELINES), "textual_inversion": ("embedding",)}
_OF_WEIGHTS = {"stylegan": ("stylegan",), "pipeline": _PIPELINES, "lora": ("lora",), "embedding": ("embedding",)}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class ConvertOptions:
    """Write what was trained, or published weights, in another form.

    to=diffusers: a pipeline folder. to=single_file: one .safetensors file with the original keys. Low-rank weights are
    merged into both. to=lora: the low-rank weights alone. to=embedding: the word that textual inversion learned.
    to=stylegan: the networks of a StyleGAN2 run, or of a published pickle, as one .safetensors file: keys `G_ema.`,
    `G.` and `D.` before the published ones, and in its metadata, under "stylegan2", what they are built with.
    `weights=` trains from any of these, and samples them.
    """

    run: str | None = field(default=None, metadata=_help("the run folder that training wrote"))
    weights: str | None = field(default=None, metadata=_help("in place of run: published weights, or what this wrote"))
    base: str | None = field(
        default=None, metadata=_help("the weights that a run or a LoRA stands on (those it was trained with)")
    )
    scale: str | None = field(
        default=None, metadata=_help("with weights: how much a LoRA counts (1); for several 0.8|0.5, in their order")
    )
    to: str | None = field(
        default=None, metadata=_help("must be given: diffusers, single_file, lora, embedding or stylegan")
    )
    out: str = field(metadata=_help("the folder or .safetensors file to write"))
    layout: str = field(
        default="diffusers", metadata=_help("of lora and embedding: diffusers, or kohya for web interfaces")
    )
    dtype: str | None = field(default=None, metadata=_help("fp32, fp16 or bf16 (as the weights came)"))
    predict: str | None = field(
        default=None, metadata=_help("with weights: what a Stable Diffusion 2.x predicts, eps or v (as its file says)")
    )
    checkpoint: str = field(default="latest", metadata=_help("a step's number, or latest"))

    def __post_init__(self) -> None:
        if (self.run is None) == (self.weights is None):
            raise LowVRAMError("convert needs a run or weights, one of them.", "Write run=outputs/faces32.")
        if self.to is None:
            raise LowVRAMError(f"to is missing: one of {', '.join(FORMATS)}.", _fitting(self))
        for name, value, known in (
            ("to", self.to, FORMATS),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("layout", self.layout, ("diffusers", "kohya")),
            ("predict", self.predict, (None, "eps", "v")),
        ):
            if value not in known:
                raise LowVRAMError(f"{name}={value} is not known.", f"Use one of {', '.join(filter(None, known))}.")
        if self.scale is not None and (self.weights is None or self.to not in _PIPELINES):
            raise LowVRAMError(
                f"scale={self.scale} is for LoRAs that are merged into weights, not for "
                + (f"to={self.to}." if self.weights is not None else "a run."),
                "Leave scale out, or write weights=LORA base=PIPELINE to=diffusers.",
            )
        out = Path(self.out)
        if self.to != "diffusers" and out.suffix != ".safetensors":
            raise LowVRAMError(f"out={self.out} does not end in .safetensors.", f"Use {out.stem}.safetensors.")
        if out.expanduser().exists():
            raise LowVRAMError(f"out={self.out} is there already.", "Remove it, or choose another.")


def _fitting(options: ConvertOptions) -> str:
    """What fits the run or the weights, as a remedy. Raises LowVRAMError where nothing does, or they can't be read."""
    from lowvram.run import Run
    from lowvram.settings import StableDiffusionSettings, StyleGAN2Settings

    if options.run is not None:
        settings, name = Run.open(options.run).settings, f"run={options.run}"
        fits: tuple[str, ...] = ("stylegan",) if isinstance(settings, StyleGAN2Settings) else ()
        if isinstance(settings, StableDiffusionSettings):
            fits = _OF_TRAINED[settings.train]
        if not fits:
            raise LowVRAMError(
                f"{name} is of task={settings.task}, which is converted to nothing: its folder is what there is.",
                "Convert a run of StyleGAN2 or of Stable Diffusion.",
            )
    else:
        from lowvram.tasks.adapted import kind_of

        name, paths = f"weights={options.weights}", [Path(part.strip()) for part in (options.weights or "").split("|")]
        kinds = [kind_of(path.expanduser()) for path in paths]
        if options.base is not None and "embedding" in kinds:
            raise LowVRAMError(
                f"{name}: words are read by a pipeline, and are no part of it.", "Sample with them: lowvram.sample."
            )
        merged = options.base is not None or len(kinds) > 1
        fits = _PIPELINES if merged else _OF_WEIGHTS[kinds[0]]
    return f"{name} fits " + " or ".join(f"to={one}" for one in fits) + "."


def main(options: ConvertOptions) -> None:
    """Convert. Raises LowVRAMError for what is missing, damaged or of another kind."""
    out = Path(options.out).expanduser()
    wrote = _stylegan(options, out) if options.to == "stylegan" else _stable_diffusion(options, out)
    print(f"lowvram: wrote {wrote} to {out}")


def _stylegan(options: ConvertOptions, out: Path) -> str:
    from lowvram import checkpoint
    from lowvram.run import Run
    from lowvram.settings import StyleGAN2Settings
    from lowvram.weights import stylegan2

    if options.weights is not None:
        networks = stylegan2.read(Path(options.weights).expanduser())
    else:
        run = Run.open(options.run or "")
        if not isinstance(run.settings, StyleGAN2Settings):
            raise LowVRAMError(
                f"{options.run} is a run of task={run.settings.task}, and to={options.to} is for StyleGAN2.",
                "Give a run of StyleGAN2.",
            )
        saved = checkpoint.read(run.find_checkpoint(options.checkpoint), only=_NETWORKS)
        networks = {n: stylegan2.published(run.settings, n, saved.tensors[n]) for n in _NETWORKS if n in saved.tensors}
    stylegan2.write(out, networks)
    return ", ".join(networks)


def _stable_diffusion(options: ConvertOptions, out: Path) -> str:
    from lowvram.tasks import adapted, export, load_run, load_weights, published
    from lowvram.tasks.stable_diffusion import StableDiffusionTask
    from lowvram.weights.pipeline import open_pipeline

    dtype = None if options.dtype is None else export.DTYPES[options.dtype]
    layout, to = cast(Any, options.layout), str(options.to)
    if options.weights is not None:
        path, alone = Path(options.weights).expanduser(), options.base is None and "|" not in options.weights
        kind = adapted.kind_of(path) if alone else None
        if kind == "pipeline" and options.to in _PIPELINES and options.scale is None:  # no network is made
            pipeline = open_pipeline(path, prediction_type=published.prediction_type(options.predict))
            return export.write_pipeline(pipeline, out, to, {}, dtype)
        if kind in ("lora", "embedding") and kind == options.to:  # in another layout
            return export.rewrite(path, out, to=kind, dtype=dtype, layout=layout)
        named: dict[str, Any] = {"base": options.base, "scale": options.scale, "predict": options.predict}
        task = load_weights(options.weights, device="cpu", prepared=False, **named)
    else:
        task = load_run(
            options.run or "", checkpoint=options.checkpoint, device="cpu", base=options.base, prepared=False
        )
    if not isinstance(task, StableDiffusionTask):
        raise LowVRAMError(
            f"{options.run or options.weights} is of task={task.settings.task}, and to={options.to} is for Stable "
            "Diffusion.",
            "StyleGAN2 has to=stylegan.",
        )
    return export.write(task, out, to=to, dtype=dtype, layout=layout)


if __name__ == "__main__":
    command(ConvertOptions, main, "convert")
