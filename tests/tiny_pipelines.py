"""Stable Diffusion 1.x, 2.x and XL of random tiny weights, as diffusers and transformers write them to a folder."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from tiny_clip import LENGTH, VOCABULARY, save_tokenizer

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")

# Widths follow the published rules, by which a single file is read: 32 groups in the norms, 8 heads in a UNet of
# Stable Diffusion 1.x, else heads 64 wide (at least one), in text encoders too.
CHANNELS = (32, 32, 64)
TEXT_WIDTH = {"sd1": 128, "sd2": 128, "sdxl": 64}
SECOND_WIDTH = 128  # of SDXL's second text encoder
POOLED = 96
SIZE = 32  # of the images, in pixels; latents are a quarter
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def make_pipeline(
    folder: Path,
    family: Family,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | None = None,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Write a pipeline that diffusers loads and samples with.

    tokenizer: a folder to take the tokenizer's files from, with the `vocabulary` they need; None: one of single
    letters. Images are SIZE pixels high and wide, latents a quarter of it.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {"unet": _unet(family), "vae": _autoencoder(family)}
    width = TEXT_WIDTH[family]
    parts["text_encoder"] = _text(width, vocabulary, act="gelu" if family == "sd2" else "quick_gelu")
    if family == "sdxl":
        parts["text_encoder_2"] = _text(SECOND_WIDTH, vocabulary, act="gelu", projection=POOLED)
    for name, network in parts.items():
        _fill(network)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        network.save_pretrained(folder / name, safe_serialization=True)
    pads = {"tokenizer": "!" if family == "sd2" else "<|endoftext|>"} | (
        {"tokenizer_2": "!"} if family == "sdxl" else {}
    )
    for name, pad in pads.items():
        if tokenizer is None:
            save_tokenizer(folder / name, pad)
        else:
            shutil.copytree(tokenizer, folder / name, dirs_exist_ok=True)
            _set_pad(folder / name / "tokenizer_config.json", pad)
    _scheduler(family).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(family, parts), indent=2))
    return folder


def load_pipeline(folder: Path) -> Any:
    """The pipeline in diffusers, silent."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline: Any, prompt: str = "a cat", *, steps: int = 2, seed: int = 0, **options: Any) -> torch.Tensor:
    """What a diffusers pipeline makes of a prompt: [1, 3, SIZE, SIZE], 0 to 1."""
    start = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": steps, "height": SIZE, "width": SIZE, "output_type": "pt", "generator": start}
    return pipeline(prompt, **(settings | options)).images


def _unet(family: Family) -> diffusers.UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": SIZE // 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH[family],
        "attention_head_dim": 8,
    }
    if family != "sd1":
        config |= {"use_linear_projection": True, "attention_head_dim": [max(1, c // 64) for c in CHANNELS]}
    if family == "sdxl":
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": TEXT_WIDTH[family] + SECOND_WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        }
    return diffusers.UNet2DConditionModel(**config)


def _autoencoder(family: Family) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )


def _text(width: int, vocabulary: int, *, act: str, projection: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=LENGTH,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if act == "gelu" else vocabulary - 1,
    )
    return (transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection)(config)


def _fill(network: torch.nn.Module) -> None:
    """Weights unlike one another: initial ones hide mistakes, being zero, one or nearly alike."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        else:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)


def _scheduler(family: Family) -> Any:
    if family == "sdxl":
        kept = {key: value for key, value in SCHEDULER.items() if key not in ("clip_sample", "set_alpha_to_one")}
        return diffusers.EulerDiscreteScheduler(**kept, timestep_spacing="leading", prediction_type="epsilon")
    return diffusers.DDIMScheduler(**SCHEDULER, prediction_type="v_prediction" if family == "sd2" else "epsilon")


def _set_pad(path: Path, pad: str) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"pad_token": pad}))


def _index(family: Family, parts: dict[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
    }
    for name, network in parts.items():
        library = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, type(network).__name__]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", type(_scheduler(family)).__name__]
    if family == "sdxl":
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    return index
