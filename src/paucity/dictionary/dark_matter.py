"""Dark matter: what of a dictionary's error is linear in the activation, and what is not.

Paper: Engels et al. 2024, https://arxiv.org/abs/2410.14670, Sections 3 to 5. With ``e = x - x_hat``, least squares
``x -> e`` (with an intercept) on one split of the tokens gives the *linear error* ``x W + b`` of other tokens, and
``e - (x W + b)`` is the *nonlinear error*. All figures are of tokens that the fit has not seen: the R^2 of the
errors (one minus squared residuals over squared deviations from the mean, summed over all dimensions), the same for
each dimension with their mean, and the R^2 of the squared norm ``|e|^2`` from ``x``, likewise by least squares. A norm
that is linear in ``x`` says that how badly a token is kept is known before any code is found.

Not implemented: errors of larger dictionaries from those of smaller ones, autoencoders trained on either part, and the
split by earlier layers. The official code reports the plain mean over dimensions, and fits without an intercept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_floating, check_ndim, check_shape, fail
from .base import Dictionary


@dataclass(frozen=True, eq=False)
class DarkMatter:
    """The error of a dictionary in parts; variances are fractions of those of the activations.

    Attributes:
        num_tokens: measured on, none of them fitted on.
        fvu: mean squared error over the variance of the activations.
        r2: of the error from the activation.
        r2_by_dim: ``[d]`` float64, the same for each dimension; NaN where it has no error.
        norm_r2: of the squared norm of the error from the activation.
        linear: mean square of the linear error, over the variance of the activations.
        nonlinear: that of the nonlinear error; with ``linear`` about ``fvu``.
        weight: ``[d, d]`` and ``bias [d]`` of the linear error, in the dtype of the activations.
        norm_weight: ``[d]`` of the squared norm.
        norm_bias: of it.
    """

    num_tokens: int
    fvu: float
    r2: float
    r2_by_dim: Tensor
    norm_r2: float
    linear: float
    nonlinear: float
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: float

    @property
    def mean_r2(self) -> float:
        """Mean of ``r2_by_dim`` over the dimensions that have an error, each with the same weight."""
        return float(self.r2_by_dim.nanmean())

    def linear_error(self, x: Tensor) -> Tensor:
        """The linear error ``[..., d]`` of activations ``[..., d]``."""
        return x @ self.weight.to(x) + self.bias.to(x)

    def norms(self, x: Tensor) -> Tensor:
        """Predicted norms ``[...]`` of the errors of ``x``; 0 where the square is predicted below it."""
        return (x @ self.norm_weight.to(x) + self.norm_bias).clamp_min(0).sqrt()


@torch.no_grad()
def dark_matter(
    dictionary: Dictionary | Callable[[Tensor], Tensor], fit: Tensor, test: Tensor, *, rows: int = 4096
) -> DarkMatter:
    """Split the error of a dictionary on ``test`` by what was fitted on ``fit``.

    Args:
        dictionary: whose reconstructions ``dictionary(x)`` have the width of ``x``.
        fit: activations ``[n, d]`` with ``n > d + 1``, finite; better ten times as many, and none that the dictionary
            was trained on: what it has seen it errs on in another way.
        test: activations ``[m, d]`` of other tokens of the same kind.
        rows: that are encoded at once.

    Raises:
        InputError: if there are too few rows, a value is not finite, or reconstructions have another width.
    """
    for name, x in (("fit", fit), ("test", test)):
        check_floating("dark_matter", name, x)
        check_ndim("dark_matter", name, x, 2)
        if not bool(x.isfinite().all()):
            raise fail("dark_matter", name, "be finite", "NaN or infinity")
    check_shape("dark_matter", "test", test, None, fit.shape[1])
    if len(fit) <= fit.shape[1] + 1:
        raise fail("dark_matter", "fit", f"have more than {fit.shape[1] + 1} rows, one more than its width", len(fit))
    if len(test) < 2:
        raise fail("dark_matter", "test", "have at least 2 rows", len(test))
    known, wanted = _errors(dictionary, fit, rows), _errors(dictionary, test, rows)
    targets = torch.cat([known, known.square().sum(1, keepdim=True)], 1)
    solution = least_squares(fit, targets)
    predicted = _with_one(test) @ solution
    truth = torch.cat([wanted, wanted.square().sum(1, keepdim=True)], 1)
    missed, spread = (truth - predicted).square().mean(0), (truth - truth.mean(0)).square().mean(0)
    x = test.double()
    variance = (x - x.mean(0)).square().mean(0).sum()
    by_dim = torch.where(spread > 0, 1 - missed / spread, torch.nan)
    linear = predicted[:, :-1].square().sum(1).mean()
    return DarkMatter(
        num_tokens=len(test),
        fvu=float(wanted.square().sum(1).mean() / variance),
        r2=float(1 - missed[:-1].sum() / spread[:-1].sum()),
        r2_by_dim=by_dim[:-1],
        norm_r2=float(by_dim[-1]),
        linear=float(linear / variance),
        nonlinear=float(missed[:-1].sum() / variance),
        weight=solution[:-1, :-1].to(test.dtype),
        bias=solution[-1, :-1].to(test.dtype),
        norm_weight=solution[:-1, -1].to(test.dtype),
        norm_bias=float(solution[-1, -1]),
    )


def least_squares(x: Tensor, targets: Tensor) -> Tensor:
    """Weights ``[d + 1, m]`` float64, the intercept last, of those that fit best the ones of least norm in
    columns of ``x`` that are centred and of norm 1.

    Args:
        x: ``[n, d]``.
        targets: ``[n, m]``.
    """
    x, targets = x.double(), targets.double()
    middle, mean = x.mean(0), targets.mean(0)
    size = (x - middle).norm(dim=0)
    size = size.where(size > 0, 1)
    rows = (x - middle) / size
    weight = torch.linalg.pinv(rows.T @ rows, rtol=1e-11, hermitian=True) @ (rows.T @ (targets - mean))
    weight = weight / size.unsqueeze(1)
    return torch.cat([weight, (mean - middle @ weight).unsqueeze(0)])


def _with_one(x: Tensor) -> Tensor:
    return nn.functional.pad(x.double(), (0, 1), value=1.0)


def _errors(dictionary: Dictionary | Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    found = []
    for part in torch.split(x, rows):
        reconstruction = dictionary(part)
        check_shape("dark_matter", "reconstructions", reconstruction, *part.shape)
        found.append(part.double() - reconstruction.double())
    return torch.cat(found)
