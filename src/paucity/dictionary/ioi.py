"""Supervised dictionaries of a task, and how well others do what they do: approximation, control, interpretability.

Paper: Makelov et al. 2024, https://arxiv.org/abs/2405.08366, on indirect object identification (IOI). Of a task whose
prompts have attributes with known values, an activation is ``a ~ a_0 + sum_i u_i(v_i)``: ``a_0`` is the mean and
``u_i(v)`` either the mean of those with value ``v`` less ``a_0``, or least squares on one-hots of all attributes. An
edit is ``a - u_i(old) + u_i(new)``. An unsupervised dictionary edits by taking out the features of ``a`` that detect
the old value best (by F1 of firing) and putting in those of the activation of a prompt with the new value that detect
it best, at most ``m`` of each; what it does not reconstruct stays. F1 also says how interpretable it is. An attribute
is *occluded* where no features detect it though those of a stronger one are found, and a value is *over-split* where
many precise features share its rows.

Not implemented: the greedy choice of features by distance to the wanted activation, paths through queries, keys and
values (one place is edited), and names given to features by their examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_floating, check_int, check_shape, fail
from ..measure.codes import entries
from ..ops.formats import Codes
from .dark_matter import least_squares

METHODS = ("least_squares", "means")


@dataclass(frozen=True, eq=False)
class Supervised:
    """A vector for each value of each attribute.

    Attributes:
        mean: ``[d]``.
        features: ``[values, d]`` for each attribute; values that were not seen have zeros.
    """

    mean: Tensor
    features: tuple[Tensor, ...]

    def reconstruct(self, labels: Tensor) -> Tensor:
        """``[n, d]`` from labels ``[n, attributes]``."""
        return self.mean + sum(each[labels[:, i]] for i, each in enumerate(self.features))

    def edit(self, x: Tensor, labels: Tensor, attribute: int, new: Tensor) -> Tensor:
        """``x [n, d]`` with the values of an attribute changed to ``new [n]``, all seen in the labels."""
        mine = self.features[attribute]
        for name, value in (("labels", labels[:, attribute]), ("new", new)):
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < len(mine):
                raise fail("Supervised.edit", name, f"be in [0, {len(mine) - 1}]", int(value.max()))
        return x - mine[labels[:, attribute]] + mine[new]

    def magnitudes(self) -> tuple[float, ...]:
        """Mean norm of the vectors of each attribute, which is how strong it is."""
        return tuple(float(each.norm(dim=1).mean()) for each in self.features)


def supervised(x: Tensor, labels: Tensor, *, method: str = "least_squares") -> Supervised:
    """The dictionary of activations whose attributes are known.

    Args:
        x: ``[n, d]``, finite.
        labels: int64 ``[n, attributes]``, each counted from 0.
        method: one of `METHODS`. Means mix attributes that go together; least squares tells them apart.

    Raises:
        InputError: if the shapes do not fit, or a value is not finite.
    """
    check_floating("supervised", "x", x)
    check_shape("supervised", "labels", labels, len(x), None)
    check_choice("supervised", "method", method, METHODS)
    if not len(x) or not bool(x.isfinite().all()) or int(labels.min()) < 0:
        raise fail("supervised", "x", "have rows, finite, with labels from 0", f"shape {list(x.shape)}")
    sizes = [int(each.max()) + 1 for each in labels.T]
    hot = torch.cat([torch.nn.functional.one_hot(each, size) for each, size in zip(labels.T, sizes, strict=True)], 1)
    rows, mean = x.double(), x.double().mean(0)
    if method == "means":
        counts = hot.sum(0).clamp_min(1).unsqueeze(1)
        weights = (hot.double().T @ (rows - mean)) / counts
    else:
        weights = least_squares(hot, rows)[:-1]
        # Of the many solutions the one where each attribute has mean 0 over the rows, so that the mean is that of x.
        parts = zip(torch.split(weights, sizes), torch.split(hot.double(), sizes, 1), strict=True)
        weights = torch.cat([(part - (own @ part).mean(0)) * (own.sum(0) > 0).unsqueeze(1) for part, own in parts])
    return Supervised(mean.to(x.dtype), tuple(each.to(x.dtype) for each in torch.split(weights, sizes)))


def value_f1(codes: Codes, values: Tensor, num_values: int) -> Tensor:
    """F1 of "the atom fires" as a sign of each value: float64 ``[num_values, dict_size]``.

    Args:
        codes: ``[n, k]``.
        values: int64 ``[n]``.
        num_values: how many there are.
    """
    hits, fires, has = _counts(codes, values, num_values)
    return 2 * hits / (fires + has.unsqueeze(1)).clamp_min(1)


def code_edit(
    x: Tensor, codes: Codes, other: Codes, atoms: Tensor, f1: Tensor, old: Tensor, new: Tensor, *, m: int
) -> Tensor:
    """``x`` without the features of the old value, with those of the new one.

    Args:
        x: ``[n, d]``.
        codes: of ``x``, ``[n, k]``.
        other: of activations of prompts that have the new value and are the same in all else.
        atoms: ``[dict_size, d]``.
        f1: of `value_f1`.
        old: int64 ``[n]``, the values of ``x``.
        new: int64 ``[n]``.
        m: features taken out, and put in, at most; those with F1 of 0 stay.
    """
    check_int("code_edit", "m", m)
    check_shape("code_edit", "the values of other", other.values, len(x), None)
    return x - _chosen(codes, atoms, f1, old, m) + _chosen(other, atoms, f1, new, m)


@dataclass(frozen=True)
class Splitting:
    """How features share the rows of a value.

    Attributes:
        precise: features that fire for the value at least ``precision`` of their times.
        best_recall: share of the rows of the value that the best of these has; 0 without one.
        recall: share that all of them have together.
    """

    precise: int
    best_recall: float
    recall: float


def splitting(codes: Codes, values: Tensor, value: int, *, precision: float = 0.9, least: int = 3) -> Splitting:
    """Many precise features of small recall are an over-split value.

    Args:
        codes: ``[n, k]``.
        values: int64 ``[n]``.
        value: one of them.
        precision: least share of the times that a feature fires.
        least: times that it has to fire.

    Raises:
        InputError: if no row has the value.
    """
    chosen = values == value
    if not bool(chosen.any()):
        raise fail("splitting", "value", "be that of a row", value)
    hits, fires, has = _counts(codes, chosen.long(), 2)
    precise = (hits[1] >= precision * fires) & (fires >= least)
    row, atom = entries(codes)
    covered = torch.zeros(len(values), dtype=torch.bool)
    covered[row[precise[atom]]] = True
    best = float(hits[1][precise].max() / has[1]) if bool(precise.any()) else 0.0
    return Splitting(int(precise.sum()), best, float(covered[chosen].double().mean()))


def occluded(f1: Sequence[float], magnitudes: Sequence[float], *, found: float = 0.5, missed: float = 0.5) -> list[int]:
    """Attributes whose values no features detect though those of a stronger one have them.

    Args:
        f1: of each attribute, the mean over its values of the best feature's F1.
        magnitudes: of `Supervised.magnitudes`.
        found: F1 from which an attribute is found.
        missed: F1 below which it is not.
    """
    if len(f1) != len(magnitudes):
        raise fail("occluded", "magnitudes", f"be {len(f1)} like the attributes", len(magnitudes))
    pairs = list(zip(f1, magnitudes, strict=True))
    return [
        i
        for i, (mine, size) in enumerate(pairs)
        if mine < missed and any(other >= found and larger > size for other, larger in pairs)
    ]


def _counts(codes: Codes, values: Tensor, num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each value in which each atom fires, in which each fires, and that have each value: float64."""
    check_shape("value_f1", "values", values, len(codes.values))
    check_int("value_f1", "num_values", num_values, int(values.max()) + 1)
    row, atom = entries(codes)
    unique = torch.unique(row * codes.dict_size + atom)
    row, atom = unique // codes.dict_size, unique % codes.dict_size
    hits = torch.bincount(values[row] * codes.dict_size + atom, minlength=num_values * codes.dict_size)
    hits = hits.view(num_values, codes.dict_size).double()
    return hits, hits.sum(0), torch.bincount(values, minlength=num_values).double()


def _chosen(codes: Codes, atoms: Tensor, f1: Tensor, values: Tensor, m: int) -> Tensor:
    """The part of a reconstruction that the ``m`` best features of a value make."""
    score = f1[values].gather(1, codes.indices.long()) * (codes.values != 0)
    best = score.topk(min(m, codes.k), dim=1)
    kept = torch.where(best.values > 0, codes.values.gather(1, best.indices), 0)
    return Codes(kept, codes.indices.gather(1, best.indices), codes.dict_size).decode(atoms.to(kept.dtype))
