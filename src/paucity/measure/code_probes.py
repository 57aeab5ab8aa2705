"""What can be read off few features: k-sparse probes, and absorption of a feature by more special ones.

**Sparse probing** (Gurnee et al. 2023, https://arxiv.org/abs/2305.01610; SAEBench, Karvonen et al. 2025,
https://arxiv.org/abs/2503.09532): the ``k`` features with the largest absolute difference of means between a class and
the rest, and a logistic regression on them, beside one on the activation itself.

**Absorption** (Chanin et al. 2024, https://arxiv.org/abs/2409.14507) as SAEBench counts it. Of each class ``p`` is the
unit direction of a logistic probe on activations. The main features are those of the k-sparse probe, from k = 1 on as
long as one more raises its F1 by more than 0.03. Over the test rows of the class that the dense probe finds, with
``s_i = z_i cos(d_i, p)``:

* *full*: no main feature fires, the feature with the largest ``s_i`` has a cosine of at least 0.025 and makes at least
  0.4 of ``x . p``, which is above 0;
* *fraction*: with ``a`` the sum of the three largest ``s_i > 0`` among the others with cosine of at least 0.1 and ``m``
  that of the main ones: 0 if ``m >= x . p`` or ``a < 0.4 x . p``; 1 if ``m <= 0``; else ``b / (b + m)`` where
  ``b = min(a, x . p - m)``.

Both are means over the rows of a class, then over classes. Main features are chosen here by how far their mean is
higher in the class, by an l1-penalised probe there, and by the F1 of the rows of training. As there, ``x`` is not
centred. Rows where ``x . p <= 0`` count 0 in both. Values may be of either sign: one of -1 on an atom opposite to ``p``
counts for ``p``, and fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_floating, check_int, check_shape, fail
from ..ops.formats import Codes
from .codes import entries
from .stats import Estimate, mean_interval, share_change, share_interval

SPLIT_GAIN, MAX_SPLITS = 0.03, 10
FULL_COSINE, FRACTION_COSINE, LEAST_SHARE, MOST_ABSORBERS = 0.025, 0.1, 0.4, 3


@dataclass(frozen=True)
class SparseProbe:
    """Accuracy of a probe on few features beside one on the activation, on the test rows.

    Attributes:
        features: the atoms that it reads, the strongest first.
        accuracy: of the sparse probe, with Wilson's interval.
        dense: of the probe on activations.
        change: ``accuracy - dense`` over the same rows.
    """

    features: tuple[int, ...]
    accuracy: Estimate
    dense: Estimate
    change: Estimate


@dataclass(frozen=True)
class Absorption:
    """Absorption by the definitions at the top of this file.

    Attributes:
        full: mean over classes, with a bootstrap over them.
        fraction: likewise.
        main: the main features of each class that was measured.
        left_out: classes of which the dense probe finds too few test rows.
    """

    full: Estimate
    fraction: Estimate
    main: dict[int, tuple[int, ...]]
    left_out: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Activations, their codes and what they are.

    Attributes:
        x: ``[n, d]``, finite.
        codes: ``[n, k]``.
        labels: ``[n]``, int64 or bool.
    """

    x: Tensor
    codes: Codes
    labels: Tensor

    def __post_init__(self) -> None:
        """Raise InputError unless the parts fit together."""
        check_floating("Labelled", "x", self.x)
        check_shape("Labelled", "x", self.x, len(self.x), None)
        check_shape("Labelled", "the values of codes", self.codes.values, len(self.x), None)
        check_shape("Labelled", "labels", self.labels, len(self.x))
        if not bool(self.x.isfinite().all()):
            raise fail("Labelled", "x", "be finite", "NaN or infinity")


def sparse_probe(train: Labelled, test: Labelled, *, k: int = 1, seed: int = 0) -> SparseProbe:
    """Tell a class from the rest by ``k`` features.

    Args:
        train: labels are bool; as many of either kind, for accuracies that mean something.
        test: likewise, other rows.
        k: features that the probe reads.
        seed: of the solver.

    Raises:
        InputError: if a split lacks one of the two kinds, or ``k`` exceeds the size of the dictionary.
    """
    check_int("sparse_probe", "k", k, 1, train.codes.dict_size)
    for name, split in (("train", train), ("test", test)):
        if (kinds := len(set(split.labels.tolist()))) != 2:
            raise fail("sparse_probe", f"the labels of {name}", "be of two kinds", kinds)
    truth = test.labels.bool().numpy()
    matrix, other = _matrix(train.codes), _matrix(test.codes)
    features = _by_difference(matrix, train.labels.bool().numpy())[:k]
    sparse = _fit(matrix[:, features].toarray(), train.labels.bool().numpy(), seed).predict(
        other[:, features].toarray()
    )
    whole = _fit(_double(train.x), train.labels.bool().numpy(), seed).predict(_double(test.x))
    right, dense = (sparse == truth).astype(float).tolist(), (whole == truth).astype(float).tolist()
    return SparseProbe(
        tuple(map(int, features)), share_interval(right), share_interval(dense), share_change(right, dense)
    )


