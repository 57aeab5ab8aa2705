"""The operators ``paucity::line_mass``, ``paucity::line_counts`` and ``paucity::line_positions``.

They are for a choice, which has no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch


@torch.library.custom_op("paucity::line_mass", mutates_args=())
def line_mass(
    last: Tensor, key: Tensor, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """``[B, H, R, D], [B, H_kv, Tk, D] -> [B, H, Tk], [B, H, Tk]`` float32: mass by position and by distance."""
    twin = dispatch.module("lines", last, __package__)
    vertical, slash = twin.mass(last.detach(), key.detach(), scale, softcap, window)
    return vertical, slash


@torch.library.custom_op("paucity::line_counts", mutates_args=())
def line_counts(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Tensor:
    """``[B, H, Tk], [B, H, Tk] -> [B, H, blocks]`` int64: how many keys each block of queries sees."""
    counts: Tensor = dispatch.module("lines", vertical, __package__).counts(vertical, slash, num_queries, q_block)
    return counts


@torch.library.custom_op("paucity::line_positions", mutates_args=())
def line_positions(
    vertical: Tensor, slash: Tensor, counts: Tensor, num_queries: int, q_block: int, width: int
) -> Tensor:
    """``[B, H, blocks, width]`` int32: the keys, at the end of their row, behind -1; ``counts`` as above."""
    twin = dispatch.module("lines", vertical, __package__)
    positions: Tensor = twin.positions(vertical, slash, counts, num_queries, q_block, width)
    return positions


def num_blocks(num_keys: int, num_queries: int, q_block: int) -> int:
    """Blocks of queries at multiples of ``q_block``, from that of the first query to that of the last."""
    return -(-num_keys // q_block) - (num_keys - num_queries) // q_block if num_queries else 0


@line_mass.register_fake
def _(last: Tensor, key: Tensor, scale: float, softcap: float | None, window: int | None) -> tuple[Tensor, Tensor]:
    shape = (*last.shape[:2], key.shape[2])
    return last.new_empty(shape, dtype=torch.float32), last.new_empty(shape, dtype=torch.float32)


@line_counts.register_fake
def _(vertical: Tensor, slash: Tensor, num_queries: int, q_block: int) -> Tensor:
    blocks = num_blocks(vertical.shape[-1], num_queries, q_block)
    return vertical.new_empty(*vertical.shape[:2], blocks, dtype=torch.int64)


@line_positions.register_fake
def _(vertical: Tensor, slash: Tensor, counts: Tensor, num_queries: int, q_block: int, width: int) -> Tensor:
    return vertical.new_empty(*counts.shape, width, dtype=torch.int32)


def _no_products(*_: Any, **__: Any) -> int:
    return 0


def _mass_products(last: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 2 * last.numel() * key.shape[2]


register_flop_formula(torch.ops.paucity.line_mass, get_raw=True)(_mass_products)
for _packet in (torch.ops.paucity.line_counts, torch.ops.paucity.line_positions):
    register_flop_formula(_packet, get_raw=True)(_no_products)
