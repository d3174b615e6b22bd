"""The loss of diffusion and flow matching: the squared error of what the network predicts. One value per sample."""

from collections.abc import Callable

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

    Raises:
        LowVRAMError: schedule, prediction and weighting do not go together, or F has another shape than x0.
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
    error = (predicted.float() - schedule.target(x0, eps, sigma, predict)).square().flatten(1).mean(1)
    return error * schedule.weight(sigma, predict, min_snr_gamma)
