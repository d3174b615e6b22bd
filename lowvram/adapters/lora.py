"""Low-rank adapters: LoRA (arXiv 2106.09685) on linear and convolution layers, and DoRA (arXiv 2402.09353), by peft.

A layer W x becomes W x + s B A x, with A [rank, in] and B [out, rank] trained, W frozen, and s = alpha / rank (LoRA,
section 4.1). B begins at zero, and with it the change. A convolution's A has the kernel of the layer, its B is 1x1.
DoRA trains the norm m of each output channel too: m (W + s B A) / |W + s B A| (section 3.2).

Layers are replaced inside the network, which keeps its blocks, its forward and its frozen weights as they are; these
are then named `to_q.base_layer.weight` where they were `to_q.weight` (see `plain_state`). So load them first.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lowvram import libraries
from lowvram.adapters.dropout import SeededDropout
from lowvram.adapters.twin import Branch, Twin
from lowvram.errors import LowVRAMError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_TRANSFORMER = (*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
_RESIDUAL = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
# Names that stand for layers, of UNets and of text encoders alike.
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "transformer": _TRANSFORMER,
    "all": (*_TRANSFORMER, *_RESIDUAL),
}
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The rank of a layer's change, and the alpha that it is scaled by: alpha / rank."""

    rank: int
    alpha: float


class Adapters(Branch):
    """The low-rank weights inside a network, as one module: what a phase updates and a checkpoint keeps.

    Its parameters are those in the network, the same objects; its state dict has them under
    `<path of the layer>.lora_A.weight`, `.lora_B.weight` and, for DoRA, `.lora_magnitude_vector.weight`.

    Attributes:
        network: where the adapters are. name: that peft knows them by.
        layers: peft's layers by their path in the network. ranks: the rank and alpha of each.
        dora: whether norms are trained too.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, layers: Mapping[str, Any], ranks: Mapping[str, Rank], name: str) -> None:
        super().__init__()
        self.__dict__["network"] = network  # not as a part of this module
        self.name = name
        self.layers = dict(layers)
        self.ranks = dict(ranks)
        self.dora = False
        self._scale = 1.0
        self._originals: dict[str, Tensor] | None = None
        for path, layer in self.layers.items():
            for part in (*_PARTS, "lora_dropout"):
                held = getattr(layer, part)
                if name in held:
                    self.plant(f"{path}.{part}", held[name])
                    self.dora |= part == "lora_magnitude_vector"

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(rank.rank for rank in self.ranks.values())

    @property
    def alpha(self) -> float:
        """The alpha of a layer of that rank."""
        return next(rank.alpha for rank in self.ranks.values() if rank.rank == self.rank)

    def train(self, mode: bool = True) -> "Adapters":
        """In training dropout is on; the network round the adapters keeps its mode."""
        for layer in self.layers.values():
            layer.training = mode
        return super().train(mode)

    def seed(self, seeds: Tensor | None) -> None:
        """Draw dropout by these: int64 [b] on the CPU, one for each sample of the batch that comes next.

        They count until others are given, for what is recomputed in the backward too. None, as it begins: dropout draws
        from torch's default generator.
        """
        for module in self.modules():
            if isinstance(module, SeededDropout):
                module.seeds = seeds

    def scale(self, value: float) -> None:
        """Count the change `value`-fold; 0 leaves the network as it was without it.

        Raises:
            LowVRAMError: it is merged.
        """
        self._not_merged("scale")
        self._scale = value
        for path, layer in self.layers.items():
            rank = self.ranks[path]
            layer.scaling[self.name] = value * rank.alpha / rank.rank
        self._activate(value != 0)

    def twin(self) -> Twin:
        """A second set of these weights, for their average: `with twin.active():` the network has that."""
        return Twin(self)

    @torch.no_grad()
    def merge(self, *, keep: bool = True) -> None:
        """Add the change to the network's weights, in their dtype, and take the adapters out of its forward.

        keep: hold the weights as they were, on the host, for `unmerge`; else the host needs one more tensor.

        Raises:
            LowVRAMError: they are merged already; or a layer has packed weights, which can't take the change.
        """
        self._not_merged("merge")
        for path, layer in self.layers.items():
            if not isinstance(layer.get_base_layer().weight, nn.Parameter):
                raise LowVRAMError(
                    f"{path} has packed weights, which a low-rank change can't be merged into.",
                    "Load the network without quantisation, add the adapter's file to it, and merge there.",
                )
        self._originals = {}
        for path, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            if keep:
                self._originals[path] = weight.detach().to("cpu", copy=True)
            weight.copy_(self._changed(layer, weight))  # in place: the data may be a view of a stream's buffer
        self._activate(False)
        if not keep:
            self.remove()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the weights from before `merge`, bit for bit, and the adapters into the forward.

        Raises:
            LowVRAMError: they are not merged.
        """
        if self._originals is None:
            raise LowVRAMError("these adapters are not merged.", "Call merge first.")
        for path, layer in self.layers.items():
            layer.get_base_layer().weight.copy_(self._originals[path])
        self._originals = None
        self._activate(self._scale != 0)

    def remove(self) -> None:
        """Take the adapters out of the network; layers that have no others are the plain ones again."""
        self._activate(False)
        for path, layer in self.layers.items():
            layer.delete_adapter(self.name)
            if not len(layer.lora_A):
                parent, _, child = path.rpartition(".")
                self.network.get_submodule(parent)._modules[child] = layer.get_base_layer()
        self.layers.clear()

    def _changed(self, layer: Any, weight: Tensor) -> Tensor:
        """W + s B A, or DoRA's, in fp32."""
        if layer.scaling[self.name] == 0:
            return weight
        changed = weight.float() + layer.get_delta_weight(self.name).float()
        if self.dora:
            magnitude = layer.lora_magnitude_vector[self.name].weight.float().flatten()  # [out]
            norm = changed.flatten(1).norm(dim=1)  # [out]
            changed *= (magnitude / norm).reshape(-1, *[1] * (changed.dim() - 1))
        return changed

    def _activate(self, on: bool) -> None:
        for layer in self.layers.values():
            others = [name for name in layer.active_adapters if name != self.name and name in layer.lora_A]
            asked = {parameter: parameter.requires_grad for parameter in layer.parameters()}
            layer.set_adapter([*others, self.name] if on else others)
            for parameter, value in asked.items():  # peft means "is trained" by "is active"
                parameter.requires_grad_(value)

    def _not_merged(self, action: str) -> None:
        if self._originals is not None:
            raise LowVRAMError(f"{action}: these adapters are merged.", "Call unmerge first.")


