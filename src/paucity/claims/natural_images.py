"""Claim: at equal sparsity, penalties close to l0 code natural images with far less error than l1 does.

Paper: Rentzeperis et al. 2023, https://arxiv.org/abs/2301.10002: whitened patches; about five times less error. Its
pictures are those of Olshausen & Field, which are not to be had here; others go through their filter.
"""

import base64
import io
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dictionary.sources import TensorSource
from ..dictionary.sparse_coding import SparseCoding, penalty_for
from ..dictionary.trainer import train
from ..measure.data import data_file
from . import CLAIMS
from .base import ClaimResult

NAME = "l0-beats-l1-on-natural-images"
SIDE, ATOMS, ENTRIES, BETTER = 10, 200, 7.0, 2.0
CUT = 0.4
ADDRESS = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Learn atoms for whitened patches with l1, hard thresholding and CEL0, each kept at the same mean entries.

    The penalty is set again after each part of the training, and once more on held-out patches, so that all are
    measured at ``ENTRIES`` entries a patch. It holds if, in every draw, l1 leaves at least ``BETTER`` times the squared
    error of both others. How localised and oriented the atoms are is reported beside; ``atoms_png`` are their pictures.

    Args:
        quick: smaller patches, little training, one draw.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    side, atoms, entries, steps, parts, draws = (8, 128, 4.5, 40, 4, 1) if quick else (SIDE, ATOMS, ENTRIES, 250, 6, 2)
    pictures, source = _pictures()
    pictures = [whitened(picture) for picture in pictures]
    measured: list[dict[str, Any]] = []
    images: dict[str, str] = {}
    for draw in range(seed, seed + draws):
        patches = draw_patches(pictures, side, 22_000 if not quick else 5_000, seed=draw)
        learn, held_out = patches[:-1500], patches[-1500:]
        figures: dict[str, Any] = {}
        for coder in ("ista", "hard", "cel0"):
            sparse = SparseCoding(side * side, atoms, coder, num_steps=20, seed=draw)  # type: ignore[arg-type]
            for part in range(parts):
                sparse.penalty = penalty_for(sparse, learn[:300], entries, halvings=10)
                train(
                    sparse,
                    TensorSource(learn, seed=100 * draw + part),
                    num_tokens=256 * steps,
                    batch_size=256,
                    learning_rate=5e-3 / (1 + part),
                    decay=0.5,
                    normalise=False,
                )
            sparse.num_steps = 100
            sparse.penalty = penalty_for(sparse, held_out[:500], entries)
            codes = sparse.encode(held_out)
            left = (sparse.decode(codes).detach() - held_out).square().sum()
            figures[coder] = {
                "fvu": float(left / held_out.square().sum()),
                "l0": float(codes.l0().float().mean()),
                "penalty": sparse.penalty,
                "oriented": float(orientation(sparse.atoms.detach(), side).median()),
            }
            if draw == seed:
                images[coder] = atoms_png(sparse.atoms.detach(), side)
        random = torch.randn(atoms, side * side, generator=torch.Generator().manual_seed(draw))
        figures["random_atoms"] = {"oriented": float(orientation(random, side).median())}
        measured.append(figures)
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"error of l1 over that of CEL0, at equal sparsity": 5.0},
        measured={
            "draws": measured,
            "ratio": [
                {name: each["ista"]["fvu"] / each[name]["fvu"] for name in ("hard", "cel0")} for each in measured
            ],
        },
        holds=all(each["ista"]["fvu"] >= BETTER * each[name]["fvu"] for each in measured for name in ("hard", "cel0")),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "pictures": source,
            "side": side,
            "atoms": atoms,
            "entries": entries,
            "cut": CUT,
            "steps": steps * parts,
            "better": BETTER,
            "atoms_png": images,
        },
    )


