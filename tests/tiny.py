"""Settings that make a recipe small enough for seconds: all four phases, ADA, 16x16."""

TINY = (
    "resolution=16",
    "batch=8",
    "model.z_dim=16",
    "model.w_dim=16",
    "model.mapping_layers=2",
    "model.channel_base=256",
    "model.channel_max=16",
    "loss.path_length_every=2",
    "loss.r1_every=2",
    "augment.mode=ada",
    "augment.p=0.2",
    "augment.interval=2",
    "augment.adjust_kimg=1",
    "data.builtin_count=40",
    "data.workers=0",
    "data.mirror=true",
    "grid=4",
    "log_kimg=0.016",
    "device=cpu",
)
