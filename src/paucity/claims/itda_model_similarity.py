"""Claim: by the origins of their atoms, ITDA tells which layers of two models correspond better than other indices do.

Paper: Leask et al. 2025, https://arxiv.org/abs/2505.17769, Section 5: layers of models trained from other seeds.
"""

import time
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dictionary.itda import ITDA, origin_similarity
from ..measure.images import Images, digits
from . import CLAIMS
from .base import ClaimResult

NAME = "itda-model-similarity"
LAYERS, WIDTH, PLACES, ANCHORS = 8, 48, 16, 300
K, THRESHOLD = 8, 0.1


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train convolutional networks from several seeds on digits, and find each layer of one among those of another.

    Every index compares the same activations, those of all places of some test images. A layer counts as found if the
    layer of the other network that is most similar to it is the one at its depth, as in the paper's benchmark (and
    Kornblith et al. 2019). It holds if ITDA finds at least as many as each of linear CKA, SVCCA and relative
    representations, and more than one of them.

    Args:
        quick: two networks, little training, few images.
        seed: of the first network; the others follow.
    """
    started = time.monotonic()
    networks, epochs, images = (2, 3, 60) if quick else (4, 12, 250)
    train, test = digits("train"), digits("test")
    layers = []
    for number in range(networks):
        network = _network(seed + number)
        _train(network, train, epochs, seed + number)
        layers.append(_activations(network, test.pixels[:images]))
    prompts = torch.arange(images).repeat_interleave(PLACES)
    origins = torch.stack([prompts, torch.arange(PLACES).repeat(images)], 1)
    dictionaries = [[_itda(rows, origins) for rows in each] for each in layers]
    indices: dict[str, Callable[[int, int, int, int], float]] = {
        "itda": lambda a, i, b, j: origin_similarity(dictionaries[a][i], dictionaries[b][j]),
        "cka": lambda a, i, b, j: linear_cka(layers[a][i], layers[b][j]),
        "svcca": lambda a, i, b, j: svcca(layers[a][i], layers[b][j]),
        "relative": lambda a, i, b, j: relative_similarity(layers[a][i], layers[b][j], seed=seed),
    }
    found: dict[str, float] = {}
    for name, index in indices.items():
        right = 0
        for a, b in permutations(range(networks), 2):
            for i in range(LAYERS):
                similar = [index(a, i, b, j) for j in range(LAYERS)]
                right += max(range(LAYERS), key=similar.__getitem__) == i
        found[name] = right / (LAYERS * networks * (networks - 1))
    others = [found[name] for name in ("cka", "svcca", "relative")]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"direction": "the Jaccard index of ITDA finds more layers than CKA, SVCCA and relative indices"},
        measured={
            "layers_found": found,
            "atoms": [[one.dict_size for one in each] for each in dictionaries],
        },
        holds=found["itda"] >= max(others) and found["itda"] > min(others),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "networks": networks,
            "layers": LAYERS,
            "width": WIDTH,
            "epochs": epochs,
            "images": images,
            "places": PLACES,
            "k": K,
            "threshold": THRESHOLD,
            "anchors": ANCHORS,
        },
    )


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Centred kernel alignment with linear kernels of ``[n, d]`` and ``[n, e]`` (Kornblith et al. 2019)."""
    one, other = one - one.mean(0), other - other.mean(0)
    cross = (one.T @ other).square().sum()
    return float(cross / ((one.T @ one).norm() * (other.T @ other).norm()).clamp_min(1e-12))


def svcca(one: Tensor, other: Tensor, *, kept: float = 0.99) -> float:
    """Mean canonical correlation of the directions that make up ``kept`` of the variance (Raghu et al. 2017)."""
    spaces = []
    for rows in (one, other):
        left, values, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        share = values.square().cumsum(0) / values.square().sum().clamp_min(1e-12)
        spaces.append(left[:, : int((share < kept).sum()) + 1])
    return float(torch.linalg.svdvals(spaces[0].T @ spaces[1]).mean())


def relative_similarity(one: Tensor, other: Tensor, *, seed: int) -> float:
    """Mean cosine between rows of cosines to the same anchors (Moschella et al. 2022)."""
    anchors = torch.randperm(len(one), generator=torch.Generator().manual_seed(seed))[:ANCHORS]
    relative = []
    for rows in (one, other):
        unit = F.normalize(rows, dim=1)
        relative.append(unit @ unit[anchors].T)
    return float(F.cosine_similarity(relative[0], relative[1], dim=1).mean())


def _itda(rows: Tensor, origins: Tensor) -> ITDA:
    itda = ITDA(rows.shape[1], len(rows), K, threshold=THRESHOLD)
    itda.fit(rows, origins=origins)
    return itda


def _network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks: list[nn.Module] = []
        for number in range(LAYERS):
            inputs, stride = (1, 2) if number == 0 else (WIDTH, 1)
            conv = nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU()))
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def _train(network: nn.Sequential, images: Images, epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    network.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images), generator=generator), 64):
            loss = F.cross_entropy(network(images.pixels[rows]), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.eval()


@torch.no_grad()
def _activations(network: nn.Sequential, pixels: Tensor) -> list[Tensor]:
    """Of each layer ``[images * places, WIDTH]``, centred, as the paper's activations have no common mean to code."""
    found: list[Any] = []
    for number in range(LAYERS):
        pixels = network[number](pixels)
        rows = pixels.flatten(2).transpose(1, 2).flatten(0, 1)
        found.append(rows - rows.mean(0))
    return found
