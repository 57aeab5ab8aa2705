"""Caches of random keys for the tests of decode policies."""

import torch

from paucity.attention import SparseLayer


def random_layer(lengths, heads=2, dim=8, seed=0):
    """A layer with one text of each length, padded on the left, and where each begins ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    longest, layer = max(lengths), SparseLayer()
    layer.update(*(torch.randn(len(lengths), heads, longest, dim, generator=generator) for _ in range(2)))
    return layer, torch.tensor([longest - length for length in lengths])


def grow(layer, seed):
    """One token more."""
    batch, heads = layer.store.starts.shape
    generator = torch.Generator().manual_seed(seed)
    layer.update(*(torch.randn(batch, heads, 1, layer.store.keys.shape[-1], generator=generator) for _ in range(2)))


def listed(numbers):
    """The numbers that a row of pages names, without -1."""
    return [number for number in numbers.tolist() if number >= 0]
