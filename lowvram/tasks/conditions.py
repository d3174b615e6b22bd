"""What a denoiser is told beside the latents: nothing, a class, or a text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowvram import seeded, standin
from lowvram.data.captions import Captions
from lowvram.data.image_cache import cache_root
from lowvram.data.latent_files import digest_of
from lowvram.ema import on_device
from lowvram.errors import LowVRAMError
from lowvram.models.text import TextEncoder
from lowvram.settings import DiffusionSettings
from lowvram.tasks import load_json

if TYPE_CHECKING:
    from lowvram.models.clip_text import ClipText

Conditions = dict[str, Tensor]  # keyword arguments of a denoiser, rows [n, ...] or one for all


class Condition(ABC):
    """Makes a denoiser's keyword arguments.

    dropout: how often training leaves the condition out (arXiv 2207.12598, section 3.2).
    """

    guidable = True  # knows "no condition"

    def __init__(self, dropout: float, device: torch.device) -> None:
        self.dropout, self.device = dropout, device

    def network(self) -> nn.Module | None:
        """A network that is trained along, newly made."""
        return None

    @abstractmethod
    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        """Of a micro-batch: labels int64 [b], seeds int64 [b] on the CPU."""

    @abstractmethod
    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        """Of classes or prompts, a row for each. cut: a text that is too long is read in part, as in training."""

    @abstractmethod
    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        """No condition, one row. negative: for texts, a prompt to lead away from in its place.

        Raises:
            LowVRAMError: there is a negative prompt, and the network knows no texts.
        """

    def _dropped(self, seeds: Tensor) -> Tensor:
        return seeded.rand(seeds, stream="condition") < self.dropout  # bool [b], CPU


class Unconditional(Condition):
    """Nothing but the latents."""

    guidable = False

    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        return {}

    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        return {}

    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        _no_texts(negative)
        return {}


class Classes(Condition):
    """One of `count` classes; the row after the last stands for none."""

    def __init__(self, count: int, dropout: float, device: torch.device) -> None:
        super().__init__(dropout, device)
        self.count = count

    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        dropped = self._dropped(seeds).to(labels.device)
        return {"labels": torch.where(dropped, self.count, labels).to(self.device)}

    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        for wish in wishes:
            if not isinstance(wish, int) or not 0 <= wish < self.count:
                raise LowVRAMError(f"class {wish} is not there.", f"This network's classes are 0 to {self.count - 1}.")
        return {"labels": torch.tensor(list(wishes))}

    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        _no_texts(negative)
        return {"labels": torch.tensor([self.count])}


class Words(Condition):
    """Captions, read by a small encoder that is trained along. A label is an image's index."""

    def __init__(self, settings: DiffusionSettings, device: torch.device) -> None:
        super().__init__(settings.loss.condition_dropout, device)
        self.settings = settings.text
        self._ids: Tensor | None = None  # [N, length] of the data set's captions

    def network(self) -> TextEncoder:
        text = self.settings
        return TextEncoder(buckets=text.buckets, length=text.length, dim=text.dim, depth=text.depth, heads=text.heads)

    def read(self, captions: Captions, network: nn.Module) -> int:
        """Take in the data set's captions. Returns how many of them are too long, and cut."""
        assert isinstance(network, TextEncoder)
        self._ids = network.tokenizer.encode(captions, too_long="cut")
        network.note(self._ids)
        return network.tokenizer.count_too_long(captions)

    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        assert network is not None
        if self._ids is None:  # a plan is made without the data
            assert standin.active(), "no captions were read"
            ids = torch.zeros(len(labels), self.settings.length, dtype=torch.int64)
        else:
            ids = torch.where(self._dropped(seeds)[:, None], 0, self._ids[labels.cpu()])
        context, mask = network(ids.to(self.device))
        return {"context": context, "context_mask": mask}

    @torch.no_grad()
    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        assert isinstance(network, TextEncoder)
        if standin.active():  # one at a time they would take a minute
            ids = torch.zeros(len(wishes), self.settings.length, dtype=torch.int64)
        else:
            ids = network.tokenizer.encode([str(wish) for wish in wishes], too_long="cut" if cut else "error")
        context, mask = network(ids.to(self.device))
        return {"context": context, "context_mask": mask}

    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        return self.wanted([negative or ""], network)


