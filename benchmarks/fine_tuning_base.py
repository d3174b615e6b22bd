"""A small Stable Diffusion made from nothing, for benchmarks.fine_tuning: faces on papers of several colours.

Its folder lies as a published one does. The autoencoder learns faces and blurred colours of all kinds, as published
ones do, so that it is not what stands between a pipeline and a new style.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lowvram import Trainer, convert, load_recipe
from lowvram.data import open_dataset
from lowvram.data.captions import read_captions
from lowvram.models.autoencoder import Autoencoder
from lowvram.models.clip_text import published
from lowvram.models.unet import UNet
from lowvram.settings import Settings
from lowvram.tasks import Task, load_run
from lowvram.tasks.autoencoder import AutoencoderTask, save, to_range
from lowvram.tasks.stable_diffusion import StableDiffusionTask
from lowvram.weights import clip_vocabulary, pipeline_folder
from lowvram.weights.random_pipeline import RandomPipeline

RESOLUTION = 32
SAMPLING = {"steps": 10, "guidance": 2.0}
WHITE = ("white", (255, 255, 255))  # is not named in captions
PAPERS = {
    "yellow": (250, 235, 110),
    "green": (140, 220, 130),
    "blue": (110, 150, 245),
    "pink": (250, 150, 205),
    "red": (235, 100, 90),
    "grey": (150, 150, 150),
    "orange": (250, 180, 100),
}
NEW_PAPER = (150, 110, 225)  # violet: between blue and pink, and neither

Colour = tuple[int, int, int]
Paper = tuple[str, Colour]

_WIDTH = 64  # of the text encoder
_UNET = {
    "sample_size": RESOLUTION // 4,
    "block_out_channels": [48, 96],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "cross_attention_dim": _WIDTH,
}
_TEXT = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
_AUTOENCODER = ["loss.perceptual=none", "model.norm_groups=1", "optimizer.lr=2e-3", "optimizer.schedule=cosine"]
_MEASURED = 256  # images whose latents set the scale
_AUTOENCODER_FACES = 1000


def common(home: Path) -> list[str]:
    """Settings of all trainings of Stable Diffusion here. home: where latents are kept."""
    return [
        f"resolution={RESOLUTION}",
        f"latent.folder={home / 'latents'}",
        *("data.workers=0", "grid=16", "snapshot_kimg=1000", "log_kimg=0.25"),
        "memory.optimizer.denoiser=adam",
        *(f"sampling.{name}={value}" for name, value in SAMPLING.items()),
    ]


def train(settings: Settings) -> float:
    """Train to the end; the seconds that it took. Raises KeyboardInterrupt where it was stopped before."""
    trainer = Trainer(settings, quiet=True)
    begun = time.perf_counter()
    trainer.fit()
    if trainer.interrupted:
        raise KeyboardInterrupt
    return time.perf_counter() - begun


def make(home: Path, *, faces: int, autoencoder_kimg: float, kimg: float, seed: int) -> Path:
    """Make the pipeline. faces: of the built-in ones the first so many. Returns the folder of its export, home/base."""
    random, known = home / "random", home / "known"
    network = _autoencoder(home, min(faces, _AUTOENCODER_FACES), autoencoder_kimg, seed)
    write_random(random, network, seed)
    papers: list[Paper] = [WHITE, *PAPERS.items()]
    draw(known, range(faces), paper=lambda index: papers[index % len(papers)])
    return _pretrained(home, random, known, kimg, seed)


def _pretrained(home: Path, random: Path, known: Path, kimg: float, seed: int) -> Path:
    """Train the UNet and the text encoder, and export their averages."""
    words = [
        *(f"weights={random}", f"data.path={known}", f"out={home / 'runs' / 'base'}", f"kimg={kimg}", f"seed={seed}"),
        *("batch=8", "device=cpu", "text.train=true", "optimizer.lr=1e-3", "optimizer.schedule=cosine"),
        *("optimizer.final_lr=0.05", "ema.enabled=true", "ema.half_life_kimg=0.5", "optimizer.warmup_kimg=0.2"),
        *common(home),
    ]
    print(f"the pipeline: {kimg:g} kimg", flush=True)
    train(load_recipe("sd15_finetune", words))
    base = home / "base"
    convert.main(convert.ConvertOptions(run=str(home / "runs" / "base"), to="diffusers", out=str(base)))
    return base


def draw(
    folder: Path,
    indices: Iterable[int],
    *,
    paper: Callable[[int], Paper],
    named: bool = True,
    captioned: bool = True,
) -> list[str]:
    """Write built-in faces on coloured paper, with their captions beside them; the captions.

    paper: of each face. named: captions begin with its colour, unless it is white. captioned: they are written.
    """
    folder.mkdir(parents=True)
    indices = list(indices)
    drawn = open_dataset(None, resolution=RESOLUTION, builtin_count=max(indices) + 1)
    texts, captions = read_captions(drawn), []
    for index in indices:
        name, colour = paper(index)
        pixels = drawn.load(index).pixels.astype(np.float32) * np.array(colour, np.float32) / 255
        Image.fromarray(np.round(pixels).astype(np.uint8)).save(folder / f"{index:06d}.png")
        captions.append(f"{name} paper, {texts[index]}" if named and name != WHITE[0] else texts[index])
        if captioned:
            (folder / f"{index:06d}.txt").write_text(captions[-1] + "\n", encoding="utf-8")
    return captions


def _autoencoder(home: Path, faces: int, kimg: float, seed: int) -> Autoencoder:
    """Trained on faces and blurs of any colour; its latents are scaled to a mean square of 1, as published ones are."""
    folder, out = home / "colours", home / "runs" / "autoencoder"
    chance = np.random.default_rng(seed)
    colours = chance.integers(80, 256, (faces, 3)).tolist()
    draw(folder, range(faces), paper=lambda index: ("any", tuple(colours[index])), captioned=False)
    for index in range(faces):  # an autoencoder learns outlines first and colours last, unless there is nothing else
        few = Image.fromarray(chance.integers(0, 256, (3, 3, 3), np.uint8))
        few.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).save(folder / f"blurred_{index:06d}.png")
    words = [f"data.path={folder}", f"out={out}", f"kimg={kimg}", f"seed={seed}", f"resolution={RESOLUTION}"]
    words += ["snapshot_kimg=1000", "log_kimg=0.25", "grid=16", "device=cpu", *_AUTOENCODER]
    print(f"the autoencoder: {kimg:g} kimg", flush=True)
    train(load_recipe("faces64_vae", words))
    return _scaled(out, folder)


def _scaled(out: Path, folder: Path) -> Autoencoder:
    """The autoencoder of a run, with the scale of its latents measured on pictures of the folder."""
    task = load_run(out, device="cpu")
    assert isinstance(task, AutoencoderTask)
    images = open_dataset(folder, resolution=RESOLUTION)
    some = torch.stack([images[index] for index in range(min(_MEASURED, len(images)))])
    network = task.average
    with torch.no_grad():
        moments = network.encode(to_range(some))  # [n, 2 C, h, w]
    mean, log_variance = moments.chunk(2, dim=1)
    network.scaling_factor = float((mean.square() + log_variance.exp()).mean().rsqrt())
    return network


def given_back(task: Task, images: Tensor) -> Tensor:
    """Images uint8 [n, 3, R, R] encoded and decoded by the autoencoder of a pipeline, the same."""
    assert isinstance(task, StableDiffusionTask)
    with torch.no_grad():
        moments = task.codec.encode(images, task.device)
    return task.codec.decode(task.codec.to_latents(moments), task.device, len(images))


def write_random(folder: Path, autoencoder: Autoencoder, seed: int) -> None:
    """Write a pipeline of Stable Diffusion 1.x with an autoencoder that can do something, and all else random."""
    import transformers

    model = RandomPipeline("sd1")
    channels = autoencoder.latent_channels
    configs: dict[str, dict[str, Any]] = {
        "unet": model.config("unet") | _UNET | {"in_channels": channels, "out_channels": channels},
        "text_encoder": model.config("text_encoder") | _TEXT | _ENDS | {"projection_dim": _WIDTH},
        "scheduler": model.config("scheduler"),
    }
    torch.manual_seed(seed)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(configs["text_encoder"]))
    _write(folder / "unet", "diffusion_pytorch_model", configs["unet"], UNet.from_config(configs["unet"]).state_dict())
    _write(folder / "text_encoder", "model", configs["text_encoder"], published(encoder).state_dict())
    save(autoencoder, folder / "vae")
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    shutil.copytree(clip_vocabulary.folder(), folder / "tokenizer")
    index = pipeline_folder.default_index(configs.__getitem__, "sd1", model.parts)
    _write_json(folder / "model_index.json", index)


def _write(folder: Path, stem: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    _write_json(folder / "config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if not name.endswith("position_ids")}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
