"""Published StyleGAN2 networks as ours: their shape as settings, and their tensors by the same keys.

Published files name a network's shape by the arguments of its constructor; newer ones flatten those of the synthesis
network into the generator's. They are pickles; what is written here is a .safetensors file of the same contents: keys
such as `G_ema.mapping.fc0.weight`, and the arguments, by the published names, as JSON in its metadata, "stylegan2".
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.settings import StyleGAN2Settings
from lowvram.settings.stylegan2 import PUBLISHED_MAPPING_LR
from lowvram.weights import stylegan_pickle
from lowvram.weights.stylegan_pickle import NAMES, PublishedNetwork

# Arguments by group, with the setting of ours that says the same; None: no effect on what is computed or trained here.
_GENERATOR: dict[str, str | None] = {
    "z_dim": "model.z_dim",
    "c_dim": "c_dim",
    "w_dim": "model.w_dim",
    "img_resolution": "resolution",
    "img_channels": "img_channels",
    "mapping_kwargs": "",
    "synthesis_kwargs": "",
    "num_layers": "model.mapping_layers",
    "channel_base": "model.channel_base",
    "channel_max": "model.channel_max",
    "num_fp16_res": None,  # precision is chosen for the card
    "conv_clamp": None,
    "w_avg_beta": None,
    "fused_modconv_default": None,
    "use_fp16": None,
    "fp16_channels_last": None,
}
_DISCRIMINATOR: dict[str, str | None] = {
    "c_dim": "c_dim",
    "img_resolution": "resolution",
    "img_channels": "img_channels",
    "block_kwargs": "",
    "mapping_kwargs": "",
    "epilogue_kwargs": "",
    "channel_base": "model.channel_base",
    "channel_max": "model.channel_max",
    "mbstd_group_size": "model.mbstd_group_size",
    "num_fp16_res": None,
    "conv_clamp": None,
    "freeze_layers": None,
    "cmap_dim": None,  # seen in the shapes
    "num_layers": None,
    "w_avg_beta": None,
    "fp16_channels_last": None,
}
# Others, and the values that they have here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "architecture": ("skip", "resnet"),
    "activation": ("lrelu",),
    "lr_multiplier": (0.01,),
    "resample_filter": ([1, 3, 3, 1],),
    "use_noise": (True,),
    "embed_features": (None,),
    "layer_features": (None,),
    "mbstd_num_channels": (1,),
}
_DEFAULTS = {"model.channel_base": 32768, "model.channel_max": 512, "model.mapping_layers": 8, "img_channels": 3}
_OTHER = "Only the StyleGAN2 of the published configurations can be taken: skip generator, residual discriminator."


_METADATA = "stylegan2"


def read(path: Path) -> dict[str, PublishedNetwork]:
    """The networks of a published pickle, or of a file that `write` made, by name: G, D and G_ema, if they are there.

    Raises:
        LowVRAMError: it is neither, damaged, or asks for anything to be executed.
    """
    if path.suffix != ".safetensors":
        return stylegan_pickle.read(path)
    try:
        with safe_open(path, "pt") as file:
            records = json.loads((file.metadata() or {})[_METADATA])
            states: dict[str, dict[str, Tensor]] = {name: {} for name in NAMES if name in records}
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, _, rest = key.partition(".")
                states[name][rest] = stylegan_pickle.finite(path, key, file.get_tensor(key))
            return {
                name: PublishedNetwork(
                    class_name=str(records[name]["class_name"]),
                    args=(),
                    arguments=dict(records[name]["arguments"]),
                    state=state,
                )
                for name, state in states.items()
            }
    except (OSError, SafetensorError) as error:
        raise LowVRAMError(f"weights={path} can't be read: {error}.", "Give a whole file.") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise LowVRAMError(
            f"weights={path} holds no StyleGAN2 networks.", "Use a published pickle, or what to=stylegan wrote."
        ) from error


def write(path: Path, networks: Mapping[str, PublishedNetwork]) -> None:
    """Write networks as one .safetensors file, which appears whole or not at all."""
    records = {n: {"class_name": p.class_name, "arguments": p.arguments} for n, p in networks.items()}
    tensors = {f"{n}.{key}": t.contiguous() for n, p in networks.items() for key, t in p.state.items()}
    draft = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, {_METADATA: json.dumps(records)})
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise LowVRAMError(f"out={path} can't be written: {error}.", "Free some space, or choose another.") from error


def published(settings: StyleGAN2Settings, name: str, state: Mapping[str, Tensor]) -> PublishedNetwork:
    """A network of a run, "G", "D" or "G_ema", under the arguments that published files have for its shape.

    A mapping that learned at another step size is stored for it, and scaled as in published files.
    """
    model = settings.model
    ratio = settings.optimizer.mapping_lr / PUBLISHED_MAPPING_LR
    if name != "D" and ratio != 1:
        state = {key: tensor * ratio if key.startswith("mapping.fc") else tensor for key, tensor in state.items()}
    embedding = state.get("mapping.embed.weight")
    sizes: dict[str, Any] = {"channel_base": model.channel_base, "channel_max": model.channel_max}
    sizes |= {"num_fp16_res": model.num_fp16_res, "conv_clamp": model.conv_clamp}
    arguments: dict[str, Any] = {
        "c_dim": 0 if embedding is None else embedding.shape[1],
        "img_resolution": settings.resolution,
        "img_channels": 3,
    }
    if name == "D":
        arguments |= {**sizes, "epilogue_kwargs": {"mbstd_group_size": model.mbstd_group_size}}
    else:
        arguments |= {"z_dim": model.z_dim, "w_dim": model.w_dim, "synthesis_kwargs": sizes}
        arguments["mapping_kwargs"] = {"num_layers": model.mapping_layers}
    return PublishedNetwork(
        class_name="Discriminator" if name == "D" else "Generator", args=(), arguments=arguments, state=state
    )


def shape(path: Path, networks: Mapping[str, PublishedNetwork]) -> dict[str, Any]:
    """The settings of a recipe that builds networks of this shape: {"resolution": 256, "model.z_dim": 512, ...}.

    `c_dim` and `img_channels`, which are no settings, are among them.

    Raises:
        LowVRAMError: the networks are of another kind.
    """
    found: dict[str, Any] = {}
    for name, network in networks.items():
        is_discriminator = name == "D"
        expected = "Discriminator" if is_discriminator else "Generator"
        if network.class_name != expected:
            raise LowVRAMError(f"weights={path}: {name} is a {network.class_name}, not a {expected}.", _OTHER)
        own = dict(_DEFAULTS)
        if is_discriminator:
            own = {"model.mbstd_group_size": 4} | own
            del own["model.mapping_layers"]
        own |= _settings(path, name, network.arguments, _DISCRIMINATOR if is_discriminator else _GENERATOR)
        for key, value in own.items():
            if found.setdefault(key, value) != value:
                raise LowVRAMError(
                    f"weights={path}: {key} is {found[key]} in one network and {value} in {name}.",
                    "Use a pickle whose networks were trained together.",
                )
    missing = [name for name in ("resolution", "model.z_dim", "model.w_dim") if name not in found]
    if missing and missing != ["model.z_dim", "model.w_dim"]:
        raise LowVRAMError(f"weights={path} does not say its {', '.join(missing)}.", _OTHER)
    return found


def _settings(path: Path, name: str, arguments: Mapping[str, Any], known: Mapping[str, str | None]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in _FIXED:
            if value not in _FIXED[key]:
                raise LowVRAMError(f"weights={path}: {name} has {key}={value}.", _OTHER)
        elif key not in known:
            raise LowVRAMError(f"weights={path}: {name} was made with {key}={value}, which is not known.", _OTHER)
        elif known[key] == "":
            if not isinstance(value, dict):
                raise LowVRAMError(f"weights={path}: {name} has {key}={value}.", _OTHER)
            out |= _settings(path, name, value, known)
        elif (setting := known[key]) is not None:
            out[setting] = value
    return out


@torch.no_grad()
def load(path: Path, name: str, published: PublishedNetwork, network: nn.Module) -> None:
    """Copy a published network's tensors into ours, all of them or none.

    Raises:
        LowVRAMError: a tensor is missing, of another shape, or has no place: the first few are listed.
    """
    wanted: dict[str, Tensor] = network.state_dict(keep_vars=True)
    wrong = [f"{key} is missing{_nearest(key, published.state)}" for key in wanted if key not in published.state]
    for key, tensor in published.state.items():
        if key not in wanted:
            wrong.append(f"{key} has no place here{_nearest(key, wanted)}")
        elif tensor.shape != wanted[key].shape:
            wrong.append(f"{key} has shape {list(tensor.shape)}, not {list(wanted[key].shape)}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise LowVRAMError(f"weights={path}: {name} does not fit: {'; '.join(wrong[:5])}{more}.", _OTHER)
    for key, tensor in published.state.items():
        wanted[key].copy_(tensor)


def _nearest(key: str, keys: Mapping[str, Any]) -> str:
    near = get_close_matches(key, list(keys), n=1, cutoff=0.8)
    return f" (there is {near[0]})" if near else ""
