"""Files of low-rank adapters as others write and read them: diffusers, and the common web interfaces ("kohya")."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowvram.adapters import lora
from lowvram.adapters.lora import Adapters, Rank
from lowvram.adapters.lora_names import TEXT_MODEL, flat_key, nearest, parse
from lowvram.errors import LowVRAMError
from lowvram.weights.tensor_file import NewTensor, TensorFile, finite, write_tensors

Layout = Literal["diffusers", "kohya"]
_METADATA = "lora_adapter_metadata"  # diffusers': the settings of peft, as JSON
_REMEDY = "Give a LoRA or DoRA of Stable Diffusion; merge other adapters with the program that made them."


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The change of one layer, in the file's dtype: down [rank, in, ...], up [out, rank, ...], magnitude [out]."""

    down: Tensor
    up: Tensor
    magnitude: Tensor | None
    alpha: float

    @property
    def rank(self) -> Rank:
        return Rank(rank=self.down.shape[0], alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What a file holds: for each part of a pipeline (unet, text_encoder, text_encoder_2) its layers by path.

    Paths are those of diffusers' folders; those of text encoders begin with `text_model.`.
    """

    path: Path
    parts: dict[str, dict[str, Layer]]
    metadata: dict[str, str]

    @property
    def dora(self) -> bool:
        """Whether there are norms."""
        return any(layer.magnitude is not None for layers in self.parts.values() for layer in layers.values())

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(rank.rank for rank in self.ranks)

    @property
    def alpha(self) -> float:
        """The alpha of a layer of that rank."""
        return next(rank.alpha for rank in self.ranks if rank.rank == self.rank)

    @property
    def ranks(self) -> list[Rank]:
        """Of all layers."""
        return [layer.rank for layers in self.parts.values() for layer in layers.values()]


def read(path: str | Path, *, layers_per_block: int = 2) -> LoraFile:
    """Read an adapter of either layout, or of older versions of diffusers.

    layers_per_block: of the UNet, where the file has the names of single files; 2 in all published ones.

    Raises:
        LowVRAMError: the file can't be read; holds tensors of other adapters, a layer in part, shapes that do not fit
            one another, or numbers that are not finite.
    """
    path = Path(path).expanduser()
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    with TensorFile.open(path) as file:
        names = {key: parse(key, layers_per_block) for key in file.names}
        others = [key for key, name in names.items() if name is None]
        if others:
            raise LowVRAMError(
                f"{path}: {len(others)} of {len(names)} tensors belong to no LoRA, {', '.join(others[:3])} among them.",
                _REMEDY,
            )
        for key, name in names.items():
            assert name is not None
            found.setdefault((name.part, name.path), {})[name.kind] = finite(path, key, file.read(key))
        metadata = dict(file.metadata)
    alphas = _Alphas(path, metadata)
    parts: dict[str, dict[str, Layer]] = {}
    for (part, layer), tensors in found.items():
        parts.setdefault(part, {})[layer] = _layer(path, part, layer, tensors, alphas)
    return LoraFile(path=path, parts=parts, metadata=metadata)


def add_from_file(
    network: nn.Module,
    part: str,
    file: LoraFile | str | Path,
    *,
    weight: float = 1.0,
    name: str | None = None,
    dropout: float = 0.0,
    values: bool = True,
) -> Adapters:
    """Put the adapters that a file has for a part of the pipeline into its network, beside those that are there.

    They can be trained further: base weights are frozen, theirs are fp32. weight: how much they count.
    name, dropout: see `lora.add`; name None: one that is free. values: False takes ranks and layers from the file
    alone, for fake tensors, which have no numbers.

    Raises:
        LowVRAMError: as `read` and `lora.add_to`; or the file has nothing for this part, or layers or shapes that the
            network does not have.
    """
    if not isinstance(file, LoraFile):
        down: Any = getattr(network, "down_blocks", None)
        file = read(file, layers_per_block=len(down[0].resnets) if part == "unet" and down else 2)
    if part not in file.parts:
        raise LowVRAMError(f"{file.path} has no adapters for {part}.", f"It has some for {', '.join(file.parts)}.")
    targets = lora.target_layers(network)
    layers = _by_path(file, part, targets)
    for path, layer in layers.items():
        _check_shapes(file.path, path, layer, targets[path])
    norms = {layer.magnitude is not None for layer in layers.values()}
    if len(norms) > 1:
        raise LowVRAMError(f"{file.path}: some layers of {part} have DoRA's norms, and some have not.", _REMEDY)
    taken = {key for module in network.modules() for key in getattr(module, "lora_A", {})}
    free = next(f"file{n}" for n in range(len(taken) + 1) if f"file{n}" not in taken)
    ranks = {path: layer.rank for path, layer in layers.items()}
    adapters = lora.add_to(network, ranks, dropout=dropout, dora=norms == {True}, name=name or free)
    with torch.no_grad():
        for path, layer in layers.items() if values else ():
            held = adapters.get_submodule(path)
            tensors = {"lora_A": layer.down, "lora_B": layer.up, "lora_magnitude_vector": layer.magnitude}
            for key, value in tensors.items():
                if value is not None:
                    parameter = held.get_parameter(f"{key}.weight")
                    parameter.copy_(value.reshape(parameter.shape))
    adapters.scale(weight)
    return adapters


def write(
    path: str | Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    alpha: float | Mapping[str, Mapping[str, float]] | None = None,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters as one .safetensors file, which appears whole or not at all.

    In the diffusers layout an alpha that is not the rank is in the metadata, which programs other than diffusers may
    not read; in the kohya layout it is a tensor of each layer, which all read. Of DoRA diffusers reads its own layout
    alone, and the web interfaces the kohya layout alone.

    Args:
        parts: for unet, text_encoder, text_encoder_2 the state dict of its `lora.Adapters`.
        alpha: of all layers, or of each by part and path; None: the rank.
        dtype: to write in; None: the tensors' own.
        metadata: more of it, text by name.

    Raises:
        LowVRAMError: the file can't be written.
        ValueError: a part or tensor that is none of an adapter's.
    """
    layers = {part: _of_state(part, state, alpha) for part, state in parts.items() if state}
    if not layers:
        raise ValueError("there are no adapters to write")
    if layout == "diffusers":
        tensors = _diffusers_tensors(layers)
        notes = {"format": "pt", _METADATA: json.dumps(_peft_settings(layers), indent=2, sort_keys=True)}
    elif layout == "kohya":
        tensors, notes = _kohya_tensors(layers), {"format": "pt"}
        ranks = [layer.rank for part in layers.values() for layer in part.values()]
        top = max(ranks, key=lambda rank: rank.rank)
        notes |= {"ss_network_module": "networks.lora", "ss_network_dim": str(top.rank)}
        notes["ss_network_alpha"] = str(top.alpha)
    else:
        raise ValueError(f"layout={layout!r} is neither diffusers nor kohya")

    def entry(tensor: Tensor) -> NewTensor:
        width = dtype or tensor.dtype
        return NewTensor(tuple(tensor.shape), width, lambda: tensor.detach().to(width))

    write_tensors(path, {key: entry(tensor) for key, tensor in tensors.items()}, notes | dict(metadata or {}))


def state_of(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The layers of a part as the state dict of a `lora.Adapters`, which `write` takes."""
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        state |= {f"{path}.lora_A.weight": layer.down, f"{path}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            state[f"{path}.lora_magnitude_vector.weight"] = layer.magnitude
    return state


# Reading.


class _Alphas:
    """The alphas that diffusers wrote into the metadata."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        try:
            settings = json.loads(metadata.get(_METADATA, "{}"))
            self._alpha = {k: float(v) for k, v in settings.items() if k.endswith(".lora_alpha")}
            patterns = {k: v for k, v in settings.items() if k.endswith(".alpha_pattern")}
            self._patterns = {k: {n: float(a) for n, a in v.items()} for k, v in patterns.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise LowVRAMError(f"{path}: its metadata {_METADATA} can't be read: {error}.", _REMEDY) from error

    def of(self, part: str, path: str) -> float | None:
        for end, alpha in self._patterns.get(f"{part}.alpha_pattern", {}).items():
            if path == end or path.endswith(f".{end}"):
                return alpha
        return self._alpha.get(f"{part}.lora_alpha")


def _layer(file: Path, part: str, path: str, tensors: Mapping[str, Tensor], alphas: _Alphas) -> Layer:
    where = f"{file}: {part}.{path}"
    missing = [kind for kind in ("down", "up") if kind not in tensors]
    if missing:
        raise LowVRAMError(f"{where} has {', '.join(tensors)} but no {missing[0]}.", "Use a whole file.")
    down, up, magnitude = tensors["down"], tensors["up"], tensors.get("magnitude")
    fits = down.dim() == up.dim() and down.dim() in (2, 4) and down.numel() and up.shape[1] == down.shape[0]
    if not fits or up[0, 0].numel() != 1:
        raise LowVRAMError(f"{where} has weights of {list(down.shape)} and {list(up.shape)}.", _REMEDY)
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise LowVRAMError(
            f"{where} has norms of {list(magnitude.shape)}, not one for each of {up.shape[0]} outputs.",
            "Only DoRA with the norms of the outputs can be read.",
        )
    alpha = tensors["alpha"] if "alpha" in tensors else alphas.of(part, path)
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise LowVRAMError(f"{where} has an alpha of {list(alpha.shape)}, not a number.", _REMEDY)
    value = float(down.shape[0] if alpha is None else alpha)
    return Layer(down=down, up=up, magnitude=None if magnitude is None else magnitude.flatten(), alpha=value)


def _by_path(file: LoraFile, part: str, targets: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The file's layers by their paths in the network."""
    known = {path.removeprefix(TEXT_MODEL): path for path in targets}
    flat = {path.replace(".", "_"): real for path, real in known.items()}
    found: dict[str, Layer] = {}
    wrong = []
    for path, layer in file.parts[part].items():
        short = path.removeprefix(TEXT_MODEL)
        real = known.get(short) or flat.get(short.replace(".", "_"))
        if real is None:
            wrong.append(path)
        else:
            found[real] = layer
    if wrong:
        raise LowVRAMError(
            f"{file.path}: {len(wrong)} of {len(file.parts[part])} layers are none of this {part}: "
            f"{nearest(wrong, targets)}.",
            "Use a file that was made for this family of models.",
        )
    return found


def _check_shapes(file: Path, path: str, layer: Layer, target: nn.Module) -> None:
    rank = layer.rank.rank
    if isinstance(target, nn.Conv2d):
        down: tuple[int, ...] = (rank, target.in_channels // target.groups, *target.kernel_size)
        outputs = target.out_channels
    else:
        assert isinstance(target, nn.Linear)
        down, outputs = (rank, target.in_features), target.out_features

    def four(shape: Sequence[int]) -> tuple[int, ...]:  # a 1x1 convolution's will do for a linear layer, and so on
        return (*shape, 1, 1)[:4]

    if four(layer.down.shape) != four(down) or layer.up.shape[0] != outputs:
        raise LowVRAMError(
            f"{file}: {path} has weights of {list(layer.down.shape)} and {list(layer.up.shape)}, where the network "
            f"needs {list(down)} and {[outputs, rank]}.",
            "Use a file that was made for this family of models.",
        )


# Writing.


def _of_state(
    part: str, state: Mapping[str, Tensor], alpha: float | Mapping[str, Mapping[str, float]] | None
) -> dict[str, Layer]:
    """The layers of the state dict of a `lora.Adapters`, under the paths of files."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = parse(f"{part}.{key}")
        if name is None or name.part != part:
            raise ValueError(f"{part}.{key} is no tensor of an adapter")
        found.setdefault(name.path, {})[name.kind] = tensor
    layers = {}
    for path, tensors in found.items():
        value: Any = alpha
        if isinstance(alpha, Mapping):
            of_part = alpha[part]
            value = of_part.get(path, of_part.get(path.removeprefix(TEXT_MODEL)))
        value = float(tensors["down"].shape[0] if value is None else value)
        layers[path] = Layer(down=tensors["down"], up=tensors["up"], magnitude=tensors.get("magnitude"), alpha=value)
    return layers


def _diffusers_tensors(layers: Mapping[str, Mapping[str, Layer]]) -> dict[str, Tensor]:
    tensors = {}
    for part, of_part in layers.items():
        for path, layer in of_part.items():
            tensors[f"{part}.{path}.lora_A.weight"] = layer.down
            tensors[f"{part}.{path}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                shape = (1, -1, 1, 1) if layer.down.dim() == 4 else (-1,)
                end = "" if part == "unet" else ".weight"  # transformers wants what diffusers leaves out
                tensors[f"{part}.{path}.lora_magnitude_vector{end}"] = layer.magnitude.reshape(shape)
    return tensors


def _peft_settings(layers: Mapping[str, Mapping[str, Layer]]) -> dict[str, Any]:
    """Peft's settings of each part; layers are named by the ends of their paths, with which transformers' all agree."""
    settings: dict[str, Any] = {}
    for part, of_part in layers.items():
        ranks = {path.removeprefix(TEXT_MODEL): layer.rank for path, layer in of_part.items()}
        common = max(ranks.values(), key=lambda rank: rank.rank)
        settings |= {
            f"{part}.r": common.rank,
            f"{part}.lora_alpha": common.alpha,
            f"{part}.target_modules": sorted(ranks),
            f"{part}.rank_pattern": {path: r.rank for path, r in ranks.items() if r.rank != common.rank},
            f"{part}.alpha_pattern": {path: r.alpha for path, r in ranks.items() if r.alpha != common.alpha},
            f"{part}.use_dora": any(layer.magnitude is not None for layer in of_part.values()),
            f"{part}.peft_type": "LORA",
        }
    return settings


def _kohya_tensors(layers: Mapping[str, Mapping[str, Layer]]) -> dict[str, Tensor]:
    tensors = {}
    for part, of_part in layers.items():
        for path, layer in of_part.items():

            def key(end: str, part: str = part, path: str = path) -> str:
                return flat_key(part, path, "text_encoder_2" in layers, end)

            tensors[key("lora_down.weight")] = layer.down
            tensors[key("lora_up.weight")] = layer.up
            tensors[key("alpha")] = torch.tensor(layer.alpha, dtype=torch.float32)
            if layer.magnitude is not None:
                tensors[key("dora_scale")] = layer.magnitude.reshape(-1, *[1] * (layer.down.dim() - 1))
    return tensors