def absorption(
    train: Labelled, test: Labelled, atoms: Tensor, *, classes: Sequence[int], least: int = 5, seed: int = 0
) -> Absorption:
    """How often special features stand in for those of a class.

    Args:
        train: to fit probes and choose main features on.
        test: to count on.
        atoms: ``[dict_size, d]``.
        classes: labels to measure, such as letters.
        least: rows of a class that the dense probe has to find in the test split for the class to count.
        seed: of the solver and the bootstrap.

    Raises:
        InputError: if no class counts, or ``atoms`` do not fit.
    """
    check_shape("absorption", "atoms", atoms, train.codes.dict_size, train.x.shape[1])
    check_int("absorption", "least", least)
    matrix, other = _matrix(train.codes), _matrix(test.codes)
    full, fraction, main, left = [], [], {}, []
    for label in classes:
        positive, truth = (train.labels == label).numpy(), (test.labels == label).numpy()
        if positive.all() or not positive.any():
            left.append(label)
            continue
        probe = _fit(_double(train.x), positive, seed, balanced=True)
        rows = np.flatnonzero(truth & probe.predict(_double(test.x)))
        if len(rows) < least:
            left.append(label)
            continue
        main[label] = _main(matrix, positive, seed)
        cosines = (F.normalize(atoms.detach().double().cpu(), dim=1) @ probe.direction).numpy()
        along = (test.x[rows].double().cpu() @ probe.direction).numpy()
        counted = [
            _absorbed(other[row].toarray()[0], cosines, main[label], at) for row, at in zip(rows, along, strict=True)
        ]
        full.append(float(np.mean([each[0] for each in counted])))
        fraction.append(float(np.mean([each[1] for each in counted])))
    if not full:
        raise fail("absorption", "classes", f"hold one of which the probe finds {least} test rows", "none")
    return Absorption(mean_interval(full, seed=seed), mean_interval(fraction, seed=seed), main, tuple(left))


def _absorbed(code: Any, cosines: Any, main: tuple[int, ...], along: float) -> tuple[bool, float]:
    """Whether a row is absorbed in full, and its fraction; ``along`` is ``x . p``."""
    if along <= 0:
        return False, 0.0
    share, chosen = code * cosines, list(main)
    # A value of either sign is a feature of positive value on an atom of that sign.
    cosine = np.where(code < 0, -cosines, cosines)
    top = int(share.argmax())
    full = bool((code[chosen] == 0).all() and cosine[top] >= FULL_COSINE and share[top] / along >= LEAST_SHARE)
    others = (cosine >= FRACTION_COSINE) & (share > 0)
    others[chosen] = False
    absorbed, kept = float(np.sort(share[others])[-MOST_ABSORBERS:].sum()), float(share[chosen].sum())
    if kept >= along or absorbed / along < LEAST_SHARE:
        return full, 0.0
    if kept <= 0:
        return full, 1.0
    part = min(absorbed, along - kept)
    return full, part / (part + kept)


def _main(matrix: Any, positive: Any, seed: int) -> tuple[int, ...]:
    """Features that one more of which raises the F1 of a k-sparse probe by more than `SPLIT_GAIN`."""
    from sklearn.metrics import f1_score

    signs = (matrix.maximum(0), (-matrix).maximum(0))  # a value of either sign is a feature of its own
    order = np.argsort(-np.maximum(*(_difference(each, positive) for each in signs)), kind="stable")[:MAX_SPLITS]
    best, count = 0.0, 1
    for k in range(1, len(order) + 1):
        columns = matrix[:, order[:k]].toarray()
        found = float(f1_score(positive, _fit(columns, positive, seed, balanced=True).predict(columns)))
        if k > 1 and found <= best + SPLIT_GAIN:
            break
        best, count = found, k
    return tuple(map(int, order[:count]))


def _by_difference(matrix: Any, positive: Any) -> Any:
    """Atoms by the absolute difference of means, the largest first."""
    return np.argsort(-np.abs(_difference(matrix, positive)), kind="stable")


def _difference(matrix: Any, positive: Any) -> Any:
    return np.asarray(matrix[positive].mean(0) - matrix[~positive].mean(0)).ravel()


@dataclass(frozen=True)
class _Probe:
    """A logistic regression on columns all divided by one number, which leaves directions as they are."""

    model: Any
    scale: float

    def predict(self, x: Any) -> Any:
        return self.model.predict(x / self.scale)

    @property
    def direction(self) -> Tensor:
        return F.normalize(torch.from_numpy(self.model.coef_[0]).double(), dim=0)


def _fit(x: Any, positive: Any, seed: int, *, balanced: bool = False) -> _Probe:
    from sklearn.linear_model import LogisticRegression

    scale = float(np.std(x)) or 1.0
    model = LogisticRegression(max_iter=1000, class_weight="balanced" if balanced else None, random_state=seed)
    return _Probe(model.fit(x / scale, positive), scale)


def _matrix(codes: Codes) -> Any:
    """Codes ``[n, k]`` as a scipy matrix of compressed rows, double entries summed."""
    from scipy.sparse import coo_matrix

    row, atom = entries(codes)
    values = codes.values.detach().cpu()
    return coo_matrix(
        (values[values != 0].double().numpy(), (row.numpy(), atom.numpy())), shape=(len(codes.values), codes.dict_size)
    ).tocsr()


def _double(x: Tensor) -> Any:
    return x.detach().double().cpu().numpy()
