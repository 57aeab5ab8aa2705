"""At which density packed weights become faster than dense ones here: measured, layer shape by layer shape.

A layer is timed as it runs in a model that decodes: on copies of its weight that together are far larger than the
caches, so that every weight comes from memory. Dense and packed take turns. Two densities that lie on both sides of
equal time are joined by a straight line, on which the crossover lies.
"""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import check_choice, check_int, check_range, fail
from ..kernels.cpu import cpu_name
from ..kernels.linear import PackedLinear
from ..kernels.linear.packed import Packed
from ..measure.cost import decode_latency, time_interleaved
from ..models.load import DTYPES, Loaded
from ..models.sites import find_sites, weight_view
from ..ops.formats import PackedBitmask, PackedBlocks, PackedNM
from ..ops.select import block_topk_mask, nm_mask, topk_mask
from .break_even_report import BreakEven, BreakEvenFormat, Decoding, Row, advice_of, crossovers_of
from .packed import pack

FORMATS: tuple[BreakEvenFormat, ...] = ("bitmask", "blocks", "nm")
DENSITIES = (0.1, 0.25, 0.4, 0.5, 0.625, 0.75, 0.875)
COLD_BYTES = 192 * 2**20
"""Of the dense copies of a weight together."""
BLOCK = (16, 16)
_PROMPT, _TOKENS = 32, 8
Tell = Callable[[str], None]


@torch.no_grad()
def measure_break_even(
    target: nn.Module | Loaded | Sequence[tuple[int, int]],
    *,
    densities: Sequence[float] = DENSITIES,
    batches: Sequence[int] = (1, 4, 16),
    dtypes: Sequence[str] | None = None,
    formats: Sequence[BreakEvenFormat] = FORMATS,
    repeats: int = 7,
    cold_bytes: int = COLD_BYTES,
    seed: int = 0,
    on_progress: Tell | None = None,
) -> BreakEven:
    """Time dense and packed layers in turns, with random weights.

    Args:
        target: a model, whose linear layers' shapes are measured, and which then decodes packed and dense in turns (in
            its own dtype; copies of it are made); or ``(rows, cols)`` pairs.
        densities: shares of nonzeros, in (0, 1). ``nm`` is measured at those that are n:4, n:8 or n:16, ``blocks``
            (16 by 16) where these divide the shape.
        batches: tokens at a time.
        dtypes: names of `DTYPES`; None is the model's, or bfloat16.
        formats: of `FORMATS`.
        repeats: rounds of each.
        cold_bytes: how large all copies of a dense weight are together; far more than the caches.
        seed: of weights and inputs.
        on_progress: told what is being timed.

    Raises:
        InputError: if an argument is out of range, the model has no linear layer that is not packed, or no format and
            density fit a shape; before anything is timed.
    """
    name, model = "measure_break_even", target.model if isinstance(target, Loaded) else target
    for density in densities:
        check_range(name, "densities", density, 0, 1, open_low=True, open_high=True)
    for batch in batches:
        check_int(name, "batches", batch)
    for kind in formats:
        check_choice(name, "formats", kind, FORMATS)
    check_int(name, "repeats", repeats)
    shapes = _shapes(model) if isinstance(model, nn.Module) else list(dict.fromkeys(model))
    if isinstance(model, nn.Module) and not shapes:
        raise fail(name, "target", "have linear layers that are not packed", type(model).__name__)
    if not (shapes and densities and batches and formats):
        raise fail(name, "target, densities, batches and formats", "hold at least one each", "none")
    unfit = [kind for kind in formats if not any(_fits(*shape, kind, each) for shape in shapes for each in densities)]
    if len(unfit) == len(formats):
        wanted = "fit a shape (nm takes densities of n:4, n:8 or n:16, blocks sizes that 16 divides)"
        raise fail(name, "formats and densities", wanted, f"{', '.join(formats)} at {list(densities)} for {shapes}")
    if dtypes is None:
        own = _dtype(model) if isinstance(model, nn.Module) else torch.bfloat16
        dtypes = [next((key for key, value in DTYPES.items() if value == own), "bfloat16")]
    for dtype in dtypes:
        check_choice(name, "dtypes", dtype, DTYPES)
    tell, rows = on_progress or _silent, list[Row]()
    for dtype, shape in itertools.product(dtypes, shapes):
        tell(f"{shape[0]}x{shape[1]} in {dtype}")
        rows += _measure(shape, dtype, sorted(densities), batches, formats, repeats, cold_bytes, seed)
    decoding = _decode(model, densities, formats, repeats, tell) if isinstance(model, nn.Module) else []
    crossings = crossovers_of(rows)
    return BreakEven(
        machine=cpu_name(),
        threads=torch.get_num_threads(),
        rows=tuple(rows),
        crossovers=tuple(crossings),
        decoding=tuple(decoding),
        advice=(*advice_of(crossings), *(f"{kind} was not measured: it fits no shape and density." for kind in unfit)),
    )


