"""Pipelines of the published shapes without weights: for plans, and to measure cost where weights can't be had."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowvram.weights import clip_vocabulary

_CONFIGS = Path(__file__).parent / "configs"


class RandomPipeline:
    """Stands for a `Pipeline` of a family ("sd1", "sd2", "sdxl"): the same configurations, random weights."""

    layout = "random"

    def __init__(self, family: str) -> None:
        self.family = family
        self.path = Path(f"random-{family}")

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads((_CONFIGS / f"{self.family}.json").read_text(encoding="utf-8"))
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that it consists of."""
        return tuple(part for part in self._configs if part != "scheduler")

    def config(self, part: str) -> dict[str, Any]:
        """The content of a part's config.json."""
        return dict(self._configs[part])

    def load(self, part: str, network: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Leave the network as it was initialised. dtype: of its parameters."""
        if dtype is not None:
            network.to(dtype)

    def tokenizer(self, part: str) -> Path:
        """The folder of CLIP's vocabulary."""
        plain = self.family != "sd2" and part == "text_encoder"
        return clip_vocabulary.folder(pad="<|endoftext|>" if plain else "!")
