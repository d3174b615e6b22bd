"""What is trained of published weights: the UNet itself, low-rank weights inside it, or the embedding of a new word."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram import standin
from lowvram.adapters import textual_inversion
from lowvram.adapters.lora_files import LoraFile
from lowvram.adapters.stack import Stack
from lowvram.adapters.twin import Twin
from lowvram.models.unet import UNet
from lowvram.settings import StableDiffusionSettings
from lowvram.tasks import Place, low_rank, published
from lowvram.tasks.pipeline_text import PipelineText
from lowvram.tasks.published import Source

if TYPE_CHECKING:
    from lowvram.models.clip_text import ClipText


class FineTuned:
    """A UNet, and for some the text encoders, as they are published; nothing is trained.

    Attributes:
        unet, text: on the host as they are made. text: None where the encoders' output is cached.
        trained: networks that the update changes, by the names of their files. frozen: those that gradients go through.
        averaged: what holds the averages of `trained`, by the same names with "_ema"; empty without `average`.
        stack: LoRA files that are in the UNet, and that `text` puts into text encoders.
    """

    def __init__(
        self,
        settings: StableDiffusionSettings,
        pipeline: Source,
        text: PipelineText,
        device: torch.device,
        stack: Stack | None = None,
    ) -> None:
        self.settings, self.pipeline, self.condition, self.device = settings, pipeline, text, device
        self.stack = Stack() if stack is None else stack
        self.trained: dict[str, nn.Module] = {}
        self.averaged: dict[str, nn.Module] = {}
        self.frozen: tuple[nn.Module, ...] = ()
        self.text: ClipText | None = None
        self.unet = self._unet()
        self.stack.add(self.unet, "unet", values=not standin.active())

    def _unet(self) -> UNet:
        unet = published.unet(self.pipeline, dtype=published.base_dtype(self.settings, self.device))
        return unet.requires_grad_(False)

    @property
    def text_networks(self) -> list[str]:
        """The names of those of `trained` that are of text encoders."""
        return [name for name in self.trained if name == "text" or name.startswith("lora_text")]

    def seed(self, seeds: Tensor) -> None:
        """Draw what is random in the networks by the seeds of the samples that come next, int64 [b] on the CPU."""

    def average(self) -> None:
        """Make `averaged`, with the values of `trained`."""

    @property
    def sampled(self) -> UNet:
        """The UNet to sample with, within `sampling`."""
        return self.unet

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """What is trained has its average within, where there is one, and no dropout."""
        yield

    @property
    def reader(self) -> "ClipText | None":
        """The text encoders to sample with, within `sampling`."""
        return self.text

    def prepare_sampling(self, device: torch.device, place: Place | None) -> None:
        """Bring the UNet to the device to be sampled, in 16 bits on a GPU. Text encoders come when they are needed.

        place: brings it there, where it may not fit as a whole.
        """
        self.sampled.to(published.base_dtype(self.settings, device))
        _placed(self.sampled, device, place)

    def changed(self) -> dict[str, dict[str, Tensor]]:
        """Weights that differ from the published ones, by part and folder name: what an export writes in their place.

        Low-rank weights are merged for it: what they sit in is of no use for training after that.
        """
        self.stack.merge()
        changed = {"unet": dict(self.unet.state_dict())} if "unet" in self.stack.parts else {}
        return changed | self._stacked_text()

    def _stacked_text(self) -> dict[str, dict[str, Tensor]]:
        """The text encoders that the stack changes, and nothing trains."""
        parts = self.stack.text_parts
        if not parts:
            return {}
        options = low_rank.text_options(self.stack)
        text = published.text(self.pipeline, self.settings, self.device, live=True, **options).network()
        assert text is not None
        return {part: text.state(n) for n, part in enumerate(self.condition.parts) if part in parts}


class Full(FineTuned):
    """All of the UNet, and with `text.train` of the text encoders. Networks `denoiser` and `text`."""

    def __init__(self, settings: StableDiffusionSettings, pipeline: Source, text: PipelineText, device: torch.device):
        super().__init__(settings, pipeline, text, device)
        self.trained = {"denoiser": self.unet}
        if settings.text.train:
            self.text = text.network()
            assert self.text is not None
            self.trained["text"] = self.text

    def _unet(self) -> UNet:
        narrow = self.settings.memory.weights_dtype.get("denoiser") == "bf16"
        unet = published.unet(self.pipeline, dtype=torch.bfloat16 if narrow else torch.float32)
        return unet.requires_grad_(False)

    def average(self) -> None:
        for name, network in self.trained.items():
            averaged = copy.deepcopy(network).float().eval().requires_grad_(False)
            self.averaged[f"{name}_ema"] = averaged

    @property
    def sampled(self) -> UNet:
        averaged = self.averaged.get("denoiser_ema", self.unet)
        assert isinstance(averaged, UNet)
        return averaged

    @property
    def reader(self) -> "ClipText | None":
        averaged: Any = self.averaged.get("text_ema", self.text)
        return averaged  # type: ignore[no-any-return]

    def changed(self) -> dict[str, dict[str, Tensor]]:
        changed = {"unet": dict(self.sampled.state_dict())}
        if self.reader is not None:
            for number, part in enumerate(self.condition.parts):
                changed[part] = self.reader.state(number)
        return changed


class Lora(FineTuned):
    """Low-rank weights in the UNet, and with `text.train` in the text encoders.

    Networks `lora_unet`, `lora_text_encoder`, `lora_text_encoder_2`.
    """

    def __init__(
        self,
        settings: StableDiffusionSettings,
        pipeline: Source,
        text: PipelineText,
        device: torch.device,
        stack: Stack | None = None,
        begin: LoraFile | None = None,
    ) -> None:
        """stack: stays frozen under them. begin: what they are to begin with; None: nothing."""
        super().__init__(settings, pipeline, text, device, stack)
        self.twins: dict[str, Twin] = {}
        self.adapters = {"unet": low_rank.add(settings, self.unet, "unet", settings.lora.targets, begin)}
        self.frozen = (self.unet,)
        if settings.text.train:
            self.text = text.network()
            assert self.text is not None
            for part, encoder in zip(text.parts, self.text.encoders, strict=True):
                self.adapters[part] = low_rank.add(settings, encoder, part, settings.lora.text_targets, begin)
            self.frozen = (self.unet, self.text)
        low_rank.check(settings, self.adapters, begin, self.stack)
        self.trained = {f"lora_{part}": adapters for part, adapters in self.adapters.items()}

    def _unet(self) -> UNet:
        unet = super()._unet()
        if self.settings.base == "nf4":
            from lowvram.adapters import quantized  # with bitsandbytes, which few need

            on = None if self.device.type == "cpu" else self.device  # where packing takes seconds
            narrow = published.compute_dtype(self.settings, self.device)
            quantized.quantize(unet, "nf4", compute_dtype=narrow, device=on)
        return unet

    def seed(self, seeds: Tensor) -> None:
        for adapters in self.adapters.values():
            adapters.seed(seeds)

    def average(self) -> None:
        self.twins = {part: adapters.twin() for part, adapters in self.adapters.items()}
        self.averaged = {f"lora_{part}_ema": twin for part, twin in self.twins.items()}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        with ExitStack() as stack:
            for twin in self.twins.values():
                stack.enter_context(twin.active())
            for adapters in self.adapters.values():
                stack.enter_context(_evaluating(adapters))
            yield

    def prepare_sampling(self, device: torch.device, place: Place | None) -> None:
        for part, twin in self.twins.items():  # for good: nothing is trained any more
            for own, averaged in zip(self.adapters[part].parameters(), twin.parameters(), strict=True):
                own.data.copy_(averaged)
        self.twins.clear()
        _placed(self.unet, device, place)  # in the type of the weights that were trained round

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The low-rank weights by part, averaged where there is an average."""
        with self.sampling():
            return {
                part: {key: tensor.detach() for key, tensor in adapters.state_dict().items()}
                for part, adapters in self.adapters.items()
            }

    def alphas(self) -> dict[str, dict[str, float]]:
        """The alpha of each layer, by part and path."""
        return {
            part: {path: rank.alpha for path, rank in adapters.ranks.items()}
            for part, adapters in self.adapters.items()
        }

    def changed(self) -> dict[str, dict[str, Tensor]]:
        self.stack.merge()
        with self.sampling():
            for adapters in self.adapters.values():
                adapters.merge(keep=False)
        changed = {"unet": dict(self.unet.state_dict())}
        if self.text is None:
            return changed | self._stacked_text()
        for number, part in enumerate(self.condition.parts):
            changed[part] = self.text.state(number)
        return changed


