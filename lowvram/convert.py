"""`python -m lowvram.convert run=FOLDER to=stylegan out=FILE`: a run's networks as a file that others can load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowvram.config import command
from lowvram.errors import LowVRAMError

FORMATS = ("stylegan",)
_NETWORKS = ("G_ema", "G", "D")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(kw_only=True)
class ConvertOptions:
    """Write the networks of a StyleGAN2 run, or of a published pickle, as one .safetensors file.

    Its keys are `G_ema.`, `G.` and `D.` before the published ones; its metadata holds, under "stylegan2", what the
    networks are built with. `weights=FILE` trains from it and samples it.
    """

    run: str | None = field(default=None, metadata=_help("the run folder that training wrote"))
    weights: str | None = field(default=None, metadata=_help("in place of run: a published StyleGAN2 (.pkl)"))
    to: str = field(default="stylegan", metadata=_help("stylegan: one .safetensors file with the published keys"))
    out: str = field(metadata=_help("the file to write"))
    checkpoint: str = field(default="latest", metadata=_help("a step's number, or latest"))

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise LowVRAMError(f"to={self.to} is not known.", f"Use to={FORMATS[0]}.")
        if (self.run is None) == (self.weights is None):
            raise LowVRAMError("convert needs a run or weights, one of them.", "Write run=outputs/faces32.")
        out = Path(self.out)
        if out.suffix != ".safetensors":
            raise LowVRAMError(f"out={self.out} does not end in .safetensors.", f"Use {out.stem}.safetensors.")
        if out.expanduser().exists():
            raise LowVRAMError(f"out={self.out} is there already.", "Remove it, or choose another.")


def main(options: ConvertOptions) -> None:
    """Convert. Raises LowVRAMError for what is missing, damaged or of another kind."""
    from lowvram import checkpoint
    from lowvram.run import Run
    from lowvram.settings import StyleGAN2Settings
    from lowvram.weights import stylegan2

    out = Path(options.out).expanduser()
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
    print(f"lowvram: wrote {', '.join(networks)} to {out}")


if __name__ == "__main__":
    command(ConvertOptions, main, "convert")