def _silent(_: str) -> None:
    """Progress that nobody watches."""


def _shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Of the linear layers, the most frequent shape first."""
    counts: Counter[tuple[int, int]] = Counter()
    for site in find_sites(model):
        view = weight_view(model, site)
        if view.ndim == 2 and "embedding" not in site.kind:
            counts[(view.shape[0], view.shape[1])] += 1
    return [shape for shape, _ in counts.most_common()]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _pattern(cols: int, density: float) -> tuple[int, int] | None:
    """The n:m that is ``density``; None where there is none."""
    patterns = ((round(density * m), m) for m in (4, 8, 16) if cols % m == 0)
    return next(((n, m) for n, m in patterns if math.isclose(n / m, density)), None)


def _fits(rows: int, cols: int, kind: str, density: float) -> bool:
    """Whether a format has such a density, and such a shape."""
    if kind == "nm":
        return _pattern(cols, density) is not None
    return kind == "bitmask" or not (rows % BLOCK[0] or cols % BLOCK[1])


def _sparse(weight: Tensor, kind: str, density: float) -> Packed | None:
    """``weight`` pruned by magnitude to ``density`` and packed; None where it does not fit the format."""
    if not _fits(weight.shape[0], weight.shape[1], kind, density):
        return None
    if kind == "bitmask":
        return PackedBitmask.pack(torch.where(topk_mask(weight.abs(), sparsity=1 - density), weight, 0))
    if kind == "blocks":
        mask = block_topk_mask(weight.abs(), block=BLOCK, sparsity=1 - density)
        return PackedBlocks.pack(torch.where(mask, weight, 0), BLOCK)
    n, m = _pattern(weight.shape[1], density) or (0, 0)
    return PackedNM.pack(torch.where(nm_mask(weight.abs(), n=n, m=m), weight, 0), n, m)


def _measure(
    shape: tuple[int, int],
    dtype: str,
    densities: Iterable[float],
    batches: Iterable[int],
    formats: Iterable[BreakEvenFormat],
    repeats: int,
    cold_bytes: int,
    seed: int,
) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    inputs = {batch: torch.randn(batch, shape[1], generator=generator).to(weight.dtype) for batch in batches}
    copies = max(2, math.ceil(cold_bytes / weight.nbytes))
    dense = [weight.clone() for _ in range(copies)]
    rows = []
    for kind, density in itertools.product(formats, densities):
        packed = _sparse(weight, kind, density)
        if packed is None:
            continue
        layers = [copy.deepcopy(PackedLinear(packed)) for _ in range(copies)]
        for batch, x in inputs.items():
            variants = {"dense": partial(_dense_pass, dense, x), "packed": partial(_packed_pass, layers, x)}
            timings = time_interleaved(variants, repeats=repeats).timings
            row: dict[str, Any] = {"rows": shape[0], "cols": shape[1], "dtype": dtype, "batch": batch, "format": kind}
            row |= {"density": density, "num_bytes": packed.nbytes, "dense_bytes": weight.nbytes}
            row |= {"seconds": timings["packed"].median / copies, "dense_seconds": timings["dense"].median / copies}
            rows.append(Row(**row))
    return rows


def _dense_pass(weights: list[Tensor], x: Tensor) -> None:
    for weight in weights:
        F.linear(x, weight)


def _packed_pass(layers: list[PackedLinear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _decode(
    model: nn.Module, densities: Iterable[float], formats: Iterable[BreakEvenFormat], repeats: int, tell: Tell
) -> list[Decoding]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        return []
    ids = torch.randint(vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    found = []
    for kind, density in itertools.product(formats, sorted(densities)):
        tell(f"decoding, {density:.0%} of the weights, {kind}")
        sparse, weights = copy.deepcopy(model), dict[str, Packed]()
        for site in find_sites(sparse, "linear"):
            view, owner = weight_view(sparse, site), sparse.get_submodule(site.module)
            packed = _sparse(view, kind, density) if type(owner) in (nn.Linear, Conv1D) and not site.tied else None
            if packed is not None:
                view.copy_(packed.unpack())
                weights[site.name] = packed
        if not weights:
            continue
        pack(sparse, weights=weights)
        timings = decode_latency({"dense": model, "packed": sparse}, ids, num_tokens=_TOKENS, repeats=repeats).timings
        ms, dense_ms = timings["packed"].median, timings["dense"].median
        found.append(Decoding(format=kind, density=density, batch=1, ms=ms, dense_ms=dense_ms))
    return found
