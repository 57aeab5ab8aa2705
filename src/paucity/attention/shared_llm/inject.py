"""Self-injection: cross-attention from the running text to the keys and values of the compressed context.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 3.3, Eq. 2 and 3: in each of the first ``M`` layers, on
top of the self-attention, ``O = cross_attn(Q, K', V')`` is added to the residual. Keys of the ``i``-th of ``n`` chunks
stand at position ``i``, all queries at ``n``. Keys and values are those of the lower model's layer: only a norm, a
query and an output projection are new.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..rotary import Rotary

Start = Literal["copy", "zero", "normal"]


@dataclass(frozen=True)
class Memory:
    """A compressed context.

    Attributes:
        keys: of each injected layer ``[B, H_kv, S, D]``, turned to the positions of their chunks.
        values: of each injected layer ``[B, H_kv, S, D]``.
        num_chunks: ``n``, which is the position of the queries.
        num_tokens: of the context before it was compressed.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_chunks: int
    num_tokens: int

    @property
    def num_kept(self) -> int:
        """Keys that each injected layer holds, ``S``."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class TreeCrossAttention(nn.Module):
    """Cross-attention of one layer, ``hidden -> hidden``.

    Args:
        layer: the decoder layer that it is for; its norm and projections are what this one starts from.
        rotary: how that layer turns positions.
        start: of the output projection: ``copy`` of the layer's, ``zero`` (the model is unchanged until it is trained),
            or ``normal`` with the standard deviation of the layer's own weights.
        generator: of the random numbers.
    """

    def __init__(self, layer: nn.Module, rotary: Rotary, start: Start, generator: torch.Generator) -> None:
        super().__init__()
        attention: Any = layer.self_attn
        self.norm: Any = copy.deepcopy(layer.input_layernorm)  # that which the copied query projection was trained with
        self.q_proj = copy.deepcopy(attention.q_proj)
        self.q_norm: Any = copy.deepcopy(getattr(attention, "q_norm", None))
        self.o_proj = copy.deepcopy(attention.o_proj)
        self.head_dim: int = attention.head_dim
        self.scale: float = getattr(attention, "scaling", 1 / math.sqrt(self.head_dim))
        self.rotary = rotary
        if start == "zero":
            nn.init.zeros_(self.o_proj.weight)
        elif start == "normal":
            for weight in (self.q_proj.weight, self.o_proj.weight):
                nn.init.normal_(weight, std=float(weight.detach().float().std()), generator=generator)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
        """What the context adds to the residual ``hidden [R, T, hidden size]``.

        ``R`` is that of the keys or a multiple of it: rows in succession, such as the beams of a text, share its keys.
        """
        batch, length = len(key), hidden.shape[0] * hidden.shape[1] // len(key)
        query = self.q_proj(self.norm(hidden)).view(batch, length, -1, self.head_dim)
        query = (query if self.q_norm is None else self.q_norm(query)).transpose(1, 2)
        origin = torch.zeros(length, dtype=torch.int64, device=hidden.device)
        query = self.rotary.turn(query, origin, origin + position)
        # Every query sees every key, so that the heads which share keys are merely more queries.
        grouped = query.reshape(batch, key.shape[1], -1, self.head_dim)
        out = scaled_dot_product_attention(grouped, key, value, scale=self.scale)
        merged = out.reshape(batch, -1, length, self.head_dim).transpose(1, 2).reshape(batch, length, -1)
        added: Tensor = self.o_proj(merged)
        return added.view(hidden.shape)


@contextmanager
def injected(layers: Sequence[nn.Module], crosses: Sequence[nn.Module], memory: Memory) -> Iterator[None]:
    """Within it the first of ``layers`` read ``memory``, after their self-attention and before the rest."""
    with ExitStack() as stack:
        for index, (layer, cross) in enumerate(zip(layers, crosses, strict=False)):
            site = _Site(cross, memory.keys[index], memory.values[index], memory.num_chunks)
            attention: Any = layer.self_attn
            stack.callback(layer.register_forward_pre_hook(site.enter, with_kwargs=True).remove)
            stack.callback(attention.register_forward_hook(site.leave).remove)
        yield


class _Site:
    """Hands the residual that enters a layer to where its self-attention ends."""

    def __init__(self, cross: nn.Module, key: Tensor, value: Tensor, position: int) -> None:
        self.cross, self.key, self.value, self.position = cross, key, value, position
        self.residual: Any = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = args[0] if args else kwargs["hidden_states"]

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        attended = output[0] if isinstance(output, tuple) else output
        added: Tensor = attended + self.cross(self.residual + attended, self.key, self.value, self.position)
        return (added, *output[1:]) if isinstance(output, tuple) else added
