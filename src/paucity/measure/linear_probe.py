"""What a linear classifier makes of embeddings: how much of the labels lies in them, in straight lines."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_floating, check_int, check_ndim, check_range, check_shape, fail
from .images import accuracy_of
from .stats import Estimate


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    penalty: float = 1e-4,
    num_steps: int = 100,
) -> Estimate:
    """Accuracy on ``test`` of multinomial logistic regression that is fit on ``train``.

    Each dimension is brought to mean 0 and variance 1 by the training rows; those that do not vary are left at 0.
    Cross-entropy and ``penalty * |W|^2`` are made small by L-BFGS, from 0: nothing is drawn.

    Args:
        train: ``[n, d]``, finite; it is not changed.
        train_labels: int64 ``[n]`` from 0.
        test: ``[m, d]``.
        test_labels: int64 ``[m]`` from 0.
        penalty: of the squared weights.
        num_steps: most iterations.

    Returns:
        The share of ``test`` that is classified rightly, with its 95 % interval.
    """
    check_ndim("linear_probe", "train", train, 2)
    check_floating("linear_probe", "train", train)
    check_shape("linear_probe", "train_labels", train_labels, len(train))
    check_shape("linear_probe", "test", test, None, train.shape[1])
    check_shape("linear_probe", "test_labels", test_labels, len(test))
    check_range("linear_probe", "penalty", penalty, 0)
    check_int("linear_probe", "num_steps", num_steps)
    if not bool(train.isfinite().all() and test.isfinite().all()):
        raise fail("linear_probe", "train and test", "be finite", "NaN or infinity")
    mean, deviation = train.mean(0), train.std(0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)
    train, test = (train.detach() - mean) * scale, (test.detach() - mean) * scale
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    weight = torch.zeros(classes, train.shape[1], dtype=train.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=train.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=num_steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(train, weight, bias), train_labels) + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call, arg-type]
    return accuracy_of(F.linear(test, weight.detach(), bias.detach()), test_labels)
