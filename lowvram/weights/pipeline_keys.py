"""How a tensor of the folder layout lies in a file: under which key, and joined, transposed or plain.

The folder layout is that of diffusers and transformers. The other layout is one file, with the keys of the networks
as first published: latent diffusion's for UNet and autoencoder, transformers' or open_clip's for text encoders. Both
hold the same numbers. The tables are in unet_keys, autoencoder_keys and text_keys.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Form = Literal["same", "flat", "transposed", "third"]


class Piece(NamedTuple):
    """Where a tensor lies in a file.

    form: "same"; "flat", [out, in] that may be [out, in, 1, 1] in the file; "transposed"; "third", one of three that
    the file has joined along their first axis, `third` being its number.
    """

    key: str
    form: Form = "same"
    third: int = 0

    def shape(self, stored: Shape) -> Shape:
        """The shape by the folder layout, of a tensor that is stored with another."""
        if self.form == "flat" and stored[2:] == (1, 1):
            return stored[:2]
        if self.form == "transposed":
            return stored[::-1]
        if self.form == "third" and stored and stored[0] % 3 == 0:
            return stored[0] // 3, *stored[1:]
        return stored

    def take(self, stored: Tensor) -> Tensor:
        """The tensor by the folder layout, out of what is stored."""
        if self.form == "third":
            rows = len(stored) // 3
            return stored[self.third * rows : (self.third + 1) * rows].clone()  # not a view, that would hold all three
        if self.form == "transposed":
            return stored.t().contiguous()
        return stored.reshape(self.shape(tuple(stored.shape)))


def stored_shape(form: Form, shape: Shape) -> Shape:
    """The shape that a new file gives a key, from that of its tensor (one of three) by the folder layout."""
    if form == "flat" and len(shape) == 2:
        return (*shape, 1, 1)
    if form == "transposed":
        return shape[::-1]
    return (3 * shape[0], *shape[1:]) if form == "third" else shape


def stored_tensor(pieces: Sequence[tuple[Piece, Callable[[], Tensor]]], shape: Shape) -> Tensor:
    """What a file has under a key, of `shape`: out of a tensor by the folder layout, or of all three of them."""
    piece, make = pieces[0]
    if piece.form == "third":
        return torch.cat([make() for _, make in sorted(pieces, key=lambda item: item[0].third)])
    return make().t().contiguous() if piece.form == "transposed" else make().reshape(shape)


def renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """A name with the module that it begins with, the longest that is known, named otherwise; None if none is known."""
    head = name
    while head:
        if head in modules:
            return modules[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return None


def inverse(modules: Mapping[str, str]) -> dict[str, str]:
    """The way back."""
    return {there: here for here, there in modules.items()}
