"""The condition of a published pipeline (Stable Diffusion 1.x, 2.x, XL): what its own text encoders make of captions.

The encoders' outputs are kept on disk, so that training holds no encoder; or they run within the loss, to be trained
along or to let gradients through to the embeddings of new words (`live`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowvram import seeded, standin
from lowvram.bars import bar
from lowvram.data.caption_variants import CaptionOptions, variants_of
from lowvram.data.image_cache import cache_root
from lowvram.data.latent_files import digest_of, locked
from lowvram.data.text_cache import Rows, is_whole, write_rows
from lowvram.ema import on_device
from lowvram.errors import LowVRAMError
from lowvram.models.clip_text import ClipText, check_lengths, count_tokens, load_tokenizer, number_tokens
from lowvram.tasks.conditions import Condition, Conditions

if TYPE_CHECKING:
    from lowvram.weights.pipeline import Pipeline

_RANDOM = "random"  # layout of a pipeline without weights: theirs are drawn here
_FORMAT = 1  # raise it when the same encoders and captions give other files
_AT_ONCE = 16  # captions in an encoder
_NUMBERED = 4096  # captions in a tokenizer, which makes lists of them
_REMEMBERED = 256  # prompts: 80 MiB of SDXL's


class PipelineText(Condition):
    """Captions as the denoiser of a pipeline knows them: `context` [B, 77, D], and for SDXL `pooled` and `size_ids`.

    A caption of "" stands for none. What training puts in place of a caption that is left out, and what `null` gives,
    is what the pipeline samples with where there is no negative prompt: "" as the encoders read it, or, where SDXL's
    model_index.json asks for it (`force_zeros_for_empty_prompt`, the default), zeros.

    Args:
        pipeline: whose encoders, tokenizers and configurations.
        dropout: how often training leaves the caption out.
        options: how captions are varied.
        live: the encoders run within the loss. `network` then gives them, and `training` must be given them.
        dtype: of the encoders' weights; None: float32 where they run on the CPU or live, else float16.
        kept_dtype: of what is kept on disk.
        skip: layers left out at the encoders' end ("clip skip"), before the usual one.
        size: height and width that are sampled, in pixels; may be set again. Of use to SDXL alone.
        key: what else the encoders' weights depend on, where they are not those of the files.
        loading: puts an encoder's weights into a module, given the part's name; None: `pipeline.load`, or random ones
            for a pipeline that has none. changing: called alike with the module that has them, to change them.

    Attributes:
        tokenizers: of each encoder. Others may be put in their place before `read`, such as ones that know new words.
        parts: the encoders' names within the pipeline.
        dim, pooled_dim: widths of `context` and `pooled`, from the configuration alone. length: 77.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        device: torch.device,
        *,
        dropout: float = 0.0,
        options: CaptionOptions | None = None,
        live: bool = False,
        dtype: torch.dtype | None = None,
        kept_dtype: torch.dtype = torch.float16,
        skip: int = 0,
        size: tuple[int, int] = (1024, 1024),
        key: str = "",
        loading: Callable[[str, nn.Module], None] | None = None,
        changing: Callable[[str, nn.Module], None] | None = None,
    ) -> None:
        super().__init__(dropout, device)
        self.pipeline, self.options, self.live = pipeline, options or CaptionOptions(), live
        self.dtype = dtype or (torch.float32 if live or device.type == "cpu" else torch.float16)
        self.kept_dtype, self.skip, self.size, self.key = kept_dtype, skip, size, key
        self.large = pipeline.family == "sdxl"
        self.parts = tuple(part for part in ("text_encoder", "text_encoder_2") if part in pipeline.parts)
        if not self.parts:
            raise LowVRAMError(f"{pipeline.path} holds no text encoder.", "Give a pipeline that is whole.")
        self._configs = [_config(pipeline, part) for part in self.parts]
        self.dim = sum(int(config["hidden_size"]) for config in self._configs)
        last = self._configs[-1]
        self.pooled_dim = int(last["projection_dim"] if _projects(last) else last["hidden_size"])
        self.length = min(int(config.get("max_position_embeddings", 77)) for config in self._configs)
        self._loading = loading or (_draw if pipeline.layout == _RANDOM else pipeline.load)
        self._changing = changing
        self._rows: NDArray[np.int64] | None = None  # [N, most]: of each image's captions among the different ones
        self._counts: NDArray[np.int64] = np.empty(0, np.int64)  # [N]: how many captions each image has
        self._ids: list[Tensor] = []  # of each tokenizer, [T, length] of the different captions; where it is live
        self._kept: Rows | None = None
        self._sizes: Tensor | None = None  # [N, variants, 6]
        self._labelled = False
        self._remembered: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def zeros(self) -> bool:
        """Whether "no caption" is zeros, not "" as it is read."""
        if not self.large:
            return False
        if self.pipeline.layout == _RANDOM:
            return True
        return bool(self.pipeline.index().get("force_zeros_for_empty_prompt", True))

    @cached_property
    def tokenizers(self) -> list[Any]:
        return [load_tokenizer(self.pipeline.tokenizer(part)) for part in self.parts]

    def network(self) -> ClipText | None:
        """Where it is live the encoders, side by side, newly loaded and with the tokenizers of `self.tokenizers`."""
        return self._encoders(range(len(self.parts)), trained=True) if self.live else None

    # Data.

    def read(self, captions: Sequence[str], say: Callable[[str], None], *, own: int | None = None) -> None:
        """Take in the data set's captions; what the encoders make of them is kept on disk, unless it is live.

        own: only the first so many are varied, and have the prefix and suffix; those after are of a class.
        """
        texts = [
            variants_of(caption, self.options) if own is None or number < own else [caption]
            for number, caption in enumerate(captions)
        ]
        self._counts = np.array([len(of_one) for of_one in texts], np.int64)
        most = max(self._counts, default=1)
        different = sorted({"", *(text for of_one in texts for text in of_one)})  # "" sorts first
        number = {text: row for row, text in enumerate(different)}
        rows = [[number[text] for text in of_one] + [0] * (most - len(of_one)) for of_one in texts]
        self._rows = np.array(rows, np.int64).reshape(len(texts), most)
        long = sum(tokens > self.length for tokens in count_tokens(self.tokenizers, different))
        if long:
            say(f"{long:,} of {len(different):,} different captions are longer than {self.length - 2} tokens, and cut")
        if self.live:
            self._ids = [self._numbered(tokenizer, different) for tokenizer in self.tokenizers]
            return
        path = cache_root() / "captions" / f"{self._key(different)}.safetensors"
        with locked(path.parent, "captions"):
            if not is_whole(path):
                say(f"encoding {len(different):,} captions with {self.pipeline.path}")
                self._write(path, different)
        self._kept = Rows(path)

    def _numbered(self, tokenizer: Any, texts: list[str]) -> Tensor:
        """int32 [T, length]."""
        parts = [texts[begin : begin + _NUMBERED] for begin in range(0, len(texts), _NUMBERED)]
        return torch.cat([number_tokens(tokenizer, part, self.length)[0].int() for part in parts])

    def take_sizes(self, sizes: NDArray[np.int64], *, labelled: bool = False) -> None:
        """Size and crop of each image, int64 [N, variants, 6] (see `data.size_ids`); of use to SDXL alone.

        labelled: labels say which variant was read, image * variants + variant; else all count as the first.
        """
        self._sizes = torch.from_numpy(np.ascontiguousarray(sizes))
        self._labelled = labelled

    def sizes(self, labels: Tensor) -> Tensor:
        """The size ids of labels, int64 [b] -> int64 [b, 6] on the CPU; without `take_sizes` those of sampling."""
        if self._sizes is None:
            return torch.tensor([self._sampled_size()]).expand(len(labels), -1).contiguous()
        count = self._sizes.shape[1] if self._labelled else 1
        labels = labels.cpu()
        return self._sizes[labels // count, labels % count]

    def _sampled_size(self) -> list[int]:
        height, width = self.size
        return [height, width, 0, 0, height, width]

    def _key(self, texts: list[str]) -> str:
        """The name of what is kept: of the encoders' files, the settings and the captions."""
        files = [file for part in self.parts for file in sorted(self.pipeline.tokenizer(part).iterdir())]
        if self.pipeline.layout != _RANDOM:
            files += [self.pipeline.file(part).path for part in self.parts]
        stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        settings = [_FORMAT, self._configs, str(self.dtype), str(self.kept_dtype), self.skip, self.key]
        return digest_of([*settings, *stats, *texts])

    def _write(self, path: Path, texts: list[str]) -> None:
        widths = [int(config["hidden_size"]) for config in self._configs]
        shapes: dict[str, tuple[int, ...]] = {
            f"context_{i}": (len(texts), self.length, width) for i, width in enumerate(widths)
        }
        pooled: list[Tensor] = []

        def parts() -> Iterator[tuple[str, Tensor]]:
            for encoder, context, ends in self._encode(texts, shown=True):
                if encoder == len(self.parts) - 1:
                    pooled.append(ends)
                yield f"context_{encoder}", context
            if self.large:
                yield "pooled", torch.cat(pooled)

        if self.large:
            shapes["pooled"] = (len(texts), self.pooled_dim)
        write_rows(path, shapes, self.kept_dtype, parts())

    # The encoders.

    def _encoders(self, numbers: Sequence[int], *, trained: bool = False) -> ClipText:
        """Some of the encoders on the CPU, loaded anew; in a plan without weights."""
        pairs: list[tuple[Mapping[str, Any], Callable[[nn.Module], None] | None]] = []
        for i in numbers:
            load = None if standin.active() else partial(self._load, self.parts[i])
            pairs.append((self._configs[i], load))
        tokenizers = [self.tokenizers[i] for i in numbers]
        return ClipText.from_parts(
            pairs, tokenizers, last_but_one=self.large, skip=self.skip, trained=trained, dtype=self.dtype
        )

    def _load(self, part: str, encoder: nn.Module) -> None:
        self._loading(part, encoder)
        if self._changing is not None:
            self._changing(part, encoder)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], *, shown: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each encoder, one after the other in memory, the context and `pooled` of some texts at a time."""
        with bar(len(texts) * len(self.parts), "captions", "caption", shown=shown) as progress:
            for i in range(len(self.parts)):
                encoder = self._encoders([i])
                with on_device(encoder, self.device):
                    for begin in range(0, len(texts), _AT_ONCE):
                        some = texts[begin : begin + _AT_ONCE]
                        context, pooled = encoder(number_tokens(self.tokenizers[i], some, self.length)[0])
                        self._check_finite(context, self.parts[i])
                        progress.update(len(some))
                        yield i, context.cpu(), pooled.cpu()

    def _check_finite(self, context: Tensor, part: str) -> None:
        if not bool(context.isfinite().all()):
            narrow = str(self.dtype).removeprefix("torch.")
            raise LowVRAMError(
                f"{part} of {self.pipeline.path} gives NaN or infinity in {narrow}.",
                "Use text.dtype=fp32; if it is that already, the file is damaged: copy it again.",
            )

    # What the denoiser is told.

    def training(self, labels: Tensor, seeds: Tensor, network: nn.Module | None) -> Conditions:
        """Of a micro-batch; labels: each image's index, or as `take_sizes` says."""
        if standin.active():  # a plan is made without the data
            return self._pretended(len(labels), network)
        assert self._rows is not None, "no captions were read"
        count = self._sizes.shape[1] if self._sizes is not None and self._labelled else 1
        images = labels.cpu().numpy() // count  # [b]
        counts = torch.from_numpy(self._counts[images])
        drawn = (seeded.rand(seeds, stream="caption") * counts).long().minimum(counts - 1)
        rows = torch.from_numpy(self._rows[images, drawn.numpy()])
        rows = torch.where(self._dropped(seeds), 0, rows)  # [b], CPU
        if self.live:
            assert network is not None
            context, pooled = network(*(ids[rows].long().to(self.device) for ids in self._ids))
        else:
            context, pooled = self._read(rows.tolist())
        context, pooled = context.to(self.device).float(), pooled.to(self.device).float()
        if self.zeros:
            empty = (rows == 0).to(self.device)
            context = torch.where(empty[:, None, None], 0.0, context)
            pooled = torch.where(empty[:, None], 0.0, pooled)
        return self._told(context, pooled, self.sizes(labels))

    def _read(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        assert self._kept is not None
        kept = self._kept
        context = torch.cat([kept.read(f"context_{i}", rows) for i in range(len(self.parts))], dim=-1)
        return context, kept.read("pooled", rows) if self.large else torch.empty(len(rows), 0)

    def _pretended(self, n: int, network: nn.Module | None) -> Conditions:
        if network is not None:
            ids = torch.zeros(n, self.length, dtype=torch.int64, device=self.device)
            context, pooled = network(*[ids] * len(self.parts))
        else:
            context = torch.zeros(n, self.length, self.dim, device=self.device)
            pooled = torch.zeros(n, self.pooled_dim, device=self.device)
        return self._told(context.float(), pooled.float(), torch.zeros(n, 6, dtype=torch.int64))

    def _told(self, context: Tensor, pooled: Tensor, sizes: Tensor) -> Conditions:
        if not self.large:
            return {"context": context}
        return {"context": context, "pooled": pooled, "size_ids": sizes.to(context.device)}

    def wanted(
        self, wishes: Sequence[int] | Sequence[str], network: nn.Module | None, *, cut: bool = False
    ) -> Conditions:
        """Of prompts, float32 on the CPU. network: the encoders, where they are trained; else those of the pipeline."""
        prompts = [str(wish) for wish in wishes]
        sizes = torch.tensor([self._sampled_size()] * len(prompts))
        if standin.active():
            context, pooled = torch.zeros(len(prompts), self.length, self.dim), torch.zeros(1, self.pooled_dim)
            told = self._told(context.to(self.device), pooled.expand(len(prompts), -1).to(self.device), sizes)
            return told
        found = self._look_up(prompts, network, cut=cut)
        return self._told(torch.stack([row for row, _ in found]), torch.stack([row for _, row in found]), sizes)

    def null(self, network: nn.Module | None, negative: str | None = None) -> Conditions:
        """What guidance leads away from: the negative prompt, also an empty one; None: no caption, as in training."""
        if negative is None and self.zeros:
            context, pooled = torch.zeros(1, self.length, self.dim), torch.zeros(1, self.pooled_dim)
            return self._told(context, pooled, torch.tensor([self._sampled_size()]))
        return self.wanted([negative or ""], network)

    def _look_up(self, prompts: list[str], network: nn.Module | None, *, cut: bool) -> list[tuple[Tensor, Tensor]]:
        """The context [77, D] and `pooled` [P] of each prompt, float32."""
        if not cut:
            check_lengths(self.tokenizers, prompts, self.length)
        if network is not None:
            return self._by(cast(ClipText, network), prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._remembered]
        if new:
            contexts: list[list[Tensor]] = [[] for _ in self.parts]
            ends: list[list[Tensor]] = [[] for _ in self.parts]
            for encoder, context, pooled in self._encode(new):
                contexts[encoder].append(context.float())
                ends[encoder].append(pooled.float())
            joined = torch.cat([torch.cat(of_one) for of_one in contexts], dim=-1)
            self._remembered |= dict(zip(new, zip(joined, torch.cat(ends[-1]), strict=True), strict=True))
        found = [self._remembered[prompt] for prompt in prompts]
        while len(self._remembered) > _REMEMBERED:
            self._remembered.pop(next(iter(self._remembered)))
        return found

    @torch.no_grad()
    def _by(self, network: ClipText, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        # In training a policy has placed them, and may bring them block by block.
        placed = any(p.device == self.device for p in network.parameters())
        with nullcontext() if placed else on_device(network, self.device):
            for begin in range(0, len(prompts), _AT_ONCE):
                some = prompts[begin : begin + _AT_ONCE]
                context, pooled = network(*(number_tokens(t, some, self.length)[0] for t in self.tokenizers))
                found += zip(context.float().cpu(), pooled.float().cpu(), strict=True)
        return found


def _config(pipeline: "Pipeline", part: str) -> dict[str, Any]:
    config = dict(pipeline.config(part))
    if part == "text_encoder_2" and not config.get("architectures"):
        config["architectures"] = ["CLIPTextModelWithProjection"]
    return config


def _draw(part: str, encoder: nn.Module) -> None:
    """Give an encoder random weights."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()


def _projects(config: Mapping[str, Any]) -> bool:
    return "CLIPTextModelWithProjection" in (config.get("architectures") or [])
