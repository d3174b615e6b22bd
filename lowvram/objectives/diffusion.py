"""The loss of diffusion and flow matching: the squared error of what the network predicts. One value per sample."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lowvram import seeded
from lowvram.errors import LowVRAMError
from lowvram.noise import Predict, Schedule, per_sample


def diffusion_loss(
    predict_fn: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    seeds: Tensor,
    *,
    schedule: Schedule,
    predict: Predict,
    min_snr_gamma: float | None = None,
    offset_noise: float = 0.0,
    weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error at one random noise level per sample (arXiv 2006.11239, equation 14), float32 [B].

    Args:
        predict_fn: (c_in x [B, C, h, w] float32, time [B] within 0..1000) -> F, shaped as its input, of any dtype.
        x0: [B, C, h, w], of any dtype; noised and compared in float32 on its own device.
        seeds: int64 [B] on the CPU: level and noise of a sample depend on its seed alone, not on its micro-batch.
        predict: "eps", "v", "x0" or "flow", as the network's output is meant.
        min_snr_gamma: Min-SNR weighting (arXiv 2303.09556); None: all levels count alike.
        offset_noise: strength of noise that is the same over a channel (crosslabs.org, "Diffusion with offset noise"),
            so that a network under a schedule that ends short of pure noise learns to change the mean brightness.
        weights: [B, 1, h, w], not negative: how much each latent pixel counts in its sample's mean (masks). They are
            relative, so that a small mask counts as much as a large one; a sample of zeros alone has no loss.
        sample_weights: [B], by which the samples' losses are multiplied (prior preservation, arXiv 2208.12242).

    Raises:
        LowVRAMError: schedule, prediction and weighting do not go together, or F or the weights are of another shape
            than x0.
    """
    x0 = x0.float()
    sigma = schedule.draw(seeded.rand(seeds, stream="diffusion.level", device=x0.device))  # [B]
    scalings = schedule.scalings(sigma, predict)
    eps = seeded.randn(seeds, *x0.shape[1:], stream="diffusion.noise", device=x0.device)
    if offset_noise:
        flat = (x0.shape[1], *[1] * (x0.ndim - 2))
        eps = eps + offset_noise * seeded.randn(seeds, *flat, stream="diffusion.offset", device=x0.device)
    # c_in (x0 + sigma eps), term by term: near pure noise x0 would be lost in a sum that is thousands of times larger.
    x_in = per_sample(scalings.c_in, x0) * x0 + per_sample(scalings.c_in * sigma, x0) * eps
    predicted = predict_fn(x_in, scalings.time)
    if predicted.shape != x0.shape:
        raise LowVRAMError(
            f"the network predicts {list(predicted.shape)} for latents {list(x0.shape)}.",
            "Set its out_channels to the latents' channels.",
        )
    error = _mean((predicted.float() - schedule.target(x0, eps, sigma, predict)).square(), weights)
    error = error * schedule.weight(sigma, predict, min_snr_gamma)
    if sample_weights is None:
        return error
    _check_shape("sample_weights", sample_weights, error.shape)
    return error * sample_weights.to(error)


def pixel_weights(mask: Tensor, unmasked_weight: float) -> Tensor:
    """`weights` of masks: 1 where they are, `unmasked_weight` (0..1) elsewhere. Masks [B, 1, h, w] in [0, 1]."""
    return unmasked_weight + (1 - unmasked_weight) * mask.float()


def _mean(error: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over each sample, weighted by [B, 1, h, w]. [B, C, h, w] -> [B]."""
    if weights is None:
        return error.flatten(1).mean(1)
    _check_shape("weights", weights, (len(error), 1, *error.shape[2:]))
    weights = weights.to(error)
    total = weights.flatten(1).sum(1) * error.shape[1]
    return (error * weights).flatten(1).sum(1) / total.clamp_min(1e-6)


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != tuple(shape):
        raise LowVRAMError(f"{name} is {list(tensor.shape)}, and must be {list(shape)}.", "Shape it as the latents.")
