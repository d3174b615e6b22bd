"""What a pipeline's folder holds beside tensors: which file of several has the weights, and small JSON files."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lowvram.errors import LowVRAMError

_MOST_JSON_BYTES = 2**22
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of UNet and autoencoder, of text encoders twice
_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pt")
_AGAIN = "Download it again."


def snapshot(path: Path) -> Path:
    """The folder itself, or within one of the Hub's cache (models--...) the snapshot that is there.

    Raises:
        LowVRAMError: it has several.
    """
    if (path / "model_index.json").is_file() or not (path / "snapshots").is_dir():
        return path
    found = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    if len(found) == 1:
        return found[0]
    names = ", ".join(folder.name for folder in found) or "none"
    raise LowVRAMError(f"weights={path} has {len(found)} snapshots: {names}.", "Give the path of one of them.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        LowVRAMError: it can't be read, or is none.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(f"it is {path.stat().st_size:,} bytes long")
        content = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it is a {type(content).__name__}, not an object")
    except OSError as error:
        raise LowVRAMError(f"{path} can't be read: {error.strerror or error}.", _AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise LowVRAMError(f"{path} is damaged: {error}.", _AGAIN) from error
    return content


def read_index(root: Path) -> dict[str, Any]:
    """The content of model_index.json; {} where there is none.

    Raises:
        LowVRAMError: it is damaged, or names a component that is no folder's name.
    """
    path = root / "model_index.json"
    index = read_json(path) if path.exists() else {}
    for name, value in index.items():
        if isinstance(value, list) and (Path(name).name != name or "\\" in name):
            raise LowVRAMError(f"{path} has a component {name!r}, which is no name of a folder.", _AGAIN)
    return index


def default_index(config: Callable[[str], Mapping[str, Any]], family: str, parts: Collection[str]) -> dict[str, Any]:
    """The content of a model_index.json for a pipeline that has none. config: those of its parts and "scheduler"."""
    xl, inpaint = family == "sdxl", config("unet")["in_channels"] == 9
    absent = [None, None]
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if xl else ''}{'Inpaint' if inpaint else ''}Pipeline",
        "_diffusers_version": "0.35.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", config("scheduler")["_class_name"]],
        "feature_extractor": absent,
    }
    if xl:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "image_encoder": absent}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": absent, "requires_safety_checker": False}
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if part in index and part not in parts:
            index |= {part: absent} | ({part.replace("text_encoder", "tokenizer"): absent} if part != "vae" else {})
    return index


def weights_file(folder: Path) -> Path:
    """The file of a component's tensors, or the index of its shards.

    .safetensors before pickles, the plain before variants such as fp16.

    Raises:
        LowVRAMError: there is none, or there are several variants and no plain file.
    """
    for ending in _ENDINGS:
        for stem in _STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    for ending in (".safetensors", ".bin"):
        files = sorted(file for stem in _STEMS for file in folder.glob(f"{stem}.*{ending}") if "-of-" not in file.name)
        variants = {file.name.removesuffix(ending).partition(".")[2]: file for file in files}
        if "fp16" in variants or len(variants) == 1:
            return variants.get("fp16", files[0])
        if variants:
            raise LowVRAMError(
                f"{folder} has no plain weights, but several variants: {', '.join(variants)}.",
                f"Remove the part .{next(iter(variants))} from the name of one.",
            )
    raise LowVRAMError(
        f"{folder} has no weights ({', '.join(f'{stem}.safetensors' for stem in _STEMS[:2])} or a .bin).",
        "Download the missing files, or use a whole pipeline.",
    )


def copy_rest(path: Path, index: Mapping[str, Any], out: Path) -> None:
    """Copy the components that are not in `out` yet, such as the safety checker, and the licence. Nothing is read.

    Of weights that are there twice only the .safetensors are copied.

    Raises:
        OSError: something can't be read or written.
    """
    root = snapshot(path)
    for name, value in index.items():
        if isinstance(value, list) and (root / name).is_dir() and not (out / name).exists():
            (out / name).mkdir()
            safe = any((root / name).glob("*.safetensors"))
            for file in sorted((root / name).iterdir()):
                if file.is_file() and not (safe and file.suffix in _OTHER_WEIGHTS):
                    shutil.copyfile(file, out / name / file.name)
    for file in sorted(root.glob("LICENSE*")):
        if file.is_file():
            shutil.copyfile(file, out / file.name)
