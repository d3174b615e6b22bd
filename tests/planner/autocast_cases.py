"""Arguments for each operation of CUDA's autocast list, by name and overload."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

N = 4


def rand(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.8 + 0.1


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def cell(gates: int, *, lstm: bool = False) -> tuple[Any, ...]:
    hidden = [rand(N, N), rand(N, N)] if lstm else rand(N, N)
    return rand(N, N), hidden, rand(gates * N, N), rand(gates * N, N), rand(gates * N), rand(gates * N)


def conv(dims: int) -> tuple[Any, ...]:
    return rand(N, N, *[N] * dims), rand(N, N, *[3] * dims), rand(N)


def grown(dims: int, *, aligned: bool) -> tuple[Any, ...]:
    return (rand(2, 2, *[N] * dims), [2 * N] * dims, *([False] if aligned else []))


def alike(names: str, args: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names.split(), args)


SQUARES = (rand(N, N), rand(N, N), rand(N, N))
BATCHES = (rand(2, N, N), rand(2, N, N), rand(2, N, N))
GRID = (rand(2, 3, N, N), rand(2, N, N, 2), 0, 0, False)
HEADS = (rand(2, 2, N, 8), rand(2, 2, N, 8), rand(2, 2, N, 8))
CONVOLUTION = (*conv(2), [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
DEPRECATED = (*CONVOLUTION, False, False, False)

CASES: dict[str, tuple[Any, ...]] = {
    **alike("acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan", (rand(N),)),
    **alike("softplus sum prod norm.Scalar linalg_vector_norm", (rand(N, N),)),
    **alike("sum.dim_IntList logsumexp nuclear_norm.dim frobenius_norm.dim", (rand(N, N), [0, 1])),
    **alike("prod.dim_int cumsum cumprod softmax.int log_softmax.int", (rand(N, N), 0)),
    **alike("mm matmul chain_matmul linalg_multi_dot einsum", SQUARES[:2]),
    **alike("addmm addr mv addmv", SQUARES),
    **alike("l1_loss smooth_l1_loss huber_loss mse_loss kl_div soft_margin_loss dist cdist", SQUARES[:2]),
    **alike("hinge_embedding_loss binary_cross_entropy_with_logits cosine_similarity", SQUARES[:2]),
    **alike("atan2 cross dot vdot linalg_vecdot", (rand(3), rand(3))),
    **alike("addcmul addcdiv", SQUARES),
    **alike("upsample_nearest1d _upsample_nearest_exact1d", grown(1, aligned=False)),
    **alike("upsample_nearest2d _upsample_nearest_exact2d", grown(2, aligned=False)),
    **alike("upsample_nearest3d _upsample_nearest_exact3d", grown(3, aligned=False)),
    **alike("upsample_bilinear2d upsample_bicubic2d", grown(2, aligned=True)),
    **alike("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", grown(2, aligned=True)),
    **alike("rnn_tanh_cell rnn_relu_cell", cell(1)),
    **alike("margin_ranking_loss cosine_embedding_loss", (rand(N, N), rand(N, N), whole(N) + 1)),
    **alike("multi_margin_loss nll_loss", (rand(N, N), whole(N))),
    "upsample_linear1d": grown(1, aligned=True),
    "upsample_trilinear3d": grown(3, aligned=True),
    "conv1d": conv(1),
    "conv2d": conv(2),
    "conv3d": conv(3),
    "conv_transpose1d": conv(1),
    "conv_transpose2d.input": conv(2),
    "conv_transpose3d.input": conv(3),
    "conv_tbc": (rand(N, 2, N), rand(3, N, N), rand(N)),
    "convolution": CONVOLUTION,
    "_convolution": (*DEPRECATED, False),
    "_convolution.deprecated": DEPRECATED,
    "linear": (rand(N, N), rand(N, N), rand(N)),
    "prelu": (rand(N, N), rand(1)),
    "chain_matmul": (list(SQUARES),),
    "linalg_multi_dot": (list(SQUARES),),
    "einsum": ("ij,jk->ik", list(SQUARES[:2])),
    "mv": (rand(N, N), rand(N)),
    "addmv": (rand(N), rand(N, N), rand(N)),
    "addr": (rand(N, N), rand(N), rand(N)),
    "bmm": BATCHES[:2],
    "baddbmm": BATCHES,
    "addbmm": (rand(N, N), *BATCHES[:2]),
    "lstm_cell": cell(4, lstm=True),
    "gru_cell": cell(3),
    "scaled_dot_product_attention": HEADS,
    "pow.Tensor_Scalar": (rand(N), 1.5),
    "pow.Tensor_Tensor": (rand(N), rand(N)),
    "pow.Scalar": (1.5, rand(N)),
    "layer_norm": (rand(N, N), [N], rand(N), rand(N)),
    "native_layer_norm": (rand(N, N), [N], rand(N), rand(N), 1e-5),
    "rms_norm": (rand(N, N), [N], rand(N)),
    "group_norm": (rand(2, N, N), 2, rand(N), rand(N)),
    "renorm": (rand(N, N), 2, 0, 1.0),
    "nuclear_norm": (rand(N, N),),
    "norm.ScalarOpt_dim": (rand(N, N), 2, [0]),
    "linalg_matrix_norm": (rand(N, N), 2),
    "linalg_matrix_norm.str_ord": (rand(N, N),),
    "linalg_matrix_sqrth": (torch.eye(N),),
    "pdist": (rand(N, N),),
    "poisson_nll_loss": (*SQUARES[:2], True, False, 1e-8, 1),
    "nll_loss2d": (rand(2, N, N, N), whole(2, N, N)),
    "multilabel_margin_loss": (rand(N, N), whole(N, N)),
    "triplet_margin_loss": SQUARES,
    "bilinear": (rand(1, 2), rand(1, 2), rand(1, 2, 2), rand(1)),
    "grid_sampler": GRID,
    "index_put": (rand(N), [whole(1)], rand(1)),
    "tensordot": (rand(2, 2, 2), rand(2, 2, 2), [1, 2], [0, 1]),
    "scatter_add": (rand(2, 2), 0, whole(2, 2), rand(2, 2)),
}


def with_widths(args: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    """The arguments, their floating-point tensors in these dtypes in turn."""
    count = iter(range(100))

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtypes[next(count) % len(dtypes)])
        return value

    return tree_map(cast, args)
