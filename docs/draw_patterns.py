"""Draws `docs/patterns/*.png`: what one head of the embedded model reads with each attention method, on real text.

Run by hand when a method or the model changes: `python docs/draw_patterns.py`.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave

from paucity import load
from paucity.attention import apply, observe
from paucity.bench.prefill import POLICIES
from paucity.measure.data import held_out_python
from paucity.measure.tokens import encode, leading_ids

FOLDER = Path(__file__).parent / "patterns"
TOKENS, CELLS, LAYER, ENLARGED, TEAL = 4096, 96, 2, 3, (0x0B / 255, 0x6E / 255, 0x6E / 255)


def draw(share: np.ndarray, path: Path) -> None:
    """One picture; the darker, the more of a cell is computed, and grey below the diagonal where nothing is."""
    image = np.zeros((*share.shape, 4))
    image[..., :3] = np.where(np.nan_to_num(share)[..., None] > 0, TEAL, (0.5, 0.5, 0.5))
    image[..., 3] = np.where(np.isnan(share), 0, np.where(share > 0, 0.15 + 0.85 * np.sqrt(np.nan_to_num(share)), 0.08))
    imsave(path, image.repeat(ENLARGED, 0).repeat(ENLARGED, 1))


def main() -> None:
    """All methods that compute attention over a pattern, two heads of one layer side by side."""
    loaded = load("embedded")
    tokenizer = loaded.need_tokenizer("draw_patterns")
    ids = torch.tensor([[*leading_ids(tokenizer), *encode(tokenizer, held_out_python())][:TOKENS]])
    FOLDER.mkdir(exist_ok=True)
    for name, policy in POLICIES.items():
        applied = apply(loaded.model, policy, layers=[LAYER])
        try:
            (seen,) = observe(applied, ids, cells=CELLS, repeats=1)
        finally:
            applied.remove()
        if seen.picture is not None:
            gap = np.full((CELLS, 6), np.nan)
            draw(
                np.concatenate([seen.picture[0].numpy(), gap, seen.picture[1].numpy()], axis=1), FOLDER / f"{name}.png"
            )
            print(name, f"density {seen.density.mean():.3f}", f"recall {seen.recall.mean():.3f}")


if __name__ == "__main__":
    main()
