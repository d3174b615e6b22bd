from contextlib import nullcontext

import pytest
import torch
from networks import small_unet, stir, unet_inputs
from torch import Tensor, nn

from lowvram.adapters import lora
from lowvram.adapters.dropout import SeededDropout
from lowvram.memory.checkpointing import recompute, wrapped_forwards

SEEDS = torch.tensor([5, 11, 7, 2**62])


def dropout(p: float, stream: str = "a", seeds: Tensor | None = SEEDS) -> SeededDropout:
    made = SeededDropout(p, stream)
    made.seeds = seeds
    return made


@pytest.mark.parametrize("shape", [(6,), (7, 5), (3, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_samples_mask_is_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever the micro-batch, and wherever in it."""
    x = torch.randn(4, *shape).to(dtype)
    whole = dropout(0.4)(x)
    assert whole.dtype == dtype
    for size in (1, 2, 3):
        parts = [dropout(0.4, seeds=s)(part) for s, part in zip(SEEDS.split(size), x.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dropout(0.4, seeds=SEEDS.flip(0))(x.flip(0)).flip(0), whole)
    if len(shape) == 3:
        assert torch.equal(dropout(0.4)(x.contiguous(memory_format=torch.channels_last)), whole)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale_and_what_masks_differ_by(p: float) -> None:
    x = torch.ones(4, 100, 250)
    count = x[0].numel()
    rows = torch.cat([dropout(p)(x), dropout(p, "b")(x), dropout(p, seeds=SEEDS + 1)(x)]).flatten(1)  # [12, count]
    dropped = rows == 0
    assert torch.equal(rows[~dropped], torch.full_like(rows[~dropped], 1 / (1 - p)))
    deviation = (p * (1 - p) / count) ** 0.5
    assert (dropped.float().mean(dim=1) - p).abs().max() < 5 * deviation
    # Any two of samples, layers and steps drop the same numbers as often as chance has it.
    both = dropped.float() @ dropped.float().T / count
    both.fill_diagonal_(p**2)
    assert (both - p**2).abs().max() < 6 * (p**2 * (1 - p**2) / count) ** 0.5


def test_the_gradient_has_the_same_mask_which_alone_is_kept() -> None:
    x = torch.randn(4, 8, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = dropout(0.25)(x)
    assert sum(t.numel() * t.element_size() for t in kept if t.dim()) == x.numel()  # bytes
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_without_training_without_seeds_and_with_wrong_ones() -> None:
    x = torch.randn(4, 50)
    assert dropout(0.5).eval()(x) is x
    free = dropout(0.5, seeds=None)
    torch.manual_seed(0)
    first, second = free(x), free(x)
    torch.manual_seed(0)
    assert torch.equal(free(x), first) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="4 seeds of dropout for 8 rows"):
        dropout(0.5)(torch.cat([x, x]))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_have_the_same_gradient_by_any_micro_batches(dora: bool) -> None:
    """Recomputed in the backward or not; and each layer has masks of its own."""
    unet = small_unet()
    x, time, context = (torch.cat([tensor, tensor.flip(0)]) for tensor in unet_inputs())  # [4, ...]
    adapters = lora.add(unet, rank=3, targets=["all"], dora=dora, dropout=0.3, name="mine")
    stir(adapters)

    def gradient(seeds: Tensor, size: int, recomputed: bool = False) -> Tensor:
        def wrap(_module: nn.Module, forward: object) -> object:
            return lambda *args, **kwargs: recompute(forward, *args, **kwargs)  # type: ignore[arg-type]

        adapters.zero_grad()
        with wrapped_forwards(list(unet.blocks().values()), wrap) if recomputed else nullcontext():  # type: ignore[arg-type]
            for index in torch.arange(4).split(size):
                adapters.seed(seeds[index])
                (unet(x[index], time[index], context=context[index]).square().mean() * len(index) / 4).backward()
        return torch.cat([p.grad.flatten() for p in adapters.parameters()])  # type: ignore[union-attr]

    whole = gradient(SEEDS, 4)
    for size in (1, 2):
        torch.testing.assert_close(gradient(SEEDS, size), whole, rtol=1e-4, atol=1e-6)
        assert torch.equal(gradient(SEEDS, size, recomputed=True), gradient(SEEDS, size))
    assert torch.equal(gradient(SEEDS, 4, recomputed=True), whole)
    assert (gradient(SEEDS + 1, 4) - whole).norm() > 0.01 * whole.norm()
    streams = [module.stream for module in adapters.modules() if isinstance(module, SeededDropout)]
    assert len(set(streams)) == len(streams) == len(adapters.layers)
    assert all("mine" in stream for stream in streams)  # as two encoders have layers of the same paths
    adapters.seed(None)
    assert all(module.seeds is None for module in adapters.modules() if isinstance(module, SeededDropout))
    plain = lora.add(small_unet(), rank=3, targets=["all"], dora=dora)
    assert not any(isinstance(module, nn.Dropout | SeededDropout) for module in plain.modules())