def whitened(picture: Tensor, cut: float = CUT) -> Tensor:
    """``[h, w]`` with the flat spectrum that natural pictures do not have, of variance 1.

    The filter of Olshausen & Field 1997, ``|f| exp(-(f / cut)^4)`` with frequencies in cycles per pixel: what is beyond
    ``cut`` is mostly noise, which whitening alone would raise to the size of all else.
    """
    rows, cols = torch.fft.fftfreq(picture.shape[0]), torch.fft.rfftfreq(picture.shape[1])
    frequency = (rows.square().unsqueeze(1) + cols.square()).sqrt()
    spectrum = torch.fft.rfft2(picture) * frequency * torch.exp(-((frequency / cut) ** 4))
    flat = torch.fft.irfft2(spectrum, s=picture.shape)
    scaled: Tensor = flat / flat.std()
    return scaled


def draw_patches(pictures: list[Tensor], side: int, count: int, *, seed: int) -> Tensor:
    """``[count, side * side]``: random patches of pictures, of mean norm 1."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.empty(count, side * side)
    for number in range(count):
        picture = pictures[int(torch.randint(len(pictures), (1,), generator=generator))]
        row, col = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in picture.shape)
        patches[number] = picture[row : row + side, col : col + side].flatten()
    normed: Tensor = patches / patches.norm(dim=1).mean()
    return normed


def orientation(atoms: Tensor, side: int) -> Tensor:
    """Share of each atom's power that lies within 22.5 degrees of its main orientation; a quarter if it has none."""
    power = torch.fft.fft2(atoms.view(-1, side, side)).abs().square()
    frequency = torch.fft.fftfreq(side)
    rows, cols = torch.meshgrid(frequency, frequency, indexing="ij")
    angle = torch.atan2(rows, cols)
    power[:, 0, 0] = 0
    doubled = torch.stack([(power * torch.cos(2 * angle)).sum((1, 2)), (power * torch.sin(2 * angle)).sum((1, 2))])
    main = torch.atan2(doubled[1], doubled[0]) / 2
    away = torch.remainder(angle - main.view(-1, 1, 1) + torch.pi / 2, torch.pi) - torch.pi / 2
    near = (power * (away.abs() <= torch.pi / 8)).sum((1, 2))
    share: Tensor = near / power.sum((1, 2)).clamp_min(1e-12)
    return share


def atoms_png(atoms: Tensor, side: int, *, most: int = 256) -> str:
    """Base64 of a PNG with the first atoms as tiles, each at its own contrast; empty without matplotlib."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        return ""
    shown = atoms[:most]
    across = round(len(shown) ** 0.5)
    down = -(-len(shown) // across)
    sheet = np.full((down * (side + 1) + 1, across * (side + 1) + 1), 0.5)
    for number, atom in enumerate(shown):
        row, col = number // across * (side + 1) + 1, number % across * (side + 1) + 1
        tile = atom.view(side, side) / atom.abs().max().clamp_min(1e-12)
        sheet[row : row + side, col : col + side] = 0.5 + 0.5 * tile.numpy()
    buffer = io.BytesIO()
    # Without the version in it the same atoms are the same file.
    unsigned: dict[str, Any] = {"Software": None}
    imsave(buffer, sheet, cmap="gray", vmin=0, vmax=1, format="png", metadata=unsigned)
    return base64.b64encode(buffer.getvalue()).decode()


def _pictures() -> tuple[list[Tensor], str]:
    """BSD68 if ``PAUCITY_DATA`` holds it, else scikit-learn's two photographs."""
    try:
        path = data_file("natural_images/bsd68_gray.npz", address=ADDRESS)
    except FileNotFoundError:
        from sklearn.datasets import load_sample_images

        return [
            torch.from_numpy(np.log1p(each.mean(2))).float() for each in load_sample_images().images
        ], "scikit-learn"
    with np.load(path) as held:
        return [torch.from_numpy(np.log1p(each.astype(np.float32))) for name in held for each in held[name]], "BSD68"
