"""What the same work cost those who published it: only where a recipe trains the same networks on as large images.

Figures are quoted with their conditions, and not scaled to other lengths or cards.
"""

from dataclasses import dataclass

from lowvram.settings import Settings
from lowvram.settings.stable_diffusion import StableDiffusionSettings
from lowvram.settings.stylegan2 import StyleGAN2Settings


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A StyleGAN2 that was trained on 25,000 thousand images: on `gpus` cards with so many images each at a time.

    v100_days, a100_days: of all the cards together.
    """

    name: str
    resolution: int
    channel_base: int
    mapping_layers: int
    gpus: int
    images: int
    v100_days: float
    a100_days: float

    def __str__(self) -> str:
        cards = "one card" if self.gpus == 1 else f"{self.gpus} cards"
        return (
            f"StyleGAN2 at {self.resolution}x{self.resolution} ({self.name}: 25 million images, {cards}, {self.images} "
            f"images on each): {self.v100_days:g} card-days of V100 or {self.a100_days:g} of A100, by the table with "
            "StyleGAN2-ADA's code"
        )


# Of the table that came with the published PyTorch code.
CONFIGURATIONS = tuple(
    Configuration(
        name=name,
        resolution=resolution,
        channel_base=16384 if resolution <= 256 else 32768,
        mapping_layers=2 if name.startswith("auto") else 8,
        gpus=gpus,
        images=images,
        v100_days=v100,
        a100_days=a100,
    )
    for name, resolution, gpus, images, v100, a100 in (
        ("auto 128", 128, 1, 32, 3.6, 2.0),
        ("auto 256", 256, 1, 16, 6.0, 3.6),
        ("auto 512", 512, 1, 8, 20.7, 11.9),
        ("auto 1024", 1024, 1, 4, 41.0, 26.2),
        ("paper 256", 256, 8, 8, 9.3, 5.7),
        ("paper 512", 512, 8, 8, 21.1, 12.2),
        ("paper 1024", 1024, 8, 4, 43.0, 27.2),
    )
)
_STYLEGAN2_1024 = (
    "StyleGAN2 at 1024x1024 as first published: 9 days 18 hours on eight V100; at $2.48 an hour for each that is $4,642"
)
_STYLEGAN2_1024_ONE = "the same at 1024x1024 on one V100: 41 days (auto 1024: 25 million images, 4 a step)"
_STYLEGAN2_256 = "the same at 256x256: quoted as under $900 in all (cards and hours are not stated)"
_TUNING = (
    "tuning a Stable Diffusion model: quoted as $50 to $400 and 20 GB of VRAM, "
    "training one from nothing as some $300,000 (cards and hours are not stated)"
)


def figures(settings: Settings) -> tuple[str, ...]:
    """What others report of the work that a recipe does, a sentence each; nothing where nobody did the same."""
    if settings.weights is None and isinstance(settings, StyleGAN2Settings):
        return _of_stylegan2(settings)
    if isinstance(settings, StableDiffusionSettings) and settings.train == "full":
        return (_TUNING,)
    return ()


def _of_stylegan2(settings: StyleGAN2Settings) -> tuple[str, ...]:
    shape = settings.resolution, settings.model.channel_base, settings.model.mapping_layers
    same = [c for c in CONFIGURATIONS if (c.resolution, c.channel_base, c.mapping_layers) == shape]
    if settings.model.channel_max != 512 or not same:
        return ()
    said = [str(one) for one in same]
    if settings.resolution == 1024:
        said += [_STYLEGAN2_1024, _STYLEGAN2_1024_ONE]
    if settings.resolution == 256:
        said.append(_STYLEGAN2_256)
    return tuple(said)