def add(
    network: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = ("attention",),
    dropout: float = 0.0,
    dora: bool = False,
    name: str = "default",
) -> Adapters:
    """Put low-rank adapters into a network and freeze all else that is in it. Its output does not change.

    A is drawn from torch's global generator. The new weights are fp32, wherever the layers are (fake tensors too).

    Args:
        rank, alpha: see above; alpha None: the rank.
        targets: presets (attention, transformer, all), or names or ends of names of linear and 2-D convolution layers.
        dropout: of the input of A, 0 up to 1 (see `Adapters.seed`). dora: see above.
        name: where several are added to one network, each has its own, and their changes add up. Their dropout, and
            that of layers of one path in two networks, differs by it.

    Raises:
        LowVRAMError: peft is missing; a value is out of range, a target is no layer, or the name is taken.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise LowVRAMError(
            f"rank={rank}, dropout={dropout}: out of range.", "Use a rank from 1, and dropout in [0, 1)."
        )
    chosen = Rank(rank=rank, alpha=float(rank if alpha is None else alpha))
    if not chosen.alpha > 0:
        raise LowVRAMError(f"alpha={alpha} is not above 0.", "Use the rank, or half of it.")
    ranks = dict.fromkeys(find_targets(network, targets), chosen)
    return add_to(network, ranks, dropout=dropout, dora=dora, name=name)


def add_to(
    network: nn.Module, ranks: Mapping[str, Rank], *, dropout: float = 0.0, dora: bool = False, name: str = "default"
) -> Adapters:
    """As `add`, to exactly the layers whose paths are given, each with a rank of its own.

    Raises:
        LowVRAMError: peft is missing, or the name is taken.
    """
    peft = _peft()
    held: list[Any] = [module for module in network.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    if any(name in layer.lora_A for layer in held):
        raise LowVRAMError(f"the network has adapters named {name!r} already.", "Give these another name.")
    trained = {parameter for parameter in _adapter_parameters(network) if parameter.requires_grad}
    active = {layer: list(layer.active_adapters) for layer in held}  # peft turns them off

    def by_rank(path: str) -> tuple[int, float]:
        return ranks[path].rank, ranks[path].alpha

    for (rank, alpha), paths in groupby(sorted(ranks, key=by_rank), key=by_rank):
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="|".join(re.escape(path) for path in paths),  # a pattern: whole names, not ends of them
            lora_dropout=dropout,
            use_dora=dora,
        )
        with torch.device("meta"):
            peft.inject_adapter_in_model(config, network, adapter_name=name)
        network.__dict__.pop("peft_config", None)  # peft's note on what it did last
    layers: dict[str, Any] = {path: network.get_submodule(path) for path in ranks}
    for layer, names in active.items():
        layer.set_adapter(names)
    for path, layer in layers.items():
        _fill(layer, name)
        if dropout:
            layer.lora_dropout[name] = SeededDropout(dropout, f"dropout.{name}.{path}")
        layer._cast_input_dtype = _cast_input
    adapters = Adapters(network, layers, ranks, name)
    network.requires_grad_(False)
    for parameter in trained | set(adapters.parameters()):
        parameter.requires_grad_(True)
    adapters.scale(1.0)
    return adapters


def find_targets(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths of the layers that presets, names or ends of names mean, in the network's order.

    Raises:
        LowVRAMError: one of them means no linear or convolution layer.
    """
    layers = target_layers(network)
    found: set[str] = set()
    for target in targets:
        ends = PRESETS.get(target, (target,))
        matches = {path for path in layers if any(path == end or path.endswith(f".{end}") for end in ends)}
        if not matches:
            near = get_close_matches(target, {end for path in layers for end in _ends(path)}, n=3)
            examples = near or list(dict.fromkeys(path.rpartition(".")[2] for path in layers))[:8]
            raise LowVRAMError(
                f"target {target!r} is no linear or convolution layer of {type(network).__name__}.",
                f"Use {', '.join(PRESETS)}, or names such as {', '.join(examples)}.",
            )
        found |= matches
    if not found:
        raise LowVRAMError("there are no targets.", f"Give one of {', '.join(PRESETS)}.")
    return [path for path in layers if path in found]


