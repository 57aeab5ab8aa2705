"""Which atom of one dictionary is which of another."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_floating, check_int, check_ndim, check_shape


@torch.no_grad()
def matched_cosines(one: Tensor, other: Tensor, *, signed: bool = False) -> Tensor:
    """Cosines of the pairs of a Hungarian match of rows, each row of the smaller set once: float64, best sum.

    Their mean is the mean correlation coefficient (MCC) against true atoms, and the stability of two trainings.

    Args:
        one: ``[m, d]``, float.
        other: ``[n, d]``, float.
        signed: whether opposite directions are strangers; else absolute cosines are matched.

    Returns:
        ``[min(m, n)]``, in the order of the rows of ``one``; rows of norm 0 have cosine 0.
    """
    from scipy.optimize import linear_sum_assignment

    for name, rows in (("one", one), ("other", other)):
        check_floating("matched_cosines", name, rows)
        check_ndim("matched_cosines", name, rows, 2)
        check_int("matched_cosines", f"the rows of {name}", len(rows))
    check_shape("matched_cosines", "other", other, None, one.shape[1])
    cosine = F.normalize(one.double(), dim=1) @ F.normalize(other.double(), dim=1).T
    cosine = cosine if signed else cosine.abs()
    rows, cols = linear_sum_assignment(-cosine.cpu().numpy())
    return cosine[torch.from_numpy(rows), torch.from_numpy(cols)]
