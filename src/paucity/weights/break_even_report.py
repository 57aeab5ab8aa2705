"""What a break-even measurement found: rows, crossovers, and what to make of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

BreakEvenFormat = Literal["bitmask", "blocks", "nm"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Model):
    """One layer shape, in one format at one density, beside the dense layer.

    Attributes:
        rows: outputs.
        cols: inputs.
        dtype: of weights and inputs.
        batch: tokens at a time.
        format: how the weight is held.
        density: share of nonzeros, of whole blocks for ``blocks``.
        seconds: of the packed layer, the median over rounds.
        dense_seconds: of ``F.linear`` with the dense weight.
        num_bytes: of the packed weight.
        dense_bytes: of the dense one.
    """

    rows: int
    cols: int
    dtype: str
    batch: int
    format: BreakEvenFormat
    density: float
    seconds: float
    dense_seconds: float
    num_bytes: int
    dense_bytes: int

    @property
    def speedup(self) -> float:
        """Dense over packed: above 1, packed is faster."""
        return self.dense_seconds / self.seconds


class Crossover(_Model):
    """Below which density a format is faster, for one layer shape, dtype and batch.

    Attributes:
        density: None where packed was slower at all densities measured; 1.0 where it was faster at all of them.
    """

    rows: int
    cols: int
    dtype: str
    batch: int
    format: BreakEvenFormat
    density: float | None


class Decoding(_Model):
    """A whole model that decodes one token at a time, pruned by magnitude and packed, beside itself dense.

    Attributes:
        ms: per token, packed.
        dense_ms: per token, dense.
    """

    format: BreakEvenFormat
    density: float
    batch: int
    ms: float
    dense_ms: float


class BreakEven(_Model):
    """What was measured on a machine.

    Attributes:
        machine: the processor.
        threads: that took part.
        rows: every layer that was timed.
        crossovers: of each shape, dtype, batch and format.
        decoding: of the model, where one was given.
        advice: one sentence for each dtype and batch.
    """

    machine: str
    threads: int
    rows: tuple[Row, ...]
    crossovers: tuple[Crossover, ...]
    decoding: tuple[Decoding, ...]
    advice: tuple[str, ...]


def crossover_density(speedups: Mapping[float, float]) -> float | None:
    """The density at which packed takes as long as dense.

    Args:
        speedups: dense over packed time by density.

    Returns:
        The highest density below which packed is faster, on straight lines of ``packed / dense`` time between those
        measured; None if packed is nowhere faster, 1.0 if it still is at the highest density.
    """
    points = sorted((density, 1 / speedup) for density, speedup in speedups.items())
    faster = [index for index, (_, share) in enumerate(points) if share < 1]
    if not faster:
        return None
    last = faster[-1]
    if last == len(points) - 1:
        return 1.0
    (low, share), (high, above) = points[last], points[last + 1]
    return low + (high - low) * (1 - share) / (above - share)


def crossovers_of(rows: Iterable[Row]) -> list[Crossover]:
    """The crossover of each shape, dtype, batch and format."""
    groups: dict[tuple[int, int, str, int, BreakEvenFormat], dict[float, float]] = {}
    for row in rows:
        key = (row.rows, row.cols, row.dtype, row.batch, row.format)
        groups.setdefault(key, {})[row.density] = row.speedup
    return [
        Crossover(rows=out, cols=size, dtype=dtype, batch=batch, format=kind, density=crossover_density(groups[key]))
        for key in groups
        for out, size, dtype, batch, kind in [key]
    ]


def advice_of(crossovers: Sequence[Crossover]) -> list[str]:
    """A sentence for each dtype and batch."""
    sentences = []
    for dtype, batch in dict.fromkeys((entry.dtype, entry.batch) for entry in crossovers):
        parts = []
        for kind in dict.fromkeys(entry.format for entry in crossovers):
            found = [e.density for e in crossovers if (e.dtype, e.batch, e.format) == (dtype, batch, kind)]
            faster = [density for density in found if density is not None]
            if not faster:
                parts.append(f"at no density measured ({kind})")
                continue
            low, high = (
                f"{value:.0%}" if value < 1 else "the highest measured" for value in (min(faster), max(faster))
            )
            part = f"below a density of {low}" + (f" to {high}, by shape" if high != low else "")
            parts.append(
                f"{part} ({kind}{f', {len(faster)} of {len(found)} shapes' if len(faster) < len(found) else ''})"
            )
        tokens = "1 token" if batch == 1 else f"{batch} tokens"
        sentences.append(f"{dtype}, {tokens} at a time: packed is faster {', '.join(parts)}.")
    return sentences
