"""Dropout (arXiv 1207.0580) whose masks belong to samples, not to the batch around them."""

from torch import Tensor, nn

from lowvram import seeded


class SeededDropout(nn.Module):
    """In training sets a share `p` of the numbers of each sample to zero, and scales the others by 1 / (1 - p).

    [b, ...] -> the same. The mask of row i is a function of `seeds[i]`, `stream` and the shape of a row: the same in
    micro-batches of any size, when a block is recomputed in the backward, and when a step is made again. It is kept for
    the backward as one byte a number.

    Attributes:
        seeds: int64 [b] on the CPU, one for each row of what comes next, also of what is recomputed, until others are
            set. None: masks are drawn from torch's default generator.
    """

    def __init__(self, p: float, stream: str) -> None:
        """p: 0 up to 1. stream: other layers have others."""
        super().__init__()
        self.p, self.stream = p, stream
        self.seeds: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.seeds is not None and len(self.seeds) != len(x):
            raise ValueError(f"{len(self.seeds)} seeds of dropout for {len(x)} rows")
        kept = seeded.bernoulli(self.seeds, 1 - self.p, *x.shape[1:], stream=self.stream, device=x.device, batch=len(x))
        return (x * kept).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream!r}"