class Inversion(FineTuned):
    """The embedding of a new word in each text encoder. Network `embedding`."""

    def __init__(self, settings: StableDiffusionSettings, pipeline: Source, text: PipelineText, device: torch.device):
        super().__init__(settings, pipeline, text, device)
        self.text = text.network()
        assert self.text is not None
        said = settings.embedding
        word = textual_inversion.Word(token=said.token, vectors=said.vectors, begin=said.initial)
        self.embeddings = textual_inversion.Embeddings(list(self.text.encoders), text.tokenizers, [word])
        text.tokenizers = self.text.tokenizers = self.embeddings.tokenizers
        self.trained = {"embedding": self.embeddings}
        self.frozen = (self.unet, self.text)
        self.twin: Twin | None = None

    def average(self) -> None:
        self.twin = self.embeddings.twin()
        self.averaged = {"embedding_ema": self.twin}

    def vectors(self) -> list[Tensor]:
        """Of the word, [vectors, dim] for each encoder, averaged where there is an average."""
        with self.sampling():
            return [rows.detach() for rows in self.embeddings.vectors(self.settings.embedding.token)]

    @contextmanager
    def sampling(self) -> Iterator[None]:
        with self.twin.active() if self.twin is not None else nullcontext():
            yield


def _placed(network: nn.Module, device: torch.device, place: Place | None) -> None:
    if place is None:
        network.to(device)
    else:
        place(network, device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def make(
    settings: StableDiffusionSettings,
    pipeline: Source,
    device: torch.device,
    folder: Path | None = None,
    *,
    untrained: bool = False,
) -> FineTuned:
    """What the recipe trains, with the published weights, and `condition`. folder: of the run. untrained: nothing."""
    stack = low_rank.stack_of(settings, folder)
    text = published.text(pipeline, settings, device, **low_rank.text_options(stack))
    if untrained:
        return FineTuned(settings, pipeline, text, device, stack)
    if settings.train == "lora":
        return Lora(settings, pipeline, text, device, stack, low_rank.begin_of(settings, folder))
    return (Full if settings.train == "full" else Inversion)(settings, pipeline, text, device)
