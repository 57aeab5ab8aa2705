"""Matryoshka: the first atoms have to do without the later ones, so that general features stay whole.

Paper: Bussmann et al. 2025, https://arxiv.org/abs/2503.17547, Eq. 4-6: BatchTopK, whose loss is taken over
reconstructions from the first ``m`` atoms for several ``m``, the whole dictionary among them. Nested sizes are fixed or
drawn in each step (Nabeshima 2024), small ones more often: here without repetition, in proportion to ``1 / sqrt(m)``.

The loss is the mean over sizes, where the paper takes the sum, so that it is comparable to that of other rules and AuxK
keeps its weight. Not implemented: sorting atoms by their share of the reconstruction while sizes are drawn.
"""

from ..checks import check_int
from .batch_topk import BatchTopK
from .sae import SparseAutoencoder


def matryoshka_sae(
    input_size: int,
    dict_size: int,
    *,
    k: int = 32,
    prefixes: tuple[int, ...] | None = None,
    drawn_prefixes: int = 0,
    auxiliary: float = 1 / 32,
    silent_after: int = 10_000_000,
    seed: int = 0,
) -> SparseAutoencoder:
    """An autoencoder of nested dictionaries.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        k: entries of a code on average.
        prefixes: nested sizes, ascending, below ``dict_size``; 1/16, 1/8, 1/4 and 1/2 of it if not given.
        drawn_prefixes: draw this many in each step instead; the paper's authors take 9.
        auxiliary: weight of the loss of silent atoms.
        silent_after: tokens without a code after which an atom counts as silent.
        seed: of the initial atoms and of the drawn sizes.

    Raises:
        InputError: if sizes do not fit, or ``prefixes`` are given and drawn.
    """
    check_int("matryoshka_sae", "dict_size", dict_size)
    if prefixes is None:
        halves = () if drawn_prefixes else (dict_size // 16, dict_size // 8, dict_size // 4, dict_size // 2)
        prefixes = tuple(sorted({size for size in halves if size}))
    return SparseAutoencoder(
        input_size,
        dict_size,
        BatchTopK(k),
        auxiliary=auxiliary,
        silent_after=silent_after,
        prefixes=prefixes,
        drawn_prefixes=drawn_prefixes,
        seed=seed,
    )
