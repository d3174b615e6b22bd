"""Textual inversion (arXiv 2208.01618): new words for frozen text encoders, whose embeddings are all that is trained.

A new word is some vectors in each encoder's table of token embeddings. As other programs do, its first vector has the
word's own name as its token, `<cat>`, and the others `<cat>_1`, `<cat>_2` ..., into which a prompt's `<cat>` is spelled
out. The table itself is not enlarged: the new rows are put in place of its output, so that nothing else gets gradients.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram.adapters.twin import Twin
from lowvram.errors import LowVRAMError


@dataclass(frozen=True, kw_only=True)
class Word:
    """A new word: its token, e.g. "<cat-toy>"; how many vectors it has; the known words that it begins as.

    begin: as many of its tokens as there are vectors are the first values, from the start again where it has fewer;
    "" draws them as the table's rows are distributed.
    """

    token: str
    vectors: int = 1
    begin: str = ""

    def tokens(self) -> list[str]:
        """The token of each vector."""
        return [self.token, *(f"{self.token}_{index}" for index in range(1, self.vectors))]


class WordTokenizer:
    """A tokenizer that knows new words: it spells them out as tokens, then does what the one it was made of does."""

    def __init__(self, tokenizer: Any, words: Sequence[Word]) -> None:
        self.words = tuple(words)
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.add_tokens([token for word in words for token in word.tokens()])

    def __call__(self, text: str | Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer that this was made of."""
        texts = self.spelled(text) if isinstance(text, str) else [self.spelled(one) for one in text]
        return self._tokenizer(texts, *args, **kwargs)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # asked for before it is there, by copy and pickle
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def spelled(self, prompt: str) -> str:
        """A prompt with the tokens of all its vectors in the place of each new word, in capitals or not (as CLIP)."""
        spellings = {word.token.lower(): " ".join(word.tokens()) for word in self.words}
        if not spellings:
            return prompt
        longest_first = sorted(spellings, key=len, reverse=True)
        pattern = "|".join(rf"{re.escape(token)}(?!_\d)" for token in longest_first)
        return re.sub(pattern, lambda match: spellings[match[0].lower()], prompt, flags=re.IGNORECASE)


