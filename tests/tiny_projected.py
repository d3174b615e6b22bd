"""Settings that make a projected GAN small enough for seconds."""

PROJECTED = (
    "resolution=16",
    "batch=8",
    "model.z_dim=16",
    "model.channel_base=256",
    "model.channel_max=16",
    "projection.backbone=efficientnet_lite0",
    "projection.size=32",
    "projection.channels=8",
    "projection.head_channels=16",
    "projection.group=4",
    "projection.pixels=8",
    "ema.half_life_kimg=2",
    "ema.rampup=0.1",
    "data.builtin_count=40",
    "data.workers=0",
    "data.mirror=true",
    "grid=4",
    "log_kimg=0.016",
    "device=cpu",
)

# A large eps: without it Adam's first steps are the signs of gradients, and rounding decides those near zero. And small
# steps, so that rounding seldom decides on which side of a hinge or a bend (ReLU6) a number falls.
CALM = {
    "stylegan2": (
        "model.generator=stylegan2",
        "projection.pixels=0",
        "model.w_dim=16",
        "optimizer.eps=0.01",
        "optimizer.lr=0.002",
        "optimizer.lr_d=0.0005",
    ),
    "fastgan": ("model.generator=fastgan", "optimizer.eps=0.01", "optimizer.lr=0.00005", "optimizer.lr_d=0.0005"),
}
