"""Training and sampling with the captions that a CLIP text encoder reads: its output is kept, and it is not trained."""

from pathlib import Path

import pytest
import torch
from tiny_clip import save_encoder, save_tokenizer
from tiny_diffusion import ldm_recipe, save_vae, steps

from lowvram import Trainer
from lowvram.errors import LowVRAMError
from lowvram.models.clip_text import ClipText
from lowvram.tasks import load_run


def test_captions_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    clip, vae = tmp_path / "clip", save_vae(tmp_path / "vae")
    save_tokenizer(clip)
    save_encoder(clip, 16)
    words = (
        "condition=text",
        f"text.clip={clip}",
        "unet.attention=[true,true]",
        "loss.condition_dropout=0.5",
        "kimg=0.024",
    )
    trainer = Trainer(ldm_recipe(tmp_path / "run", vae, *words), quiet=True)
    assert set(trainer.task.networks) == {"denoiser", "denoiser_ema"}  # it is no part of the run

    (kept,) = (tmp_path / "cache" / "captions").iterdir()
    written = kept.stat().st_mtime_ns
    seeds = torch.arange(200)
    told = trainer.task.condition.training(torch.zeros(200, dtype=torch.int64), seeds, None)
    alone = ClipText(clip).encode([trainer.task.captions[0], ""], too_long="cut")[0]
    rows = [int((told["context"] - row).abs().flatten(1).amax(1).lt(2e-2).sum()) for row in alone]
    assert sum(rows) == 200 and 60 < rows[1] < 140  # the image's caption, or none for half of them

    steps(trainer)
    Trainer(ldm_recipe(tmp_path / "again", vae, *words), quiet=True)
    assert kept.stat().st_mtime_ns == written

    task = load_run(tmp_path / "run", device="cpu")
    for parameter in task.denoiser_ema.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    red, blue = (task.sample(2, 1, prompts=[text], guidance=2.0) for text in ("a red cat", "blue"))
    assert red.dtype == torch.uint8 and not torch.equal(red, blue)
    with pytest.raises(LowVRAMError, match="200 tokens, of which CLIP reads 75"):
        task.sample(1, prompts=["cat " * 200])