class Embeddings(nn.Module):
    """The vectors of new words, in place in text encoders: the only thing that is trained.

    Args:
        encoders: transformers' CLIP text encoders, one or two; frozen by this. Fake tensors will do.
        tokenizers: theirs; not changed.
        words: see `Word`.

    Attributes:
        tokenizers: to be used instead of those given.
        rows: for each word the vectors in each encoder, fp32 [vectors, dim]; named `rows.<word>.<encoder>`.

    Raises:
        LowVRAMError: a word is known already, given twice, or has no vectors; or `begin` has more tokens than vectors.
    """

    def __init__(self, encoders: Sequence[nn.Module], tokenizers: Sequence[Any], words: Sequence[Word]) -> None:
        super().__init__()
        self.words = tuple(words)
        tables = [_table(encoder) for encoder in encoders]
        for tokenizer, table in zip(tokenizers, tables, strict=True):
            _check(self.words, tokenizer)
            if len(tokenizer) > table.num_embeddings:
                raise LowVRAMError(
                    f"a tokenizer of {len(tokenizer)} tokens for an encoder of {table.num_embeddings}.",
                    "Take both from the same pipeline.",
                )
        self.tokenizers = [WordTokenizer(tokenizer, words) for tokenizer in tokenizers]
        self.rows = nn.ModuleList()
        for word in self.words:
            begins = [_begin(word, *pair) for pair in zip(tokenizers, tables, strict=True)]
            self.rows.append(nn.ParameterList([nn.Parameter(begin) for begin in begins]))
        self._hooks = []
        for index, (encoder, table) in enumerate(zip(encoders, tables, strict=True)):
            encoder.requires_grad_(False)
            place = _Place(self, index, first=len(tokenizers[index]))
            # The first hook hides the new tokens from the table, the second fills in their rows.
            self._hooks += [table.register_forward_pre_hook(place.hide), table.register_forward_hook(place.fill)]

    def vectors(self, token: str) -> list[Tensor]:
        """A word's vectors [vectors, dim] in each encoder.

        Raises:
            LowVRAMError: there is no such word.
        """
        for word, rows in zip(self.words, self.rows, strict=True):
            if word.token == token:
                return list(rows.parameters())
        known = ", ".join(word.token for word in self.words)
        raise LowVRAMError(f"{token!r} is no new word.", f"Use one of {known}.")

    @torch.no_grad()
    def load(self, token: str, vectors: Sequence[Tensor]) -> None:
        """Take a word's vectors over from elsewhere: [vectors, dim] for each encoder.

        Raises:
            LowVRAMError: there is no such word, or the shapes are not its own.
        """
        rows = self.vectors(token)
        wanted, given = [list(row.shape) for row in rows], [list(vector.shape) for vector in vectors]
        if wanted != given:
            raise LowVRAMError(
                f"the vectors of {token!r} have shapes {given}, not {wanted}.",
                "Use a file that was made for this family of models, and as many vectors as it holds.",
            )
        for row, vector in zip(rows, vectors, strict=True):
            row.copy_(vector)

    def twin(self) -> Twin:
        """A second set of these vectors, for their average: `with twin.active():` the encoders have that."""
        return Twin(self)

    def remove(self) -> None:
        """Take the words out of the encoders."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Place:
    """Where the vectors come in: at the output of one encoder's table, for tokens from `first` on."""

    def __init__(self, embeddings: Embeddings, encoder: int, first: int) -> None:
        self.embeddings, self.encoder, self.first = embeddings, encoder, first
        self.ids: Tensor | None = None

    def hide(self, table: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.ids = args[0]
        return args[0].clamp(max=self.first - 1), *args[1:]

    def fill(self, table: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids, self.ids = self.ids, None
        rows = torch.cat([list(rows.parameters())[self.encoder] for rows in self.embeddings.rows])  # [V, D]
        assert ids is not None
        rows = rows.to(ids.device)  # they are part of neither network that a sampler moves
        new = F.embedding((ids - self.first).clamp(min=0), rows).to(output.dtype)  # [B, L, D]
        return torch.where((ids >= self.first)[..., None], new, output)


def _table(encoder: nn.Module) -> nn.Embedding:
    """The token embeddings of a text encoder of transformers."""
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(table, nn.Embedding)
    return table


def _check(words: Sequence[Word], tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    seen: set[str] = set()
    for word in words:
        if word.vectors < 1:
            raise LowVRAMError(f"the new word {word.token!r} has {word.vectors} vectors.", "Give it 1 or more.")
        if not word.token or re.search(r"\s", word.token):
            raise LowVRAMError(f"the new word {word.token!r} is empty or has a space in it.", "Call it <something>.")
        for token in word.tokens():
            if token.lower() in seen:
                raise LowVRAMError(f"the new word {token!r} is given twice.", "Give each word a name of its own.")
            if token in vocabulary or f"{token.lower()}</w>" in vocabulary:
                raise LowVRAMError(
                    f"the new word {token!r} is in the tokenizer's vocabulary already.",
                    f"Call it <{token.strip('<>')}-1>.",
                )
            seen.add(token.lower())


@torch.no_grad()
def _begin(word: Word, tokenizer: Any, table: nn.Embedding) -> Tensor:
    """First values fp32 [vectors, dim] on the table's device."""
    weight = table.weight
    if not word.begin:
        mean, std = weight.float().mean(dim=0), weight.float().std(dim=0)
        return mean + std * torch.randn(word.vectors, weight.shape[1], device=weight.device)
    ids = tokenizer(word.begin, add_special_tokens=False)["input_ids"]
    if not ids or len(ids) > word.vectors:
        raise LowVRAMError(
            f"{word.begin!r}, which {word.token!r} begins as, has {len(ids)} tokens for {word.vectors} vectors.",
            f"Use words of {word.vectors} tokens at most, or more vectors.",
        )
    return torch.stack([weight[ids[index % len(ids)]].float() for index in range(word.vectors)])
