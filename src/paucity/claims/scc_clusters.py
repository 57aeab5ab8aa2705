"""Claim: images cluster better by their sparse concept codes than by their pixels.

Paper: Dash et al. 2020, https://arxiv.org/abs/2004.01551, on the coding of Cai et al. 2011 (figures on COIL-20).
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dictionary.nmf import NMF
from ..dictionary.sparse_concept_coding import SparseConceptCoding
from ..dictionary.tetrolets import tetrolet_transform
from ..measure.data import data_file
from . import CLAIMS
from .base import ClaimResult

NAME = "scc-clusters"
ENTRIES = 5
ADDRESS = "https://www.cs.columbia.edu/CAVE/software/softlib/coil-20.php"


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Cluster COIL-20, where it is there, and scikit-learn's digits by pixels, by NMF codes and by concept codes.

    All rows have norm 1, as in Cai's own example on COIL-20, and there are as many atoms as classes, as there. Labels
    are used for the score alone: normalised mutual information, over several starts of k-means. It holds if on each set
    the mean score of concept codes is above that of pixels, and of NMF codes, by more than the standard errors of both.
    Concept codes of tetrolets, which is what the paper feeds to a classifier, are reported beside.

    Args:
        quick: fewer starts.
        seed: of the first start; the others follow.
    """
    started = time.monotonic()
    starts = 5 if quick else 20
    measured: dict[str, Any] = {}
    holds = True
    for name, (pictures, labels) in _sets().items():
        classes = len(np.unique(labels))
        low, high, _ = tetrolet_transform(pictures)
        pixels = _unit(pictures.flatten(1))
        features = {
            "pixels": pixels,
            "nmf": _nmf(pixels, classes, seed),
            "concepts": _concepts(pixels, classes, seed),
            "tetrolet_concepts": _concepts(_unit(torch.cat([low.flatten(1), high.abs().flatten(1)], 1)), classes, seed),
        }
        scores = {kind: _scores(rows, labels, starts, seed) for kind, rows in features.items()}
        mean = {kind: float(np.mean(each)) for kind, each in scores.items()}
        error = {kind: float(np.std(each, ddof=1) / len(each) ** 0.5) for kind, each in scores.items()}
        measured[name] = {"mutual_information": mean, "standard_error": error, "images": len(pixels), "atoms": classes}
        holds &= all(mean["concepts"] - mean[other] > error["concepts"] + error[other] for other in ("pixels", "nmf"))
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"COIL-20 mutual information": {"pixels": 0.739, "concepts": 0.902}},
        measured=measured,
        holds=holds,
        seconds=time.monotonic() - started,
        seed=seed,
        settings={"data": list(measured), "entries": ENTRIES, "starts": starts},
    )


def _sets() -> dict[str, tuple[Tensor, Any]]:
    """Pictures ``[n, h, w]`` within [0, 1], and their classes."""
    from scipy.io import loadmat
    from sklearn.datasets import load_digits

    digits = load_digits()
    found = {"digits": (torch.from_numpy(digits.images).float() / 16, digits.target)}
    try:
        coil = loadmat(data_file("feature_selection/COIL20.mat", address=ADDRESS))
    except FileNotFoundError:
        return found
    pictures = torch.from_numpy(coil["X"].astype(np.float32)).view(-1, 32, 32)
    return {"COIL-20": (pictures / pictures.max(), coil["Y"].ravel())} | found


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _concepts(rows: Tensor, atoms: int, seed: int) -> Tensor:
    coder = SparseConceptCoding(rows.shape[1], atoms, ENTRIES, seed=seed)
    coder.fit(rows)
    return coder.encode(rows).to_dense()


def _nmf(rows: Tensor, atoms: int, seed: int) -> Tensor:
    """Codes over atoms of norm 1: the factorisation leaves open how much of an entry is its atom's."""
    coder = NMF(rows.shape[1], atoms, seed=seed)
    coder.fit(rows, max_iter=2000)
    codes: Tensor = coder.encode(rows).to_dense() * coder.atoms.norm(dim=1)
    return codes


def _scores(rows: Tensor, labels: Any, starts: int, seed: int) -> list[float]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    classes = len(np.unique(labels))
    found = []
    for start in range(seed, seed + starts):
        clusters = KMeans(classes, n_init=1, random_state=start).fit_predict(rows.double().numpy())
        found.append(float(normalized_mutual_info_score(labels, clusters)))
    return found
