"""What was trained of Stable Diffusion, as files that other programs load."""


import torch

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