def target_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have adapters, by path: linear and 2-D convolution, plain or adapted already."""
    layers: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if "base_layer" in path.split("."):
            layers[path.removesuffix(".base_layer")] = module
        elif isinstance(module, nn.Linear | nn.Conv2d) and not _is_adapter(path):
            layers[path] = module
    return {path: module for path, module in layers.items() if path}


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network without its adapters, under the names from before they were added."""
    return {
        ".".join(part for part in key.split(".") if part != "base_layer"): tensor
        for key, tensor in network.state_dict().items()
        if not _is_adapter(key)
    }


def _peft() -> ModuleType:
    return libraries.load("peft", "an adapter", "pip install 'lowvram[finetune]'")


@torch.no_grad()
def _fill(layer: Any, name: str) -> None:
    """Give a layer's adapters, made on the meta device, weights where the layer is, in fp32.

    Made there by peft, A would have been rounded to the layer's dtype, by a conversion that fake tensors refuse.
    """
    base = layer.get_base_layer()
    device = next(base.parameters()).device
    for part in _PARTS:
        if name in getattr(layer, part):
            module = getattr(layer, part)[name]
            module.weight = nn.Parameter(torch.empty(module.weight.shape, dtype=torch.float32, device=device))
    layer.reset_lora_parameters(name, True)
    if name in layer.lora_magnitude_vector:  # W as it is: B is zero
        magnitude = layer.lora_magnitude_vector[name].weight
        magnitude.copy_(base.weight.float().flatten(1).norm(dim=1).reshape(magnitude.shape))


def _cast_input(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In place of peft's: autocast brings x to the width of the arithmetic, and an fp32 copy of it would be waste."""
    if x is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def _adapter_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for key, parameter in network.named_parameters() if _is_adapter(key)]


def _is_adapter(path: str) -> bool:
    return any(part in (*_PARTS, "lora_dropout") for part in path.split("."))


def _ends(path: str) -> list[str]:
    """`b.c` of `a.b.c`, and `c`, and the whole."""
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]
