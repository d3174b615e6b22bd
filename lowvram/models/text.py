"""Text with no downloads: words hashed into buckets, and a small transformer that is trained along.

Meant for captions of a limited vocabulary, such as those of the built-in faces. For free text see `clip_text`.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lowvram.errors import LowVRAMError
from lowvram.models.dit import Attention, RMSNorm, SwiGLU, check_heads, hidden_width

TooLong = Literal["error", "cut"]

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\s]")  # a word, with apostrophes inside it; or one other sign
_MARKS_INSIDE = str.maketrans("’", "'")
_SHOWN_CHARACTERS = 40


def shortened(text: str) -> str:
    """A text for an error: quoted, and not longer than a line."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...")


def check_too_long(choice: str) -> None:
    """Raise LowVRAMError unless the choice is "error" or "cut"."""
    if choice not in ("error", "cut"):
        raise LowVRAMError(f"too_long={choice!r} is not known.", "Use error or cut.")


class WordTokenizer:
    """Words and punctuation marks as numbers, by the hash of each: there is no vocabulary to make or to keep.

    Two words share a bucket by chance (crc32): for n words, some n^2 / (2 * buckets) pairs do.

    Args:
        buckets: numbers in use; 0 stands for no word.
        length: words and marks of a caption, at most.
    """

    def __init__(self, buckets: int = 8192, length: int = 32) -> None:
        if buckets < 2 or length < 1:
            raise LowVRAMError(
                f"a tokenizer with buckets={buckets} and length={length} can hold no word.",
                "Use buckets of 2 or more (8192), and a length of 1 or more (32).",
            )
        self.buckets, self.length = buckets, length

    def words(self, text: str) -> list[str]:
        """The words and punctuation marks of a text, in lower case and in Unicode's composed form (NFKC)."""
        composed = unicodedata.normalize("NFKC", text).casefold().translate(_MARKS_INSIDE)
        return _TOKEN.findall(composed)

    def bucket(self, word: str) -> int:
        """The number of one of `words`, 1 to buckets - 1: the same on every machine."""
        return 1 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (self.buckets - 1)

    def encode(self, captions: Sequence[str], *, too_long: TooLong = "error") -> Tensor:
        """int64 [B, length] on the CPU, filled up with 0; an empty caption is all zeros.

        too_long: "cut" leaves out what is beyond `length` (see `count_too_long`), for training captions.

        Raises:
            LowVRAMError: too_long is "error", and a caption has more words than `length`.
        """
        check_too_long(too_long)
        ids = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for row, caption in zip(ids, captions, strict=True):
            words = self.words(caption)
            if len(words) > self.length and too_long == "error":
                raise LowVRAMError(
                    f"the caption {shortened(caption)} has {len(words)} words and punctuation marks, of which this "
                    f"model reads {self.length}.",
                    f"Shorten it to {self.length}.",
                )
            numbers = [self.bucket(word) for word in words[: self.length]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return ids

    def count_too_long(self, captions: Iterable[str]) -> int:
        """How many of the captions `encode` would have to cut."""
        return sum(len(self.words(caption)) > self.length for caption in captions)


class TextLayer(nn.Module):
    """Self-attention and MLP over x [B, L, D], each after a norm; mask bool [B, L], True for tokens that count."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, hidden_width(dim, 4.0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), None, mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Captions as `WordTokenizer` numbers them to vectors for cross-attention.

    A learned start token comes first and always counts, so that an empty caption, the unconditional one, has something
    to be attended to.

    Args:
        buckets, length: of the tokenizer, which is made here as `tokenizer`.
        dim: width of the context. depth, heads: of the transformer; 0 layers leave the embedded words as they are.
    """

    seen: Tensor

    def __init__(
        self, *, buckets: int = 8192, length: int = 32, dim: int = 256, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        if depth < 0:
            raise LowVRAMError(f"depth={depth} is no number of layers.", "Use 0 or more.")
        self.tokenizer = WordTokenizer(buckets, length)
        self.embedding = nn.Embedding(buckets, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(length + 1, dim))
        self.layers = nn.ModuleList(TextLayer(dim, heads) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.register_buffer("seen", torch.zeros(buckets, dtype=torch.bool))
        for table in (self.embedding.weight, self.start, self.positions):
            nn.init.normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for module in self.modules():
            if isinstance(module, TextLayer):  # begins as the identity, so that words differ from the first step
                nn.init.zeros_(module.attention.out.weight)
                nn.init.zeros_(module.mlp.down.weight)

    def blocks(self) -> dict[str, nn.Module]:
        """The transformer layers by name."""
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [B, length] to the context [B, L, dim] and its mask bool [B, L], with L = length + 1.

        The context is in the dtype of the weights, and zero where the mask is False.

        Raises:
            LowVRAMError: ids have another shape.
        """
        length = self.tokenizer.length
        if ids.dim() != 2 or ids.shape[1] != length:
            raise LowVRAMError(
                f"ids have shape {list(ids.shape)}, not [B, {length}].", "Make them with this encoder's tokenizer."
            )
        words = self.embedding(ids)  # [B, length, dim]
        x = torch.cat([self.start.expand(len(ids), 1, -1), words], dim=1) + self.positions
        mask = torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids != 0], dim=1)  # [B, L]
        for layer in self.layers:
            x = layer(x, mask)
        return torch.where(mask[..., None], self.norm(x), 0.0), mask

    @torch.no_grad()
    def note(self, ids: Tensor) -> None:
        """Remember the words of training captions, int64 of any shape, for `unseen`.

        Call it once with all captions, not by batch: processes would remember different ones.
        """
        self.seen[ids.reshape(-1).to(self.seen.device)] = True

    def unseen(self, prompt: str) -> list[str]:
        """The words and marks of a prompt that no training caption had, each once, in the prompt's order.

        A word that shares its bucket with one that was seen is not found out.
        """
        words = dict.fromkeys(self.tokenizer.words(prompt))
        seen = self.seen.cpu()
        return [word for word in words if not seen[self.tokenizer.bucket(word)]]
