"""Pictures of what the heads of sparse attention read, one small image each."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from . import units
from .schema import AttentionLayer, Report

Entry = TypeVar("Entry")
MOST_LAYERS, MOST_HEADS = 8, 16
"""How many are shown; of more, some at even distances."""


@dataclass(frozen=True)
class HeadPicture:
    """One head: ``image`` is a ``data:`` address of a mask whose opacity tells how much is computed."""

    head: int
    image: str
    alt: str


def picture_png(share: list[list[float]]) -> str:
    """A picture as base64 of a PNG, one pixel a cell.

    Args:
        share: computed share of the visible pairs, rows of queries; NaN where nothing is visible.
    """
    import numpy as np
    from matplotlib.image import imsave

    cells = np.nan_to_num(np.asarray(share, dtype=np.float64)).clip(0, 1)
    image = np.zeros((*cells.shape, 4))
    # Single keys in a cell of many must be seen, so that opacity grows with the root of the share.
    image[..., 3] = np.where(cells > 0, 0.12 + 0.88 * np.sqrt(cells), 0)
    buffer = io.BytesIO()
    unsigned: dict[str, Any] = {"Software": None}  # a version would make the same picture another file
    imsave(buffer, image, format="png", metadata=unsigned)
    return base64.b64encode(buffer.getvalue()).decode()


def head_pictures(report: Report) -> list[tuple[int, list[HeadPicture]]]:
    """The layers that are shown, each with its heads."""
    drawn = [entry for entry in report.attention if entry.pictures]
    return [(entry.layer, _heads(entry)) for entry in spread(drawn, MOST_LAYERS)]


def spread(entries: Sequence[Entry], most: int) -> Sequence[Entry]:
    """At most ``most`` of the entries, at even distances, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _heads(entry: AttentionLayer) -> list[HeadPicture]:
    shown = []
    for head in spread(range(len(entry.pictures)), MOST_HEADS):
        said = [f"Layer {entry.layer}, head {head}: density {units.percent(entry.density[head])}"]
        if entry.recall is not None:
            said.append(f"recall {units.percent(entry.recall[head])}")
        said.append(f"error {units.percent(entry.output_error[head])}")
        shown.append(HeadPicture(head, f"data:image/png;base64,{entry.pictures[head]}", ", ".join(said)))
    return shown
