"""Precision and recall of generated images (Kynkaanniemi et al. 2019, arXiv 1904.06991), computed by torch-fidelity."""

from typing import NamedTuple

from torch import Tensor

from lowvram.errors import LowVRAMError

NEIGHBOURS = 3  # the paper's k (section 3)
_ROWS = 1000  # of the matrix of distances at a time: [1000, N] float32, 40 MB for 10,000 images


class PrecisionRecall(NamedTuple):
    """precision: the share of generated images that look real. recall: of real ones that could be generated."""

    precision: float
    recall: float


def precision_recall(fake: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Equations 1 and 2 of the paper, from features [N, D] and [M, D].

    Both grow with the number of images, so that only values of equal counts compare; give sets of equal size.
    Raises LowVRAMError for `neighbours` or fewer images.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    least = min(len(fake), len(real))
    if least <= neighbours:
        raise LowVRAMError(
            f"precision and recall can't be taken of {least} images.", f"Use n={neighbours + 1} or more."
        )
    values = prc_features_to_metric(
        fake, real, prc_neighborhood=neighbours, prc_batch_size=_ROWS, save_cpu_ram=True, verbose=False
    )
    return PrecisionRecall(values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL])