class Clip(Condition):
    """Captions, read by a CLIP text encoder that is not trained: its output is kept on disk, and read back by row.

    The encoder itself is on the device only while captions are read or prompts are sampled.
    """

    def __init__(self, settings: DiffusionSettings, device: torch.device) -> None:
        super().__init__(settings.loss.condition_dropout, device)
        assert settings.text.clip is not None
        self.path = Path(settings.text.clip).expanduser()
        self._rows: Tensor | None = None  # [N] of each image's caption among the different ones
        self._file: Path | None = None

    @cached_property
    def dim(self) -> int:
        """Width of the context, from the configuration alone."""
        encoders = [self.path / name for name in ("text_encoder", "text_encoder_2")]
        found = [folder for folder in encoders if folder.is_dir()] or [self.path]
        return sum(int(load_json(folder / "config.json").get("hidden_size", 0)) for folder in found)

    def read(self, captions: Captions, say: Any) -> None:
        """Encode the data set's captions, each different one once, unless that was done before."""
        texts = sorted({"", *captions})
        number = {text: i for i, text in enumerate(texts)}
        self._rows = torch.tensor([number[text] for text in captions])
        weights = [
            f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(self.path.rglob("*.safetensors"))
        ]
        key = digest_of([str(self.path.resolve()), *weights, *texts])
        self._file = cache_root() / "captions" / f"{key}.safetensors"
        if self._file.is_file():
            return
        say(f"encoding {len(texts):,} captions with {self.path}")
        contexts, masks = [], []
        with on_device(self._encoder, self.device):
            for begin in range(0, len(texts), 64):
                context, mask, _ = self._encoder.encode(texts[begin : begin + 64], too_long="cut")
                contexts.append(context.half().cpu())
                masks.append(mask.cpu())
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        save_file({"context": torch.cat(contexts), "mask": torch.cat(masks)}, partial)
        partial.replace(self._file)

    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        if self._rows is None or self._file is None:
            assert standin.active(), "no captions were read"
            return {"context": torch.zeros(len(labels), 77, self.dim, device=self.device)}
        rows = torch.where(self._dropped(seeds), 0, self._rows[labels.cpu()])  # "" sorts first
        with safe_open(self._file, "numpy") as file:
            contexts, masks = file.get_slice("context"), file.get_slice("mask")
            context = torch.from_numpy(np.stack([contexts[row] for row in rows.tolist()])).float()
            mask = torch.from_numpy(np.stack([masks[row] for row in rows.tolist()]))
        return {"context": context.to(self.device), "context_mask": mask.to(self.device)}

    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        if standin.active():
            return {"context": torch.zeros(len(wishes), 77, self.dim, device=self.device)}
        with on_device(self._encoder, self.device):
            texts = [str(wish) for wish in wishes]
            context, mask, _ = self._encoder.encode(texts, too_long="cut" if cut else "error")
        return {"context": context.float().cpu(), "context_mask": mask.cpu()}

    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        return self.wanted([negative or ""], network)

    @cached_property
    def _encoder(self) -> "ClipText":
        """On the host, between uses."""
        from lowvram.models.clip_text import ClipText

        return ClipText(self.path)


def _no_texts(negative: str | None) -> None:
    if negative is not None:
        raise LowVRAMError(f"negative={negative!r}: this network was trained without prompts.", "Leave negative out.")


def make(settings: DiffusionSettings, classes: int, device: torch.device) -> Condition:
    """The condition of a recipe."""
    if settings.condition == "class":
        return Classes(classes, settings.loss.condition_dropout, device)
    if settings.condition == "text":
        return Words(settings, device) if settings.text.clip is None else Clip(settings, device)
    return Unconditional(0.0, device)
